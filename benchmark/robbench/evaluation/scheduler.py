"""Many runs over many workers: which task comes next, and what becomes of its records.

A task is (model, stage, samples). Records do not depend on which samples share a task, so a task is cut from whatever
waits for its stage: full batches first, then the next model, and what is left only where a worker would be idle. A
sample comes to a stage as soon as the stages before have records of it. Records are committed here, by `EvaluationRun`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robbench.core.errors import RobbenchError
from robbench.engine.engine import Rows
from robbench.evaluation.peers import Peer
from robbench.evaluation.run import EvaluationRun
from robbench.evaluation.worker import First, Job
from robbench.results.adversarials import Points, merge
from robbench.results.schema import ResultFile

__all__ = ["Outcome", "Pool", "Reply", "Task", "View", "spread"]

_SECONDS = (
    10.0  # that a task takes if nothing breaks: what a lost worker costs at most, and far above what it costs here
)
_LOSSES = 3  # workers that a task may lose before it is given up
Outcome = ResultFile | RobbenchError


@dataclass(frozen=True, eq=False)
class Task:
    """What a worker is asked to do.

    Attributes:
        run: number of the run.
        kind: "look" at the clean images, "attack" them, or "end": look at the model again and let it go.
        at: positions among the samples of the run, [n].
        positions: positions in the test set, [n].
        stage: which, for an attack.
        deterministic: whether the model answers the same thing twice.
    """

    run: int
    kind: str
    at: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    positions: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    stage: int = 0
    deterministic: bool = True


@dataclass(eq=False)
class Reply:
    """What came of a task.

    Attributes:
        first: of a look.
        rows: of an attack.
        points: adversarial examples of those rows.
        narrowed: widths to go on with after memory ran out, and why.
        flags: of an end.
        error: what the model did; records made before it are in `rows`.
        lost: why the worker is gone; the task is to be done again.
        begun: whether the worker that is gone had begun the task.
    """

    first: First | None = None
    rows: list[Rows] = field(default_factory=list)
    points: list[Points] = field(default_factory=list)
    narrowed: list[tuple[int, str]] = field(default_factory=list)
    flags: dict[str, str] = field(default_factory=dict)
    error: RobbenchError | None = None
    lost: str | None = None
    begun: bool = True

    def take(self, k: int, rows: Rows) -> None:
        """Take records of an attack; the task says of which stage."""
        self.rows.append(rows)

    def narrow(self, k: int, width: int, reason: str) -> None:
        """Hear that memory ran out."""
        self.narrowed.append((width, reason))


class Pool(Protocol):
    """Workers, and what is on its way to and from them."""

    workers: int
    """How many there are."""
    batches: int
    """How many batches each of them has at once."""

    @property
    def free(self) -> bool:
        """Whether a worker takes another task; a bounded number is in flight."""

    def add(self, run: int, job: Job) -> None:
        """Make a run's model and data ready to be sent.

        Raises:
            RobbenchError: they cannot be.
        """

    def submit(self, task: Task) -> None:
        """Give a task to a worker."""

    def close(self, run: int) -> int:
        """Ask every worker that has a run's model to end with it; returns how many replies will come."""

    def wait(self) -> Iterable[tuple[Task, Reply]]:
        """Wait until replies are there.

        Raises:
            RobbenchError: no worker is left.
        """


class View(Protocol):
    """Hears how all runs together go."""

    def note(self, text: str) -> None:
        """Hear of something a user should know at once."""

    def update(self, finished: int, asked: int) -> None:
        """Hear how many runs are finished, of how many."""

    def progress(self, title: str, done: int, total: int) -> None:
        """Hear how many records of a run under way are there; done == total when it ends."""


@dataclass(eq=False)
class _Open:
    """A run under way."""

    number: int
    run: EvaluationRun
    begun: bool = False
    out: int = 0
    closing: bool = False
    error: RobbenchError | None = None
    points: list[Points] = field(default_factory=list)
    flags: dict[str, str] = field(default_factory=dict)
    seconds: float = math.nan
    deterministic: bool = True
    done: int = 0
    total: int = 0

    def hand_over(self, exact: bool) -> list[Points]:
        """Hand over the adversarial examples that came since the last time, one group per number format."""
        points, self.points = self.points, []
        wanted = [pd.DataFrame({"sample": p.sample, "attack": p.attack}) for p in points]
        return merge(points, pd.concat(wanted, ignore_index=True)) if points else []

    @property
    def over(self) -> bool:
        """Whether nothing is left to hand out or to come."""
        return not self.out and (self.error is not None or (self.begun and self.run.flow.is_over))


def spread(
    openings: Sequence[Callable[[], EvaluationRun]], pool: Pool, view: View, most_open: int | None = None
) -> list[Outcome]:
    """Do runs on workers; one that fails holds up no other.

    Args:
        openings: make the runs; each is called when its turn comes.
        pool: the workers.
        view: hears of progress.
        most_open: runs under way at once; by default enough to give every worker one. Another is opened only when those
            under way have no whole batch to hand out.

    Returns:
        For each its result, or why there is none.

    Raises:
        RobbenchError: no worker is left, or records cannot be stored. What came before is kept.
    """
    return _Spread(openings, pool, view, most_open or 2 + pool.workers).go()


