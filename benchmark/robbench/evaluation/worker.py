"""The part of a run that asks the model, in this process or on another machine. It reads and writes no file."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from robbench.classifier.batch_width import BatchWidths
from robbench.classifier.checks import (
    choose_width,
    classify,
    compute_logits,
    find_bfloat16_flag,
    find_state_change_flag,
    measure_pass_seconds,
)  # fmt: skip
from robbench.classifier.fast_layers import list_fast_layers
from robbench.classifier.guard import list_flags, out_of_memory
from robbench.classifier.leak import keeps_memory
from robbench.classifier.prepare import Target
from robbench.core.errors import ModelError
from robbench.core.machine import Growth, describe_device, environment, held_bytes, versions
from robbench.core.threat import Ball
from robbench.core.types import Judge
from robbench.core.words import format_count
from robbench.engine import engine
from robbench.evaluation.inputs import Images
from robbench.evaluation.keep_adversarials import Keeper
from robbench.evaluation.stages import ReadyStage, run_stage
from robbench.evaluation.targets import Targets
from robbench.evaluation.transfer import Transfer
from robbench.results.adversarials import Points

__all__ = ["CleanReport", "Job", "Place", "Sink", "Worker"]


class Sink(Protocol):
    """Takes what a worker finds, as it is found."""

    def take(self, k: int, rows: engine.Rows) -> None:
        """Take records of stage k."""

    def narrow(self, k: int, width: int, reason: str) -> None:
        """Hear that memory ran out at stage k: the width that is left, and what the allocator said."""


@dataclass(frozen=True)
class Place:
    """What a number was measured on, and with what; see `core.machine`."""

    hardware: str
    versions: dict[str, str]
    environment: dict[str, Any]

    @classmethod
    def of(cls, target: Target) -> Place:
        """Describe this process, and how the model runs in it."""
        fast_layers = {"fast_layers": list_fast_layers(target.module)}
        return cls(describe_device(target.device), versions(), environment(target.device) | fast_layers)


@dataclass(frozen=True, eq=False)
class Job:
    """What a worker needs of a run.

    Attributes:
        target: the model.
        stages: the attacks, in the order of the suite.
        images: the whole test set.
        ball: threat.
        judge: which points count.
        lanes: batch width.
        coarse: whether gradients are computed in bfloat16.
        keep: the run_id if adversarial examples are kept; they carry it.
        targets: what gives each image its target; None if every other class is a break.
    """

    target: Target
    stages: list[ReadyStage]
    images: Images
    ball: Ball
    judge: Judge
    lanes: int
    coarse: bool
    keep: str | None
    targets: Targets | None = None

    def on(self, device: torch.device) -> Job:
        """Move the model, and the surrogates of transfers, to a device."""
        target = replace(self.target, module=self.target.module.to(device), device=device)
        for stage in self.stages:
            if isinstance(stage.attack, Transfer):
                stage.attack.surrogate.to(device)
        return replace(self, target=target)


@dataclass(frozen=True, eq=False)
class CleanReport:
    """What a look at the clean images found.

    Attributes:
        prediction: [n] int64, -1 where the answer is not finite.
        flags: name of the problem -> sentence.
        seconds: for one forward and backward pass of a full batch, as attacks make them; NaN if the model fails at it.
        place: where it was.
        lanes: batch width that the memory allowed.
        notes: what a user should know at once, and results need not say.
    """

    prediction: NDArray[np.int64]
    flags: dict[str, str]
    seconds: float
    place: Place
    lanes: int
    notes: tuple[str, ...] = ()

    @property
    def deterministic(self) -> bool:
        """Whether the model answers the same thing twice."""
        return "randomized" not in self.flags


@dataclass(eq=False)
class Worker:
    """A job on one device.

    Attributes:
        job: what of the run it needs.
        deterministic: whether the model answers the same thing twice, as `look` found here or elsewhere.
    """

    job: Job
    deterministic: bool = True
    growth: Growth = field(default_factory=Growth)

    def __post_init__(self) -> None:
        job, images = self.job, self.job.images
        self.shape = images.shape
        self.widths = BatchWidths(job.target.module, self.shape, job.lanes, images.dtype, job.coarse)
        exact = job.judge == "nearest"  # rounding would change the distance, which is what the points show
        self.keeper = job.keep and Keeper(job.keep, job.target, images, job.ball, self.widths, exact)
        self.known: set[str] = set()  # flags that `look` reported
        self.before: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def look(self, positions: NDArray[np.int64]) -> CleanReport:
        """Classify clean images, and look for answers that no robust accuracy can be derived from.

        When memory runs out, the lanes are halved, and it begins again.

        Args:
            positions: of the images in the test set, [n].

        Raises:
            ModelError: see `checks.classify`; or memory runs out with a single lane.
        """
        notes: tuple[str, ...] = ()
        while True:
            try:
                return self._look(positions, notes)
            except (ModelError, MemoryError, RuntimeError) as error:
                cause = error.__cause__ if isinstance(error, ModelError) else error
                if cause is None or not out_of_memory(cause):
                    raise
                failure = (str(cause).splitlines() or ["MemoryError"])[0]
            # Outside of the except block: there, the traceback still holds the tensors.
            if self.widths.lanes == 1:
                raise ModelError(f"Out of memory with a single lane: {failure}")
            if self.job.target.device.type == "cuda":
                torch.cuda.empty_cache()
            self.widths.halve()
            notes = (f"out of memory ({failure}); going on with {format_count(self.widths.lanes, 'lane')}.",)

    def _look(self, positions: NDArray[np.int64], notes: tuple[str, ...]) -> CleanReport:
        target, images = self.job.target, self.job.images
        lanes = choose_width(self.widths, len(positions))
        x, y, sample = images.take(positions), images.y[positions], images.index[positions]
        prediction, flags = classify(target, x, y, images.num_classes, lanes, sample)
        seconds = full = measure_pass_seconds(target, self.shape, lanes, images.dtype)
        if self.job.coarse:
            flags |= find_bfloat16_flag(target, x[:lanes], lanes)
            seconds = measure_pass_seconds(target, self.shape, lanes, images.dtype, bfloat16=True)
            if seconds > 1.1 * full:
                times = f"{1e3 * seconds:.1f} ms in bfloat16 and {1e3 * full:.1f} ms in {images.dtype}"
                notes += (f"Gradients in bfloat16 cost time here: a pass of {lanes} images takes {times}.",)
        found = CleanReport(prediction, flags, seconds, Place.of(target), self.widths.lanes, notes)
        self.deterministic, self.known = found.deterministic, set(flags)
        return found

    def is_deterministic(self) -> bool:
        """Return whether the model answers the same thing twice, as far as `look` and the judge have seen."""
        return self.deterministic and "randomized" not in list_flags(self.job.target.module)

    def attack(self, k: int, positions: NDArray[np.int64], sink: Sink) -> None:
        """Run stage k on images that the model classifies correctly.

        Args:
            k: which stage.
            positions: of the images in the test set, [n].
            sink: takes the records as they finish.

        Raises:
            ModelError: the model fails; the sentence says at which samples.
        """
        for part in self.job.images.split(positions):
            self._attack(k, part, sink)

    def _attack(self, k: int, positions: NDArray[np.int64], sink: Sink) -> None:
        job, stage = self.job, self.job.stages[k]
        x, y, index = job.images.x(positions), job.images.y[positions], job.images.index[positions]
        if self.before is None:
            first = x[: self.widths.lanes]
            before = compute_logits(job.target, first, choose_width(self.widths, len(first)))
            self.before = first, y[: len(first)], before

        def finish(rows: engine.Rows) -> None:
            if self.keeper:  # before the rows, so that a shard has both
                self.keeper.take(stage.name, rows)
            kept = 0 if rows.x_adv is None else rows.x_adv.nbytes
            self.growth.look(held_bytes(job.target.device), kept + 200 * len(rows.sample))
            sink.take(k, replace(rows, x_adv=None))

        run_stage(
            stage,
            job.target,
            job.images,
            x,
            y,
            index,
            job.ball,
            widths=self.widths,
            judge=job.judge,
            deterministic=self.is_deterministic(),
            on_rows=finish,
            on_narrow=functools.partial(sink.narrow, k),
            keep_adversarials=bool(self.keeper),
            targets=job.targets,
        )

    def points(self, exact: bool = False) -> list[Points]:
        """Hand over the adversarial examples found since the last time; with `exact` the model is not asked."""
        return self.keeper.points(exact or not self.is_deterministic()) if self.keeper else []

    def end(self) -> dict[str, str]:
        """Look at the model and the memory again when the attacks are over; returns flags."""
        flags = {name: said for name, said in list_flags(self.job.target.module).items() if name not in self.known}
        if self.is_deterministic() and self.before is not None:
            lanes = choose_width(self.widths, len(self.before[0]))
            flags |= find_state_change_flag(self.job.target, *self.before, lanes)
        if (leaked := self.growth.leaked) and keeps_memory(self.job.target, self.shape, self.job.images.dtype):
            flags["memory"] = (
                f"Memory in use grew steadily, by {leaked / 2**20:.0f} MiB after the first third of the run: something "
                "in the model keeps what it is given. A longer run may be killed; the same command then goes on."
            )
        return flags
