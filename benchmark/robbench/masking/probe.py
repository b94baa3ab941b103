"""What every measurement of a model shares: the images it looks at, chance, and what it costs."""

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

__all__ = ["Connected", "Probe", "Trace", "cosine"]


class Connected(nn.Module):
    """A model without a path for gradients, given one that carries zeros: what an attack on it truly sees."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Answer as the inner model does."""
        logits: Tensor = self.inner(x)
        return logits + 0 * x.flatten(1).sum(1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Trace:
    """One trial of an attack without early stop; T steps, N images.

    Attributes:
        loss: cross-entropy at every queried point, [T + 1, N].
        margin: the margin there, positive where the prediction is wrong, [T + 1, N].
        x: the final points, [N, C, H, W].
    """

    loss: Tensor
    margin: Tensor
    x: Tensor


@dataclass(eq=False)
class Probe:
    """A model and correctly classified images to measure it on.

    Attributes:
        target: the model.
        x: images [N, C, H, W] on the CPU, in official order.
        y: labels [N].
        sample: official indices [N].
        ball: the threat.
        seed: of the random numbers.
        widths: of batches.
        draws: how many answers decide over a break.
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
    _counts: list[int] = field(default_factory=lambda: [0, 0])  # forward passes alone, with a backward pass
    _paused: list[bool] = field(default_factory=lambda: [False])  # lists, so that parts of a probe share them

    def first(self, count: int) -> Probe:
        """Look at the first images only; what it costs is counted here too."""
        return replace(self, x=self.x[:count], y=self.y[:count], sample=self.sample[:count])

    def __len__(self) -> int:
        """Count the images."""
        return len(self.y)

    @contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Count what the model is asked within, under a name."""

        def count(_: nn.Module, given: tuple[Tensor, ...], out: object) -> None:
            if not self._paused[0]:
                self._counts[torch.is_grad_enabled()] += len(given[0])

        before, begin = list(self._counts), time.perf_counter()
        hook = self.target.module.register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()
            forwards, pairs = (now - then for now, then in zip(self._counts, before, strict=True))
            self.costs[name] = Cost(forwards=forwards, pairs=pairs, seconds=round(time.perf_counter() - begin, 3))

    def problem(self, name: str, trial: int = 0) -> Problem:
        """Pose the problem on the model's device, with random numbers of this name."""
        device = self.target.device
        sample = torch.from_numpy(self.sample).to(device)
        return Problem(
            x=self.x.to(device),
            y=self.y.to(device),
            sample=sample,
            trial=torch.full_like(sample, trial),
            key=rng.make_key(self.seed, f"sanity/{name}"),
        )

    def signs(self, name: str, step: int) -> Tensor:
        """Draw random Rademacher directions, [N, C, H, W] of ±1."""
        p = self.problem(name)
        words = rng.bits(p.key, p.sample, p.trial, step, p.x[0].numel())
        return ((words & 1) * 2 - 1).to(p.x.dtype).view_as(p.x)

    def batches(self) -> Iterator[slice]:
        """Split the images into batches of the lanes' width."""
        for start in range(0, len(self), self.widths.lanes):
            yield slice(start, start + self.widths.lanes)

    def logits(self, x: Tensor) -> Tensor:
        """Ask about points [M, C, H, W], any number of them, without gradients: [M, K]."""
        with torch.no_grad():
            return torch.cat([self.target.module(part) for part in x.split(self.widths.lanes)])  # type: ignore[no-untyped-call]

    def margins(self, x: Tensor, y: Tensor) -> Tensor:
        """Evaluate the margin of points [M, C, H, W] in float64, so that differences of close ones keep digits: [M]."""
        return margin(self.logits(x).double(), y)

    def margin_gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the margin and its gradient at points [M, C, H, W]: [M] and [M, C, H, W]."""
        return self.gradient(x, y, margin)

    def gradient(self, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Evaluate a loss and its gradient at points [M, C, H, W]: [M] and [M, C, H, W] (zero where not finite)."""
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

    def attack(self, name: str, attack: Attack, ball: Ball | None = None) -> engine.Rows:
        """Let the engine run an attack on all images and judge it; rows are in the order of the images."""
        self._paused[0] = True  # the engine counts for itself, without what fills its lanes
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
        asked, climbed = int(rows.forwards.sum()), int(rows.backwards.sum())
        self._counts[0] += asked - climbed
        self._counts[1] += climbed
        order = np.argsort(rows.sample)[np.argsort(np.argsort(self.sample))]
        columns = {n: getattr(rows, n)[order] for n in engine.Rows.__dataclass_fields__ if n != "x_adv"}
        return engine.Rows(**columns)

    def trace(self, name: str, attack: Attack) -> Trace:
        """Run one trial of an attack to its end, whatever it finds, and record losses at every step."""
        whole = self.problem(name)
        parts = []
        for at in self.batches():
            cut = {field: getattr(whole, field)[at] for field in ("x", "y", "sample", "trial")}
            parts.append(trace(self.target.module, attack, replace(whole, **cut), self.ball))
        return Trace(
            torch.cat([t.loss for t in parts], dim=1),
            torch.cat([t.margin for t in parts], dim=1),
            torch.cat([t.x for t in parts]),
        )


def trace(model: nn.Module, attack: Attack, p: Problem, ball: Ball) -> Trace:
    """Run one trial of an attack as the plain loop (`engine.perturb`), recording what every query answered."""
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
    return Trace(torch.stack(losses), torch.stack(margins), state["x"].detach())


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Compare rows in float64: the cosine of [N, D] and [N, D], 0 where one of them is zero, NaN where both are."""
    a, b = a.double(), b.double()
    lengths = a.norm(dim=1) * b.norm(dim=1)
    both = (a == 0).all(1) & (b == 0).all(1)
    found = torch.where(lengths > 0, (a * b).sum(1) / lengths.clamp(min=torch.finfo(a.dtype).tiny), 0.0)
    return found.masked_fill(both, torch.nan)
