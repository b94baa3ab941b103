"""The momentum iterative method (Dong et al. 2018): steps along a running sum of normalized gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robbench.attacks.pgd import PGD
from robbench.core.errors import SuiteError
from robbench.core.threat import Ball, per_lane
from robbench.core.types import Problem, State

__all__ = ["MIFGSM"]


@dataclass(frozen=True, kw_only=True)
class MIFGSM(PGD):
    """g ← μ g + ∇loss / ‖∇loss‖₁, x ← Π(x + step · steepest(g)) (Dong et al. 2018, Alg. 1), from x itself.

    The norm is the mean over pixels, as in the authors' code. Only the weight of a gradient relative to earlier ones
    matters.

    Attributes:
        decay: μ; 0 is plain PGD.
    """

    kind: ClassVar[str] = "mifgsm"
    version: ClassVar[int] = 1
    memoryless: ClassVar[bool] = False

    steps: int = 10
    relative_step: float = 0.1
    random_start: bool = False
    decay: float = 1.0

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        super().__post_init__()
        if self.decay < 0:
            raise SuiteError(f"decay {self.decay} given; it must be at least 0")

    def init(self, p: Problem, ball: Ball) -> State:
        """Start without momentum."""
        return super().init(p, ball) | {"g": torch.zeros_like(p.x)}

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Add the new direction to the old ones and take one projected step."""
        size = grad.abs().flatten(1).mean(1).clamp(min=torch.finfo(grad.dtype).tiny)
        g = self.decay * s["g"] + grad / per_lane(size, grad)
        return super().step(p, ball, s, t, logits, loss, g) | {"g": g}
