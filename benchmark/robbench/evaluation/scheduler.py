"""The scheduler: divides many runs into tasks, gives the tasks to workers, and collects the records.

A task is a stage of a run on some samples. The samples of a task do not change the records, so a task can hold any
samples that wait for the stage. A sample waits for a stage when the stages before have its records. The scheduler first
submits tasks of full size, then opens further runs. It submits smaller tasks only if a worker would be idle. Workers
write no files. `EvaluationRun` commits the records in this process.
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
from robbench.evaluation.worker import CleanReport, Job
from robbench.results.adversarials import Points, merge
from robbench.results.schema import ResultFile

__all__ = ["Outcome", "Pool", "Reply", "RunsReporter", "Task", "schedule_runs"]

# Computing time of a task if no sample breaks. The loss of a worker wastes about this time. The driver works far less
# than this on a task, so longer tasks would not save time.
_TASK_SECONDS = 10.0
_MOST_LOSSES = 3  # a run fails after one of its tasks lost this many workers
Outcome = ResultFile | RobbenchError


@dataclass(frozen=True, eq=False)
class Task:
    """One piece of work for a worker.

    Attributes:
        run: number of the run.
        kind: "classify" the clean images, "attack" images, or "close" the run: check whether the model has changed, and
            remove it from the worker.
        at: positions of the samples in the run, [n].
        positions: positions of the same samples in the test set, [n].
        stage: number of the stage, for an attack.
        deterministic: whether the model gives the same logits for the same images.
    """

    run: int
    kind: str
    at: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    positions: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    stage: int = 0
    deterministic: bool = True


@dataclass(eq=False)
class Reply:
    """The reply of a worker to a task.

    Attributes:
        clean_report: the report on the clean images. Only in the reply to a "classify" task.
        rows: the records. Only in the reply to an "attack" task.
        points: the adversarial examples of these records.
        narrowed: (smaller batch width, message of the allocator), for each time that memory ran out.
        flags: name of a problem -> sentence. Only in the reply to a "close" task.
        error: the error that stopped the task. `rows` then holds the records made before it.
        lost_reason: why the worker was lost; None if it was not lost.
        has_begun: whether the lost worker had begun the task.
    """

    clean_report: CleanReport | None = None
    rows: list[Rows] = field(default_factory=list)
    points: list[Points] = field(default_factory=list)
    narrowed: list[tuple[int, str]] = field(default_factory=list)
    flags: dict[str, str] = field(default_factory=dict)
    error: RobbenchError | None = None
    lost_reason: str | None = None
    has_begun: bool = True

    def take(self, k: int, rows: Rows) -> None:
        """Store records of an attack. The task holds the stage, so k is not stored."""
        self.rows.append(rows)

    def narrow(self, k: int, width: int, reason: str) -> None:
        """Store the new batch width after the memory ran out."""
        self.narrowed.append((width, reason))


class Pool(Protocol):
    """The workers, their tasks and their replies."""

    workers: int
    """Number of workers."""
    batches: int
    """Number of batches that each worker computes at the same time."""

    @property
    def has_free_worker(self) -> bool:
        """Whether a worker can take another task. The number of tasks per worker is limited."""

    def add(self, run: int, job: Job) -> None:
        """Prepare the model and the data of a run for sending.

        Raises:
            RobbenchError: they cannot be sent.
        """

    def submit(self, task: Task) -> None:
        """Give a task to a worker."""

    def close(self, run: int) -> int:
        """Submit a "close" task to every worker that has the model of a run. Return the number of these tasks."""

    def wait(self) -> Iterable[tuple[Task, Reply]]:
        """Wait for replies.

        Raises:
            RobbenchError: no worker is left.
        """


class RunsReporter(Protocol):
    """Gets messages about the progress of many runs. The command line shows them as one bar."""

    def note(self, text: str) -> None:
        """Called with a message that the user should see at once."""

    def update(self, finished: int, asked: int) -> None:
        """Called when a run ends: number of finished runs, and number of all runs."""

    def progress(self, title: str, done: int, total: int) -> None:
        """Called when a run has new records: number of new records, and number at the end of the run."""


@dataclass(eq=False)
class _OpenRun:
    """A run that has been opened and not yet closed."""

    number: int  # position in the argument of `schedule_runs`
    run: EvaluationRun
    is_classified: bool = False  # the clean images are classified
    tasks_in_flight: int = 0  # submitted, without a reply
    is_closing: bool = False  # the "close" tasks are submitted
    error: RobbenchError | None = None  # the first error of a task
    points: list[Points] = field(default_factory=list)  # not committed yet
    flags: dict[str, str] = field(default_factory=dict)  # from the "close" tasks
    pass_seconds: float = math.nan  # for one forward and backward pass of a full batch
    deterministic: bool = True
    total: int = 0  # new records when the run ends

    def take_points(self, exact: bool) -> list[Points]:
        """Return the adversarial examples that came since the last call, one group per number format.

        `exact` has no effect. The workers have already chosen the number format.
        """
        points, self.points = self.points, []
        wanted = [pd.DataFrame({"sample": p.sample, "attack": p.attack}) for p in points]
        return merge(points, pd.concat(wanted, ignore_index=True)) if points else []

    @property
    def is_over(self) -> bool:
        """Whether the run has no task in flight and needs no further task."""
        return not self.tasks_in_flight and (self.error is not None or (self.is_classified and self.run.flow.is_over))


def schedule_runs(
    factories: Sequence[Callable[[], EvaluationRun]], pool: Pool, reporter: RunsReporter, most_open: int | None = None
) -> list[Outcome]:
    """Compute runs on workers. If a run fails, the other runs continue.

    Args:
        factories: functions that make the runs. Each is called when the scheduler opens its run.
        pool: the workers.
        reporter: gets messages about the progress.
        most_open: the largest number of runs that are open at the same time; None means two more than there are
            workers. The scheduler opens another run only if the open runs have no task of full size.

    Returns:
        For each run its result, or the error that stopped it.

    Raises:
        RobbenchError: no worker is left, or records cannot be stored. Earlier records stay stored.
    """
    return _Scheduler(factories, pool, reporter, most_open or 2 + pool.workers).compute()


class _Scheduler:
    def __init__(
        self, factories: Sequence[Callable[[], EvaluationRun]], pool: Pool, reporter: RunsReporter, most_open: int
    ) -> None:
        self.factories, self.pool, self.reporter, self.most_open = factories, pool, reporter, most_open
        self.next_number = 0
        self.open_runs: dict[int, _OpenRun] = {}
        self.lost_tasks: list[Task] = []
        self.losses: dict[Task, int] = {}
        self.outcomes: dict[int, Outcome] = {}

    def compute(self) -> list[Outcome]:
        """Submit tasks and handle replies until every run has an outcome."""
        try:
            while True:
                self.submit_tasks()
                if not any(o.tasks_in_flight for o in self.open_runs.values()):
                    break
                for task, reply in self.pool.wait():
                    self.handle_reply(task, reply)
        finally:
            for o in self.open_runs.values():  # after an interrupt, this commits the records
                o.run.__exit__(*sys.exc_info())
        return [self.outcomes[i] for i in range(len(self.factories))]

    def submit_tasks(self) -> None:
        """Submit tasks while a worker is free."""
        while self.pool.has_free_worker:
            task = self.lost_tasks.pop() if self.lost_tasks else self.make_attack_task(full_size=True)
            task = task or self.open_next_run() or self.make_attack_task(full_size=False)
            if task is None:
                return
            self.pool.submit(task)

    def open_next_run(self) -> Task | None:
        """Open the next run that has something to compute, and return its first task."""
        while self.next_number < len(self.factories) and len(self.open_runs) < self.most_open:
            number, self.next_number = self.next_number, self.next_number + 1
            try:
                run = self.factories[number]()
            except RobbenchError as error:
                self.store_outcome(number, error)
                continue
            o = _OpenRun(number, run)
            try:
                if (known := run.open()) is not None:
                    run.__exit__(None, None, None)
                    self.store_outcome(number, known)
                    continue
                self.open_runs[number] = o
                self.pool.add(number, run.make_job())
                run.forget_model()
            except RobbenchError as error:
                self.open_runs.pop(number, None)
                run.__exit__(type(error), error, None)
                self.store_outcome(number, error)
                continue
            o.tasks_in_flight = 1
            return Task(number, "classify", positions=run.positions)
        return None

    def make_attack_task(self, full_size: bool) -> Task | None:
        """Make a task from waiting samples.

        Late stages come first, because their attacks take longest. With `full_size`, return no task that is smaller
        than `choose_task_size` asks, unless no further sample can come to its stage.
        """
        for o in self.open_runs.values():
            if not o.is_classified or o.error is not None or o.is_closing:
                continue
            run = o.run
            for k in reversed(range(len(run.stages))):
                waiting, closed = len(run.flow.waiting[k]), run.flow.is_closed(k)
                # The attack of another library gets fixed batches of official indices, so all samples must be there.
                needs_all = isinstance(run.stages[k].attack, Peer)
                if not waiting or (needs_all and not closed):
                    continue
                size = waiting if needs_all else self.choose_task_size(o, k)
                if full_size and waiting < size and not closed:
                    continue
                at = run.flow.take(k, size)
                o.tasks_in_flight += 1
                return Task(o.number, "attack", at, run.positions[at], k, o.deterministic)
        return None

    def choose_task_size(self, o: _OpenRun, k: int) -> int:
        """Return the number of samples of a full task of stage k: at most about `_TASK_SECONDS` of computing time.

        When all runs are open, the tasks are also small enough to keep every worker busy until the end.
        """
        run = o.run
        unit = run.lanes * self.pool.batches
        seconds = o.pass_seconds * run.stages[k].passes
        most = max(1, int(_TASK_SECONDS / seconds)) if seconds > 0 else 1
        if self.next_number < len(self.factories):  # further runs keep the workers busy
            return unit * most
        share = -(-len(run.positions) // (2 * self.pool.workers * unit))
        return unit * max(1, min(most, share))

    def handle_reply(self, task: Task, reply: Reply) -> None:
        """Store the content of a reply, and close the run if it is over."""
        o = self.open_runs[task.run]
        o.tasks_in_flight -= 1
        if reply.lost_reason is not None:
            self.repeat_lost_task(o, task, reply)
        elif task.kind == "classify":
            if (report := reply.clean_report) is not None:
                o.run.begin(report, o.take_points, self.pool.workers)
                o.is_classified, o.pass_seconds, o.deterministic = True, report.seconds, report.deterministic
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
        if o.is_classified:
            self.reporter.progress(o.run.title(), o.run.shards.added, o.total)
        if o.is_over:
            self.close_run(o)

    def repeat_lost_task(self, o: _OpenRun, task: Task, reply: Reply) -> None:
        """Put the task of a lost worker back, or stop its run after `_MOST_LOSSES` losses."""
        if task.kind == "close":  # the worker is gone, and the model with it
            return
        if reply.has_begun:
            self.losses[task] = self.losses.get(task, 0) + 1
            self.reporter.note(f"{o.run.title()}: a worker was lost ({reply.lost_reason}); its task is done again.")
        if self.losses.get(task, 0) >= _MOST_LOSSES:
            o.error = RobbenchError(
                f"{o.run.title()}: {_MOST_LOSSES} workers in a row were lost at the same {len(task.positions)} samples "
                f"(the last: {reply.lost_reason}). If memory ran out, give fewer lanes (--lanes N) or fewer workers."
            )
            return
        o.tasks_in_flight += 1
        self.lost_tasks.append(task)

    def close_run(self, o: _OpenRun) -> None:
        """Submit the "close" tasks of a run. After their replies, make the result."""
        if not o.is_closing:
            o.is_closing, o.tasks_in_flight = True, self.pool.close(o.number)
            if o.tasks_in_flight:
                return
        del self.open_runs[o.number]
        with o.run:
            outcome: Outcome = o.error or o.run.finish(o.flags)
        self.store_outcome(o.number, outcome)

    def store_outcome(self, number: int, outcome: Outcome) -> None:
        """Store the result of a run, or the error that stopped it, and report it."""
        self.outcomes[number] = outcome
        if isinstance(outcome, RobbenchError):
            self.reporter.note(str(outcome))
        self.reporter.update(len(self.outcomes), len(self.factories))
