"""How many iterations a training has, how far it is at each of them, and how they are fitted to a given time."""

from __future__ import annotations

from dataclasses import dataclass

from robbench.core.errors import RobbenchError

__all__ = ["Fitter", "Plan"]

_MOST = 10**9  # iterations
_MEASURE_SECONDS = 3.0  # at most, before the first plan
_LOOKS = 50  # number of times that a fitted plan is compared with the clock
_TOLERANCE = 0.02  # part of the time by which the end may be wrong before the plan is changed,
_SLACK = 0.1  # plus this part of the time that is left, because later looks can mend it
_AIM = 0.98  # part of the time to use; the rest is for the files written after the last iteration


@dataclass(frozen=True)
class Plan:
    """The iterations of a training, as pieces (begin, total): from iteration `begin` on, it is to end at `total`.

    The progress goes from 0 to 1, and the learning rate is a function of it. The progress is linear within a piece and
    reaches 1 at the total of the piece. The next piece begins at the progress that was reached, so nothing jumps.
    Before the first piece the progress is 0. A plan without pieces has no end yet.

    As text it is `2000`, or `57:2100,500:1800` with more than one piece or a later begin.
    """

    pieces: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read a plan from its text.

        Raises:
            RobbenchError: the text is not a plan.
        """
        pairs = [part.strip().split(":") for part in (text if ":" in text else f"0:{text.strip()}").split(",")]
        pieces = tuple(tuple(int(n) if n.isdecimal() and len(n) < 11 else -1 for n in pair) for pair in pairs)
        earlier = ((0, _MOST), *pieces)
        for i, piece in enumerate(pieces):
            # A piece begins after the one before, and before that one ends.
            first = earlier[i][0] + (i > 0)
            if len(piece) != 2 or not first <= piece[0] < min(piece[1], earlier[i][1]) or piece[1] > _MOST:
                raise RobbenchError(
                    f"--iterations: {text[:200]!r} given; allowed: a number from 1 to {_MOST}, or the plan of a card's "
                    "[trained] table, such as 57:2100,500:1800."
                )
        return cls(tuple((begin, total) for begin, total in pieces))

    def __str__(self) -> str:
        begin, total = self.pieces[0]
        if len(self.pieces) == 1 and begin == 0:
            return str(total)
        return ",".join(f"{begin}:{total}" for begin, total in self.pieces)

    @property
    def total(self) -> int:
        """Number of iterations; 0 if there is no piece yet."""
        return self.pieces[-1][1] if self.pieces else 0

    def progress(self, iteration: int) -> float:
        """Return the part of the training that was done before an iteration, in [0, 1]. The first iteration is 0."""
        done = 0.0
        ends = [begin for begin, _ in self.pieces[1:]]
        for (begin, total), end in zip(self.pieces, [*ends, iteration], strict=False):
            if iteration <= begin:
                break
            done += (1 - done) * (min(end, iteration) - begin) / (total - begin)
        return done

    def change(self, iteration: int, total: int) -> Plan:
        """Return the plan that ends at another total, from an iteration on."""
        return Plan((*self.pieces, (iteration, total)))


class Fitter:
    """Changes a plan while a training runs, so that it ends at a given time.

    It measures the time of iterations now and then, because other programs may slow the machine down for a while.
    Pauses (checkpoints, reports) are seen in the time that is left. One is kept in reserve for the end.

    Args:
        seconds: the time for the whole training.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.rate: float | None = None  # seconds an iteration
        self.worked = 0.0
        self.longest = 0.0  # pause
        self.mark: tuple[int, float] | None = None  # iteration and seconds of work at the last look

    def pause(self, seconds: float) -> None:
        """Note a pause between two iterations."""
        self.longest = max(self.longest, seconds)

    def adjust(self, plan: Plan, iteration: int, worked: float, seconds: float) -> Plan:
        """Return the plan from this iteration on: the same plan, if it ends in time.

        Args:
            plan: the plan so far.
            iteration: the number of iterations that are done.
            worked: seconds of the last iteration.
            seconds: seconds of the training so far, with pauses and earlier calls.
        """
        self.worked += worked
        if self.mark is None:  # the first iteration takes longer
            self.mark = iteration, self.worked
            return plan
        done, took = iteration - self.mark[0], self.worked - self.mark[1]
        look = self.seconds / _LOOKS
        if took < (look if plan.pieces else min(look, _MEASURE_SECONDS)):
            return plan
        self.rate = took / done if self.rate is None else (self.rate + took / done) / 2
        self.mark = iteration, self.worked
        left = _AIM * self.seconds - seconds - self.longest
        total = iteration + max(1, min(round(left / self.rate), _MOST - iteration))
        if plan.pieces and abs(total - plan.total) * self.rate < _TOLERANCE * self.seconds + _SLACK * max(left, 0):
            return plan
        return plan.change(iteration, total)