class _Spread:
    def __init__(self, openings: Sequence[Callable[[], EvaluationRun]], pool: Pool, view: View, most_open: int) -> None:
        self.openings, self.pool, self.view, self.most_open = openings, pool, view, most_open
        self.next = 0
        self.open: dict[int, _Open] = {}
        self.again: list[Task] = []
        self.losses: dict[Task, int] = {}
        self.outcomes: dict[int, Outcome] = {}

    def go(self) -> list[Outcome]:
        try:
            while True:
                self.feed()
                if not any(o.out for o in self.open.values()):
                    break
                for task, reply in self.pool.wait():
                    self.take(task, reply)
        finally:
            for o in self.open.values():  # an interrupt: what came is kept
                o.run.__exit__(*sys.exc_info())
        return [self.outcomes[i] for i in range(len(self.openings))]

    def feed(self) -> None:
        """Hand out tasks while a worker takes them."""
        while self.pool.free:
            task = self.again.pop() if self.again else self.cut(full=True) or self.opened() or self.cut(full=False)
            if task is None:
                return
            self.pool.submit(task)

    def opened(self) -> Task | None:
        """Open the next run that has something to compute."""
        while self.next < len(self.openings) and len(self.open) < self.most_open:
            number, self.next = self.next, self.next + 1
            try:
                run = self.openings[number]()
            except RobbenchError as error:
                self.settle(number, error)
                continue
            o = _Open(number, run)
            try:
                if (known := run.open()) is not None:
                    run.__exit__(None, None, None)
                    self.settle(number, known)
                    continue
                self.open[number] = o
                self.pool.add(number, run.job())
                run.forget_model()
            except RobbenchError as error:
                self.open.pop(number, None)
                run.__exit__(type(error), error, None)
                self.settle(number, error)
                continue
            o.out = 1
            return Task(number, "look", positions=run.positions)
        return None

    def cut(self, full: bool) -> Task | None:
        """Cut a task from what waits: late stages first, because they are long; full ones alone, or any."""
        for o in self.open.values():
            if not o.begun or o.error is not None or o.closing:
                continue
            run = o.run
            for k in reversed(range(len(run.stages))):
                waiting, closed = len(run.flow.waiting[k]), run.flow.is_closed(k)
                # Another library's attack is given whole batches by official index, so they must be complete.
                coupled = isinstance(run.stages[k].attack, Peer)
                if not waiting or (coupled and not closed):
                    continue
                size = waiting if coupled else self.size(o, k)
                if full and waiting < size and not closed:
                    continue
                at = run.flow.take(k, size)
                o.out += 1
                return Task(o.number, "attack", at, run.positions[at], k, o.deterministic)
        return None

    def size(self, o: _Open, k: int) -> int:
        """Choose how many samples a task has: some seconds of work, and near the end a share that leaves none idle."""
        run = o.run
        unit = run.lanes * self.pool.batches
        one = o.seconds * run.stages[k].passes
        long = int(_SECONDS / one) if one > 0 else 1
        if self.next < len(self.openings):  # other models keep the workers busy
            return unit * max(1, long)
        share = -(-len(run.positions) // (2 * self.pool.workers * unit))
        return unit * max(1, min(long, share))

    def take(self, task: Task, reply: Reply) -> None:
        """Take what came of a task."""
        o = self.open[task.run]
        o.out -= 1
        if reply.lost is not None:
            self.lost(o, task, reply)
        elif task.kind == "look":
            if reply.first is not None:
                o.run.begin(reply.first, o.hand_over, self.pool.workers)
                o.begun, o.seconds, o.deterministic = True, reply.first.seconds, reply.first.deterministic
                o.total = int(o.run.lacking.sum())
        elif task.kind == "attack":
            o.points += reply.points
            for width, reason in reply.narrowed:
                o.run.narrow(task.stage, width, reason)
            for rows in reply.rows:
                o.run.take(task.stage, rows)
            if reply.error is None:
                o.run.flow.finish(task.stage, task.at)
        else:
            o.flags |= reply.flags
        if reply.error is not None:
            o.error = o.error or reply.error
        if o.begun:
            o.done = o.run.shards.added
            self.view.progress(o.run.title(), o.done, o.total)
        if o.over:
            self.end(o)

    def lost(self, o: _Open, task: Task, reply: Reply) -> None:
        """Have the task of a worker that is gone done again."""
        if task.kind == "end":  # the model went with it
            return
        if reply.begun:
            self.losses[task] = self.losses.get(task, 0) + 1
            self.view.note(f"{o.run.title()}: a worker was lost ({reply.lost}); its task is done again.")
        if self.losses.get(task, 0) >= _LOSSES:
            o.error = RobbenchError(
                f"{o.run.title()}: {_LOSSES} workers in a row were lost at the same {len(task.positions)} samples, the "
                f"last one: {reply.lost}. If memory ran out, give fewer lanes (--lanes N) or fewer workers."
            )
            return
        o.out += 1
        self.again.append(task)

    def end(self, o: _Open) -> None:
        """Close a run: its workers look at the model a last time, and then there is a result."""
        if not o.closing:
            o.closing, o.out = True, self.pool.close(o.number)
            if o.out:
                return
        del self.open[o.number]
        outcome: Outcome
        with o.run:
            outcome = o.error or o.run.finish(o.flags)
        self.settle(o.number, outcome)

    def settle(self, number: int, outcome: Outcome) -> None:
        self.outcomes[number] = outcome
        if isinstance(outcome, RobbenchError):
            self.view.note(str(outcome))
        self.view.update(len(self.outcomes), len(self.openings))
