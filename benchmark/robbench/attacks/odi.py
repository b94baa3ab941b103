"""Output-diversified starts (Tashiro et al. 2020): restarts that differ in logits, not only in pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robbench.attacks.pgd import PGD
from robbench.core import rng
from robbench.core.errors import SuiteError
from robbench.core.threat import Ball, per_lane
from robbench.core.types import Problem, State

__all__ = ["ODI", "weighted"]

_WEIGHTS = 1 << 30  # step counter of the draw of the weights, away from those of the starts


def weighted(logits: Tensor, p: Problem, start: int | Tensor = 0) -> Tensor:
    """Sum the logits [L, K] by weights uniform in [−1, 1), drawn for each trial and start: [L] (Eq. 2, w·z)."""
    w = 2 * rng.uniform(p.key, p.sample, p.trial, start + _WEIGHTS, logits.shape[1]).to(logits.dtype) - 1
    return (w * logits).sum(1)


@dataclass(frozen=True, kw_only=True)
class ODI(PGD):
    """PGD whose first steps increase w·z(x) for random weights w on the logits (Tashiro et al. 2020, Eq. 2).

    Attributes:
        odi_steps: how many of `steps` increase w·z(x).
        odi_step: the size of these steps, as a share of eps.
    """

    kind: ClassVar[str] = "odi"
    version: ClassVar[int] = 1
    memoryless: ClassVar[bool] = False

    objective: str = "margin"
    odi_steps: int = 2
    odi_step: float = 1.0

    def __post_init__(self) -> None:
        """Check the hyperparameters: at least one step must be left for the loss."""
        super().__post_init__()
        if not 1 <= self.odi_steps < self.steps:
            raise SuiteError(f"odi_steps {self.odi_steps} given with steps {self.steps}; allowed: 1 to steps − 1")
        if self.odi_step <= 0:
            raise SuiteError(f"odi_step {self.odi_step} given; it must be above 0")

    def init(self, p: Problem, ball: Ball) -> State:
        """Start like PGD."""
        return super().init(p, ball) | {"left": torch.full_like(p.y, self.odi_steps)}

    def loss(self, logits: Tensor, p: Problem, s: State) -> Tensor:
        """Evaluate w·z(x) in the first steps, then the objective."""
        return torch.where(s["left"] > 0, weighted(logits, p), super().loss(logits, p, s))

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Take a starting step, or a step of PGD."""
        far = ball.project(p.x, s["x"] + ball.climb(s["x"], grad, self.odi_step * ball.radius(grad)))
        near = super().step(p, ball, s, t, logits, loss, grad)["x"]
        starting = per_lane(s["left"] > 0, grad)
        return {"x": torch.where(starting, far, near), "left": (s["left"] - 1).clamp(min=0)}
