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
_LONGER = 2  # how often a restart takes the steps of a cycle
_RIVALS = 3  # the targets that restarts take by turns
_LOOK = 4  # points of the second part after which a target may be left


@dataclass(frozen=True, kw_only=True)
class Relax:
    """One trial of a short run and of cycles, each from a start of its own, towards the classes that the run came near.

    First, a run of `probe` steps climbs the rescaled cross-entropy. The classes other than y are ranked by the logits
    at its last point. Then one cycle climbs the margin of each of the `targets` likeliest classes. A cycle has three
    parts. Points of the first part may lie outside the ball: in a ball whose radius shrinks from 1 + `widen` times ε to
    ε. Such a point breaks nothing. Where the model errs on one, its projection is the next query, and the second part
    begins. Points of the second part lie in the ball. The third part begins halfway between the best point of the
    cycle and a random point of the ball. At last, up to `restarts` cycles, twice as long, climb by turns the margins of
    the three classes that came closest to zero.

    The relaxation follows the idea of Pan et al. 2025 ("Constraint relaxation attack", AAAI). The rules are different.
    What is left of an image or a target is its best margin so far, as a share of the margin of the clean image. So no
    rule depends on the scale of the logits:

    - The trial ends after k cycles if more than `patience` / k is left of the image. So the images that came closest
      get the most cycles.
    - A cycle ends after four points of its second part, or after the whole part, if its target is behind: more is left
      of the target than `hopeless`, and than `lag` times what is left of the image.

    Attributes:
        probe: steps of the short run.
        targets: number of target classes, the likeliest at the end of the short run first.
        restarts: most cycles after those of the targets.
        outside: steps of the first part of a cycle.
        inside: steps of the second part.
        again: steps of the third part.
        widen: how far points of the first part may leave the ball, as a share of ε.
        patience: the share of the clean margin that may be left after one cycle. After k cycles, it is a k-th of that.
        lag: how many times what is left of the image may be left of a target.
        hopeless: what may be left of a target in any case.
    """

    kind: ClassVar[str] = "relax"
    version: ClassVar[int] = 2
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
    patience: float = 1.0
    lag: float = 2.5
    hopeless: float = 0.2

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        check_parameters(self)
        for name in ("probe", "targets", "outside", "inside", "again"):
            if getattr(self, name) < 1:
                raise SuiteError(f"{name} {getattr(self, name)} given; allowed: at least 1")
        for name in ("restarts", "widen"):
            if getattr(self, name) < 0:
                raise SuiteError(f"{name} {getattr(self, name)} given; allowed: at least 0")
        for name in ("patience", "hopeless"):
            if getattr(self, name) <= 0:
                raise SuiteError(f"{name} {getattr(self, name)} given; it must be above 0")
        if self.lag < 1:
            raise SuiteError(f"lag {self.lag} given; allowed: at least 1")

    @property
    def cycle(self) -> int:
        """The steps of a cycle."""
        return self.outside + self.inside + self.again

    @property
    def steps(self) -> int:
        """The steps of the short run and of all cycles, and one step between each and the next."""
        return self.probe + self.targets * (self.cycle + 1) + self.restarts * (_LONGER * self.cycle + 1)

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
        outside, turn, cycle = self._parts(s)
        inside = probing | (taken >= outside)
        best = torch.where(inside, torch.maximum(s["best"], gap), s["best"])
        better = inside & (loss > s["near"])
        near = torch.where(better, loss, s["near"])
        top = torch.where(per_lane(better, grad), s["x"], s["top"])

        look = (taken == turn) | (taken == outside + _LOOK - 1)
        behind = look & (near / lead > (self.lag * best / lead).clamp(min=self.hopeless))  # margins are negative
        over = torch.where(probing, taken == self.probe, behind | (taken == cycle))
        order = s["order"]
        if may_hold(probing & over):
            others = logits.scatter(1, p.y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :-1]
            order = torch.where((probing & over)[:, None], others, order)
        mine = torch.arange(order.shape[1], device=at.device) == s["rank"][:, None]
        came = torch.where((over & ~probing)[:, None] & mine, torch.maximum(s["came"], near[:, None]), s["came"])
        done = s["done"] | (over & self._gives_up(at, best / lead, order))
        jump = over & ~done
        number = self._number(order)
        closest = came.argsort(dim=1, descending=True, stable=True)
        turns = (at - number).clamp(min=0) % min(_RIVALS, number)
        rank = torch.where(at < number, at, closest.gather(1, turns[:, None]).squeeze(1))

        x = self._move(p, ball, s | {"top": top}, grad)
        caught = ~inside & (gap > 0)  # the model errs on a point outside the ball
        if may_hold(caught):
            x = torch.where(per_lane(caught, grad), ball.project(p.x, s["x"]), x)
        if may_hold(jump):
            x = torch.where(per_lane(jump, grad), ball.random(p, step=at + 1), x)
        return {
            "x": torch.where(per_lane(done, grad), s["x"], x),
            "at": at + jump.long(),
            "taken": torch.where(jump, 0, torch.where(caught, outside, taken + 1)),
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

    def _parts(self, s: State) -> tuple[Tensor, Tensor, Tensor]:
        """Return how many steps this cycle has taken after each of its parts: three of [L]."""
        longer = torch.where(s["at"] > self._number(s["order"]), _LONGER, 1)
        return longer * self.outside, longer * (self.outside + self.inside), longer * self.cycle

    def _gives_up(self, at: Tensor, left: Tensor, order: Tensor) -> Tensor:
        """Tell where the trial ends after cycle number `at`, with this share of the clean margin left: [L] bool."""
        return (at > 0) & (left * at > self.patience) | (at >= self._number(order) + self.restarts)

    def _move(self, p: Problem, ball: Ball, s: State, grad: Tensor) -> Tensor:
        """Follow the gradient by steps whose size falls along half a cosine, in the ball of this step."""
        probing, taken = s["at"] == 0, s["taken"]
        first, turn, cycle = self._parts(s)
        third = ~probing & (taken >= turn)
        share = torch.where(
            probing, taken / self.probe, torch.where(third, (taken - turn) / (cycle - turn), taken / turn)
        ).to(grad.dtype)
        size = ((share.clamp(max=1) * math.pi).cos() + 1) * torch.where(third, 0.5, 1.0) * ball.eps
        x = s["x"]
        begins = third & (taken == turn)
        if may_hold(begins):  # the draw takes time
            halfway = (s["top"] + ball.random(p, step=s["at"] + _NOISE)) / 2
            x = torch.where(per_lane(begins, grad), halfway, x)  # the gradient is that of another point
        x = x + ball.climb(x, grad, per_lane(size.masked_fill(begins, 0), grad))
        # The wider ball is the ball, stretched around the image and cut at the box.
        outside = self.widen * (1 - (taken + 1).to(grad.dtype) / first).clamp(min=0)
        wide = per_lane(torch.where(probing, 0.0, outside) + 1, grad)
        stretched = (p.x + wide * (ball.project(p.x, p.x + (x - p.x) / wide) - p.x)).clamp(0, 1)
        return torch.where(wide > 1, stretched, ball.project(p.x, x))
