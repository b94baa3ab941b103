"""The files of the linear model's measurements. Imports no torch.

```
results/<dataset>/<model>/linear/linear.json          the summary (`LinearFile`)
results/<dataset>/<model>/linear/classes.parquet      one row per image and class (`CLASSES`)
results/<dataset>/<model>/linear/activations.parquet  one row per neuron of the last two layers (`ACTIVATIONS`)
```
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import AfterValidator, Field

from robbench.core.errors import ResultError
from robbench.core.files import digest, write_atomically
from robbench.core.parquet import encode_rows, read_flat_table
from robbench.core.words import advise_overwrite
from robbench.linear.theory import QUANTITIES, Linearization
from robbench.results.measurement import check_summary, digest_table, read_measurements
from robbench.results.reader import Damage
from robbench.results.schema import Accuracy, Answers, Component, Count, StrictModel, dump_sealed, read_validated
from robbench.results.summary import make_accuracy

__all__ = [
    "ACTIVATIONS",
    "CLASSES",
    "FOLDER",
    "LINEAR_VERSION",
    "LinearFile",
    "linear_folder",
    "read_activations",
    "read_linear",
    "read_linear_files",
    "read_linearization",
    "summarize_linear",
    "write_linear",
]

FOLDER = "linear"
_FILES = ("classes.parquet", "activations.parquet")
_MEASURED_FLAGS = ("zero_gradients", "nonfinite")  # flags that follow from classes.parquet
_KEPT = (  # fields that do not follow from other data
    "model", "dataset", "total", "forwards", "backwards", "seconds", "lanes", "hardware", "versions", "date", "files",
    "answers",
)  # fmt: skip
_MOST_BYTES = 2**31
LINEAR_VERSION = 1  # increased whenever a measurement or the meaning of a number changes

CLASSES = {
    "sample": "int64",  # official index
    "label": "int64",  # true class
    "class": "int64",  # the class k of this row
    "logit": "float32",  # z_k
    "gradient": "float32",  # ‖∇z_k‖_1
    "gradient_gap": "float32",  # ‖∇z_y − ∇z_k‖_1; 0 at k = y
    "cosine": "float32",  # cosine of the angle between ∇z_y and ∇z_k; NaN if one of them is zero
}
"""The columns of classes.parquet, in order."""

ACTIVATIONS = {
    "layer": "str",  # penultimate: the input of the last linear layer; logits: its output
    "neuron": "int64",
    "mean": "float64",  # mean of |activation| over the images
    "active": "float64",  # share of the images with an activation other than 0
}
"""The columns of activations.parquet, in order."""


def _check_medians(medians: dict[str, float | None]) -> dict[str, float | None]:
    if missing := set(QUANTITIES) - set(medians):
        raise ValueError(f"no median of {', '.join(sorted(missing))} given; expected: {', '.join(QUANTITIES)}")
    return medians


class LinearFile(StrictModel):
    """The content of linear.json. Its numbers are computed from classes.parquet."""

    schema_version: Literal[1]
    run_id: str
    """SHA-256 of `identity`. Batch width, device and number of images are not part of the identity."""
    model: Component
    dataset: Component
    n: Count
    """Number of images: the first n of the test set."""
    total: Count
    """Number of images of the whole test set."""
    classes: Count
    """Number of logits, K."""
    clean_accuracy: Accuracy
    medians: Annotated[dict[str, float | None], AfterValidator(_check_medians)]
    """Medians over the images of `QUANTITIES` at the nearest class. null if the median is not finite."""
    flags: dict[str, str]
    """Problems that make the numbers doubtful: name of the problem -> sentence."""
    identity: dict[str, Any]
    """What the numbers depend on."""
    forwards: int
    """Forward passes, summed over images."""
    backwards: int
    """Backward passes, summed over images."""
    seconds: float
    lanes: int
    hardware: str
    versions: dict[str, str]
    date: str
    """UTC, ISO 8601."""
    answers: Answers = Field(default_factory=list)
    """As in result.json; empty in files of older versions."""
    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of classes.parquet and activations.parquet. Empty in files of older versions."""

    @property
    def is_always_sealed(self) -> bool:
        """Versions that name the digests seal."""
        return bool(self.files)


def linear_folder(root: Path, dataset: str, model: str) -> Path:
    """Return the folder of a results tree that holds a model's measurement."""
    return root / dataset / model / FOLDER


def summarize_linear(
    measured: Linearization, identity: dict[str, Any], flags: dict[str, str], described: dict[str, Any]
) -> LinearFile:
    """Compute the summary of a measurement.

    Args:
        measured: the measured logits and gradients.
        identity: what the numbers depend on.
        flags: problems with the model's outputs: name of the problem -> sentence.
        described: the remaining fields of `LinearFile`.
    """
    correct = int((measured.logits.argmax(1) == measured.label).sum())
    medians = {name: float(np.median(measured.take_at_nearest(name))) for name in QUANTITIES}
    return LinearFile(
        schema_version=1,
        run_id=digest(identity),
        identity=identity,
        n=len(measured),
        classes=measured.logits.shape[1],
        clean_accuracy=make_accuracy(correct, len(measured)),
        medians={k: float(f"{v:.6g}") if np.isfinite(v) else None for k, v in medians.items()},
        flags=flags | _find_flags(measured),
        **described,
    )


