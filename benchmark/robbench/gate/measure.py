"""Makes the entries of a baseline: it runs a suite on a model, or reads a stored result."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robbench.core.errors import ResultError, unknown_name
from robbench.core.user_code import imported
from robbench.core.version import digest_verdict_code
from robbench.gate.baseline import Baseline, BaselineEntry, Given, build_entry
from robbench.models.sources import parse_source
from robbench.results.schema import ResultFile, read_result
from robbench.results.store import read_rows, result_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from robbench.evaluation.run import Reporter

__all__ = [
    "Machine",
    "choose_entries",
    "measure_entry",
    "measure_entry_again",
    "open_results_tree",
    "read_stored_entry",
]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and with what to measure. These settings do not change what is measured.

    Attributes:
        results: the results tree that keeps the records, so that an interrupted run can resume (`open_results_tree`).
        device: auto, cpu, cuda or cuda:i.
        lanes: batch width; None chooses one.
        data_dir: folder of the data sets.
        models: further model registries.
        reporter: receives progress.
    """

    results: Path
    device: str = "auto"
    lanes: int | None = None
    data_dir: str | Path | None = None
    models: tuple[str | Path, ...] = ()
    reporter: Reporter | None = None

    def options(self) -> dict[str, Any]:
        """Return the settings as options of `evaluate`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@contextlib.contextmanager
def open_results_tree(path: Path | None) -> Iterator[Path]:
    """Yield the given results tree, or a temporary one that is deleted afterwards."""
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="robbench-") as folder:
        yield Path(folder)


def measure_entry(
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
) -> BaselineEntry:
    """Run a suite on a model and build the entry of a baseline.

    Args:
        given: how the user named the model. With `module`, only the name and the data set are used.
        suite: a suite's name, or the path of a suite file.
        machine: where and with what to measure.
        module: the model itself. Without it, `given` is loaded.
        x: images [N, C, H, W] in [0, 1] for a source or a module. Their positions are their sample ids.
        y: labels [N] of `x`.
        samples: number of images; None means all.
        sample_seed: seed of the random choice and order of the images; None means the official order.
        seed: seed of the attacks' random numbers.
        norm: overrides the suite's norm.
        eps: overrides the suite's radius, in [0, 1] pixel units.

    Raises:
        RobbenchError: as `evaluate`.
    """
    from robbench.evaluation.run import evaluate  # needs torch, which the comparison of stored results does not need

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
    return _entry_of(result, result_folder(machine.results, result), given, suite, digest_verdict_code())


def measure_entry_again(
    before: BaselineEntry,
    machine: Machine,
    *,
    given: Given | None = None,
    n: int | None = None,
    seed: int | None = None,
    **model: Any,
) -> BaselineEntry:
    """Measure an entry again with the same suite, threat, images and seed.

    Args:
        before: the entry of the baseline.
        machine: where and with what to measure.
        given: a model that replaces the baseline's model.
        n: measure only the first n images of the entry.
        seed: a seed of the attacks that replaces the baseline's seed.
        **model: `module`, `x` and `y` of `measure_entry`.
    """
    return measure_entry(
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


def read_stored_entry(path: Path) -> BaselineEntry:
    """Build the entry of a baseline from a stored result. Imports no torch.

    Args:
        path: the folder of a result, or its result.json.

    Raises:
        ResultError: the result is missing or damaged.
    """
    folder = path.parent if path.name == "result.json" else path
    if not (folder / "result.json").is_file():
        raise ResultError(f"No result at {path}; expected a folder with result.json and outcomes.parquet in it.")
    result = read_result(folder / "result.json")
    return _entry_of(result, folder, Given(model=f"{result.dataset}/{result.model}"), result.suite, {})


def _entry_of(result: ResultFile, folder: Path, given: Given, suite: str, code: dict[str, str]) -> BaselineEntry:
    rows = read_rows(folder / "outcomes.parquet")
    # The records are in the order of selection. An earlier run may have stored more images than this result has.
    rows = rows[rows["sample"].isin(rows["sample"].unique()[: result.n])]
    sample_seed = result.identity.get("sample_seed")
    return build_entry(result, rows, given, suite=suite, sample_seed=sample_seed, code=code)


def choose_entries(baseline: Baseline, models: list[str]) -> list[tuple[BaselineEntry, Given]]:
    """Choose the entries that a check measures, and the model that it loads for each.

    Args:
        baseline: the baseline.
        models: names of models of the baseline; empty means all. If the baseline holds one model, the name of another
            model is allowed too. This model then takes the place of the baseline's model.

    Raises:
        ResultError: the baseline holds several models, and a name is none of them; or an entry names a function of a
            module that the user did not import.
    """
    known = {name: entry for entry in baseline.runs for name in (entry.given.model, entry.name)}
    if all(m in known for m in models):
        for entry in baseline.runs if not models else ():
            source = parse_source(entry.given.model)
            if source is not None and source.kind == "function":
                imported(source.parts[0], f"Model {entry.given.model!r} of the baseline", ResultError)
        return [(entry, entry.given) for entry in ([known[m] for m in models] or baseline.runs)]
    if len(models) > 1 or len(baseline.runs) > 1:
        unknown = next(m for m in models if m not in known)
        names = [entry.name for entry in baseline.runs]
        raise ResultError(
            unknown_name("model of the baseline", unknown, names)
            + " Only a baseline with one model can be compared with a model that it does not hold."
        )
    (entry,) = baseline.runs
    return [(entry, _replace_model(entry.given, models[0]))]


def _replace_model(given: Given, model: str) -> Given:
    """Name another model. The description of the source stays where the new source needs it."""
    source = parse_source(model)
    if source is None:
        return Given(model=model)
    if source.kind in ("file", "hf"):
        return given.model_copy(update={"model": model})
    return Given(model=model, dataset=given.dataset)
