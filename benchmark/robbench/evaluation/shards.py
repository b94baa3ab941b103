"""The rows of a run on their way to disk: committed every few seconds, and in one order at the end."""

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

__all__ = ["NOTHING", "Shards", "ordered"]

NOTHING: dict[str, Any] = {
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
"""What a sample costs that a stage has nothing to do for."""


@dataclass(eq=False)
class Shards:
    """Rows of the run: those known from disk, and new ones, committed every few seconds and on the way out.

    What is on disk is not held in memory.

    Attributes:
        store: where they are committed, if anywhere.
        known: rows of earlier runs.
        points: hands over the adversarial examples of new rows; told True, without asking the model anything.
        commit_seconds: how often rows are committed: a kill loses at most so much work.
        added: how many rows are new.
    """

    store: RunStore | None
    known: pd.DataFrame
    points: Callable[[bool], list[Points]]
    commit_seconds: float = 5.0
    fresh: list[dict[str, Any]] = field(default_factory=list)
    last: float = field(default_factory=time.monotonic)
    added: int = 0
    kept: list[pd.DataFrame] = field(default_factory=list)
    committed: list[Path] = field(default_factory=list)

    def add(self, attack: str, status: ArrayLike, rows: dict[str, Any]) -> None:
        """Take the records of one attack; columns may hold one value for all of them."""
        if n := len(rows["sample"]):
            self.added += n
            columns = {"attack": attack, "status": status, **rows}
            self.fresh.append({name: np.broadcast_to(columns[name], n) for name in COLUMNS})
        if time.monotonic() - self.last > self.commit_seconds:
            self.flush()

    def flush(self, exact: bool = False) -> None:
        """Make what has come since the last time safe; with `exact` without asking the model anything."""
        if self.fresh:
            shard = pd.DataFrame({name: np.concatenate([c[name] for c in self.fresh]) for name in COLUMNS})
            shard = shard.astype(COLUMNS)
            if self.store is None:
                self.kept.append(shard)
            else:
                self.committed.append(self.store.commit(shard, self.points(exact)))
        self.fresh, self.last = [], time.monotonic()

    def rows(self) -> pd.DataFrame:
        """Put together all rows that were flushed, and those known before.

        Raises:
            ResultError: a shard was damaged meanwhile.
        """
        stored = [read_run_rows(path, self.store.run_id, list(COLUMNS)) for path in self.committed if self.store]
        return pd.concat([self.known, *self.kept, *stored], ignore_index=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush(exact=isinstance(error, Exception))  # what failed may well have been the model


def ordered(rows: pd.DataFrame, samples: NDArray[np.int64], stages: list[str]) -> pd.DataFrame:
    """Rows of complete samples, by sample and stage: the same file whatever the order of computation."""
    place = {int(s): i for i, s in enumerate(samples)}
    kept = rows[rows["sample"].isin(place)]
    by = pd.DataFrame({"s": kept["sample"].map(place), "a": kept["attack"].map({n: i for i, n in enumerate(stages)})})
    return kept.loc[by.sort_values(["s", "a"]).index].reset_index(drop=True)
