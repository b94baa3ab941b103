"""The files of a study: numbers of a family of small trainings. Imports no torch.

```
results/<dataset>/<study>/study/study.json     the summary (`StudyFile`)
results/<dataset>/<study>/study/study.parquet  one row per number: kind, eps, at, draw, value
```

`pair` is the linear classifier of two classes, `networks` the family of networks. Both have the same files.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from robbench.core.errors import ResultError
from robbench.core.files import digest
from robbench.core.parquet import encode_rows
from robbench.results.differences import list_differences
from robbench.results.measurement import (
    SealedFile,
    read_measurements,
    read_summary,
    read_table,
    write_measurement,
)
from robbench.results.reader import Damage
from robbench.results.schema import Component, Count

__all__ = ["COLUMNS", "STUDY_VERSION", "StudyFile", "read_studies", "read_study", "study_folder", "write_study"]

FOLDER = "study"
STUDY_VERSION = 1  # increased whenever a training or the meaning of a number changes
COLUMNS = {
    "kind": "str",  # pair: correlation, weight, weak, clean, robust; networks: Linf, L2
    "eps": "float64",  # radius of training
    "at": "int64",  # pair: number of the pixel, or how many pixels were used; networks: number of training images
    "draw": "int64",  # pair: bootstrap sample, 0 for the images as they are; networks: seed
    "value": "float64",
}
"""The columns of study.parquet, in order."""
_SUMMARY, _TABLE = "study.json", "study.parquet"
_MOST_BYTES = 2**26
_DERIVED = {"schema_version", "run_id", "identity", "rows", "means"}


class StudyFile(SealedFile):
    """The content of study.json. Its means are computed from study.parquet."""

    schema_version: Literal[1]
    run_id: str
    """SHA-256 of `identity`."""
    model: Component
    """Name of the study, such as `tsipras2019-pair`."""
    dataset: Component
    n: Count
    """Number of test images."""
    rows: Count
    """Number of rows of the table."""
    means: dict[str, float]
    """Mean of the values of each kind."""
    identity: dict[str, Any]
    """What the numbers depend on."""
    seconds: float
    hardware: str
    versions: dict[str, str]
    date: str
    """UTC, ISO 8601."""

    @property
    def total(self) -> int:
        """Number of test images; a study uses all of them."""
        return self.n


def study_folder(root: Path, dataset: str, study: str) -> Path:
    """Return the folder of a results tree that holds a study."""
    return root / dataset / study / FOLDER


def _summarize(rows: pd.DataFrame, identity: dict[str, Any], described: dict[str, Any]) -> StudyFile:
    # fsum rounds once, so that every machine finds the same means.
    means = {str(kind): math.fsum(own["value"]) / len(own) for kind, own in rows.groupby("kind")}
    run_id = digest(identity)
    return StudyFile(schema_version=1, run_id=run_id, identity=identity, rows=len(rows), means=means, **described)


def write_study(folder: Path, rows: pd.DataFrame, identity: dict[str, Any], described: dict[str, Any]) -> StudyFile:
    """Write a study and return its summary with the digest of the table.

    Args:
        folder: where to write it.
        rows: the numbers, with `COLUMNS`.
        identity: what the numbers depend on.
        described: the remaining fields of `StudyFile` except `files`.
    """
    rows = rows.astype(COLUMNS)
    file = _summarize(rows, identity, {**described, "files": {}})
    return write_measurement(folder / _SUMMARY, _MOST_BYTES, file, {_TABLE: encode_rows(rows)})


def read_study(folder: Path) -> tuple[StudyFile, pd.DataFrame]:
    """Read a study. The summary must follow from the table, and the table must be the one that was written.

    Raises:
        ResultError: a file is missing, damaged or changed, or the summary does not follow.
    """
    path = folder / _SUMMARY
    try:
        file = read_summary(path, StudyFile, [_TABLE], _MOST_BYTES)
        rows = read_table(folder / _TABLE, _MOST_BYTES, list(COLUMNS.items()))
        if not np.isfinite(rows[["eps", "value"]].to_numpy()).all():
            raise ResultError(f"{folder / _TABLE} holds a number that is not finite.")
        described = {name: getattr(file, name) for name in StudyFile.model_fields if name not in _DERIVED}
        again = _summarize(rows, file.identity, described)
        for field, given, derived in list_differences("", file.model_dump(), again.model_dump()):
            raise ResultError(f"{path}: {field} is {given!r}; {derived!r} follows from {_TABLE}.")
    except (ResultError, ValueError) as error:
        raise ResultError(f"{error} Train it again: robbench train --family NAME --restart.") from None
    return file, rows


def read_studies(root: Path) -> tuple[dict[str, tuple[StudyFile, pd.DataFrame]], list[Damage]]:
    """Read the studies of a results tree.

    Returns:
        `dataset/study` -> summary and table, sorted by name, and the studies that are damaged.
    """
    return read_measurements(root, FOLDER, _SUMMARY, read_study)
