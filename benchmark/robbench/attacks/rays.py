"""RayS (Chen & Gu 2020, "RayS: A Ray Searching Method for Hard-label Adversarial Attack"): labels alone, Linf."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robbench.attacks.base import check_parameters
from robbench.attacks.boundary import is_wrong
from robbench.core import rng
from robbench.core.errors import SuiteError
from robbench.core.threat import Ball, per_lane
from robbench.core.types import Norm, Problem, State

__all__ = ["RayS"]


@dataclass(frozen=True, kw_only=True)
class RayS:
    """Search a direction in {−1, 1}^n whose ray from the image meets another class soonest (Algorithms 2 and 3).

    It uses the predicted class of its queries and nothing else. The search starts at the direction of all ones. A
    proposal flips the signs of one block of pixels: first of the whole image, then of halves, of quarters and so on.
    One query at the radius found so far tells whether the proposal is at least as good. If it is, `searches` queries
    bisect its radius. The radius starts at 1, which reaches a corner of the box.

    The paper goes on flipping single pixels. Here, a pass over all single pixels that finds nothing better ends the
    search, and a new one starts at a random direction. Images of more pixels than `steps` never get there.

    Attributes:
        steps: queries after the first; the last one asks about the best point again.
        searches: halvings of the radius after each proposal that is kept; the paper bisects to 1e-3.
        restarts: number of independent trials; the first starts at all ones, the others at a random direction.
    """

    kind: ClassVar[str] = "rays"
    version: ClassVar[int] = 1
    norms: ClassVar[tuple[Norm, ...]] = ("Linf",)
    needs_grad: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False
    memoryless: ClassVar[bool] = False
    can_target: ClassVar[bool] = False  # a ray meets some other class, hardly ever a given one

    steps: int = 5000
    searches: int = 10
    restarts: int = 1

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        check_parameters(self)
        if min(self.steps, self.searches, self.restarts) < 1:
            raise SuiteError(
                f"steps {self.steps}, searches {self.searches}, restarts {self.restarts} given; all must be at least 1"
            )

    @property
    def trials(self) -> int:
        """One trial per restart."""
        return self.restarts

    def init(self, p: Problem, ball: Ball) -> State:
        """Ask about the corner at the end of the first ray."""
        none, ones = torch.zeros_like(p.y), torch.ones_like(p.x)
        direction = torch.where(per_lane(p.trial > 0, p.x), self._draw(p, none), ones)
        radius = torch.ones_like(p.x.flatten(1)[:, 0])
        return {
            "x": (p.x + direction).clamp(0, 1),
            "best": direction,  # the direction whose ray is the shortest so far
            "radius": radius,  # of a point on it that is misclassified, once a query has found one
            "lowest": torch.zeros_like(radius),  # of a point on it that is classified correctly
            "level": none,  # the signs of n / 2^level pixels are flipped together
            "block": none - 1,  # which of them; −1 is the first direction as it is
            "searching": none.clone(),  # queries that are left of a bisection
            "improved": torch.zeros_like(none, dtype=torch.bool),  # whether this level has kept a proposal
            "champion": direction,  # the direction of the shortest ray of all searches of the trial
            "reach": radius,  # its radius
        }

    def loss(self, logits: Tensor, p: Problem, s: State) -> Tensor:
        """Return zeros, because the search compares no losses."""
        return torch.zeros_like(logits[:, 0])

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Keep a proposal that is as near and bisect its radius, or propose the next one."""
        wrong, bisecting = is_wrong(logits, p.y), s["searching"] > 0
        kept = wrong & ~bisecting
        middle = (s["lowest"] + s["radius"]) / 2
        best = torch.where(per_lane(kept, p.x), self._flip(s["best"], s["level"], s["block"]), s["best"])
        radius = torch.where(wrong & bisecting, middle, s["radius"])
        lowest = torch.where(bisecting & ~wrong, middle, torch.where(bisecting, s["lowest"], 0))
        searching = torch.where(kept, self.searches, (s["searching"] - 1).clamp(min=0))
        improved = s["improved"] | kept

        shorter = (radius < s["reach"]) | (kept & (radius <= s["reach"]))
        champion = torch.where(per_lane(shorter, p.x), best, s["champion"])
        reach = torch.minimum(radius, s["reach"])

        over = searching == 0
        last_level = math.ceil(math.log2(p.x[0].numel()))
        block = s["block"] + over.long()
        wrapped = block * self._block_size(p.x, s["level"]) >= p.x[0].numel()
        restarts = wrapped & (s["level"] == last_level) & ~improved
        level = torch.where(restarts, 0, (s["level"] + wrapped.long()).clamp(max=last_level))
        block = torch.where(restarts, -1, torch.where(wrapped, 0, block))
        if x_restarts := bool(restarts.any()):
            best = torch.where(per_lane(restarts, p.x), self._draw(p, t + 1), best)
        radius = torch.where(restarts, 1, radius) if x_restarts else radius

        last = t + 1 >= self.steps
        asked = torch.where(per_lane(over, p.x), self._flip(best, level, block), best)
        asked = torch.where(per_lane(last, p.x), champion, asked)
        far = torch.where(last, reach, torch.where(over, radius, (lowest + radius) / 2))
        return {
            "x": (p.x + per_lane(far, p.x) * asked).clamp(0, 1),
            "best": best,
            "radius": radius,
            "lowest": lowest,
            "level": level,
            "block": block,
            "searching": searching,
            "improved": improved & ~wrapped,
            "champion": champion,
            "reach": reach,
        }

    def _draw(self, p: Problem, step: Tensor) -> Tensor:
        """Draw a random direction: [L, C, H, W] of −1 and 1."""
        words = rng.bits(p.key, p.sample, p.trial, step, p.x[0].numel())
        return ((words & 1) * 2 - 1).to(p.x.dtype).view_as(p.x)

    def _block_size(self, x: Tensor, level: Tensor) -> Tensor:
        """Count the pixels of a block, the last of which may have fewer: [L] -> [L]."""
        blocks = 2**level
        return (x[0].numel() + blocks - 1) // blocks

    def _flip(self, direction: Tensor, level: Tensor, block: Tensor) -> Tensor:
        """Flip the signs of one block of each lane's direction; block −1 flips none."""
        pixel = torch.arange(direction[0].numel(), device=direction.device)
        inside = pixel // self._block_size(direction, level)[:, None] == block[:, None]
        return torch.where(inside.view_as(direction), -direction, direction)
