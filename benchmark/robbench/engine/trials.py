"""Which trials of which samples wait, run and have ended: what the batches of one attack share.

A sample's trials count in their order: it is broken by the lowest trial that breaks it, and has cost what the trials
up to that one cost. So trials may run beside each other, and the record is the same as if they had run in turn.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

__all__ = ["Ledger", "Trial"]


class Trial(NamedTuple):
    """How one trial of a sample ended; what each field means, `engine.Rows` says."""

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
    """A sample that is being attacked."""

    begun: int = 1
    ended: dict[int, Trial] = field(default_factory=dict)
    over: int = 0  # how many of the first trials have all ended


class Ledger:
    """What is to be done for each sample, by its position, and what was done.

    Of a sample that has withstood its first k trials, 2k + 1 more may run wherever lanes are free. So fewer than three
    times the trials that count are ever begun, and a hundred restarts of the few samples that withstand everything fill
    a batch instead of a few lanes.

    Attributes:
        trials: of each sample.
        winner: the lowest trial that has broken the sample at this position so far, `trials` where none has, [N].
        seconds: each sample's share of the wall time, [N].
    """

    def __init__(self, waiting: Iterable[int], n: int, trials: int, *, ahead: bool = True) -> None:
        self.trials, self._ahead = trials, ahead
        self.winner = np.full(n, trials)
        self.seconds = np.zeros(n)
        self._waiting = deque(waiting)
        self._cases: dict[int, _Case] = {}
        self._running = self._spare = 0
        self._closed = False
        self._change = threading.Condition()

    @property
    def closed(self) -> bool:
        """Whether all are to stop."""
        return self._closed

    def wanted(self) -> int:
        """Count the lanes, of all crews together, that there is work for."""
        return len(self._waiting) + self._running + self._spare

    def take(self, most: int) -> list[tuple[int, int]]:
        """Hand out so many trials at most, as (position, trial): those of waiting samples before further ones."""
        if most <= 0 or not (self._waiting or self._spare):
            return []  # asked in every round, and mostly for none
        with self._change:
            taken = [(self._waiting.popleft(), 0) for _ in range(min(most, len(self._waiting)))]
            self._cases |= {position: _Case() for position, _ in taken}
            if len(taken) < most and self._spare:
                for position, case in self._cases.items():
                    more = min(self._free(position, case), most - len(taken))
                    taken += ((position, case.begun + k) for k in range(more))
                    case.begun += more
                    self._spare -= more
            self._running += len(taken)
            return taken

    def go_on(self, position: int) -> int | None:
        """Say which trial of this sample a lane goes on with that has just ended one; None if there is none."""
        with self._change:
            case = self._cases.get(position)
            if case is None or not self._allowed(position, case):
                return None
            self._spare -= self._free(position, case)
            case.begun += 1
            self._running += 1
            self._spare += self._free(position, case)
            return case.begun - 1

    def file(self, position: int, trial: int, end: Trial) -> list[Trial]:
        """Note how a trial ended; returns the sample's trials up to the one that counts, once all of those have."""
        with self._change:
            self._running -= 1
            if trial > self.winner[position]:  # another crew was faster
                self._tell()
                return []
            case = self._cases[position]
            self._spare -= self._free(position, case)
            case.ended[trial] = end
            while case.over in case.ended:
                case.over += 1
            if end.broken:
                self.winner[position] = min(self.winner[position], trial)
            last = min(int(self.winner[position]), self.trials - 1)
            found = []
            if case.over > last:
                del self._cases[position]
                found = [case.ended[k] for k in range(last + 1)]
            else:
                self._spare += self._free(position, case)
            self._tell()
            return found

    def drop(self, lanes: int) -> None:
        """Note that so many lanes have let go of trials that no longer count."""
        with self._change:
            self._running -= lanes
            self._tell()

    def rest(self) -> bool:
        """Wait until there is a trial to take; returns whether there is, rather than nothing more to come."""
        with self._change:
            self._change.wait_for(lambda: self._closed or self._waiting or self._spare or not self._running)
            return not self._closed and bool(self._waiting or self._spare)

    def close(self) -> None:
        """Have all stop."""
        with self._change:
            self._closed = True
            self._change.notify_all()

    def _allowed(self, position: int, case: _Case) -> int:
        """Count the further trials of a sample that may begin now."""
        lost = self.winner[position] < self.trials
        return 0 if lost else max(min(3 * case.over + 1, self.trials) - case.begun, 0)

    def _free(self, position: int, case: _Case) -> int:
        """Count those among them that any lane may begin."""
        return self._allowed(position, case) if self._ahead else 0

    def _tell(self) -> None:
        if self._spare or not self._running:
            self._change.notify_all()
