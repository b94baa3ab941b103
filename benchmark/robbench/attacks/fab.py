"""FAB-T (Croce & Hein 2020, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robbench.attacks.base import check_parameters, clean_logits, may_hold, target_class
from robbench.attacks.boundary import (
    SEARCHES,
    between,
    bracket,
    gap_to,
    is_wrong,
    narrowed,
    toward_plane,
)
from robbench.core.errors import SuiteError
from robbench.core.losses import margin
from robbench.core.threat import Ball, length, per_lane
from robbench.core.types import NORMS, Norm, Problem, State

__all__ = ["FAB"]


@dataclass(frozen=True, kw_only=True)
class FAB:
    """Targeted FAB: steps onto the linearised boundary to a target class, biased towards the clean image.

    This is Algorithm 1 of the paper for one target class t at a time, with the plane z_t − z_y = 0, as in AutoAttack. A
    trial is a pair of target and restart. The rank of the clean logits gives the order of targets. With fewer than
    `targets` other classes, the ranks start again from the first, and these trials are further restarts.

    The paper linearises at the point after the backward step. So a misclassified point costs two queries: one there,
    and one after the backward step. `steps` counts queries. The last queries are the paper's final search (pyautoattack
    has none), on the segment from the clean image to the closest misclassified point, if there is one. The segment may
    pass through a third class.

    Attributes:
        targets: number of target classes per restart.
        restarts: the first starts at x, others at a random point at half of eps. The paper takes min(u, eps) / 2 with
            the smallest distance u found so far; here a u < eps is a break, after which no further trial counts.
        steps: queries per trial that are followed by a step.
        searches: how many of the queries belong to the final search; 0 means no search.
        alpha_max: the largest share of the move that starts at the clean image.
        eta: how far beyond the plane to go, 1 being the plane.
        beta: a misclassified point is pulled back to this share of its distance from the clean image.
    """

    kind: ClassVar[str] = "fab"
    version: ClassVar[int] = 1
    norms: ClassVar[tuple[Norm, ...]] = NORMS
    needs_grad: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    memoryless: ClassVar[bool] = False
    precise: ClassVar[bool] = True  # how far a plane is: the difference of two logits, small near the boundary

    targets: int = 9
    restarts: int = 1
    steps: int = 100
    searches: int = SEARCHES
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        check_parameters(self)
        if min(self.targets, self.restarts, self.steps) < 1:
            raise SuiteError(
                f"targets {self.targets}, restarts {self.restarts}, steps {self.steps} given; all must be at least 1"
            )
        if not 0 <= self.searches < self.steps:
            raise SuiteError(f"searches {self.searches} given; allowed: 0 to below steps, {self.steps}")
        if not (0 <= self.alpha_max <= 1 and self.eta >= 1 and 0 < self.beta < 1):
            raise SuiteError(
                f"alpha_max {self.alpha_max}, eta {self.eta}, beta {self.beta} given; "
                "allowed: alpha_max in [0, 1], eta at least 1, beta between 0 and 1"
            )

    @property
    def trials(self) -> int:
        """One trial per target and restart."""
        return self.targets * self.restarts

    def init(self, p: Problem, ball: Ball) -> State:
        """Start at x, and in restarts at half the radius."""
        start = Ball(ball.norm, ball.eps / 2).random(p, surface=True)
        first = p.trial < min(self.targets, clean_logits(p).shape[1] - 1)
        return {
            "x": torch.where(per_lane(first, p.x), p.x, start),
            "target": target_class(p, self.targets),
            "pulled": torch.zeros_like(p.y, dtype=torch.bool),  # whether x is the end of a backward step
            "searching": torch.zeros_like(p.y, dtype=torch.bool),
            "distance": torch.full_like(p.y, torch.inf, dtype=torch.float64),  # of the bracket's outer end
            **bracket(p),
        }

    def loss(self, logits: Tensor, p: Problem, s: State) -> Tensor:
        """Compute z_t − z_y."""
        return gap_to(logits, p.y, s["target"])

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Pull a misclassified point back, or go to the plane. The last steps search the segment."""
        x, wrong, searching = s["x"], is_wrong(logits, p.y), s["searching"]
        s = dict(s)
        if may_hold(wrong | searching):  # where images stand, there is seldom something to keep
            distance = ball.distance(p.x, x)
            closer = wrong & (distance < s["distance"])
            s |= narrowed(s, searching & ~wrong, closer, margin(logits, p.y))
            s["distance"] = torch.where(closer, distance, s["distance"])
        s["searching"] = (t + 1 > self.steps - self.searches) & s["distance"].isfinite()
        s["pulled"] = wrong & ~s["pulled"]
        s["x"] = self._onward(p, ball.norm, x, loss, grad)
        if may_hold(s["pulled"]):
            s["x"] = torch.where(per_lane(s["pulled"], x), p.x + self.beta * (x - p.x), s["x"])
        if may_hold(s["searching"]):
            s["x"] = torch.where(per_lane(s["searching"], x), between(s), s["x"])
        return s

    def _onward(self, p: Problem, norm: Norm, x: Tensor, gap: Tensor, grad: Tensor) -> Tensor:
        """Go beyond the plane from x and from the clean image, and mix the two (Algorithm 1)."""
        gap_clean = gap + (grad * (p.x - x)).flatten(1).sum(1)
        moves = toward_plane(norm, torch.stack([x, p.x]), grad, torch.stack([gap, gap_clean]))
        move, move_clean = moves.unbind()
        far, far_clean = length(norm, moves.flatten(0, 1)).clamp(min=1e-8).chunk(2)
        alpha = per_lane((far / (far + far_clean)).clamp(max=self.alpha_max), x)
        return ((1 - alpha) * (x + self.eta * move) + alpha * (p.x + self.eta * move_clean)).clamp(0, 1)
