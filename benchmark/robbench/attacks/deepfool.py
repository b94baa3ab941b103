"""DeepFool (Moosavi-Dezfooli et al. 2016, "DeepFool: a simple and accurate method to fool deep neural networks")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robbench.attacks.base import check_parameters, others_by_rank
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
from robbench.core.types import Norm, Problem, State

__all__ = ["DeepFool"]


@dataclass(frozen=True, kw_only=True)
class DeepFool:
    """Move repeatedly to the nearest linearised boundary to another class (Algorithm 2, Sec. 3.3).

    An iteration needs one gradient per candidate class. So it queries its point once for each class, and then moves.
    With fewer other classes than `candidates`, an iteration takes fewer queries, and the budget has more iterations.

    The paper has no box. Its moves have length |f| / ‖w‖. Moves cut off at the box would stop where the most
    influential pixels are 0 or 1 already. So this code takes the nearest planes and the shortest moves inside the box.
    In the interior of the box both are the same.

    The paper stops at the first misclassified point, which lies up to `overshoot` beyond the boundary. The overshoot
    should not decide what lies within a fixed radius. So if that point is outside the ball, three queries search the
    segment between the clean image and that point. Then the point of the trial does not change any more.

    Attributes:
        candidates: number of classes to try, by the rank of the clean logits.
        iterations: number of moves, if there are that many candidates.
        overshoot: how far to go beyond the boundary, as a share of the sum of all moves; 0.02 in the paper.
    """

    kind: ClassVar[str] = "deepfool"
    version: ClassVar[int] = 1
    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2")
    needs_grad: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    memoryless: ClassVar[bool] = False
    precise: ClassVar[bool] = True  # how far a plane is: the difference of two logits, small near the boundary
    trials: ClassVar[int] = 1

    candidates: int = 9
    iterations: int = 50
    overshoot: float = 0.02

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        check_parameters(self)
        if self.candidates < 1 or self.iterations < 1:
            raise SuiteError(f"candidates {self.candidates}, iterations {self.iterations} given; at least 1 is needed")
        if not 0 <= self.overshoot < 1:
            raise SuiteError(f"overshoot {self.overshoot} given; allowed: 0 to below 1")

    @property
    def steps(self) -> int:
        """One query per candidate and iteration."""
        return self.candidates * self.iterations

    def init(self, p: Problem, ball: Ball) -> State:
        """Start at x."""
        classes = others_by_rank(p)[:, : self.candidates]
        return {
            "x": p.x.clone(),
            "classes": classes,
            "turn": torch.zeros_like(p.y),  # which of the classes is asked about
            "moved": torch.zeros_like(p.x),  # the sum of all moves, without the overshoot
            "nearest": torch.full_like(p.x.flatten(1)[:, 0], torch.inf),  # distance to the nearest plane so far
            "move": torch.zeros_like(p.x),  # the way there
            "searches": torch.zeros_like(p.y),  # queries since the first misclassified point, itself included
            **bracket(p),
        }

    def loss(self, logits: Tensor, p: Problem, s: State) -> Tensor:
        """Compute z_k − z_y for the class k that this query is about."""
        return gap_to(logits, p.y, s["classes"].gather(1, s["turn"][:, None]).squeeze(1))

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Remember the nearest plane. Move after the last class. Search after the first misclassified point."""
        wrong = is_wrong(logits, p.y)
        found = wrong | (s["searches"] > 0)
        s = s | narrowed(s, found & ~wrong, wrong, margin(logits, p.y))
        s["searches"] = s["searches"] + found

        move = toward_plane(ball.norm, s["x"], grad, loss)
        # Where the box ends before the plane, as far as it would be at the same rate; NaN where no pixel can move.
        distance = length(ball.norm, move) * loss.abs() / (grad * move).flatten(1).sum(1).abs()
        nearer = distance < s["nearest"]
        move = torch.where(per_lane(nearer, grad), move, s["move"])

        last = s["turn"] + 1 == s["classes"].shape[1]
        moved = torch.where(per_lane(last, grad), (p.x + s["moved"] + move).clamp(0, 1) - p.x, s["moved"])
        onward = torch.where(per_lane(last, grad), (p.x + (1 + self.overshoot) * moved).clamp(0, 1), s["x"])
        closer = torch.where(per_lane(s["searches"] > SEARCHES, grad), s["outer"], between(s))
        s["x"] = torch.where(per_lane(found, grad), closer, onward)
        s["moved"] = moved
        s["turn"] = torch.where(last, 0, s["turn"] + 1)
        s["nearest"] = torch.where(last, torch.inf, torch.where(nearer, distance, s["nearest"]))
        s["move"] = torch.where(per_lane(last, grad), 0, move)
        return s
