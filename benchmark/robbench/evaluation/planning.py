"""What a run will cost: passes, time and memory, from records of a few images and seconds of calibration.

Passes: what images cost in existing records of the same run, else in a pilot on images drawn at random. Time: the
passes, laid onto the lanes as the engine does, at the speed at which this machine was seen to run each stage with all
lanes full. Both are estimates: images that stand cost the most, and how many do is known no better than from the pilot.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.attacks import parameters
from robbench.attacks.base import Searching
from robbench.classifier.batch_width import BatchWidths
from robbench.classifier.prepare import Target
from robbench.core.errors import ResultError, RobbenchError
from robbench.core.machine import keep_freed_memory
from robbench.core.threat import Ball
from robbench.core.types import Status
from robbench.engine.trials import Trial, TrialQueue
from robbench.evaluation.inputs import Options
from robbench.evaluation.peers import Peer
from robbench.evaluation.run import Run, ready, run_here
from robbench.evaluation.stages import ReadyStage, run_stage
from robbench.evaluation.transfer import Transfer
from robbench.evaluation.worker import Job, Worker
from robbench.models.sources import Build
from robbench.results.schema import read_result
from robbench.results.store import read_rows

__all__ = ["ModelPlan", "StagePlan", "plan"]

_SHARE, _SHORTEST, _LONGEST = 0.05, 0.2, 2.0  # of what a stage may take: seconds of calibration at each width
_LEAST = 6  # rounds, however long they take
_SEARCH = 200  # steps that a random search is timed on
clock = time.perf_counter
"""What seconds are taken by; perf/plan.py puts CPU time here on a busy machine."""


@dataclass(frozen=True)
class StagePlan:
    """One stage of one model.

    Attributes:
        stage: its name.
        attacked: images that it will see.
        forwards: forward passes, summed over images.
        backwards: backward passes.
        seconds: on one worker like this process.
        passes_per_second: of images through the model while all lanes are full, each with its share of what the attack
            and the engine do.
    """

    stage: str
    attacked: int
    forwards: int
    backwards: int
    seconds: float
    passes_per_second: float


@dataclass(frozen=True)
class ModelPlan:
    """One model under one suite.

    Attributes:
        title: what is run.
        n: images asked for.
        opening: seconds before the attacks: clean predictions of all images, and what is checked about the model.
        stages: in the order of the suite.
        uncertainty: two standard errors of the seconds, as a share of them: what the number of records leaves open.
        source: where the passes come from.
        lanes: batch width.
        memory: peak bytes of this process so far, or on a GPU of its tensors.
    """

    title: str
    n: int
    opening: float
    stages: list[StagePlan]
    uncertainty: float
    source: str
    lanes: int
    memory: int

    @property
    def seconds(self) -> float:
        """On one worker."""
        return self.opening + sum(s.seconds for s in self.stages)


class _Enough(Exception):
    """Enough rounds were timed."""


class _Timed(nn.Module):
    """A model that notes when it is asked, and how much at once."""

    def __init__(self, inner: nn.Module, limit: float) -> None:
        super().__init__()
        self.inner, self.limit = inner, limit
        self.seen: list[tuple[float, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Ask the model, for so many seconds."""
        if x.is_cuda:
            torch.cuda.synchronize()
        self.seen.append((clock(), len(x)))
        spent = self.seen[-1][0] - self.seen[0][0]
        if len(self.seen) > _LEAST and spent > self.limit:
            raise _Enough
        answer: Tensor = self.inner(x)
        return answer

    def round(self, width: int) -> float:
        """Seconds from one question of this width to the next; NaN if there was none."""
        spent = [b - a for (a, n), (b, _) in itertools.pairwise(self.seen[1:]) if n == width]
        return float(np.mean(spent)) if spent else math.nan


@dataclass(frozen=True)
class _Pace:
    """How long a round of a stage takes, linear in the width of the batch.

    Attributes:
        lanes: full width.
        narrow: a narrower width.
        full_seconds: of a round at full width.
        narrow_seconds: at the narrower one.
    """

    lanes: int
    narrow: int
    full_seconds: float
    narrow_seconds: float

    def seconds(self, width: int) -> float:
        """Seconds of a round at this width."""
        if self.narrow == self.lanes:
            return self.full_seconds
        slope = (self.full_seconds - self.narrow_seconds) / (self.lanes - self.narrow)
        return max(0.0, self.full_seconds - slope * (self.lanes - width))


