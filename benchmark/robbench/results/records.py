"""Per-sample records on disk: their columns, and Parquet files that say whose they are and notice damage. No torch.

A file's metadata hold, under the key `robbench`, a JSON object with `version`, `run_id` and `sha256`, which is taken
over the values: the same rows of the same run give the same bytes, and a flipped bit is told. Wall times never repeat,
so they are in a file of their own: outcomes.parquet holds what was found, timings.parquet how long each row took.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from robbench.core.errors import ResultError

__all__ = [
    "COLUMNS",
    "OUTCOMES",
    "TIMINGS",
    "TIMING_COLUMNS",
    "make_empty_rows",
    "pack_rows",
    "read_rows",
    "read_run_id",
    "read_run_rows",
]

OUTCOMES = "outcomes.parquet"
TIMINGS = "timings.parquet"
_VERSION = 1
_MOST_ROWS = 50_000_000  # far above any run; a small file can claim more than fits into memory

COLUMNS = {
    "sample": "int64",  # official index
    "attack": "str",  # name of the stage
    "status": "str",  # misclassified, broken, robust, skipped
    "claimed": "bool",  # whether the attack itself says that it broke the image; ours say what the judge says
    "label": "int64",  # true class
    "prediction": "int64",  # class predicted at the break or the last queried point; -1: not finite on the clean image
    "trial": "int64",  # which restart broke it (or was the last)
    "step": "int64",  # after how many steps of that trial
    "forwards": "int64",
    "backwards": "int64",
    "distance": "float64",  # ‖x_adv − x‖ of the break, nan otherwise
    "zero_gradients": "int64",  # queries whose loss gradient was exactly zero
    "nonfinite": "int64",  # queries answered with NaN or infinity
    "seconds": "float64",  # share of the wall time; in timings.parquet once a run has finished
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
    """Make a Parquet file of records; the same rows of the same run give the same bytes.

    Args:
        rows: the records.
        run_id: of the run.
        columns: which to write: `TIMING_COLUMNS`, or by default those of outcomes.parquet.
    """
    columns = columns or _OUTCOME_COLUMNS
    frame = rows[columns].astype({name: COLUMNS[name] for name in columns}).reset_index(drop=True)
    # One chunk: how rows came together must not show in how they are laid out.
    table = pa.Table.from_pandas(frame, preserve_index=False).combine_chunks()
    about = {"version": _VERSION, "run_id": run_id, "sha256": _digest(frame)}
    out = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"robbench": json.dumps(about, sort_keys=True)}), out)
    return out.getvalue()


def read_run_id(path: Path) -> str | None:
    """Tell of which run a file of records says that it is; None where it is missing, unreadable or does not say."""
    try:
        about = json.loads((pq.read_schema(path).metadata or {})[b"robbench"])
        return str(about["run_id"])
    except Exception:  # whatever a damaged or hostile file provokes; reading the records names it
        return None


def read_run_rows(path: Path, run_id: str, columns: list[str] | None = None) -> pd.DataFrame:
    """Read records that must be of one run and unchanged; `columns` as for `pack_rows`.

    Raises:
        ResultError: damaged, of another run, or of an older format; the sentence says which.
    """
    frame, about = _read(path)
    if about is None:
        raise ResultError(f"{path}: of an older or another format; it does not say of which run it is")
    if about.get("run_id") != run_id:
        raise ResultError(f"{path}: of another run, {str(about.get('run_id'))[:16]}; expected {run_id[:16]}")
    expected = columns or _OUTCOME_COLUMNS
    if list(frame.columns) != expected:
        raise ResultError(f"{path} has the columns {list(frame.columns)}; expected {expected}")
    return frame


def read_rows(path: Path) -> pd.DataFrame:
    """Read the records of a finished run, with the wall times that lie beside it (0 where there are none).

    Results of versions that had no timings.parquet hold the seconds themselves.

    Raises:
        ResultError: not readable, damaged, or without the columns of `COLUMNS`.
    """
    rows, _ = _read(path)
    if list(rows.columns) == _OUTCOME_COLUMNS:
        rows = _timed(rows, path.with_name(TIMINGS))
    if list(rows.columns) != list(COLUMNS):
        raise ResultError(f"{path} has the columns {list(rows.columns)}; expected {list(COLUMNS)}.")
    return rows


def _timed(rows: pd.DataFrame, path: Path) -> pd.DataFrame:
    try:
        times = _read(path)[0]
        known = times[TIMING_COLUMNS].drop_duplicates(_KEYS)
    except (ResultError, KeyError):  # wall times decide nothing: a result without them is whole
        return rows.assign(seconds=0.0)
    return rows.merge(known, on=_KEYS, how="left").fillna({"seconds": 0.0})


def _read(path: Path) -> tuple[pd.DataFrame, dict[str, Any] | None]:
    """Read a file of records and what it says of itself."""
    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows > _MOST_ROWS:
                raise ValueError(f"it claims {file.metadata.num_rows} rows; allowed: {_MOST_ROWS}")
            table = file.read()
        # What pandas left in the metadata could make an index of columns or types of its own.
        frame = table.to_pandas(ignore_metadata=True)
        about = json.loads((table.schema.metadata or {}).get(b"robbench", b"null"))
        _check_types(table.schema)
        # Records of a foreign file may have nulls, which no column of ours can hold.
        frame = frame.astype({c: COLUMNS[c] for c in frame.columns if c in COLUMNS})
        if about is not None and (about["version"] != _VERSION or about["sha256"] != _digest(frame)):
            raise ValueError("its values are not those that were written (SHA-256)")
    except Exception as error:  # whatever a damaged or hostile file provokes in the reader
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ResultError(f"{path} cannot be read ({reason}). Remove it, and its samples are computed again.") from None
    return frame, about


def _check_types(schema: pa.Schema) -> None:
    for field in schema:
        fits = _KINDS.get(COLUMNS.get(field.name, ""))
        if fits is not None and not fits(field.type):
            raise ValueError(f"column {field.name} is {field.type}, expected {COLUMNS[field.name]}")


def _digest(frame: pd.DataFrame) -> str:
    """SHA-256 over names and values of the columns."""
    hasher = hashlib.sha256()
    for name in frame.columns:
        values = frame[name]
        text = COLUMNS.get(name) == "str"
        content = json.dumps(values.tolist()).encode() if text else values.to_numpy().tobytes()
        hasher.update(f"{name}\0{len(content)}\0".encode() + content)
    return hasher.hexdigest()
