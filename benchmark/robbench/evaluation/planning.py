"""What a run will cost: passes, time and memory, scaled from a pilot.

The pilot is the run itself on a few of its images. Passes grow with the images. Further passes take the time that they
took in the widest batches of the pilot. Stored records replace the pilot's passes where they cover more images.
"""

from __future__ import annotations

import itertools
import math
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
import pandas as pd
import torch
from torch import nn

from robbench.classifier.checks import classify
from robbench.classifier.prepare import Target
from robbench.core.errors import ResultError, RobbenchError
from robbench.core.types import Status
from robbench.core.words import format_count
from robbench.evaluation.inputs import select
from robbench.evaluation.options import check_count
from robbench.evaluation.peers import Peer
from robbench.evaluation.progress import Silent
from robbench.evaluation.request import RunFields, RunRequest
from robbench.evaluation.run import EvaluationRun, make_run, run_here
from robbench.evaluation.stages import ReadyStage
from robbench.evaluation.transfer import Transfer
from robbench.results.reader import read_vouched, read_vouched_rows
from robbench.suite import SuiteSource

__all__ = ["ModelPlan", "StagePlan", "plan"]

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
        passes_per_second: forward passes of images, each with its backward pass and its share of what the attack and
            the engine do.
    """

    stage: str
    attacked: int
    forwards: int
    backwards: int
    seconds: float
    passes_per_second: float


@dataclass(frozen=True, repr=False)
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

    @property
    def headline(self) -> str:
        """The whole cost in one line, as `robbench plan` prints it."""
        return (
            f"{self.title}: {format_count(self.n, 'image')}, {self.seconds:.0f} s ± {100 * self.uncertainty:.0f} % on "
            f"one worker. Passes: {self.source}. {format_count(self.lanes, 'lane')}; at most "
            f"{self.memory / 2**20:.0f} MiB so far."
        )

    def __repr__(self) -> str:
        """Return the whole cost in one line."""
        return f"<ModelPlan {self.headline}>"

    def __str__(self) -> str:
        """Return the whole cost, and a line for each attack."""
        costs = [
            f"  {s.stage}: {format_count(s.attacked, 'image')}, {s.forwards} forward and {s.backwards} backward "
            f"passes, {s.seconds:.1f} s"
            for s in self.stages
        ]
        return "\n".join([self.headline, *costs])


class _Stopwatch(Silent):
    """Times a run: its opening, each stage up to its last record, and the calls of the model in each stage."""

    def __init__(self) -> None:
        self.begin, self.opening = clock(), 0.0
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, list[tuple[float, int]]] = {"": []}

    def plan(self, *about: object) -> None:
        """End the opening."""
        self.opening = clock() - self.begin

    def stage(self, name: str, todo: int, done: int, standing: int) -> None:
        """Begin a stage."""
        self.begin, self.seconds[name], self.calls[name] = clock(), 0.0, []

    def progress(self, name: str, finished: int, broken: int) -> None:
        """Note how long the stage has taken so far."""
        self.seconds[name] = clock() - self.begin

    def call(self, width: int) -> None:
        """Note that the model is asked about so many images at once."""
        self.calls[[*self.calls][-1]].append((clock(), width))

    def pace(self, name: str) -> float | None:
        """Return seconds for each image of the widest batches of a stage; None where it had no two calls."""
        spent = [(width, end - begin) for (begin, width), (end, _) in itertools.pairwise(self.calls[name])]
        widest = max((width for width, _ in spent), default=0)
        return float(np.mean([s for width, s in spent if width == widest])) / widest if spent else None


def plan(
    model: str | nn.Module, suite: SuiteSource = "whitebox", *, pilot: int | None = None, **fields: Unpack[RunFields]
) -> ModelPlan:
    """Tell what a run will cost on one worker like this process.

    Args:
        model: as for `evaluate`.
        suite: as for `evaluate`.
        pilot: how many of the run's images to run the suite on. None means 128, or as many as fill the lanes, because a
            full batch is what most of a long run is made of.
        **fields: as for `evaluate`.

    Raises:
        RobbenchError: what `evaluate` refuses; or the model classifies no image of the pilot correctly.
    """
    pilot = check_count("pilot", pilot, least=2)
    request = RunRequest.of(model, suite, **fields)
    run = make_run(request)
    request = run.request
    few = replace(
        request.options,
        samples=pilot or max(128, run.lanes),
        sample_seed=0,
        results=None,
        save_adversarials=False,
        overwrite=False,
    )
    watch = _Stopwatch()
    trial = EvaluationRun(replace(request, options=few), run.target, run.images, run.suite, watch)
    # Drawn from all images of the run: neighbours in official order may be alike.
    trial.positions = run.positions[select(len(run.positions), few)]
    trial.index = run.images.index[trial.positions]
    noted = run.target.module.register_forward_pre_hook(lambda module, args: watch.call(len(args[0])))
    try:
        run_here(trial)
    finally:
        noted.remove()
    return _scaled(run, trial, watch)


def _scaled(run: EvaluationRun, trial: EvaluationRun, watch: _Stopwatch) -> ModelPlan:
    """Scale what the pilot cost to all images of the run."""
    n, count, tried = len(run.index), len(trial.index), trial.shards.collect_rows()
    rows, source = _records(run)
    if rows["sample"].nunique() < count:
        rows, source = tried, f"a pilot on {format_count(count, 'image')}"
    known = rows["sample"].nunique()
    attacked = rows[rows["status"].isin([Status.BROKEN, Status.ROBUST])]
    if attacked.empty:
        raise RobbenchError(f"{run.title()}: none of {known} images is classified correctly; nothing is to attack.")
    stages, cost = [], pd.Series(0.0, index=rows["sample"].unique())
    for stage in run.stages:
        mine = attacked[attacked["attack"] == stage.name].set_index("sample")
        images, forwards, backwards = (
            n / known * share for share in (len(mine), mine["forwards"].sum(), mine["backwards"].sum())
        )
        seconds = _seconds(stage, forwards, run, trial, watch)
        rate = float(forwards / seconds) if seconds else 0.0
        stages.append(StagePlan(stage.name, round(images), round(forwards), round(backwards), float(seconds), rate))
        cost = cost.add(mine["forwards"] / rate if rate else 0.0, fill_value=0.0)
    begin, at = clock(), trial.positions
    classify(run.target, run.images.take(at), run.images.y[at], run.images.num_classes, run.lanes)
    opening = watch.opening + (clock() - begin) * (n / count - 1)
    # Records of all images leave nothing open.
    error = 2 * cost.std() / cost.mean() * math.sqrt(max(0.0, 1 / known - 1 / n)) if cost.mean() else 0.0
    return ModelPlan(run.title(), n, opening, stages, float(error), source, run.lanes, _memory(run.target))


def _seconds(stage: ReadyStage, forwards: float, run: EvaluationRun, trial: EvaluationRun, watch: _Stopwatch) -> float:
    """Return seconds of a stage: those of the pilot, and for each further pass its share of a full batch."""
    rows, spent = trial.shards.collect_rows(), watch.seconds[stage.name]
    tried = int(rows.loc[rows["attack"] == stage.name, "forwards"].sum())
    if isinstance(stage.attack, Peer):  # it attacks whole batches, whichever of their images are asked for
        batches = [len(np.unique(r.index // stage.attack.batch)) for r in (run, trial)]
        return spent * batches[0] / batches[1]
    if not tried:  # a cascade that left the pilot nothing: as fast as all stages together
        return forwards * sum(watch.seconds.values()) / max(int(rows["forwards"].sum()), 1)
    each = spent / tried
    if not isinstance(stage.attack, Transfer):  # most of its work is to ask another model
        each = watch.pace(stage.name) or each
    return max(0.0, spent + each * (forwards - tried))


def _records(run: EvaluationRun) -> tuple[pd.DataFrame, str]:
    """Read what is stored of this very run."""
    nothing = pd.DataFrame({"sample": []})
    if run.store is None or not run.store.result_path.exists():
        return nothing, ""
    try:
        if read_vouched(run.store.folder).run_id != run.store.run_id:
            return nothing, ""
        rows = read_vouched_rows(run.store.folder)
    except ResultError:  # damaged: the run itself will say so
        return nothing, ""
    rows = rows[rows["sample"].isin(run.index)]
    return rows, f"records of {format_count(rows['sample'].nunique(), 'image')} in {run.store.folder}"


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