def plan(model: str, suite: str, *, pilot: int = 128, **options: Any) -> ModelPlan:
    """Tell what a run will cost on one worker like this process.

    Args:
        model: a registered name or a source, as for `evaluate`.
        suite: as for `evaluate`.
        pilot: how many images to find the passes on, where no records of the run are in the results tree.
        **options: dataset, architecture, mean, std, and those of `inputs.Options`.

    Raises:
        RobbenchError: what `evaluate` refuses.
    """
    keep_freed_memory()
    if pilot < 2:
        raise RobbenchError(f"pilot: {pilot} given; it must be at least 2.")
    build = Build(*(options.pop(key, None) for key in ("architecture", "mean", "std")))
    dataset = options.pop("dataset", None)
    asked = Options.given(options)
    run = ready(model, suite, build, asked, dataset=dataset)
    rows, source = _records(run)
    if rows["sample"].nunique() < pilot:
        # Spread over the test set: neighbours in official order may be alike.
        few = replace(asked, samples=pilot, sample_seed=0, results=None, save_adversarials=False, overwrite=False)
        trial = ready(model, suite, build, few, dataset=dataset)
        run_here(trial)
        rows = trial.shards.rows()
        source = f"a pilot on {rows['sample'].nunique()} images"
    return _planned(run, rows, source)


def _records(run: Run) -> tuple[pd.DataFrame, str]:
    """Read what is stored of this very run."""
    nothing = pd.DataFrame({"sample": []})
    if run.store is None or not run.store.result_path.exists():
        return nothing, ""
    try:
        if read_result(run.store.result_path).run_id != run.store.run_id:
            return nothing, ""
        rows = read_rows(run.store.outcomes_path)
    except ResultError:  # damaged: the run itself will say so
        return nothing, ""
    return rows, f"records of {rows['sample'].nunique()} images in {run.store.folder}"


def _planned(run: Run, rows: pd.DataFrame, source: str) -> ModelPlan:
    n, known = len(run.positions), rows["sample"].nunique()
    spent = pd.Series(0.0, index=rows["sample"].unique())
    widths = BatchWidths(
        run.target.module, run.images.x(np.arange(1)).shape[1:], run.lanes, run.images.dtype, run.coarse
    )
    right = rows.loc[rows["status"] != Status.MISCLASSIFIED, "sample"].unique()
    if not len(right):
        raise RobbenchError(
            f"{run.title()}: of {known} images none is classified correctly; nothing would be attacked."
        )
    at = np.searchsorted(run.images.index, right)
    opening, each = _opening(run, widths)
    stages = []
    for stage in run.stages:
        mine = rows[(rows["attack"] == stage.name) & rows["status"].isin([Status.BROKEN, Status.ROBUST])]
        attacked = round(n * len(mine) / known)
        scale = attacked / max(len(mine), 1)
        forwards, backwards = mine["forwards"].to_numpy(), mine["backwards"].to_numpy()
        about = scale * float(forwards.sum()) / run.lanes * each
        pace = _calibrated(run, stage, at, widths, float(np.clip(np.nan_to_num(_SHARE * about), _SHORTEST, _LONGEST)))
        rate = pace.lanes / pace.full_seconds
        seconds = _laid(_tried(mine, attacked), getattr(stage.attack, "trials", 1), widths, pace)
        stages.append(
            StagePlan(
                stage.name, attacked, round(scale * forwards.sum()), round(scale * backwards.sum()), seconds, rate
            )
        )
        spent[mine["sample"]] += forwards / rate
    error = float(2 * spent.std() / math.sqrt(known) / spent.mean()) if spent.mean() > 0 else 0.0
    # All records of the run itself leave nothing open.
    error *= math.sqrt(max(0.0, 1 - known / n)) if "records" in source else 1.0
    return ModelPlan(run.title(), n, opening, stages, error, source, run.lanes, _memory(run.target))


