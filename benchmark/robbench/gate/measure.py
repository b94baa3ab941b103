"""Measuring for the gate: a run of a suite as a baseline keeps it, from a model or from a stored result.

The decision itself is in `decision.py`, which runs nothing.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from robbench.core.errors import ResultError, RobbenchError, unknown_name
from robbench.core.user_code import require_imported
from robbench.core.version import digest_verdict_code
from robbench.evaluation.options import Options
from robbench.evaluation.request import RunRequest
from robbench.gate.baseline import Baseline, Given, Run, record
from robbench.models.sources import parse_source
from robbench.models.spec import ModelSpec
from robbench.results.schema import ResultFile, read_result
from robbench.results.store import locate_result, read_rows
from robbench.suite import SuiteSource

if TYPE_CHECKING:
    from robbench.evaluation.run import Reporter

__all__ = ["measure", "measure_again", "results_tree", "stored_run", "wanted_runs"]


@contextlib.contextmanager
def results_tree(path: Path | None) -> Iterator[Path]:
    """Yield a results tree to measure into: the user's, or one that goes away."""
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="robbench-") as folder:
        yield Path(folder)


def measure(spec: ModelSpec, suite: SuiteSource, options: Options, reporter: Reporter | None = None) -> Run:
    """Run a suite on a model and take what a baseline keeps of it.

    Args:
        spec: the model and its images.
        suite: as for `evaluate`.
        options: what else is asked for; `results` says where the records are kept (see `results_tree`).
        reporter: hears of progress.

    Raises:
        RobbenchError: what `evaluate` refuses.
    """
    from robbench.evaluation.run import make_run, run_here  # needs torch; a stored result is compared without

    if options.results is None:
        raise RobbenchError("measure given options without results: say where to (results=DIR).")
    result = run_here(make_run(RunRequest(spec, suite, options), reporter))
    folder = locate_result(Path(options.results), result)
    named = str(suite) if isinstance(suite, str | Path) else result.suite
    return _run(result, folder, Given.of(spec), named, digest_verdict_code())


def measure_again(
    before: Run,
    options: Options,
    reporter: Reporter | None = None,
    *,
    spec: ModelSpec | None = None,
    n: int | None = None,
    seed: int | None = None,
) -> Run:
    """Measure what a baseline measured: the same suite, threat, images and seed.

    Args:
        before: the run of the baseline.
        options: how to measure: results, device, lanes, data_dir and models count.
        reporter: hears of progress.
        spec: another model in the place of the baseline's.
        n: only the first n of its images.
        seed: another seed of the attacks.
    """
    asked = replace(
        options,
        samples=n or before.n,
        sample_seed=before.sample_seed,
        seed=before.seed if seed is None else seed,
        norm=before.threat["norm"],
        eps=before.threat["eps"],
    )
    return measure(spec or before.given.spec(), before.suite, asked, reporter)


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
