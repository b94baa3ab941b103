"""Makes the entries of a baseline: it runs a suite on a model, or reads a stored result.

`decision.py` compares entries. It runs no attack.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from robbench.core.errors import ResultError, RobbenchError, SuiteError, unknown_name
from robbench.core.user_code import require_imported
from robbench.core.version import digest_judging_code, digest_verdict_code
from robbench.evaluation.options import Options
from robbench.evaluation.request import RunRequest
from robbench.gate.baseline import Baseline, BaselineEntry, Given, build_entry
from robbench.models.schema import DATASETS
from robbench.models.sources import parse_source
from robbench.models.spec import ModelSpec
from robbench.results.places import locate_result
from robbench.results.reader import read_vouched, read_vouched_rows
from robbench.results.schema import ResultFile
from robbench.suite import SuiteSource, load_suite, suite_names

if TYPE_CHECKING:
    from robbench.evaluation.run import Reporter

__all__ = ["choose_entries", "measure_entry", "measure_entry_again", "open_results_tree", "read_stored_entry"]

_DISTANCES = (
    "Suite {} given for a baseline. It looks for the nearest break at any distance, so it breaks every image. Give a "
    "suite with a radius, such as quick."
)


@contextlib.contextmanager
def open_results_tree(path: Path | None) -> Iterator[Path]:
    """Yield the given results tree, or a temporary one that is deleted afterwards."""
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="robbench-") as folder:
        yield Path(folder)


def measure_entry(
    spec: ModelSpec, suite: SuiteSource, options: Options, reporter: Reporter | None = None
) -> BaselineEntry:
    """Run a suite on a model, and make the entry of a baseline from the result.

    Args:
        spec: the model and its images.
        suite: the suite, given as for `evaluate`.
        options: all other options. `results` is required (see `open_results_tree`).
        reporter: gets messages about the progress.

    Raises:
        RobbenchError: the options have no `results`, or an error of `evaluate`.
    """
    from robbench.evaluation.run import (  # here, because it imports torch; a stored result is compared without torch
        make_run,
        run_here,
    )

    if options.results is None:
        raise RobbenchError("measure_entry given options without results. Give a folder for the results: results=DIR.")
    if load_suite(suite).judge == "nearest":
        raise RobbenchError(_DISTANCES.format(suite))
    result = run_here(make_run(RunRequest(spec, suite, options, same_code=True), reporter))
    folder = locate_result(Path(options.results), result)
    named = str(suite) if isinstance(suite, str | Path) else result.suite
    return _build_entry(result, folder, Given.of(spec), named, digest_verdict_code())


def measure_entry_again(
    before: BaselineEntry,
    options: Options,
    reporter: Reporter | None = None,
    *,
    spec: ModelSpec | None = None,
    n: int | None = None,
    seed: int | None = None,
) -> BaselineEntry:
    """Measure an entry of a baseline again, with the same suite, threat, images and seed.

    Args:
        before: the entry of the baseline.
        options: results, device, lanes, data_dir, models and surrogate are used. The entry determines the other
            options, and a registered surrogate where none is given. Only transfer attacks use a surrogate.
        reporter: gets messages about the progress.
        spec: the model to measure; None means the model of the entry.
        n: measure only the first n images of the entry; None means all.
        seed: seed of the attacks; None means the seed of the entry.

    Raises:
        ResultError: the surrogate of the entry is a source. The user must name it.
        RobbenchError: see `measure_entry`.
    """
    surrogate = (options.surrogate or before.surrogate) if before.has_transfer else None
    if options.surrogate is None and surrogate is not None and parse_source(surrogate) is not None:
        raise ResultError(
            f"The baseline of {before.name} has the surrogate {surrogate}. A file alone never loads one: name it, "
            f"--surrogate {surrogate}."
        )
    asked = replace(
        options,
        samples=n or before.n,
        sample_seed=before.sample_seed,
        seed=before.seed if seed is None else seed,
        norm=before.threat["norm"],
        eps=before.threat["eps"],
        target=before.identity.get("target"),
        levels=before.identity.get("levels"),
        surrogate=surrogate,
    )
    try:
        load_suite(before.suite)
    except SuiteError:
        if before.suite in suite_names():
            raise
        # The path may be that of any file, so the message does not repeat what stands in it.
        raise ResultError(
            f"The suite {before.suite!r} of the baseline cannot be read as a suite. If it is a file of yours, "
            "`robbench eval --suite FILE` says what is wrong with it."
        ) from None
    return measure_entry(spec or before.given.make_spec(), before.suite, asked, reporter)


def read_stored_entry(path: Path) -> BaselineEntry:
    """Build the entry of a baseline from a stored result. Imports no torch.

    Args:
        path: the folder of a result, or its result.json.

    Raises:
        ResultError: the result is missing or damaged.
    """
    folder = path.parent if path.name == "result.json" else path
    result = read_vouched(folder)
    if not result.has_radius:
        raise ResultError(_DISTANCES.format(result.suite))
    code = digest_verdict_code() if result.code == digest_judging_code() else {}
    return _build_entry(result, folder, Given(model=f"{result.dataset}/{result.model}"), result.suite, code)


def _build_entry(result: ResultFile, folder: Path, given: Given, suite: str, code: dict[str, str]) -> BaselineEntry:
    rows = read_vouched_rows(folder)
    # The records are in the order of selection. An earlier run may have stored more images than this result has.
    rows = rows[rows["sample"].isin(rows["sample"].unique()[: result.n])]
    sample_seed = result.identity.get("sample_seed")
    return build_entry(result, rows, given, suite=suite, sample_seed=sample_seed, code=code)


def choose_entries(
    baseline: Baseline, models: list[str], data: Path | None = None
) -> list[tuple[BaselineEntry, Given]]:
    """Choose the entries that a check measures, and the model that it loads for each.

    Args:
        baseline: the baseline.
        models: names of models of the baseline; empty means all. If the baseline holds one model, the name of another
            model is allowed too. This model then takes the place of the baseline's model.
        data: where the images are now, for a baseline of images of the user's own; None means where they were.

    Raises:
        ResultError: the baseline holds several models, and a name is none of them; or an entry names a download that
            the user did not name, or a function of a module that the user did not import.
    """
    known = {name: entry for entry in baseline.runs for name in (entry.given.model, entry.name)}
    if all(m in known for m in models):
        chosen = [known[m] for m in models] or baseline.runs
        for entry in chosen:
            if entry.given.model not in models:
                _require_consent(entry.given)
        return [(entry, _move_data(entry.given, data)) for entry in chosen]
    if len(models) > 1 or len(baseline.runs) > 1:
        unknown = next(m for m in models if m not in known)
        names = [entry.name for entry in baseline.runs]
        raise ResultError(
            unknown_name("model of the baseline", unknown, names)
            + " Only a baseline with one model can be compared with a model that it does not hold."
        )
    (entry,) = baseline.runs
    return [(entry, _move_data(_replace_model(entry, models[0]), data))]


def _move_data(given: Given, data: Path | None) -> Given:
    if data is not None and given.data is None:
        raise ResultError(f"--data {data} given; the baseline of {given.model} is not of images of your own.")
    return given if data is None else given.model_copy(update={"data": str(data)})


def _require_consent(given: Given) -> None:
    """Refuse a model of a baseline that is a download, or code that is not imported, unless the user names it.

    Raises:
        ResultError: the model is one of these. The message says what to do.
    """
    model = given.model
    source = parse_source(model)
    if source is None or (not source.has_code and given.architecture is not None):
        return
    if source.kind == "function":
        require_imported(source.parts[0], f"Model {model!r} of the baseline", ResultError)
        return
    raise ResultError(
        f"Model {model!r} of the baseline is a download, or may run code. A baseline alone never starts either: if you "
        f"want it, name it, --model {model}."
    )


def _replace_model(entry: BaselineEntry, model: str) -> Given:
    """Name another model. The data set stays, and the description of the source where the new source needs it."""
    source, given = parse_source(model), entry.given
    if given.data is None and entry.dataset in DATASETS:
        given = given.model_copy(update={"dataset": entry.dataset})
    if source is None:
        return Given(model=model)
    if source.kind in ("file", "hf"):
        return given.model_copy(update={"model": model})
    return given.model_copy(update={"model": model, "architecture": None, "mean": None, "std": None})
