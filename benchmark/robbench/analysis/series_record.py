"""The files of series: measurements with one row per group and image. Imports no torch.

```
results/<dataset>/<model>/<kind>/<kind>.json     the summary (`SeriesFile`)
results/<dataset>/<model>/<kind>/<kind>.parquet  columns of the kind (`list_columns`)
```

The kinds are `steps` (PGD of several step sizes), `training` (logits at iterations of a short training) and `students`
(small networks that learned from the logits of a training).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from robbench.core.errors import ResultError
from robbench.core.files import digest
from robbench.core.parquet import encode_rows
from robbench.core.words import advise_overwrite
from robbench.results.measurement import (
    MeasurementFile,
    check_summary,
    read_measurements,
    read_summary,
    read_table,
    write_measurement,
)
from robbench.results.reader import Damage
from robbench.results.schema import Count

__all__ = [
    "SERIES",
    "SeriesFile",
    "list_columns",
    "read_series",
    "read_series_files",
    "series_folder",
    "summarize_series",
    "write_series",
]

Kind = Literal["steps", "training", "students"]
SERIES: tuple[Kind, ...] = ("steps", "training", "students")
_MOST_BYTES = 2**30
_DERIVED = {"schema_version", "run_id", "identity", "n"}


def list_columns(kind: str, classes: int) -> dict[str, str]:
    """Return the columns of a table and their types. The columns before `sample` name the group of a row.

    steps: whether the image is classified correctly, and the number of steps until PGD broke it; -1 if it did not.
    training: the logits, and whether PGD broke the image; only images of the test set are attacked.
    students: whether the student is right about the image, and whether it is still right under PGD.
    """
    image = {"sample": "int64", "label": "int64"}
    if kind == "steps":
        return {"step_size": "float64", **image, "correct": "bool", "step": "int64"}
    if kind == "students":
        return {"loss": "str", "iteration": "int64", **image, "correct": "bool", "robust": "bool"}
    logits = {f"logit_{k}": "float16" for k in range(classes)}
    return {"seed": "int64", "iteration": "int64", "split": "str", **image, "broken": "bool", **logits}


class SeriesFile(MeasurementFile):
    """The content of the summary."""

    measure: Kind
    classes: Count


def series_folder(root: Path, dataset: str, model: str, kind: str) -> Path:
    """Return the folder of a results tree that holds a series of a model."""
    return root / dataset / model / kind


def summarize_series(rows: pd.DataFrame, identity: dict[str, Any], described: dict[str, Any]) -> SeriesFile:
    """Compute the summary of a series.

    Args:
        rows: the table.
        identity: what the numbers depend on.
        described: the remaining fields of `SeriesFile`.

    Raises:
        ResultError: the groups of the table do not have the same images.
    """
    n = len(_list_samples(rows, str(described["measure"]), described["classes"]))
    return SeriesFile(schema_version=1, run_id=digest(identity), identity=identity, n=n, **described)


def _list_samples(rows: pd.DataFrame, kind: str, classes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the official indices of the test images. Every group of the table must have the same."""
    names = list(list_columns(kind, classes))
    keys = names[: names.index("sample")]
    samples: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = {}
    for key, group in rows.groupby(keys, sort=False):
        split = str(key[-1]) if "split" in keys else "test"
        mine = group["sample"].to_numpy()
        if not np.array_equal(samples.setdefault(split, mine), mine):
            raise ResultError(f"The group {key} of a table of {kind} has other images than the first one.")
    if "test" not in samples:
        raise ResultError(f"A table of {kind} has no test image.")
    return np.asarray(samples["test"], np.int64)


def write_series(folder: Path, file: SeriesFile, rows: pd.DataFrame) -> SeriesFile:
    """Write a series, its summary last, and return the summary with the digest of the table."""
    summary, table = _paths(folder, file.measure)
    columns = list_columns(file.measure, file.classes)
    content = encode_rows(rows[list(columns)].astype(columns))
    return write_measurement(summary, _MOST_BYTES, file, {table.name: content})


def read_series(folder: Path) -> tuple[SeriesFile, pd.DataFrame]:
    """Read a series. The summary must follow from the table, and the table must be the one that was written.

    Raises:
        ResultError: a file is missing, damaged or changed, or the summary does not follow.
    """
    summary, table = _paths(folder, folder.name)
    try:
        file = read_summary(summary, SeriesFile, [table.name], _MOST_BYTES)
        if file.measure != folder.name:
            raise ResultError(f"{summary} is a measurement of {file.measure}.")
        rows = read_table(table, _MOST_BYTES, list(list_columns(file.measure, file.classes).items()))
        described = {name: getattr(file, name) for name in SeriesFile.model_fields if name not in _DERIVED}
        again = summarize_series(rows, file.identity, described)
        check_summary(summary, table, file, again, _list_samples(rows, file.measure, file.classes))
        _check_values(table, file, rows)
    except (ResultError, ValueError) as error:
        command = advise_overwrite(f"measure {folder.name} --model {{}}", folder)
        raise ResultError(f"{error} Measure it again: {command}") from None
    return file, rows


def _check_values(table: Path, file: SeriesFile, rows: pd.DataFrame) -> None:
    """Refuse values that no series writes.

    Raises:
        ResultError: a label is no class, a logit is not finite, or an image is robust without being correct.
    """
    if file.measure == "training":
        logits = rows.filter(like="logit_").to_numpy(np.float64)
        wrong = rows["broken"] & ((rows["split"] == "train") | (logits.argmax(1) != rows["label"]))
        bad = not np.isfinite(logits).all() or bool(wrong.any())
    else:
        claimed = rows["step"] >= 0 if file.measure == "steps" else rows["robust"]
        bad = bool((claimed & ~rows["correct"]).any())
    if bad or not rows["label"].between(0, file.classes - 1).all():
        raise ResultError(f"{table} holds values that no measurement writes.")


def _paths(folder: Path, kind: str) -> tuple[Path, Path]:
    return folder / f"{kind}.json", folder / f"{kind}.parquet"


def read_series_files(root: Path) -> tuple[dict[tuple[str, str], tuple[SeriesFile, pd.DataFrame]], list[Damage]]:
    """Read all series of a results tree.

    Returns:
        (kind, `dataset/model`) -> summary and table, and the series that are damaged.
    """
    found: dict[tuple[str, str], tuple[SeriesFile, pd.DataFrame]] = {}
    damaged = []
    for kind in SERIES:
        mine, broken = read_measurements(root, kind, f"{kind}.json", read_series)
        found.update({(kind, name): content for name, content in mine.items()})
        damaged += broken
    return found, damaged
