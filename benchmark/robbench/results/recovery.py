"""What is fit for use among the files of a run; the rest is named, set aside as `*.damaged`, and computed again.

A shard's name is the beginning of the SHA-256 of its bytes, and its metadata say of which run it is: a file that was
cut, changed, copied from elsewhere or written by an older version is not mistaken for one. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path

import pandas as pd

from robbench.core.errors import ResultError
from robbench.core.files import set_aside
from robbench.core.types import Status
from robbench.results.adversarials import read
from robbench.results.records import COLUMNS, OUTCOMES, TIMING_COLUMNS, TIMINGS, read_rows, read_run_id, read_run_rows

__all__ = ["Note", "read_sound_records", "read_sound_shards", "set_aside_unsound_points", "shard_name"]

Note = Callable[[str], None]


def shard_name(data: bytes) -> str:
    """Name a shard by its content."""
    return hashlib.sha256(data).hexdigest()[:32]


def read_sound_shards(partial: Path, run_id: str, attacks: Collection[str], note: Note) -> dict[Path, pd.DataFrame]:
    """Read the shards of a run, in the order of their names; damaged ones are moved to the folder of the result.

    Args:
        partial: the folder of the shards, `<result>/.partial/<run_id>`.
        run_id: of the run.
        attacks: names of its stages.
        note: hears of every file that was set aside.
    """
    folder, sound = partial.parents[1], {}
    for path in sorted(partial.glob("*.parquet")):
        try:
            if shard_name(path.read_bytes()) != path.stem:
                raise ResultError(f"{path}: not as it was written (SHA-256)")
            rows = read_run_rows(path, run_id, list(COLUMNS))
            _check(rows, attacks, path)
        except (OSError, ResultError) as error:
            _aside(path, folder, error, "its images are computed again", note)
        else:
            sound[path] = rows
    return sound


def set_aside_unsound_points(path: Path, run_id: str, folder: Path, note: Note) -> bool:
    """Tell whether a file of adversarial examples is this run's and unchanged; one that is damaged is moved away."""
    try:
        kept = read(path)
        if kept.run_id != run_id:
            raise ResultError(f"{path} is of run {kept.run_id[:16]}; expected {run_id[:16]}")
        if kept.altered:
            raise ResultError(f"{path}: not as it was written (SHA-256): {', '.join(kept.altered)}")
    except ResultError as error:
        _aside(path, folder, error, "--save-adversarials finds its points again", note)
        return False
    return True


def read_sound_records(
    folder: Path, run_id: str, attacks: Collection[str], vouched: bool, note: Note
) -> pd.DataFrame | None:
    """Read the merged records of a run with their wall times; None where there are none that are fit for use.

    Args:
        folder: of the result.
        run_id: of the run.
        attacks: names of its stages.
        vouched: whether a sound result.json beside them says that they are this run's. Records of older versions,
            which do not say so themselves, need that.
        note: hears of every file that was set aside.
    """
    path = folder / OUTCOMES
    if not path.exists():
        if vouched:
            note(f"{path} is missing; its images are computed again.")
        return None
    try:
        rows = read_rows(path) if vouched and read_run_id(path) is None else read_run_rows(path, run_id)
        _check(rows, attacks, path)
    except ResultError as error:
        _aside(path, folder, error, "its images are computed again", note)
        return None
    times = folder / TIMINGS
    if times.exists():
        try:
            read_run_rows(times, run_id, TIMING_COLUMNS)
        except ResultError as error:
            _aside(times, folder, error, "wall times are counted as 0", note)
    return read_rows(path)


def _check(rows: pd.DataFrame, attacks: Collection[str], path: Path) -> None:
    """Refuse records that cannot be of this run: another status would silently count as robust."""
    for column, allowed in (("status", list(Status)), ("attack", list(attacks))):
        strange = rows.loc[~rows[column].isin(allowed), column]
        if len(strange):
            raise ResultError(f"{path}: {column} {strange.iloc[0]!r} given; allowed: {', '.join(allowed)}")


def _aside(path: Path, folder: Path, error: Exception, then: str, note: Note) -> None:
    reason = str(error).split(" Remove it")[0].rstrip(".")
    note(f"{reason}. Set aside as {set_aside(path, folder).name}; {then}.")
