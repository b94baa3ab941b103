"""The files of stored logits on clean and adversarial images. Imports no torch.

```
results/<dataset>/<model>/logits/logits.json     the summary (`LogitsFile`)
results/<dataset>/<model>/logits/logits.parquet  one row per image: sample, label, broken, clean_k, adversarial_k
```
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from robbench.analysis.logits import Booleans, Integers
from robbench.core.errors import ResultError
from robbench.core.files import digest
from robbench.core.parquet import encode_rows
from robbench.core.words import advise_overwrite
from robbench.linear.theory import Values
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
    "FOLDER",
    "LOGITS_VERSION",
    "LogitsFile",
    "StoredLogits",
    "logits_folder",
    "read_logits",
    "read_logits_files",
    "summarize_logits",
    "write_logits",
]

FOLDER = "logits"
LOGITS_VERSION = 1  # increased whenever a measurement or the meaning of a number changes
_SUMMARY, _TABLE = "logits.json", "logits.parquet"
_MOST_BYTES = 2**31
_DERIVED = {"schema_version", "run_id", "identity", "n", "classes", "clean_accuracy", "robust_accuracy"}


@dataclass(frozen=True, eq=False)
class StoredLogits:
    """Logits of n images without and with a perturbation.

    Attributes:
        sample: official index of each image, [n].
        label: true class, [n].
        broken: whether the attack broke the image; False for an image that is misclassified without an attack, [n].
        clean: logits of the image, [n, K].
        adversarial: logits at the break. Of an image that was not broken: those of the image itself, [n, K].
    """

    sample: Integers
    label: Integers
    broken: Booleans
    clean: Values
    adversarial: Values

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.sample)

    def take_first(self, n: int) -> StoredLogits:
        """Return the logits of the first n images."""
        return StoredLogits(self.sample[:n], self.label[:n], self.broken[:n], self.clean[:n], self.adversarial[:n])

    @property
    def correct(self) -> Booleans:
        """Whether each image is classified correctly without an attack, [n]."""
        return np.asarray(self.clean.argmax(1) == self.label)

    @property
    def robust(self) -> Booleans:
        """Whether each image is classified correctly and was not broken, [n]."""
        return self.correct & ~self.broken


class LogitsFile(MeasurementFile):
    """The content of logits.json. Its numbers are computed from logits.parquet."""

    classes: Count
    """Number of logits, K."""
    clean_accuracy: Accuracy
    robust_accuracy: Accuracy
    answers: Answers
    """As in result.json."""


def logits_folder(root: Path, dataset: str, model: str) -> Path:
    """Return the folder of a results tree that holds a model's logits."""
    return root / dataset / model / FOLDER


def summarize_logits(measured: StoredLogits, identity: dict[str, Any], described: dict[str, Any]) -> LogitsFile:
    """Compute the summary of a measurement.

    Args:
        measured: the logits.
        identity: what the numbers depend on.
        described: the remaining fields of `LogitsFile`.
    """
    n = len(measured)
    return LogitsFile(
        schema_version=1,
        run_id=digest(identity),
        identity=identity,
        n=n,
        classes=measured.clean.shape[1],
        clean_accuracy=make_accuracy(int(measured.correct.sum()), n),
        robust_accuracy=make_accuracy(int(measured.robust.sum()), n),
        **described,
    )


def _columns(classes: int) -> list[str]:
    return ["sample", "label", "broken", *(f"{kind}_{k}" for kind in ("clean", "adversarial") for k in range(classes))]


def write_logits(folder: Path, file: LogitsFile, measured: StoredLogits) -> LogitsFile:
    """Write a measurement and return its summary with the digest of the table (`write_measurement`)."""
    logits = np.hstack([measured.clean, measured.adversarial]).astype(np.float32)
    head = [measured.sample, measured.label, measured.broken]
    table = pd.DataFrame(dict(zip(_columns(file.classes), [*head, *logits.T], strict=True)))
    return write_measurement(folder / _SUMMARY, _MOST_BYTES, file, {_TABLE: encode_rows(table)})


def read_logits(folder: Path) -> tuple[LogitsFile, StoredLogits]:
    """Read a measurement. The summary must follow from the table, and the table must be the one that was written.

    Raises:
        ResultError: a file is missing, damaged or changed, or the summary does not follow.
    """
    path = folder / _SUMMARY
    try:
        file = read_summary(path, LogitsFile, [_TABLE], _MOST_BYTES)
        measured = _read_table(folder / _TABLE, file.classes)
        described = {name: getattr(file, name) for name in LogitsFile.model_fields if name not in _DERIVED}
        again = summarize_logits(measured, file.identity, described)
        check_summary(path, folder / _TABLE, file, again, measured.sample)
    except (ResultError, ValueError) as error:
        command = advise_overwrite("measure logits --model {}", folder)
        raise ResultError(f"{error} Measure it again: {command}") from None
    return file, measured


def read_logits_files(root: Path) -> tuple[dict[str, tuple[LogitsFile, StoredLogits]], list[Damage]]:
    """Read the logits of all models of a results tree.

    Returns:
        `dataset/model` -> summary and logits, sorted by name, and the measurements that are damaged.
    """
    return read_measurements(root, FOLDER, _SUMMARY, read_logits)


def _read_table(path: Path, classes: int) -> StoredLogits:
    """Read the table.

    Raises:
        ResultError: it cannot be read, has other columns, or holds values that no measurement writes.
    """
    kinds = ["int64", "int64", "bool", *["float32"] * (2 * classes)]
    rows = read_table(path, _MOST_BYTES, list(zip(_columns(classes), kinds, strict=True)))
    logits = rows.iloc[:, 3:].to_numpy(np.float64)
    measured = StoredLogits(
        rows["sample"].to_numpy(),
        rows["label"].to_numpy(),
        rows["broken"].to_numpy(),
        logits[:, :classes],
        logits[:, classes:],
    )
    if not rows["label"].between(0, classes - 1).all() or not np.isfinite(logits).all():
        raise ResultError(f"{path} holds a label that is no class, or a logit that is not finite.")
    moved = (measured.clean != measured.adversarial).any(1)
    fooled = measured.adversarial.argmax(1) != measured.label
    if (measured.broken & ~(measured.correct & fooled)).any() or (moved & ~measured.broken).any():
        raise ResultError(f"{path} calls an image broken whose logits are not, or moves one that is not broken.")
    return measured
