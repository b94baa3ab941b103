"""A model with images to measure it on, random numbers, and a count of the cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.attacks import Attack
from robbench.classifier.batch_width import BatchWidths
from robbench.classifier.prepare import Target
from robbench.core import rng
from robbench.core.losses import cross_entropy, margin
from robbench.core.threat import Ball
from robbench.core.types import Problem
from robbench.engine import engine
from robbench.masking.measurements import Cost

__all__ = ["AttackTrace", "GradientProbe", "ZeroGradientModel", "compute_cosines", "trace_attack"]


class ZeroGradientModel(nn.Module):
    """A model that autograd does not connect to its input, with a gradient of zero. Gradient attacks can run on it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the inner model, [N, K]."""
        logits: Tensor = self.inner(x)
        return logits + 0 * x.flatten(1).sum(1, keepdim=True)


@dataclass(frozen=True, eq=False)
class AttackTrace:
    """The losses of one trial of an attack without early stop, for T steps and N images.

    Attributes:
        loss: cross-entropy at every queried point, [T + 1, N].
        margin: margin at every queried point, [T + 1, N]. It is positive where the prediction is wrong.
        x: the final points, [N, C, H, W].
    """

    loss: Tensor
    margin: Tensor
    x: Tensor


@dataclass(eq=False)
class GradientProbe:
    """A model and images to measure it on.

    Attributes:
        target: the model.
        x: images [N, C, H, W] on the CPU, in official order.
        y: labels [N].
        sample: official indices [N].
        ball: the threat.
        seed: seed of the random numbers.
        widths: batch widths.
        draws: number of answers of the model whose majority decides whether an image is broken.
        costs: name of a measurement -> its cost.
    """

    target: Target
    x: Tensor
    y: Tensor
    sample: NDArray[np.int64]
    ball: Ball
    seed: int
    widths: BatchWidths
    draws: int = 1
    costs: dict[str, Cost] = field(default_factory=dict)
    # The counters are lists, so that the probes that `take_first` returns share them.
    _counts: list[int] = field(default_factory=lambda: [0, 0])  # forward passes without and with a backward pass
    _paused: list[bool] = field(default_factory=lambda: [False])

    def take_first(self, count: int) -> GradientProbe:
        """Return a probe of the first images. Its cost is added to this probe's costs."""
        return replace(self, x=self.x[:count], y=self.y[:count], sample=self.sample[:count])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.y)

    @contextmanager
    def count_cost(self, name: str) -> Iterator[None]:
        """Count the passes through the model inside the `with` block, and store them under a name in `costs`."""

        def count(_: nn.Module, given: tuple[Tensor, ...], out: object) -> None:
            if not self._paused[0]:
                self._counts[torch.is_grad_enabled()] += len(given[0])

        before, begin = list(self._counts), time.perf_counter()
        hook = self.target.module.register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()
            forwards, pairs = (after - start for after, start in zip(self._counts, before, strict=True))
            self.costs[name] = Cost(forwards=forwards, pairs=pairs, seconds=round(time.perf_counter() - begin, 3))

    def make_problem(self, name: str, trial: int = 0) -> Problem:
        """Make the attack problem on the model's device. The name selects its random numbers."""
        device = self.target.device
        sample = torch.from_numpy(self.sample).to(device)
        return Problem(
            x=self.x.to(device),
            y=self.y.to(device),
            sample=sample,
            trial=torch.full_like(sample, trial),
            key=rng.make_key(self.seed, f"sanity/{name}"),
        )

    def draw_signs(self, name: str, step: int) -> Tensor:
        """Draw random Rademacher directions, [N, C, H, W] of ±1."""
        p = self.make_problem(name)
        words = rng.bits(p.key, p.sample, p.trial, step, p.x[0].numel())
        return ((words & 1) * 2 - 1).to(p.x.dtype).view_as(p.x)

    def split_batches(self) -> Iterator[slice]:
        """Yield slices that split the images into batches of the batch width."""
        for start in range(0, len(self), self.widths.lanes):
            yield slice(start, start + self.widths.lanes)

    def compute_logits(self, x: Tensor) -> Tensor:
        """Return the logits [M, K] at points [M, C, H, W], for any M, without gradients."""
        with torch.no_grad():
            return torch.cat([self.target.module(part) for part in x.split(self.widths.lanes)])  # type: ignore[no-untyped-call]

    def compute_margins(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the margins [M] at points [M, C, H, W] in float64, so that differences of close values are exact."""
        return margin(self.compute_logits(x).double(), y)

    def compute_gradient(self, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return a loss [M] and its gradient [M, C, H, W] at points [M, C, H, W]. Nonfinite entries become 0."""
        values, gradients = [], []
        for start in range(0, len(x), self.widths.lanes):
            at = slice(start, start + self.widths.lanes)
            point = x[at].detach().requires_grad_(True)
            with torch.enable_grad():
                value = loss(self.target.module(point), y[at])
            (grad,) = torch.autograd.grad(value.sum(), point, allow_unused=True)
            values.append(value.detach())
            gradients.append(torch.zeros_like(point) if grad is None else grad.nan_to_num(0.0, 0.0, 0.0))
        return torch.cat(values), torch.cat(gradients)

    def run_attack(self, name: str, attack: Attack, ball: Ball | None = None) -> engine.Rows:
        """Run an attack on all images with the engine, and return its judged records in the order of the images."""
        self._paused[0] = True  # the engine counts the passes itself and leaves out images that only fill a batch
        rows = engine.attack_samples(
            self.target.module,
            attack,
            self.x,
            self.y,
            self.sample,
            ball or self.ball,
            key=rng.make_key(self.seed, f"sanity/{name}"),
            widths=self.widths,
            detect_cycles=self.draws == 1,
            draws=self.draws,
        )
        self._paused[0] = False
        forwards, backwards = int(rows.forwards.sum()), int(rows.backwards.sum())
        self._counts[0] += forwards - backwards
        self._counts[1] += backwards
        order = np.argsort(rows.sample)[np.argsort(np.argsort(self.sample))]
        columns = {n: getattr(rows, n)[order] for n in engine.Rows.__dataclass_fields__ if n != "x_adv"}
        return engine.Rows(**columns)

    def trace_attack(self, name: str, attack: Attack) -> AttackTrace:
        """Run one trial of an attack without early stop, and record the losses at every step."""
        problem = self.make_problem(name)
        parts = []
        for at in self.split_batches():
            batch = {field: getattr(problem, field)[at] for field in ("x", "y", "sample", "trial")}
            parts.append(trace_attack(self.target.module, attack, replace(problem, **batch), self.ball))
        return AttackTrace(
            torch.cat([t.loss for t in parts], dim=1),
            torch.cat([t.margin for t in parts], dim=1),
            torch.cat([t.x for t in parts]),
        )


def trace_attack(model: nn.Module, attack: Attack, p: Problem, ball: Ball) -> AttackTrace:
    """Run one trial of an attack without early stop (as `engine.perturb`), and record the losses of every query."""
    state = attack.init(p, ball)
    losses, margins = [], []
    for step in range(attack.steps + 1):
        last = step == attack.steps
        logits, loss, grad = engine.query(model, attack, p, state, attack.needs_grad and not last)
        losses.append(cross_entropy(logits, p.y))
        margins.append(margin(logits, p.y))
        if not last:
            t = torch.full_like(p.sample, step)
            state = attack.step(p, ball, state, t, logits, loss, grad.nan_to_num(0.0, 0.0, 0.0))
    return AttackTrace(torch.stack(losses), torch.stack(margins), state["x"].detach())


def compute_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines [N] of the rows of [N, D] and [N, D], in float64: 0 if one row is zero, NaN if both are."""
    a, b = a.double(), b.double()
    lengths = a.norm(dim=1) * b.norm(dim=1)
    both_zero = (a == 0).all(1) & (b == 0).all(1)
    cosines = torch.where(lengths > 0, (a * b).sum(1) / lengths.clamp(min=torch.finfo(a.dtype).tiny), 0.0)
    return cosines.masked_fill(both_zero, torch.nan)
