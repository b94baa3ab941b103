"""The files of stored loss gradients and large perturbations. Imports no torch.

```
results/<dataset>/<model>/gradients/gradients.json     the summary (`GradientsFile`)
results/<dataset>/<model>/gradients/gradients.parquet  one row per image, with `COLUMNS`
results/<dataset>/<model>/gradients/pictures.parquet   one row per pixel of each picture: first image of each class
```
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
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
from robbench.results.schema import Accuracy, Answers, Count
from robbench.results.summary import make_accuracy

__all__ = [
    "COLUMNS",
    "GRADIENTS_VERSION",
    "KINDS",
    "STEPS",
    "GradientsFile",
    "Pictures",
    "gradients_folder",
    "read_gradients",
    "read_gradients_files",
    "summarize_gradients",
    "write_gradients",
]

FOLDER = "gradients"
GRADIENTS_VERSION = 1  # increased whenever a measurement or the meaning of a number changes
STEPS = 6  # points on the way from the image to its L2 example, with both ends
KINDS = ("image", "gradient", "L2", "Linf")
"""The pictures of an image: itself, the loss gradient at ±3σ (127 is 0), and its large perturbations."""
_MEANS = ("alignment", "roughness", "sparsity", "distance_Linf", *(f"distance_{k}" for k in range(STEPS)))
COLUMNS = {
    "sample": "int64",  # official index of the image
    "label": "int64",
    "alignment": "float32",  # cosine between the negative loss gradient and the class's mean image minus the others'
    "roughness": "float32",  # differences of neighbouring pixels of the gradient; white noise has 1
    "sparsity": "float32",  # Hoyer's, of the gradient
    "L2": "int64",  # the model's answer to the L2 example
    "Linf": "int64",  # the model's answer to the Linf example
    "near_Linf": "int64",  # label of the training image that is nearest to the Linf example
    "distance_Linf": "float32",  # its L2 distance
    **{f"near_{k}": "int64" for k in range(STEPS)},  # the same on the way to the L2 example
    **{f"distance_{k}": "float32" for k in range(STEPS)},  # L2 distance from the nearest training image on the way
}
"""The columns of gradients.parquet, in order."""
_PIXELS = {"shown": "int64", "kind": "str", "level": "uint8"}
_SUMMARY, _TABLE, _PICTURES = "gradients.json", "gradients.parquet", "pictures.parquet"
_MOST_BYTES = 2**28
_DERIVED = {"schema_version", "run_id", "identity", "n", "means", "judge"}

Pictures = NDArray[np.uint8]
"""Levels of the pictures of m images, [m, len(KINDS), C, H, W]."""


class GradientsFile(MeasurementFile):
    """The content of gradients.json. Its means are computed from gradients.parquet."""

    means: dict[str, float]
    """Means over the images."""
    judge: Accuracy
    """How often the nearest training image of an unchanged image has its label."""
    shape: Annotated[list[Count], Field(min_length=3, max_length=3)]
    """Shape of an image, (C, H, W)."""
    shown: Annotated[list[int], Field(min_length=1)]
    """Official indices of the images in pictures.parquet, the first of each class."""
    answers: Answers
    """As in result.json."""


def gradients_folder(root: Path, dataset: str, model: str) -> Path:
    """Return the folder of a results tree that holds the gradients of a model."""
    return root / dataset / model / FOLDER


def summarize_gradients(rows: pd.DataFrame, identity: dict[str, Any], described: dict[str, Any]) -> GradientsFile:
    """Compute the summary of a measurement.

    Args:
        rows: the table, with `COLUMNS`.
        identity: what the numbers depend on.
        described: the remaining fields of `GradientsFile`.
    """
    n = len(rows)
    return GradientsFile(
        schema_version=1,
        run_id=digest(identity),
        identity=identity,
        n=n,
        means={name: math.fsum(rows[name]) / n for name in _MEANS},  # fsum rounds once, so every machine agrees
        judge=make_accuracy(int((rows["near_0"] == rows["label"]).sum()), n),
        **described,
    )


def write_gradients(folder: Path, file: GradientsFile, rows: pd.DataFrame, pictures: Pictures) -> GradientsFile:
    """Write a measurement and return its summary with the digests of both tables. The summary is written last."""
    levels = pd.DataFrame(
        {
            "shown": np.repeat(np.arange(len(pictures)), pictures[0].size),
            "kind": np.tile(np.repeat(KINDS, pictures[0, 0].size), len(pictures)),
            "level": pictures.ravel(),
        }
    )
    tables = {
        name: encode_rows(table.astype(columns))
        for name, table, columns in ((_TABLE, rows, COLUMNS), (_PICTURES, levels, _PIXELS))
    }
    return write_measurement(folder / _SUMMARY, _MOST_BYTES, file, tables)


def read_gradients(folder: Path) -> tuple[GradientsFile, tuple[pd.DataFrame, Pictures]]:
    """Read a measurement. The summary must follow from the table, and both tables must be those that were written.

    Raises:
        ResultError: a file is missing, damaged or changed, or the summary does not follow.
    """
    path = folder / _SUMMARY
    try:
        file = read_summary(path, GradientsFile, [_TABLE, _PICTURES], _MOST_BYTES)
        rows = read_table(folder / _TABLE, _MOST_BYTES, list(COLUMNS.items()))
        if not np.isfinite(rows[list(_MEANS)].to_numpy()).all():
            raise ResultError(f"{folder / _TABLE} holds a number that is not finite.")
        described = {name: getattr(file, name) for name in GradientsFile.model_fields if name not in _DERIVED}
        again = summarize_gradients(rows, file.identity, described)
        check_summary(path, folder / _TABLE, file, again, rows["sample"].to_numpy())
        pictures = _read_pictures(folder / _PICTURES, file)
    except (ResultError, ValueError) as error:
        command = advise_overwrite("measure gradients --model {}", folder)
        raise ResultError(f"{error} Measure it again: {command}") from None
    return file, (rows, pictures)


def read_gradients_files(
    root: Path,
) -> tuple[dict[str, tuple[GradientsFile, tuple[pd.DataFrame, Pictures]]], list[Damage]]:
    """Read the gradients of all models of a results tree.

    Returns:
        `dataset/model` -> summary, table and pictures, sorted by name, and the measurements that are damaged.
    """
    return read_measurements(root, FOLDER, _SUMMARY, read_gradients)


def _read_pictures(path: Path, file: GradientsFile) -> Pictures:
    """Read the pictures.

    Raises:
        ResultError: the file cannot be read, or does not hold every pixel of each picture in order.
    """
    rows = read_table(path, _MOST_BYTES, list(_PIXELS.items()))
    size, shown = math.prod(file.shape), len(file.shown)
    kinds = np.tile(np.repeat(KINDS, size), shown)
    places = np.repeat(np.arange(shown), len(KINDS) * size)
    if len(rows) != len(kinds) or (rows["kind"] != kinds).any() or (rows["shown"] != places).any():
        raise ResultError(f"{path} does not hold {shown} images of {size} pixels with {len(KINDS)} pictures each.")
    return rows["level"].to_numpy().reshape(shown, len(KINDS), *file.shape)
