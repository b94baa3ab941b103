"""Projected gradient descent (Madry et al. 2018) and its one-step ancestor FGSM (Goodfellow et al. 2015)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robbench.attacks.base import Climbing
from robbench.core.errors import SuiteError
from robbench.core.threat import Ball, per_lane
from robbench.core.types import Problem, State

__all__ = ["FGSM", "PGD"]


@dataclass(frozen=True, kw_only=True)
class PGD(Climbing):
    """x ← Π(x + step · steepest(∇loss)), from x or from a random point of the ball. `Ball.climb` takes the step.

    Attributes:
        step_size: in pixel units [0, 1]; None takes `relative_step` of eps.
        relative_step: step size as a share of eps, where `step_size` is not given.
        random_start: start from a random point of the ball (Madry et al.) instead of from x.
        anneal: let the step size fall to zero along half a cosine. Annealing from eps or above breaks images that no
            constant step size breaks (docs/performance.md).
    """

    kind: ClassVar[str] = "pgd"
    version: ClassVar[int] = 1

    step_size: float | None = None
    relative_step: float = 0.25
    random_start: bool = True
    anneal: bool = False

    @property
    def memoryless(self) -> bool:
        """True if the step size does not depend on the step."""
        return not self.anneal

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        super().__post_init__()
        if (self.step_size is not None and self.step_size <= 0) or self.relative_step <= 0:
            raise SuiteError(
                f"step_size {self.step_size}, relative_step {self.relative_step} given; an attack that takes no step "
                "finds nothing: both must be above 0"
            )
        if self.restarts > 1 and not self.random_start and self.kind != "odi":
            raise SuiteError(f"restarts {self.restarts} without random_start would repeat one computation")

    def init(self, p: Problem, ball: Ball) -> State:
        """Start at x or at a random point."""
        return {"x": ball.random(p) if self.random_start else p.x.clone()}

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Take one projected step of steepest ascent."""
        size: float | Tensor = self.relative_step * ball.radius(grad) if self.step_size is None else self.step_size
        if self.anneal:
            share = (t.to(grad.dtype) / self.steps * math.pi).cos().add(1) / 2
            size = size * per_lane(share, grad)
        return {"x": ball.project(p.x, s["x"] + ball.climb(s["x"], grad, size))}


@dataclass(frozen=True, kw_only=True)
class FGSM(PGD):
    """The fast gradient sign method: one step of the full eps from x itself."""

    kind: ClassVar[str] = "fgsm"

    steps: int = 1
    relative_step: float = 1.0
    random_start: bool = False
