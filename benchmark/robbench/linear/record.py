"""Measurements of the linear model on disk. Imports no torch.

```
results/<dataset>/<model>/linear/linear.json          the summary (`LinearFile`)
results/<dataset>/<model>/linear/classes.parquet      one row per image and class (`CLASSES`)
results/<dataset>/<model>/linear/activations.parquet  one row per neuron of the last two layers (`ACTIVATIONS`)
```
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import ValidationError

from robbench.core.errors import ResultError
from robbench.core.files import digest, write_atomically
from robbench.linear.theory import QUANTITIES, Linearization
from robbench.results.schema import Accuracy, StrictModel
from robbench.results.summary import make_accuracy

__all__ = [
    "ACTIVATIONS",
    "CLASSES",
    "FOLDER",
    "LINEAR_VERSION",
    "LinearFile",
    "linear_files",
    "linear_folder",
    "read_activations",
    "read_linear",
    "read_linearization",
    "summarize_linear",
    "write_linear",
]

FOLDER = "linear"
LINEAR_VERSION = 1  # raised when what is measured, or what its numbers mean, changes

CLASSES = {
    "sample": "int64",  # official index
    "label": "int64",  # true class
    "class": "int64",  # the class k that this row is about
    "logit": "float32",  # z_k
    "gradient": "float32",  # ‖∇z_k‖_1
    "gradient_gap": "float32",  # ‖∇z_y − ∇z_k‖_1; 0 at k = y
    "cosine": "float32",  # of the angle between ∇z_y and ∇z_k; NaN where one of them is zero
}
"""The columns of classes.parquet, in order."""

ACTIVATIONS = {
    "layer": "str",  # penultimate: what the last linear layer is given; logits: what it answers
    "neuron": "int64",
    "mean": "float64",  # of |activation| over the images
    "active": "float64",  # share of the images with an activation other than 0
}
"""The columns of activations.parquet, in order."""


class LinearFile(StrictModel):
    """linear.json. Its numbers are derived from classes.parquet, its run_id from `identity`."""

    schema_version: Literal[1]
    run_id: str
    """SHA-256 of `identity`: what was measured. Batch width, device and number of images are not part of it."""
    model: str
    dataset: str
    n: int
    """Number of images: the first n of the test set."""
    total: int
    """Images of the test set."""
    classes: int
    """Number of logits, K."""
    clean_accuracy: Accuracy
    medians: dict[str, float | None]
    """Over the images, at the class of the smallest L: logit_gap, gradient_gap, radius (L), cosine; null: no number."""
    flags: dict[str, str]
    """What a reader must know before trusting the numbers: name of the problem -> sentence."""
    identity: dict[str, Any]
    forwards: int
    """Forward passes, summed over images."""
    backwards: int
    seconds: float
    lanes: int
    hardware: str
    versions: dict[str, str]
    date: str
    """UTC, ISO 8601."""


def linear_folder(root: Path, dataset: str, model: str) -> Path:
    """Name the folder of a results tree that holds a model's measurement."""
    return root / dataset / model / FOLDER


def summarize_linear(
    measured: Linearization, identity: dict[str, Any], flags: dict[str, str], described: dict[str, Any]
) -> LinearFile:
    """Make the summary of a measurement.

    Args:
        measured: what was found.
        identity: what was measured.
        flags: what was noticed about the model's answers.
        described: the remaining fields of `LinearFile`.
    """
    right = int((measured.logits.argmax(1) == measured.label).sum())
    medians = {name: float(np.median(measured.at_nearest(name))) for name in QUANTITIES}
    return LinearFile(
        schema_version=1,
        run_id=digest(identity),
        identity=identity,
        n=len(measured),
        classes=measured.logits.shape[1],
        clean_accuracy=make_accuracy(right, len(measured)),
        medians={k: float(f"{v:.6g}") if np.isfinite(v) else None for k, v in medians.items()},
        flags=flags | _dead(measured),
        **described,
    )