def _opening(run: Run, widths: BatchWidths) -> tuple[float, float]:
    """Time what comes before the attacks on a few images, and what each further one adds to it.

    Returns:
        Seconds for all images, and about what a forward and backward pass of a full batch takes.
    """
    begin = clock()
    for left in range(1, widths.lanes, max(widths.lanes // 8, 1)):  # about as many as a run meets
        widths.fit(left)
    checks = clock() - begin
    job = Job(run.target, run.stages, run.images, Ball.of(run.threat), run.suite.judge, run.lanes, run.coarse, None)
    worker, spent = Worker(job), []
    for some in (run.positions[: widths.lanes], run.positions[: 4 * widths.lanes]):
        begin = clock()
        first = worker.look(some)
        spent.append((len(some), clock() - begin))
    (few, short), (more, long) = spent
    each = max(0.0, long - short) / (more - few) if more > few else 0.0
    return checks + short + each * (len(run.positions) - few), first.seconds


def _calibrated(run: Run, stage: ReadyStage, at: NDArray[np.int64], widths: BatchWidths, limit: float) -> _Pace:
    """Run a stage with all lanes full, and with few of them in use, for so many seconds each."""
    narrow = widths.fit(max(16, widths.lanes // 8))
    if isinstance(stage.attack, Transfer | Peer):  # most of their work is not asking this model: time it as a whole
        begin = clock()
        _attack(run, run.target, stage, np.resize(at, widths.lanes), widths)
        each = clock() - begin
        return _Pace(widths.lanes, widths.lanes, each, each)
    cases = ((widths.lanes, 4 * widths.lanes), (narrow, narrow))
    seconds = []
    # A question takes a search on by several steps, so a short one is timed.
    if isinstance(stage.attack, Searching) and "steps" in parameters(type(stage.attack)):
        short = replace(stage, attack=replace(cast("Any", stage.attack), steps=min(stage.attack.steps, _SEARCH)))
        for width, count in cases:
            begin = clock()
            forwards = _attack(run, run.target, short, np.resize(at, count), widths)
            seconds.append((clock() - begin) / forwards * width)
        return _Pace(widths.lanes, narrow, *seconds)
    for width, count in cases:
        timed = _Timed(run.target.module, limit).eval()
        with contextlib.suppress(_Enough):
            while True:
                _attack(run, replace(run.target, module=timed), stage, np.resize(at, count), widths)
        seconds.append(timed.round(width))
    return _Pace(widths.lanes, narrow, *seconds)


def _attack(run: Run, target: Target, stage: ReadyStage, at: NDArray[np.int64], widths: BatchWidths) -> int:
    """Attack these images; returns how many forward passes that took."""
    forwards: list[int] = []
    run_stage(
        stage,
        target,
        run.images,
        run.images.x(at),
        run.images.y[at],
        run.images.index[at],
        Ball.of(run.threat),
        widths=widths,
        judge=run.suite.judge,
        deterministic=True,
        on_rows=lambda rows, claimed: forwards.append(int(rows.forwards.sum())),
        on_narrow=lambda width, reason: None,
    )
    return sum(forwards)


@dataclass(frozen=True, eq=False)
class _Tried:
    """What images are taken to cost: the trials that count of each, rounds of each of those, and whether it breaks."""

    trials: NDArray[np.int64]
    rounds: NDArray[np.float64]
    broken: NDArray[np.bool_]


def _tried(rows: pd.DataFrame, n: int) -> _Tried:
    """Take n images to cost what those on record do, over and over."""
    trials = rows["trial"].to_numpy(np.int64) + 1
    rounds = rows["forwards"].to_numpy(np.float64) / trials
    broken = (rows["status"] == Status.BROKEN).to_numpy()
    return _Tried(*(np.resize(column, n if len(rows) else 0) for column in (trials, rounds, broken)))


def _laid(tried: _Tried, trials: int, widths: BatchWidths, pace: _Pace) -> float:
    """Lay images onto the lanes as the engine does (`trials`, `lanes`); returns the seconds that it takes."""
    queue = TrialQueue(range(len(tried.trials)), len(tried.trials), trials)
    seconds, now = 0.0, 0.0
    ends: list[tuple[float, int, int]] = []  # when a lane will be done, with which sample and trial
    over = Trial(False, 0, 0, 0, 0, 0.0, 0, 0, None)
    while True:
        taken = queue.take(pace.lanes - len(ends))
        for position, trial in taken:
            heapq.heappush(ends, (now + tried.rounds[position], position, trial))
        if not ends:
            return seconds
        width = widths.fit(len(ends))
        seconds += (ends[0][0] - now) * pace.seconds(width)
        now = ends[0][0]
        while ends and ends[0][0] == now:
            _, position, trial = heapq.heappop(ends)
            broken = bool(tried.broken[position]) and trial + 1 == tried.trials[position]
            queue.record_end(position, trial, over._replace(broken=broken))
            if broken and trial:  # lanes stop trials that no longer count
                ends = [end for end in ends if end[1] != position]
                heapq.heapify(ends)
            elif (following := queue.next_trial_of(position)) is not None:
                heapq.heappush(ends, (now + tried.rounds[position], position, following))


def _memory(target: Target) -> int:
    if target.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(target.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def total(plans: Sequence[ModelPlan], workers: int) -> dict[str, float]:
    """Sum models up: seconds of work, and until the last of so many workers is done if none ever waits."""
    work = sum(p.seconds for p in plans)
    return {"work_seconds": work, "wall_seconds": work / workers, "workers": workers}


def as_rows(plans: Sequence[ModelPlan]) -> Iterator[dict[str, Any]]:
    """List models and stages as rows of a table."""
    for p in plans:
        clean = StagePlan("(clean)", p.n, p.n, 0, p.opening, p.n / p.opening)
        for s in (clean, *p.stages):
            yield {
                "run": p.title,
                "attack": s.stage,
                "images": s.attacked,
                "forwards": s.forwards,
                "backwards": s.backwards,
                "passes/s": f"{s.passes_per_second:.0f}",
                "seconds": f"{s.seconds:.1f}",
            }
