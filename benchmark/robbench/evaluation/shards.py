"""Commits the rows of a run to disk every few seconds, and puts them into a fixed order at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from robbench.results.adversarials import Points
from robbench.results.records import read_run_rows
from robbench.results.store import COLUMNS, RunStore

__all__ = ["NOT_ATTACKED", "Shards", "order_rows"]

NOT_ATTACKED: dict[str, Any] = {
    name: np.nan if name == "distance" else 0
    for name in (
        "claimed",
        "trial",
        "step",
        "forwards",
        "backwards",
        "distance",
        "zero_gradients",
        "nonfinite",
        "seconds",
    )
}
"""Column -> value, in a row for a sample that the stage did not attack. All counts are 0, and there is no distance."""


@dataclass(eq=False)
class Shards:
    """The rows of a run: known rows from earlier calls, and new rows.

    New rows are committed every few seconds and at the end of the `with` block. Committed rows leave the memory.

    Attributes:
        store: commits the rows. None means that all rows stay in memory.
        known_rows: rows of earlier calls.
        take_points: returns the adversarial examples of the rows since its last call. Its argument is `exact`: if it is
            True, the points are not rounded, and the model is not called.
        commit_seconds: seconds between commits. If the process is killed, it loses at most the work of this time.
        uncommitted: columns of the new rows since the last flush.
        flushed_at: time of the last flush, from `time.monotonic`.
        added: number of new rows.
        in_memory: flushed rows, without a store.
        paths: files of the flushed rows, with a store.
    """

    store: RunStore | None
    known_rows: pd.DataFrame
    take_points: Callable[[bool], list[Points]]
    commit_seconds: float = 5.0
    uncommitted: list[dict[str, Any]] = field(default_factory=list)
    flushed_at: float = field(default_factory=time.monotonic)
    added: int = 0
    in_memory: list[pd.DataFrame] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)

    def add(self, attack: str, status: ArrayLike, rows: dict[str, Any]) -> None:
        """Add rows of one attack. A column can be an array, or one value for all rows. Flush if it is time."""
        if n := len(rows["sample"]):
            self.added += n
            columns = {"attack": attack, "status": status, **rows}
            self.uncommitted.append({name: np.broadcast_to(columns[name], n) for name in COLUMNS})
        if time.monotonic() - self.flushed_at > self.commit_seconds:
            self.flush()

    def flush(self, exact: bool = False) -> None:
        """Commit the rows since the last flush. For `exact`, see `take_points`."""
        if self.uncommitted:
            shard = pd.DataFrame({name: np.concatenate([c[name] for c in self.uncommitted]) for name in COLUMNS})
            shard = shard.astype(COLUMNS)
            if self.store is None:
                self.in_memory.append(shard)
            else:
                self.paths.append(self.store.commit(shard, self.take_points(exact)))
        self.uncommitted, self.flushed_at = [], time.monotonic()

    def collect_rows(self) -> pd.DataFrame:
        """Return the known rows and all flushed rows.

        Raises:
            ResultError: a committed file was damaged since then.
        """
        stored = [read_run_rows(path, self.store.run_id, list(COLUMNS)) for path in self.paths if self.store]
        return pd.concat([self.known_rows, *self.in_memory, *stored], ignore_index=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush(exact=isinstance(error, Exception))  # after an error the model may not work


def order_rows(rows: pd.DataFrame, samples: NDArray[np.int64], stages: list[str]) -> pd.DataFrame:
    """Return the rows of the given samples, ordered by sample and stage.

    The order of computation does not change the result, so equal records give equal files.

    Args:
        rows: the rows of a run.
        samples: official indices, [n], in the order of the result.
        stages: names of the stages, in the order of the suite.
    """
    place = {int(s): i for i, s in enumerate(samples)}
    kept = rows[rows["sample"].isin(place)]
    by = pd.DataFrame({"s": kept["sample"].map(place), "a": kept["attack"].map({n: i for i, n in enumerate(stages)})})
    return kept.loc[by.sort_values(["s", "a"]).index].reset_index(drop=True)
