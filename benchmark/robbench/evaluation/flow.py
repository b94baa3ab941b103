"""The order of work in a run: which samples wait for which stages. A sample may need the outcome of earlier stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from robbench.suite import Mode

__all__ = ["Flow"]

Positions = NDArray[np.int64]


class Flow:
    """Moves the samples of a run through its stages.

    Args:
        mode: mode of the suite.
        lacking: mask of the records that do not exist yet, [stages, n].
        broke: mask of the existing records that are breaks, [stages, n]. The caller updates it.
        correct: mask of the samples that the model classifies correctly, [n].
        on_skip: called with a stage and the samples that it skips, because an earlier stage broke them.
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
        self.correct = correct
        self.stages = len(lacking)
        self.broken = np.zeros(len(correct), bool)  # broken by a stage, so that later stages skip the sample
        self.waiting: list[Positions] = [np.zeros(0, np.int64)] * self.stages
        self.in_work = [0] * self.stages
        for k in range(self.stages) if mode == "full" else [0]:
            self._enter(k, np.flatnonzero(correct))

    @property
    def is_over(self) -> bool:
        """Whether no sample waits and no stage works on a sample."""
        return not any(map(len, self.waiting)) and not any(self.in_work)

    def is_closed(self, k: int) -> bool:
        """Return whether no further samples can come to a stage."""
        before = {"full": 0, "challenge": min(k, 1), "cascade": k}[self.mode]
        return not any(len(self.waiting[i]) or self.in_work[i] for i in range(before))

    def count_standing(self, k: int) -> int:
        """Count the samples that are classified correctly, and that no stage broke whose breaks count for stage k."""
        return int((self.correct & ~self.broken & ~self.broke[k]).sum())

    def take(self, k: int, most: int | None = None) -> Positions:
        """Take samples that wait for a stage, at most `most` of them."""
        taken, self.waiting[k] = np.split(self.waiting[k], [len(self.waiting[k]) if most is None else most])
        self.in_work[k] += len(taken)
        return taken

    def finish(self, k: int, positions: Positions) -> None:
        """Report that a stage has finished samples that it took. Set their breaks in `broke` before this call."""
        self.in_work[k] -= len(positions)
        self._pass_on(k, positions)

    def _enter(self, k: int, at: Positions) -> None:
        lacking, skipped = self.lacking[k, at], self.broken[at]
        if (lacking & skipped).any():
            self.on_skip(k, at[lacking & skipped])
        self.waiting[k] = np.concatenate([self.waiting[k], at[lacking & ~skipped]])
        self._pass_on(k, at[~lacking | skipped])

    def _pass_on(self, k: int, at: Positions) -> None:
        if self.mode == "cascade" or (self.mode == "challenge" and k == 0):
            self.broken[at] |= self.broke[k, at]
        if len(at):
            for after in self._next_stages(k):
                self._enter(after, at)

    def _next_stages(self, k: int) -> Iterator[int]:
        if self.mode == "cascade" and k + 1 < self.stages:
            yield k + 1
        elif self.mode == "challenge" and k == 0:
            yield from range(1, self.stages)
