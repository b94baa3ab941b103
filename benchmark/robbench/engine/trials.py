"""The queue of trials of one attack: which trials wait, which have begun, and which have ended.

A sample's trials count in their order. The lowest trial that breaks a sample is the one that counts. The sample has
cost what the trials up to that one cost. So several trials of a sample may run at the same time, and the record is the
same as if they had run one after another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

__all__ = ["Trial", "TrialQueue"]


class Trial(NamedTuple):
    """How one trial of a sample ended. `engine.Rows` explains the fields."""

    broken: bool
    prediction: int
    step: int
    forwards: int
    backwards: int
    distance: float
    zero_gradients: int
    nonfinite: int
    x_adv: Tensor | None


@dataclass(slots=True)
class _Case:
    """A sample under attack.

    Attributes:
        begun: number of trials that have begun.
        ended: the trials that have ended, by number.
        over: the trials 0 to over − 1 have all ended.
    """

    begun: int = 1
    ended: dict[int, Trial] = field(default_factory=dict)
    over: int = 0


class TrialQueue:
    """Hands out the trials of all samples, and collects how they ended. Samples are named by their position.

    Once a sample has withstood its first k trials, 2k + 1 more may begin in free lanes. So fewer than three times the
    trials that count ever begin, and a hundred restarts of a few robust samples fill a batch.

    Args:
        waiting: positions of the samples to attack, in the order in which they begin.
        n: number of positions.
        trials: number of trials of each sample.
        ahead: whether further trials of a sample may begin in free lanes. Without it, a sample's trials run one after
            another.

    Attributes:
        trials: number of trials of each sample.
        winner: the lowest trial that has broken each sample so far, `trials` where none has, [N].
    """

    def __init__(self, waiting: Iterable[int], n: int, trials: int, *, ahead: bool = True) -> None:
        self.trials, self._ahead = trials, ahead
        self.winner = np.full(n, trials)
        self._waiting = deque(waiting)
        self._cases: dict[int, _Case] = {}
        self._spare = 0  # number of further trials that any lane may begin

    def take(self, most: int) -> list[tuple[int, int]]:
        """Hand out at most so many trials as (position, trial). Waiting samples come before further trials."""
        if most <= 0 or not (self._waiting or self._spare):
            return []  # the usual answer: every round asks
        taken = [(self._waiting.popleft(), 0) for _ in range(min(most, len(self._waiting)))]
        self._cases |= {position: _Case() for position, _ in taken}
        if len(taken) < most and self._spare:
            for position, case in self._cases.items():
                more = min(self._count_spare(position, case), most - len(taken))
                taken += ((position, case.begun + k) for k in range(more))
                case.begun += more
                self._spare -= more
        return taken

    def next_trial_of(self, position: int) -> int | None:
        """Begin the next trial of a sample in the lane that has just ended one. None if the sample has no next."""
        case = self._cases.get(position)
        if case is None or not self._count_allowed(position, case):
            return None
        self._spare -= self._count_spare(position, case)
        case.begun += 1
        self._spare += self._count_spare(position, case)
        return case.begun - 1

    def record_end(self, position: int, trial: int, end: Trial) -> list[Trial]:
        """Record how a trial ended.

        Returns:
            The sample's trials up to the one that counts, once all of these have ended; until then an empty list.
        """
        if trial > self.winner[position]:  # an earlier trial has broken the sample in the same round
            return []
        case = self._cases[position]
        self._spare -= self._count_spare(position, case)
        case.ended[trial] = end
        while case.over in case.ended:
            case.over += 1
        if end.broken:
            self.winner[position] = min(self.winner[position], trial)
        last = min(int(self.winner[position]), self.trials - 1)
        if case.over > last:
            del self._cases[position]
            return [case.ended[k] for k in range(last + 1)]
        self._spare += self._count_spare(position, case)
        return []

    def _count_allowed(self, position: int, case: _Case) -> int:
        """Count the further trials of a sample that may begin now."""
        broken = self.winner[position] < self.trials
        return 0 if broken else max(min(3 * case.over + 1, self.trials) - case.begun, 0)

    def _count_spare(self, position: int, case: _Case) -> int:
        """Count the further trials of a sample that any lane may begin."""
        return self._count_allowed(position, case) if self._ahead else 0
