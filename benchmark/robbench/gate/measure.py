"""Measuring for the gate: a run of a suite as a baseline keeps it, from a model or from a stored result.

The decision itself is in `regression.py`, which runs nothing.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robbench.core.errors import ResultError, unknown_name
from robbench.core.user_code import require_imported
from robbench.core.version import digest_verdict_code
from robbench.gate.baseline import Baseline, Given, Run, record
from robbench.models.sources import parse_source
from robbench.results.schema import ResultFile, read_result
from robbench.results.store import locate_result, read_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

    from robbench.evaluation.run import Reporter

__all__ = ["Machine", "measure", "measure_again", "results_tree", "stored_run", "wanted_runs"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How to measure; no part of what is measured.

    Attributes:
        results: the results tree that keeps the records, so that an interrupted run goes on (see `results_tree`).
        device: as in `inputs.Options`, like the rest.
        lanes: batch width.
        data_dir: where the data sets are.
        models: further model registries.
        reporter: hears of progress.
    """

    results: Path
    device: str = "auto"
    lanes: int | None = None
    data_dir: str | Path | None = None
    models: tuple[str | Path, ...] = ()
    reporter: Reporter | None = None

    def options(self) -> dict[str, Any]:
        """Say it as options of `evaluate`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@contextlib.contextmanager
def results_tree(path: Path | None) -> Iterator[Path]:
    """Yield a results tree to measure into: the user's, or one that goes away."""
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="robbench-") as folder:
        yield Path(folder)


def measure(
    given: Given,
    suite: str,
    machine: Machine,
    *,
    module: nn.Module | None = None,
    x: Tensor | None = None,
    y: Tensor | None = None,
    samples: int | None = None,
    sample_seed: int | None = None,
    seed: int = 0,
    norm: str | None = None,
    eps: str | float | None = None,
) -> Run:
    """Run a suite on a model and take what a baseline keeps of it.

    Args:
        given: how the model is named; with `module` only the name and the data set count.
        suite: a suite's name, or the path of a suite file.
        machine: how to measure.
        module: the model itself, instead of one that is loaded.
        x: images [N, C, H, W] in [0, 1] for a source or a module; sample ids are their positions.
        y: labels [N] of `x`.
        samples: how many images; None means all.
        sample_seed: draw them, and their order, at random with this seed.
        seed: of the attacks' random numbers.
        norm: overrides the suite's norm.
        eps: overrides the suite's radius, in [0, 1] pixel units.

    Raises:
        RobbenchError: what `evaluate` refuses.
    """
    from robbench.evaluation.run import evaluate  # needs torch; a stored result is compared without

    about: dict[str, Any] = {"dataset": given.dataset, "x": x, "y": y}
    if module is not None:
        about["name"] = given.model
    else:
        about |= {"architecture": given.architecture, "mean": given.mean, "std": given.std}
    result = evaluate(
        given.model if module is None else module,
        suite,
        **about,
        samples=samples,
        sample_seed=sample_seed,
        seed=seed,
        norm=norm,
        eps=eps,
        **machine.options(),
    )
    return _run(result, locate_result(machine.results, result), given, suite, digest_verdict_code())


def measure_again(
    before: Run,
    machine: Machine,
    *,
    given: Given | None = None,
    n: int | None = None,
    seed: int | None = None,
    **model: Any,
) -> Run:
    """Measure what a baseline measured: the same suite, threat, images and seed.

    Args:
        before: the run of the baseline.
        machine: how to measure.
        given: another model in the place of the baseline's.
        n: only the first n of its images.
        seed: another seed of the attacks.
        **model: `module`, `x` and `y` of `measure`.
    """
    return measure(
        given or before.given,
        before.suite,
        machine,
        samples=n or before.n,
        sample_seed=before.sample_seed,
        seed=before.seed if seed is None else seed,
        norm=before.threat["norm"],
        eps=before.threat["eps"],
        **model,
    )


def stored_run(path: Path) -> Run:
    """Take what a baseline keeps of a stored result; imports no torch.

    Args:
        path: the folder of a result, or its result.json.

    Raises:
        ResultError: there is no result, or it is damaged.
    """
    folder = path.parent if path.name == "result.json" else path
    if not (folder / "result.json").is_file():
        raise ResultError(f"No result at {path}; expected a folder with result.json and outcomes.parquet in it.")
    result = read_result(folder / "result.json")
    return _run(result, folder, Given(model=f"{result.dataset}/{result.model}"), result.suite, {})


def _run(result: ResultFile, folder: Path, given: Given, suite: str, code: dict[str, str]) -> Run:
    rows = read_rows(folder / "outcomes.parquet")
    # Records lie in the order in which images are selected, and there may be more than were asked for this time.
    rows = rows[rows["sample"].isin(rows["sample"].unique()[: result.n])]
    sample_seed = result.identity.get("sample_seed")
    return record(result, rows, given, suite=suite, sample_seed=sample_seed, code=code)


def wanted_runs(baseline: Baseline, models: list[str]) -> list[tuple[Run, Given]]:
    """Choose what a check measures: all runs of a baseline, some, or another model in the place of its only one.

    Args:
        baseline: as read.
        models: what was asked for; nothing means all.

    Raises:
        ResultError: a model is not in the baseline, and the baseline has several; or the baseline, and nobody else,
            names a function of a module that is not imported.
    """
    known = {name: run for run in baseline.runs for name in (run.given.model, run.name)}
    if all(m in known for m in models):
        for run in baseline.runs if not models else ():
            source = parse_source(run.given.model)
            if source is not None and source.kind == "function":
                require_imported(source.parts[0], f"Model {run.given.model!r} of the baseline", ResultError)
        return [(run, run.given) for run in ([known[m] for m in models] or baseline.runs)]
    if len(models) > 1 or len(baseline.runs) > 1:
        strange = next(m for m in models if m not in known)
        names = [run.name for run in baseline.runs]
        raise ResultError(
            unknown_name("model of the baseline", strange, names)
            + " Another model is compared with a baseline that holds one model."
        )
    (run,) = baseline.runs
    return [(run, _in_place_of(run.given, models[0]))]


def _in_place_of(given: Given, model: str) -> Given:
    """Name another model; what describes a source stays, as far as it means something for the other one."""
    source = parse_source(model)
    if source is None:
        return Given(model=model)
    if source.kind in ("file", "hf"):
        return given.model_copy(update={"model": model})
    return Given(model=model, dataset=given.dataset)