def _dead(measured: Linearization) -> dict[str, str]:
    flags = {}
    gap = measured.of_pairs("gradient_gap")
    if dead := int((gap == 0).sum()):
        flags["zero_gradients"] = (
            f"In {dead} of {len(gap)} pairs of an image and a wrong class the gradient gap is exactly zero, so Eq. 4 "
            "calls them robust at any radius. Dead gradients are a sign of masking, not of robustness."
        )
    if bad := int((~np.isfinite(gap)).sum()):
        flags["nonfinite"] = f"{bad} of {len(gap)} gradient gaps are NaN or infinite; these images count as broken."
    return flags


def write_linear(folder: Path, file: LinearFile, measured: Linearization, activations: pd.DataFrame) -> None:
    """Write a measurement; the summary last, so that where it is, the rest is."""
    n, k = measured.logits.shape
    columns = {
        "sample": np.repeat(measured.sample, k),
        "label": np.repeat(measured.label, k),
        "class": np.tile(np.arange(k), n),
        "logit": measured.logits.ravel(),
        "gradient": measured.gradient.ravel(),
        "gradient_gap": measured.gradient_gap.ravel(),
        "cosine": measured.cosine.ravel(),
    }
    (folder / "linear.json").unlink(missing_ok=True)
    write_atomically(folder / "classes.parquet", pd.DataFrame(columns).astype(CLASSES).to_parquet(index=False))
    write_atomically(folder / "activations.parquet", activations.astype(ACTIVATIONS).to_parquet(index=False))
    text = json.dumps(file.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / "linear.json", text.encode())


def linear_files(root: Path) -> dict[str, LinearFile]:
    """Read the summary of every measurement below a results tree, by `dataset/model`, ordered.

    Raises:
        ResultError: one of them is damaged.
    """
    files = [read_linear(path.parent) for path in sorted(root.glob(f"*/*/{FOLDER}/linear.json"))]
    return {f"{file.dataset}/{file.model}": file for file in files}


def read_linear(folder: Path) -> LinearFile:
    """Read the summary of a measurement.

    Raises:
        ResultError: not a summary of this schema.
    """
    path = folder / "linear.json"
    try:
        return LinearFile.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ResultError(f"{path}: {said}. Measure it again: robbench measure linear.") from None


def read_linearization(folder: Path) -> Linearization:
    """Read what was found per image and class.

    Raises:
        ResultError: not readable, or not one row for every image and class.
    """
    path = folder / "classes.parquet"
    rows = _read(path, CLASSES)
    k = int(rows["class"].max()) + 1 if len(rows) else 0
    n = len(rows) // max(k, 1)
    samples = rows["sample"].to_numpy()[::k] if k else rows["sample"].to_numpy()
    if not n or len(rows) != n * k or not np.array_equal(rows["class"], np.tile(np.arange(k), n)):
        raise ResultError(f"{path} does not hold one row per image and class. Measure it again with --overwrite.")

    def grid(column: str) -> Any:
        return rows[column].to_numpy(np.float64).reshape(n, k)

    return Linearization(
        sample=samples,
        label=rows["label"].to_numpy()[::k],
        logits=grid("logit"),
        gradient=grid("gradient"),
        gradient_gap=grid("gradient_gap"),
        cosine=grid("cosine"),
    )


def read_activations(folder: Path) -> pd.DataFrame:
    """Read how active the neurons of the last two layers are.

    Raises:
        ResultError: not readable, or without the columns of `ACTIVATIONS`.
    """
    return _read(folder / "activations.parquet", ACTIVATIONS)


def _read(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    try:
        rows = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} cannot be read ({error}). Measure it again with --overwrite.") from None
    if list(rows.columns) != list(columns):
        raise ResultError(f"{path} has the columns {list(rows.columns)}; expected {list(columns)}.")
    return rows
