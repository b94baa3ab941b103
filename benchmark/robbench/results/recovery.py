"""Read the sound files of a run. Damaged files are reported and renamed to `*.damaged`; their rows are computed again.

A file is sound if it is complete, unchanged and belongs to the run. The name of a shard is the beginning of the SHA-256
of its bytes, and its metadata has the run_id. So a shard that was cut, changed, copied from another run or written by
an older version is detected. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path

import pandas as pd

from robbench.core.errors import ResultError
from robbench.core.files import read_bounded, set_aside
from robbench.core.types import Status
from robbench.results.adversarials import read
from robbench.results.records import (
    COLUMNS,
    MOST_BYTES,
    OUTCOMES,
    TIMING_COLUMNS,
    TIMINGS,
    read_rows,
    read_run_id,
    read_run_rows,
)

__all__ = ["Note", "read_sound_records", "read_sound_shards", "set_aside_unsound_points", "shard_name"]

Note = Callable[[str], None]


def shard_name(data: bytes) -> str:
    """Return the name of a shard, which is made of its content."""
    return hashlib.sha256(data).hexdigest()[:32]


def read_sound_shards(partial: Path, run_id: str, attacks: Collection[str], note: Note) -> dict[Path, pd.DataFrame]:
    """Read the sound shards of a run, in the order of their names. Other shards are moved to the result's folder.

    Args:
        partial: the folder of the shards, `<result>/.partial/<run_id>`.
        run_id: the run.
        attacks: names of the run's stages.
        note: called with a text for every file that is moved.
    """
    folder, sound = partial.parents[1], {}
    for path in sorted(partial.glob("*.parquet")):
        try:
            if shard_name(read_bounded(path, MOST_BYTES)) != path.stem:
                raise ResultError(f"{path}: not as it was written (SHA-256)")
            rows = read_run_rows(path, run_id, list(COLUMNS))
            _check(rows, attacks, path)
        except (OSError, ResultError) as error:
            _report_and_set_aside(path, folder, error, "its images are computed again", note)
        else:
            sound[path] = rows
    return sound


def set_aside_unsound_points(path: Path, run_id: str, folder: Path, note: Note) -> None:
    """Move a file of adversarial examples to `folder` if the file is damaged, was changed or is of another run."""
    try:
        kept = read(path)
        if kept.run_id != run_id:
            raise ResultError(f"{path} is of run {kept.run_id[:16]}; expected {run_id[:16]}")
        if kept.altered:
            raise ResultError(f"{path}: not as it was written (SHA-256): {', '.join(kept.altered)}")
    except ResultError as error:
        _report_and_set_aside(path, folder, error, "--save-adversarials finds its points again", note)


def read_sound_records(
    folder: Path, run_id: str, attacks: Collection[str], has_summary: bool, note: Note
) -> pd.DataFrame | None:
    """Read outcomes.parquet of a run with the wall times. None if there is no sound file.

    Args:
        folder: the folder of the result.
        run_id: the run.
        attacks: names of the run's stages.
        has_summary: whether there is a sound result.json of this run in the folder. Records of older versions have no
            run_id, so they are used only with such a result.json.
        note: called with a text for every file that is moved.
    """
    path = folder / OUTCOMES
    if not path.exists():
        if has_summary:
            note(f"{path} is missing; its images are computed again.")
        return None
    try:
        rows = read_rows(path) if has_summary and read_run_id(path) is None else read_run_rows(path, run_id)
        _check(rows, attacks, path)
    except ResultError as error:
        _report_and_set_aside(path, folder, error, "its images are computed again", note)
        return None
    times = folder / TIMINGS
    if times.exists():
        try:
            read_run_rows(times, run_id, TIMING_COLUMNS)
        except ResultError as error:
            _report_and_set_aside(times, folder, error, "wall times are counted as 0", note)
    return read_rows(path)


def _check(rows: pd.DataFrame, attacks: Collection[str], path: Path) -> None:
    """Refuse records with an unknown status or attack. An unknown status would silently count as robust."""
    for column, allowed in (("status", list(Status)), ("attack", list(attacks))):
        unknown = rows.loc[~rows[column].isin(allowed), column]
        if len(unknown):
            raise ResultError(f"{path}: {column} {unknown.iloc[0]!r} given; allowed: {', '.join(allowed)}")


def _report_and_set_aside(path: Path, folder: Path, error: Exception, consequence: str, note: Note) -> None:
    reason = str(error).split(" Remove it")[0].rstrip(".")
    note(f"{reason}. Set aside as {set_aside(path, folder).name}; {consequence}.")
