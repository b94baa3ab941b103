"""Which samples of a run wait for which of its stages. A stage of a sample waits for earlier stages of the same one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from robbench.suite import Mode

__all__ = ["Flow"]

Positions = NDArray[np.int64]


class Flow:
    """The samples of a run on their way through its stages.

    Args:
        mode: of the suite.
        lacking: which records are not there yet, [stages, n].
        broke: which of those that are there are breaks, [stages, n].
        correct: which samples the model classifies correctly, [n].
        on_skip: called with a stage and the samples that earlier stages spare it.
    """

    def __init__(
        self,
        mode: Mode,
        lacking: NDArray[np.bool_],
        broke: NDArray[np.bool_],
        correct: NDArray[np.bool_],
        on_skip: Callable[[int, Positions], None],
    ) -> None:
        self.mode, self.lacking, self.broke, self.on_skip = mode, lacking, broke, on_skip
        self.stages = len(lacking)
        self.broken = np.zeros(len(correct), bool)  # by a stage that spares later ones
        self.waiting: list[Positions] = [np.zeros(0, np.int64)] * self.stages
        self.out = [0] * self.stages
        for k in range(self.stages) if mode == "full" else [0]:
            self._enter(k, np.flatnonzero(correct))

    @property
    def is_over(self) -> bool:
        """Whether nothing waits and nothing is out."""
        return not any(map(len, self.waiting)) and not any(self.out)

    def is_closed(self, k: int) -> bool:
        """Tell whether no more samples can come to a stage than wait for it now."""
        before = {"full": 0, "challenge": min(k, 1), "cascade": k}[self.mode]
        return not any(len(self.waiting[i]) or self.out[i] for i in range(before))

    def take(self, k: int, most: int | None = None) -> Positions:
        """Hand out samples that wait for a stage, at most so many."""
        taken, self.waiting[k] = np.split(self.waiting[k], [len(self.waiting[k]) if most is None else most])
        self.out[k] += len(taken)
        return taken

    def finish(self, k: int, positions: Positions) -> None:
        """Hear that a stage has records of samples that were taken; breaks were told by `broke` before."""
        self.out[k] -= len(positions)
        self._leave(k, positions)

    def _enter(self, k: int, at: Positions) -> None:
        lacking, spared = self.lacking[k, at], self.broken[at]
        if (lacking & spared).any():
            self.on_skip(k, at[lacking & spared])
        self.waiting[k] = np.concatenate([self.waiting[k], at[lacking & ~spared]])
        self._leave(k, at[~lacking | spared])

    def _leave(self, k: int, at: Positions) -> None:
        if self.mode == "cascade" or (self.mode == "challenge" and k == 0):
            self.broken[at] |= self.broke[k, at]
        if len(at):
            for after in self._after(k):
                self._enter(after, at)

    def _after(self, k: int) -> Iterator[int]:
        if self.mode == "cascade" and k + 1 < self.stages:
            yield k + 1
        elif self.mode == "challenge" and k == 0:
            yield from range(1, self.stages)
