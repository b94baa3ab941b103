"""The only way to read a finished result for a table, a page, an export or a comparison. Imports no torch.

A result is vouched for if `run_id` is the digest of `identity`, the records are unchanged and of this run, the samples
are those of `selection`, and every number of result.json follows from the records. Anything else is damaged. A damaged
result is named, and no number of it is shown.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from robbench.core.errors import ResultError
from robbench.core.files import digest_file
from robbench.models.card import locate_builtin_cards
from robbench.results.consistency import find_mismatches
from robbench.results.places import drop_repeats, list_folders, locate_result
from robbench.results.records import MOST_BYTES, OUTCOMES, TIMINGS, read_own_rows
from robbench.results.schema import MOST_RESULT_BYTES, ResultFile, read_result
from robbench.results.summary import find_robust_samples

__all__ = [
    "Damage",
    "StoredResults",
    "list_result_paths",
    "name_near_results",
    "read_in_tree",
    "read_results",
    "read_vouched",
    "read_vouched_robust",
    "read_vouched_rows",
]

RESULT = "result.json"
_FILES = {RESULT: MOST_RESULT_BYTES, OUTCOMES: MOST_BYTES, TIMINGS: MOST_BYTES}  # with their size limits


@dataclass(frozen=True)
class Damage:
    """A file or folder of a results tree that no number is taken from.

    Attributes:
        name: path relative to the tree, such as digits/at/whitebox.
        reason: what is wrong, in one sentence.
    """

    name: str
    reason: str

    @classmethod
    def of(cls, root: Path, path: Path, error: ResultError) -> Damage:
        """Describe what is wrong with a file of a results tree. Paths are relative to the tree, wherever it lies."""
        return cls(str(path.relative_to(root)), str(error).replace(f"{root}/", ""))

    def __str__(self) -> str:
        """Print as `digits/at/whitebox: damaged: …`."""
        return f"{self.name}: damaged: {self.reason}"


class StoredResults(NamedTuple):
    """The results of a tree, ordered by path, each run once."""

    results: list[ResultFile]
    damaged: list[Damage]


def read_vouched(path: Path) -> ResultFile:
    """Read a result that agrees with its records.

    Args:
        path: the folder of the result, or its result.json.

    Raises:
        ResultError: the result is missing or damaged. The message names the file.
    """
    return _read(path).result


def read_vouched_robust(path: Path) -> pd.Series[bool]:
    """Read which samples no attack broke, indexed by sample; the same arguments and errors as `read_vouched`."""
    return _read(path).robust


def read_vouched_rows(path: Path) -> pd.DataFrame:
    """Read the records of a result that agrees with them; the same arguments and errors as `read_vouched`."""
    result = read_vouched(path)
    return read_own_rows((path.parent if path.name == RESULT else path) / OUTCOMES, result.run_id)


def read_results(root: Path, model: str = "*/*") -> StoredResults:
    """Read the results of a results tree; see `read_in_tree`.

    Args:
        root: the results tree.
        model: full name of a model, such as `digits/at`; by default all models.
    """
    results, damaged = [], []
    for path in list_result_paths(root, model):
        try:
            results.append(read_in_tree(root, path.parent))
        except ResultError as error:
            damaged.append(Damage.of(root, path.parent, error))
    return StoredResults(drop_repeats(results), damaged)


def read_in_tree(root: Path, folder: Path) -> ResultFile:
    """Read a result like `read_vouched`. It must also be in its place in the results tree.

    Under the name of a built-in card lie only results of models with a card: its present weights, or earlier ones.

    Raises:
        ResultError: the result is damaged, or is that of another model, suite or run.
    """
    result = read_vouched(folder)
    about = result.identity.get("model")
    is_own = isinstance(about, dict) and not about.keys().isdisjoint({"class", "source"})  # a card has neither
    if is_own and (locate_builtin_cards() / result.dataset / f"{result.model}.toml").is_file():
        raise ResultError(
            f"{folder / RESULT} has the name of the registered model {result.dataset}/{result.model}; its identity is "
            "of a model of the user's own. Measure that model again under another name: name=."
        )
    model = root / result.dataset / result.model
    if folder not in list_folders(model, result.suite, result.run_id):
        raise ResultError(f"{folder / RESULT} is the result of {locate_result(root, result).relative_to(root)}.")
    return result


def list_result_paths(root: Path, model: str = "*/*") -> Iterable[Path]:
    """List the result.json files of a results tree, or of one model of it, ordered by path."""
    return sorted(root.glob(f"{model}/*/{RESULT}"))


def name_near_results(folder: Path) -> str:
    """Return ` Near it: A, B.` with results in a folder that is none, or beside one that is missing; or nothing."""
    place = folder if os.path.isdir(folder) else folder.parent
    if place == Path() or not os.path.isdir(place):  # the working directory can hold anything
        return ""
    found = sorted(path.parent for depth in ("*", "*/*") for path in place.glob(f"{depth}/{RESULT}"))
    return f" Near it: {', '.join(map(str, found[:3]))}{' …' if len(found) > 3 else '.'}" if found else ""


def _digest(path: Path, most: int) -> str:
    """SHA-256 of a file; empty if it is missing."""
    try:
        return digest_file(path, most)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror or error}.") from None


class _Vouched(NamedTuple):
    """A result that agrees with its records, and which samples no attack broke."""

    result: ResultFile
    robust: pd.Series[bool]


def _read(path: Path) -> _Vouched:
    folder = path.parent if path.name == RESULT else path
    if not (folder / RESULT).is_file():
        near = name_near_results(folder)
        raise ResultError(f"No result at {path}; give a folder with {RESULT} and {OUTCOMES}, or its {RESULT}.{near}")
    return _check(folder, tuple(_digest(folder / name, most) for name, most in _FILES.items()))


@functools.lru_cache(maxsize=1024)
def _check(folder: Path, digests: tuple[str, ...]) -> _Vouched:
    """Read and check a result. Files with the same digests are checked once in a process."""
    path = folder / RESULT
    if not digests[list(_FILES).index(OUTCOMES)]:
        raise ResultError(f"{folder / OUTCOMES} is missing.")
    result = read_result(path)
    rows = read_own_rows(folder / OUTCOMES, result.run_id)
    mismatches = [str(m) for m in find_mismatches(result, rows)]
    if mismatches:
        more = f" (and {len(mismatches) - 1} more)" if len(mismatches) > 1 else ""
        raise ResultError(f"{path} and {OUTCOMES} contradict each other: {mismatches[0]}{more}.")
    return _Vouched(result, find_robust_samples(rows))
