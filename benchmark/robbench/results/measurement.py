"""What stored measurements share: the table is as it was written, and the summary follows from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robbench.core.errors import ResultError
from robbench.core.files import digest_file, write_atomically
from robbench.core.parquet import read_flat_table
from robbench.results.differences import list_differences
from robbench.results.reader import Damage
from robbench.results.schema import Answers, Component, Count, StrictModel, dump_sealed, read_validated
from robbench.results.selection import describe_selection, find_selection_error

__all__ = [
    "MeasurementFile",
    "SealedFile",
    "check_summary",
    "digest_table",
    "read_measurements",
    "read_summary",
    "read_table",
    "write_measurement",
]

_MOST_SUMMARY_BYTES = 2**24


class _Summary(Protocol):
    """The fields of a summary that the check reads."""

    @property
    def n(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def model(self) -> str: ...
    @property
    def dataset(self) -> str: ...
    @property
    def identity(self) -> dict[str, Any]: ...
    def model_dump(self) -> dict[str, Any]: ...


class SealedFile(StrictModel):
    """A summary with the digests of its tables."""

    files: dict[str, str]
    """SHA-256 of each table."""

    @property
    def is_always_sealed(self) -> bool:
        """Every version seals."""
        return True


class MeasurementFile(SealedFile):
    """The fields that summaries of measurements of a model share."""

    schema_version: Literal[1]
    run_id: str
    """SHA-256 of `identity`. Batch width, device and number of images are not part of the identity."""
    model: Component
    dataset: Component
    n: Count
    """Number of images: the first n of the test set."""
    total: Count
    """Number of images of the whole test set."""
    flags: dict[str, str]
    """Problems that make the numbers doubtful: name of the problem -> sentence."""
    identity: dict[str, Any]
    """What the numbers depend on."""
    seconds: float
    lanes: int
    hardware: str
    versions: dict[str, str]
    date: str
    """UTC, ISO 8601."""
    answers: Answers | None
    """As in result.json; null where the measurement trains its own networks."""


_File = TypeVar("_File", bound=_Summary)
_Model = TypeVar("_Model", bound=SealedFile)
_Content = TypeVar("_Content")


def check_summary(summary: Path, table: Path, file: _Summary, again: _Summary, sample: NDArray[np.int64]) -> None:
    """Check that a summary follows from its table, and that the table holds exactly the first images of the test set.

    Args:
        summary: where `file` was read.
        table: where the measurements were read.
        file: the summary as it is stored.
        again: the summary that was made anew of the table.
        sample: official indices in the table.

    Raises:
        ResultError: they do not fit. The message names the file and the field.
    """
    for field, given, derived in list_differences("", file.model_dump(), again.model_dump()):
        raise ResultError(f"{summary}: {field} is {given!r}; {derived!r} follows from {table.name}.")
    error = find_selection_error(
        sample,
        selection=describe_selection(file.n, file.total, None),
        sample_seed=None,
        dataset=file.dataset,
        data=file.identity.get("data"),
    )
    if error:
        raise ResultError(f"{table}: {error}.")


def digest_table(path: Path, most: int) -> str:
    """Return the SHA-256 of a table of at most `most` bytes.

    Raises:
        ResultError: it cannot be read, is no regular file, or is larger.
    """
    try:
        return digest_file(path, most)
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror or error}.") from None


def read_table(path: Path, most: int, columns: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Read a table of at most `most` bytes with exactly these columns: names and types, in order.

    Raises:
        ResultError: it cannot be read, or has other columns.
    """
    try:
        # The metadata of pandas could turn columns into an index or change their types.
        rows: pd.DataFrame = read_flat_table(path, most).to_pandas(ignore_metadata=True)
    except Exception as error:  # a damaged or hostile file can make the reader raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ResultError(f"{path} cannot be read ({reason}).") from None
    found = [(str(name), str(kind)) for name, kind in rows.dtypes.items()]
    if found != list(columns):
        raise ResultError(f"{path} has other columns or types: {sorted({*found} ^ {*columns})[:4]}.")
    return rows


def write_measurement(summary: Path, most: int, file: _Model, tables: Mapping[str, bytes]) -> _Model:
    """Write a measurement and return its summary with the digests of the tables.

    The summary is written last, so that a summary on disk means a complete measurement.

    Args:
        summary: where to write the summary.
        most: size limit of a table in bytes.
        file: the summary.
        tables: Parquet files beside the summary: name -> content.
    """
    summary.unlink(missing_ok=True)
    for name, content in tables.items():
        write_atomically(summary.with_name(name), content)
    digests = {name: digest_table(summary.with_name(name), most) for name in tables}
    file = file.model_copy(update={"files": digests})
    write_atomically(summary, dump_sealed(file))
    return file


def read_summary(summary: Path, kind: type[_Model], tables: Sequence[str], most: int) -> _Model:
    """Read a summary. The tables beside it must be those that were written.

    Raises:
        ResultError: a file is missing, damaged or changed.
    """
    file = read_validated(summary, kind, _MOST_SUMMARY_BYTES)
    for name in tables:
        if file.files.get(name) != digest_table(summary.with_name(name), most):
            raise ResultError(f"{summary.with_name(name)}: not as it was written (SHA-256).")
    return file


def read_measurements(
    root: Path, folder: str, summary: str, read: Callable[[Path], tuple[_File, _Content]]
) -> tuple[dict[str, tuple[_File, _Content]], list[Damage]]:
    """Read the measurements of one kind of all models of a results tree.

    Args:
        root: the results tree.
        folder: name of the folder of a measurement, in that of its model.
        summary: name of the summary's file.
        read: reads the measurement in a folder. Raises ResultError.

    Returns:
        `dataset/model` -> summary and content, sorted by path, and the measurements that are damaged.
    """
    found, damaged = {}, []
    for path in sorted(root.glob(f"*/*/{folder}/{summary}")):
        try:
            file, content = read(path.parent)
            if root / file.dataset / file.model / folder != path.parent:
                raise ResultError(f"{path} is the measurement of {file.dataset}/{file.model}.")
            found[f"{file.dataset}/{file.model}"] = file, content
        except ResultError as error:
            damaged.append(Damage.of(root, path.parent, error))
    return found, damaged
