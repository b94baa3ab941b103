"""Cycles towards targets, whose first steps may leave the ball, with rules to give up that no scale of logits moves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robbench.attacks.base import check_parameters, clean_logits, may_hold
from robbench.core.errors import SuiteError
from robbench.core.losses import cross_entropy_scaled, margin, margin_targeted
from robbench.core.threat import Ball, per_lane
from robbench.core.types import NORMS, Norm, Problem, State

__all__ = ["Relax"]

_NOISE = 1 << 29  # step counter of the noise, away from those of the starts


@dataclass(frozen=True, kw_only=True)
class Relax:
    """One trial of a short run and of cycles, each from a start of its own, towards the classes that the run came near.

    First, a run of `probe` steps climbs the rescaled cross-entropy. The classes other than y are ranked by the logits
    at its last point. Then one cycle climbs the margin of each of the `targets` likeliest classes. A cycle has three
    parts. Points of the first part may lie outside the ball: in a ball whose radius shrinks from 1 + `widen` times ε to
    ε. Such a point breaks nothing. Where the model errs on one, its projection is the next query, and the second part
    begins. Points of the second part lie in the ball. The third part begins halfway between the best point of the
    cycle and a random point of the ball. At last, up to `restarts` cycles climb the margin of the class that came
    closest to zero.

    The relaxation follows the idea of Pan et al. 2025 ("Constraint relaxation attack", AAAI). The rules below are
    different. A margin is compared with the margin of the clean image, or with the range of other margins of the same
    image. So no rule depends on the scale of the logits:

    - A cycle ends after its second part if more than `hopeless` of the clean margin is left.
    - Among the targets, from the third cycle on, the trial ends after a cycle if two things hold. More than `hopeless`
      of the clean margin is left, and the distance from the best cycle to zero is more than `spread` times the distance
      from the worst cycle to the best. Cycles that all end alike on a far image promise nothing of the next one.
    - A restart happens if less than a share of the clean margin is left. The share falls from `hopeless` before the
      first restart in equal parts to zero after the last one.

    Attributes:
        probe: steps of the short run.
        targets: number of target classes, the likeliest at the end of the short run first.
        restarts: most cycles after those of the targets.
        outside: steps of the first part of a cycle.
        inside: steps of the second part.
        again: steps of the third part.
        widen: how far points of the first part may leave the ball, as a share of ε.
        hopeless: the share of the clean margin from which on an image or a target counts as far.
        spread: how often the range of the cycles must fit between the best cycle and zero to end the trial.
    """

    kind: ClassVar[str] = "relax"
    version: ClassVar[int] = 1
    memoryless: ClassVar[bool] = False
    norms: ClassVar[tuple[Norm, ...]] = NORMS
    needs_grad: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    trials: ClassVar[int] = 1

    probe: int = 10
    targets: int = 9
    restarts: int = 12
    outside: int = 5
    inside: int = 10
    again: int = 5
    widen: float = 0.5
    hopeless: float = 0.1
    spread: float = 1.0

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        check_parameters(self)
        for name in ("probe", "targets", "outside", "inside", "again"):
            if getattr(self, name) < 1:
                raise SuiteError(f"{name} {getattr(self, name)} given; allowed: at least 1")
        for name in ("restarts", "widen", "spread"):
            if getattr(self, name) < 0:
                raise SuiteError(f"{name} {getattr(self, name)} given; allowed: at least 0")
        if self.hopeless <= 0:
            raise SuiteError(f"hopeless {self.hopeless} given; it must be above 0")

    @property
    def cycle(self) -> int:
        """The steps of a cycle."""
        return self.outside + self.inside + self.again

    @property
    def steps(self) -> int:
        """The steps of the short run and of all cycles, and one step between each and the next."""
        return self.probe + (self.targets + self.restarts) * (self.cycle + 1)

    def init(self, p: Problem, ball: Ball) -> State:
        """Begin the short run."""
        count, lanes = torch.zeros_like(p.y), torch.zeros_like(p.x.flatten(1)[:, 0])
        others = clean_logits(p).shape[1] - 1
        return {
            "x": ball.random(p),
            "at": count,  # 0 for the short run, then the number of the cycle
            "taken": count.clone(),  # steps of it
            "order": torch.zeros_like(p.y)[:, None].repeat(1, others),  # classes other than y, the likeliest first
            "rank": count.clone(),  # of the target
            "came": torch.full_like(lanes, -torch.inf)[:, None].repeat(1, others),  # best margin of each rank's cycles
            "near": lanes - torch.inf,  # best margin of this cycle inside the ball, towards its target
            "top": p.x.clone(),  # its point
            "best": lanes - torch.inf,  # margin of any point in the ball
            "done": torch.zeros_like(p.y, dtype=torch.bool),
        }

    def loss(self, logits: Tensor, p: Problem, s: State) -> Tensor:
        """Evaluate the rescaled cross-entropy in the short run, and the margin of the target in a cycle."""
        target = s["order"].gather(1, s["rank"][:, None]).squeeze(1)
        return torch.where(s["at"] == 0, cross_entropy_scaled(logits, p.y), margin_targeted(logits, p.y, target))

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Take a step, begin the next cycle, or end the trial."""
        at, taken, probing = s["at"], s["taken"], s["at"] == 0
        gap, lead = margin(logits, p.y), margin(clean_logits(p), p.y)
        inside = probing | (taken >= self.outside)
        best = torch.where(inside, torch.maximum(s["best"], gap), s["best"])
        better = inside & (loss > s["near"])
        near = torch.where(better, loss, s["near"])
        top = torch.where(per_lane(better, grad), s["x"], s["top"])

        far = (near / lead > self.hopeless) & (taken == self.outside + self.inside)  # both are negative
        over = torch.where(probing, taken == self.probe, far | (taken == self.cycle))
        order = s["order"]
        if may_hold(probing & over):
            others = logits.scatter(1, p.y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :-1]
            order = torch.where((probing & over)[:, None], others, order)
        mine = torch.arange(order.shape[1], device=at.device) == s["rank"][:, None]
        came = torch.where((over & ~probing)[:, None] & mine, torch.maximum(s["came"], near[:, None]), s["came"])
        done = s["done"] | (over & self._gives_up(at, best / lead, came))
        jump = over & ~done
        rank = torch.where(at < self._number(order), at, came.argmax(1))

        x = self._move(p, ball, s | {"top": top}, grad)
        caught = ~inside & (gap > 0)  # the model errs on a point outside the ball
        if may_hold(caught):
            x = torch.where(per_lane(caught, grad), ball.project(p.x, s["x"]), x)
        if may_hold(jump):
            x = torch.where(per_lane(jump, grad), ball.random(p, step=at + 1), x)
        return {
            "x": torch.where(per_lane(done, grad), s["x"], x),
            "at": at + jump.long(),
            "taken": torch.where(jump, 0, torch.where(caught, self.outside, taken + 1)),
            "order": order,
            "rank": torch.where(jump, rank, s["rank"]),
            "came": came,
            "near": near.masked_fill(jump, -torch.inf),
            "top": top,
            "best": best,
            "done": done,
        }

    def _number(self, order: Tensor) -> int:
        """Return how many targets there are."""
        return min(self.targets, order.shape[1])

    def _gives_up(self, at: Tensor, left: Tensor, came: Tensor) -> Tensor:
        """Tell where the trial ends after cycle number `at`, with this share of the clean margin left: [L] bool."""
        number = self._number(came)
        high, low = came.amax(1), came.masked_fill(came.isinf(), torch.inf).amin(1)
        alike = (at >= 3) & (left > self.hopeless) & (-high > self.spread * (high - low))
        restarted = at - number
        allowed = self.hopeless * (1 - restarted / max(self.restarts, 1))
        return torch.where(restarted < 0, alike, (left >= allowed) | (restarted >= self.restarts))

    def _move(self, p: Problem, ball: Ball, s: State, grad: Tensor) -> Tensor:
        """Follow the gradient by steps whose size falls along half a cosine, in the ball of this step."""
        probing, taken, turn = s["at"] == 0, s["taken"], self.outside + self.inside
        third = ~probing & (taken >= turn)
        share = torch.where(
            probing, taken / self.probe, torch.where(third, (taken - turn) / self.again, taken / turn)
        ).to(grad.dtype)
        size = ((share.clamp(max=1) * math.pi).cos() + 1) * torch.where(third, 0.5, 1.0) * ball.eps
        x = s["x"]
        begins = third & (taken == turn)
        if may_hold(begins):  # the draw takes time
            halfway = (s["top"] + ball.random(p, step=s["at"] + _NOISE)) / 2
            x = torch.where(per_lane(begins, grad), halfway, x)  # the gradient is that of another point
        x = x + per_lane(size.masked_fill(begins, 0), grad) * ball.steepest(x, grad)
        # The wider ball is the ball, stretched around the image and cut at the box.
        outside = self.widen * (1 - (taken + 1).to(grad.dtype) / self.outside).clamp(min=0)
        wide = per_lane(torch.where(probing, 0.0, outside) + 1, grad)
        stretched = (p.x + wide * (ball.project(p.x, p.x + (x - p.x) / wide) - p.x)).clamp(0, 1)
        return torch.where(wide > 1, stretched, ball.project(p.x, x))
