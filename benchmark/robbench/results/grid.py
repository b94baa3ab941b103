"""The records of a run as arrays [sample, attack]. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robbench.core.errors import ResultError
from robbench.core.types import Status

__all__ = ["Grid"]

_CODES = {str(status): code for code, status in enumerate(Status)}


@dataclass(frozen=True, eq=False)
class Grid:
    """The records of n samples under k attacks. Of a record that is stored twice, the first counts.

    Attributes:
        samples: official indices in the order of the records, [n].
        row: position of each record in the frame, [n, k]; -1 where there is none.
        status: code of each status, [n, k]; -1 where there is no record (see `has`).
        unknown: whether each row of the frame has an attack or a status that is not known.
        double: whether a row before it has the same sample and attack.
    """

    samples: NDArray[np.int64]
    row: NDArray[np.int64]
    status: NDArray[np.int8]
    unknown: NDArray[np.bool_]
    double: NDArray[np.bool_]

    @classmethod
    def of(cls, rows: pd.DataFrame, attacks: Sequence[str]) -> Grid:
        """Arrange records.

        Args:
            rows: the records (`records.COLUMNS`).
            attacks: names of the attacks, in order.

        Raises:
            ResultError: most of the records are missing.
        """
        at, samples = pd.factorize(rows["sample"].to_numpy())
        attack = _encode(rows["attack"], {name: i for i, name in enumerate(attacks)})
        code = _encode(rows["status"], _CODES).astype(np.int8)
        known = np.flatnonzero((attack >= 0) & (code >= 0))
        if len(samples) * len(attacks) > 10 * len(rows) + 10_000:  # a hostile file must not fill the memory
            raise ResultError(
                f"outcomes.parquet holds {len(rows)} records of {len(samples)} samples under {len(attacks)} attacks; "
                "expected: one record per sample and attack."
            )
        row = np.full((len(samples), len(attacks)), -1, np.int64)
        backwards = known[::-1]  # where two are assigned to one place, the last assignment counts
        row[at[backwards], attack[backwards]] = backwards
        first = row[at[known], attack[known]] == known
        unknown, double = np.ones(len(rows), bool), np.zeros(len(rows), bool)
        unknown[known], double[known] = False, ~first
        status = np.where(row >= 0, code[row] if len(rows) else np.int8(-1), np.int8(-1))
        return cls(np.asarray(samples, np.int64), row, status, unknown, double)

    def has(self, status: Status) -> NDArray[np.bool_]:
        """Return which records have a status, [n, k]."""
        return np.asarray(self.status == _CODES[str(status)])

    @property
    def lost(self) -> NDArray[np.bool_]:
        """Whether each record is misclassified or broken, [n, k]."""
        return self.has(Status.MISCLASSIFIED) | self.has(Status.BROKEN)

    def sum(self, values: pd.Series[Any]) -> NDArray[Any]:
        """Sum a column of the frame over the samples, [k]."""
        column = np.append(values.to_numpy(), values.to_numpy()[:1] * 0)  # the place -1 adds nothing
        total: NDArray[Any] = column[self.row].sum(axis=0)
        return total


def _encode(values: pd.Series[str], codes: Mapping[str, int]) -> NDArray[np.int64]:
    """Replace names by their codes; -1 for a name that has none."""
    place, names = pd.factorize(values)
    return np.array([*(codes.get(name, -1) for name in names), -1], np.int64)[place]  # a null has the place -1
