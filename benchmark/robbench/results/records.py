"""Per-sample records on disk: their columns, and Parquet files with run_id and digest. Imports no torch.

The metadata of a file has a key `robbench` with a JSON object: `version`, `run_id` and `sha256` of the values. The same
rows of the same run give the same bytes, and any changed bit is detected. Wall times differ from run to run, so they
are in a separate file: outcomes.parquet holds the outcomes, timings.parquet the time of each row.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from robbench.core.errors import ResultError
from robbench.core.files import parse_json
from robbench.core.parquet import encode_rows, open_parquet, read_flat_table

__all__ = [
    "COLUMNS",
    "MOST_BYTES",
    "OUTCOMES",
    "TIMINGS",
    "TIMING_COLUMNS",
    "make_empty_rows",
    "pack_rows",
    "read_own_rows",
    "read_rows",
    "read_run_id",
    "read_run_rows",
]

OUTCOMES = "outcomes.parquet"
TIMINGS = "timings.parquet"
_VERSION = 1
MOST_BYTES = 2**31
"""Limit for a file of records."""

COLUMNS = {
    "sample": "int64",  # official index
    "attack": "str",  # name of the stage
    "status": "str",  # misclassified, broken, robust, skipped
    "claimed": "bool",  # whether the attack reports a break; robbench's own attacks report what the judge says
    "label": "int64",  # true class
    "prediction": "int64",  # class at the break, or at the last queried point; -1: the clean logits are not finite
    "trial": "int64",  # the restart that broke the image, or the last one
    "step": "int64",  # number of steps of that trial
    "forwards": "int64",
    "backwards": "int64",
    "distance": "float64",  # ‖x_adv − x‖ of the break, nan otherwise
    "zero_gradients": "int64",  # queries whose loss gradient was exactly zero
    "nonfinite": "int64",  # queries answered with NaN or infinity
    "seconds": "float64",  # share of the wall time; in timings.parquet for a finished run
}
"""The columns of the records, in order."""

_KEYS = ["sample", "attack"]
TIMING_COLUMNS = [*_KEYS, "seconds"]
_OUTCOME_COLUMNS = [c for c in COLUMNS if c != "seconds"]
_KINDS = {"int64": pa.types.is_integer, "bool": pa.types.is_boolean, "float64": pa.types.is_floating}


def make_empty_rows() -> pd.DataFrame:
    """Make a frame with the columns of the records and no rows."""
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in COLUMNS.items()})


def pack_rows(rows: pd.DataFrame, run_id: str, columns: list[str] | None = None) -> bytes:
    """Return the bytes of a Parquet file of records. The same rows of the same run give the same bytes.

    Args:
        rows: the records.
        run_id: the run.
        columns: the columns to write, such as `TIMING_COLUMNS`; by default those of outcomes.parquet.
    """
    columns = columns or _OUTCOME_COLUMNS
    frame = rows[columns].astype({name: COLUMNS[name] for name in columns}).reset_index(drop=True)
    return encode_rows(frame, {"version": _VERSION, "run_id": run_id, "sha256": _digest(frame)})


def read_run_id(path: Path) -> str | None:
    """Read the run_id in a file of records. None if the file is missing, cannot be read or has no run_id."""
    try:
        with open_parquet(path, MOST_BYTES) as file:
            about = parse_json((file.schema_arrow.metadata or {})[b"robbench"])
        return str(about["run_id"])
    except Exception:  # a damaged or hostile file can raise anything; `read_run_rows` reports it
        return None


def read_run_rows(path: Path, run_id: str, columns: list[str] | None = None) -> pd.DataFrame:
    """Read records and check that they are unchanged and belong to a run. `columns` as for `pack_rows`.

    Raises:
        ResultError: the file is damaged, of another run, or of an older format. The message says which.
    """
    frame, about = _read(path)
    if about is None:
        raise ResultError(f"{path}: of an older or another format, without a run_id")
    _check_owner(path, frame, about, run_id, columns or _OUTCOME_COLUMNS)
    return frame


def _check_owner(path: Path, frame: pd.DataFrame, about: dict[str, Any], run_id: str, columns: list[str]) -> None:
    if about.get("run_id") != run_id:
        raise ResultError(f"{path}: of another run, {str(about.get('run_id'))[:16]}; expected {run_id[:16]}")
    if list(frame.columns) != columns:
        raise ResultError(f"{path} has the columns {list(frame.columns)}; expected {columns}")


def read_own_rows(path: Path, run_id: str) -> pd.DataFrame:
    """Read the records of a finished run like `read_rows`. The records and the wall times must be of this run.

    Records of older versions have no run_id. They are recognized by their column `seconds`.

    Raises:
        ResultError: outcomes.parquet or timings.parquet is damaged or of another run.
    """
    rows, about = _read(path)
    if about is None:
        if list(rows.columns) != list(COLUMNS):
            raise ResultError(f"{path}: without a run_id")
        return rows
    _check_owner(path, rows, about, run_id, _OUTCOME_COLUMNS)
    times = path.with_name(TIMINGS)
    if not times.exists():
        return rows.assign(seconds=0.0)
    timed = read_run_rows(times, run_id, TIMING_COLUMNS)
    if len(timed) != len(rows) or any((timed[key].to_numpy() != rows[key].to_numpy()).any() for key in _KEYS):
        raise ResultError(f"{times}: not of the records of {OUTCOMES}")
    return rows.assign(seconds=timed["seconds"].to_numpy())


def read_rows(path: Path) -> pd.DataFrame:
    """Read the records of a finished run, with the wall times from timings.parquet (0 where there are none).

    Older versions had no timings.parquet. Their outcomes.parquet holds the seconds.

    Raises:
        ResultError: the file cannot be read, is damaged, or does not have the columns of `COLUMNS`.
    """
    rows, _ = _read(path)
    if list(rows.columns) == _OUTCOME_COLUMNS:
        rows = _add_seconds(rows, path.with_name(TIMINGS))
    if list(rows.columns) != list(COLUMNS):
        raise ResultError(f"{path} has the columns {list(rows.columns)}; expected {list(COLUMNS)}.")
    return rows


def _add_seconds(rows: pd.DataFrame, path: Path) -> pd.DataFrame:
    try:
        times = _read(path)[0]
        known = times[TIMING_COLUMNS].drop_duplicates(_KEYS)
    except (ResultError, KeyError):  # no verdict depends on wall times, so a result without them is complete
        return rows.assign(seconds=0.0)
    return rows.merge(known, on=_KEYS, how="left").fillna({"seconds": 0.0})


def _read(path: Path) -> tuple[pd.DataFrame, dict[str, Any] | None]:
    """Read a file of records and its metadata."""
    try:
        table = read_flat_table(path, MOST_BYTES)
        # The metadata of pandas could turn columns into an index or change their types.
        frame = table.to_pandas(ignore_metadata=True)
        about = parse_json((table.schema.metadata or {}).get(b"robbench", b"null"))
        _check_types(table.schema)
        # `astype` refuses nulls, which no column of ours may hold.
        frame = frame.astype({c: COLUMNS[c] for c in frame.columns if c in COLUMNS})
        if about is not None and (about["version"] != _VERSION or about["sha256"] != _digest(frame)):
            raise ValueError("its values are not those that were written (SHA-256)")
    except Exception as error:  # a damaged or hostile file can make the reader raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ResultError(f"{path} cannot be read ({reason}). Remove it, and its samples are computed again.") from None
    return frame, about


def _check_types(schema: pa.Schema) -> None:
    for field in schema:
        fits = _KINDS.get(COLUMNS.get(field.name, ""))
        if fits is not None and not fits(field.type):
            raise ValueError(f"column {field.name} is {field.type}, expected {COLUMNS[field.name]}")


def _digest(frame: pd.DataFrame) -> str:
    """SHA-256 of the names and values of the columns."""
    hasher = hashlib.sha256()
    for name in frame.columns:
        values = frame[name]
        text = COLUMNS.get(name) == "str"
        content = json.dumps(values.tolist()).encode() if text else values.to_numpy().tobytes()
        hasher.update(f"{name}\0{len(content)}\0".encode() + content)
    return hasher.hexdigest()