def _find_flags(measured: Linearization) -> dict[str, str]:
    flags = {}
    gap = measured.take_pairs("gradient_gap")
    if zero := int((gap == 0).sum()):
        flags["zero_gradients"] = (
            f"In {zero} of {len(gap)} pairs of an image and a wrong class the gradient gap is exactly zero, so Eq. 4 "
            "calls them robust at any radius. Dead gradients are a sign of masking, not of robustness."
        )
    if nonfinite := int((~np.isfinite(gap)).sum()):
        flags["nonfinite"] = (
            f"{nonfinite} of {len(gap)} gradient gaps are NaN or infinite; these images count as broken."
        )
    return flags


def write_linear(folder: Path, file: LinearFile, measured: Linearization, activations: pd.DataFrame) -> LinearFile:
    """Write a measurement and return its summary with the digests of the files.

    The summary is written last, so that a summary on disk means a complete measurement.
    """
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
    write_atomically(folder / "classes.parquet", encode_rows(pd.DataFrame(columns).astype(CLASSES)))
    write_atomically(folder / "activations.parquet", encode_rows(activations.astype(ACTIVATIONS)))
    file = file.model_copy(update={"files": {name: digest_table(folder / name, _MOST_BYTES) for name in _FILES}})
    write_atomically(folder / "linear.json", dump_sealed(file))
    return file


def read_linear_files(root: Path) -> tuple[dict[str, LinearFile], list[Damage]]:
    """Read the summaries of all measurements of a results tree.

    Returns:
        `dataset/model` -> summary, sorted by name, and the measurements that are damaged.
    """
    found, damaged = read_measurements(root, FOLDER, "linear.json", lambda folder: (read_linear(folder), None))
    return {name: file for name, (file, _) in found.items()}, damaged


def read_linear(folder: Path) -> LinearFile:
    """Read the summary of a measurement. It must follow from classes.parquet.

    Raises:
        ResultError: a file is missing or damaged, or the summary does not follow.
    """
    path = folder / "linear.json"
    try:
        file = read_validated(path, LinearFile, 2**26)
        for name, expected in file.files.items():
            if name not in _FILES or digest_table(folder / name, _MOST_BYTES) != expected:
                raise ResultError(f"{folder / name}: not as it was written (SHA-256).")
        measured = read_linearization(folder)
        described = {name: getattr(file, name) for name in _KEPT}
        flags = {name: text for name, text in file.flags.items() if name not in _MEASURED_FLAGS}
        again = summarize_linear(measured, file.identity, flags, described)
        check_summary(path, folder / _FILES[0], file, again, measured.sample)
    except (ResultError, ValueError) as error:
        command = advise_overwrite("measure linear --model {}", folder)
        raise ResultError(f"{error} Measure it again: {command}") from None
    return file


def read_linearization(folder: Path) -> Linearization:
    """Read the measured logits and gradients.

    Raises:
        ResultError: the file cannot be read, or does not hold one row for every image and class.
    """
    path = folder / "classes.parquet"
    rows = _read_table(path, CLASSES)
    k = int(rows["class"].max()) + 1 if len(rows) else 0
    n = len(rows) // max(k, 1)
    samples = rows["sample"].to_numpy()[::k] if k else rows["sample"].to_numpy()
    whole = n and len(rows) == n * k and np.array_equal(rows["class"], np.tile(np.arange(k), n))
    if not whole or any((rows[c] != np.repeat(rows[c].to_numpy()[::k], k)).any() for c in ("sample", "label")):
        raise ResultError(f"{path} does not hold one row per image and class. Measure it again with --overwrite.")

    if not rows["label"].between(0, k - 1).all():
        raise ResultError(f"{path} holds a label that is no class; the classes are 0 to {k - 1}.")

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
    """Read the activations of the last two layers: one row per neuron, with the columns of `ACTIVATIONS`.

    Raises:
        ResultError: the file cannot be read, or has other columns.
    """
    return _read_table(folder / "activations.parquet", ACTIVATIONS)


def _read_table(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    try:
        # The metadata of pandas could turn columns into an index or change their types.
        frame = read_flat_table(path, _MOST_BYTES).to_pandas(ignore_metadata=True)
        rows: pd.DataFrame = frame.astype({name: kind for name, kind in columns.items() if name in frame})
    except Exception as error:  # a damaged or hostile file can make the reader raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ResultError(f"{path} cannot be read ({reason}). Measure it again with --overwrite.") from None
    if list(rows.columns) != list(columns):
        raise ResultError(
            f"{path} has the columns {list(rows.columns)}; expected {list(columns)}. Measure it again with --overwrite."
        )
    return rows
