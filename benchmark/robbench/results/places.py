"""Where a run lies in a results tree: one folder for one run. Imports no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from robbench.core.errors import ResultError
from robbench.results.records import OUTCOMES, read_run_id
from robbench.results.schema import ResultFile, read_result

__all__ = ["drop_repeats", "list_folders", "locate_result", "locate_run"]


def list_folders(model: Path, suite: str, run_id: str) -> list[Path]:
    """List the folders that can hold a run: the first without overrides, the second with overrides."""
    return [model / suite, model / f"{suite}@{run_id[:8]}"]


def locate_run(model: Path, suite: str, run_id: str, standard: bool) -> Path:
    """Return the folder that holds a run, or the folder where it belongs if no folder holds it.

    Older versions stored a run twice if its overrides were the suite's own values. The folder with more images counts.
    If both have equally many, the folder `<suite>` counts.

    Args:
        model: the folder of the model.
        suite: name of the suite.
        run_id: identity of the run.
        standard: whether the run has no overrides.
    """
    folders = list_folders(model, suite, run_id)
    held = [(n, folder) for folder in folders if (n := _count_images(folder, run_id)) is not None]
    if held:
        return max(held, key=lambda pair: pair[0])[1]
    return folders[0] if standard else folders[1]


def _count_images(folder: Path, run_id: str) -> int | None:
    """Count the images of a run's result in a folder: 0 if it is unfinished there, None if the folder lacks the run."""
    with contextlib.suppress(ResultError):  # there is no result.json, or it is damaged
        stored = read_result(folder / "result.json", changed=True)
        if stored.run_id == run_id:
            return stored.n
    is_begun = (folder / ".partial" / run_id).is_dir() or read_run_id(folder / OUTCOMES) == run_id
    return 0 if is_begun else None


def locate_result(root: Path, result: ResultFile) -> Path:
    """Return the folder of a result in a results tree."""
    return locate_run(root / result.dataset / result.model, result.suite, result.run_id, not result.overrides)


def drop_repeats(results: Iterable[ResultFile]) -> list[ResultFile]:
    """Keep one result of each run of a model: the one on the most images; of equal ones, the first."""
    kept: dict[tuple[str, str, str], ResultFile] = {}
    for result in results:
        key = (result.dataset, result.model, result.run_id)
        if key not in kept or kept[key].n < result.n:
            kept[key] = result
    return list(kept.values())
