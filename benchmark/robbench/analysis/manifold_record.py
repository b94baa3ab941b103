"""The files of stored manifold geometry (MFTMA). Imports no torch.

```
results/<dataset>/<model>/manifolds/manifolds.json     the summary (`ManifoldsFile`)
results/<dataset>/<model>/manifolds/manifolds.parquet  one row per layer, kind and image (`COLUMNS`)
```
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

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
from robbench.results.schema import Answers, Count, StrictModel

__all__ = [
    "COLUMNS",
    "KINDS",
    "MANIFOLDS_VERSION",
    "LayerGeometry",
    "ManifoldsFile",
    "manifolds_folder",
    "read_manifolds",
    "read_manifolds_files",
    "summarize_manifolds",
    "write_manifolds",
]

FOLDER = "manifolds"
MANIFOLDS_VERSION = 1  # increased whenever a measurement or the meaning of a number changes
KINDS = ("clean", "adversarial")
COLUMNS = {
    "layer": "int64",  # place of the layer in the summary; 0 are the pixels
    "kind": "str",  # clean: random points of the ball; adversarial: final points of PGD from random points of the ball
    "sample": "int64",  # official index of the image
    "cost": "float64",  # 1 / capacity of the manifold of this image
    "radius": "float64",
    "dimension": "float64",
}
"""The columns of manifolds.parquet, in order."""
_SUMMARY, _TABLE = "manifolds.json", "manifolds.parquet"
_MOST_BYTES = 2**28
_MEANS = ("cost", "radius", "dimension")
_DERIVED = {"schema_version", "run_id", "identity", "n", "layers"}


class LayerGeometry(StrictModel):
    """The geometry of all manifolds of one kind in one layer. Capacity, radius and dimension follow from the table."""

    layer: str
    """Place and type of the layer, such as `2 ReLU`; `0 pixels` are the images."""
    kind: Literal["clean", "adversarial"]
    features: Count
    """Number of features of the layer."""
    cost: float
    """Mean of 1 / capacity over the manifolds. The capacity of all together is 1 / cost."""
    radius: float
    dimension: float
    correlation: Annotated[float, Field(ge=0, le=1 + 1e-9)]
    """Mean |cosine| between the centres."""
    removed: Annotated[int, Field(ge=0)]
    """Number of common directions of the centres that were projected out."""
    simulated: Annotated[float, Field(gt=0)] | None
    """Simulated capacity; null if the features separate fewer than half of the labels."""


class ManifoldsFile(MeasurementFile):
    """The content of manifolds.json. Its means are computed from manifolds.parquet."""

    n: Count
    """Number of images, so of manifolds: the first n of the test set."""
    layers: Annotated[list[LayerGeometry], Field(min_length=1)]
    """Clean and adversarial, layer by layer."""
    answers: Answers
    """As in result.json."""


def manifolds_folder(root: Path, dataset: str, model: str) -> Path:
    """Return the folder of a results tree that holds the manifold geometry of a model."""
    return root / dataset / model / FOLDER


def summarize_manifolds(
    rows: pd.DataFrame, layers: list[LayerGeometry], identity: dict[str, Any], described: dict[str, Any]
) -> ManifoldsFile:
    """Compute the summary of a measurement.

    Args:
        rows: the table, with `COLUMNS`, in the order of the layers.
        layers: the layers. Their means are replaced by those of the table.
        identity: what the numbers depend on.
        described: the remaining fields of `ManifoldsFile`.
    """
    n = len(rows) // len(layers)
    columns = {name: rows[name].to_numpy().reshape(len(layers), n) for name in _MEANS}
    filled = [  # fsum rounds once, so that every machine finds the same means
        geometry.model_copy(update={name: math.fsum(values[i]) / n for name, values in columns.items()})
        for i, geometry in enumerate(layers)
    ]
    return ManifoldsFile(
        schema_version=1,
        run_id=digest(identity),
        identity=identity,
        n=n,
        layers=filled,
        **described,
    )


def write_manifolds(folder: Path, file: ManifoldsFile, rows: pd.DataFrame) -> ManifoldsFile:
    """Write a measurement and return its summary with the digest of the table (`write_measurement`)."""
    table = encode_rows(rows.astype(COLUMNS))
    return write_measurement(folder / _SUMMARY, _MOST_BYTES, file, {_TABLE: table})


def read_manifolds(folder: Path) -> tuple[ManifoldsFile, pd.DataFrame]:
    """Read a measurement. The summary must follow from the table, and the table must be the one that was written.

    Raises:
        ResultError: a file is missing, damaged or changed, or the summary does not follow.
    """
    path = folder / _SUMMARY
    try:
        file = read_summary(path, ManifoldsFile, [_TABLE], _MOST_BYTES)
        rows = _read_table(folder / _TABLE, file)
        described = {name: getattr(file, name) for name in ManifoldsFile.model_fields if name not in _DERIVED}
        again = summarize_manifolds(rows, file.layers, file.identity, described)
        sample = rows["sample"].to_numpy()[: file.n]
        check_summary(path, folder / _TABLE, file, again, sample)
    except (ResultError, ValueError) as error:
        command = advise_overwrite("measure manifolds --model {}", folder)
        raise ResultError(f"{error} Measure it again: {command}") from None
    return file, rows


def read_manifolds_files(root: Path) -> tuple[dict[str, tuple[ManifoldsFile, pd.DataFrame]], list[Damage]]:
    """Read the manifold geometry of all models of a results tree.

    Returns:
        `dataset/model` -> summary and table, sorted by name, and the measurements that are damaged.
    """
    return read_measurements(root, FOLDER, _SUMMARY, read_manifolds)


def _read_table(path: Path, file: ManifoldsFile) -> pd.DataFrame:
    """Read the table.

    Raises:
        ResultError: it cannot be read, has other columns or rows, or holds values that no measurement writes.
    """
    rows = read_table(path, _MOST_BYTES, list(COLUMNS.items()))
    layers = len(file.layers) // len(KINDS)
    if [g.kind for g in file.layers] != list(KINDS) * layers or len(rows) != len(file.layers) * file.n:
        raise ResultError(f"{path} has {len(rows)} rows for {len(file.layers)} kinds of manifolds of {file.n} images.")
    sample = rows["sample"].to_numpy()[: file.n]
    expected = [np.repeat(np.arange(layers), len(KINDS) * file.n), np.tile(sample, len(file.layers))]
    kinds = np.tile(np.repeat(KINDS, file.n), layers)
    in_order = (rows["layer"] == expected[0]) & (rows["sample"] == expected[1]) & (rows["kind"] == kinds)
    if not in_order.all():
        raise ResultError(f"{path} does not hold each image once for each kind and layer, in order.")
    values = rows[list(_MEANS)].to_numpy()
    if not np.isfinite(values).all() or (values < 0).any():
        raise ResultError(f"{path} holds a value that is negative or not finite.")
    return rows
