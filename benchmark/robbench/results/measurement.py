"""What the readers of stored measurements share: the table is as it was written, and the summary follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robbench.core.errors import ResultError
from robbench.core.files import digest_file
from robbench.results.differences import list_differences
from robbench.results.selection import describe_selection, find_selection_error

__all__ = ["check_summary", "digest_table"]


class _Summary(Protocol):
    """The fields of a summary that the check reads."""

    @property
    def n(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def dataset(self) -> str: ...
    @property
    def identity(self) -> dict[str, Any]: ...
    def model_dump(self) -> dict[str, Any]: ...


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
