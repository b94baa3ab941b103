"""Random noise. No attack should be weaker (Athalye et al. 2018, Sec. 3.1: random search finds nothing new)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robbench.attacks.base import Climbing
from robbench.core.threat import Ball, per_lane
from robbench.core.types import Problem, State

__all__ = ["Noise"]


@dataclass(frozen=True, kw_only=True)
class Noise(Climbing):
    """Independent random points, alternately inside the ball and on its surface. It uses no loss and no gradient.

    Attributes:
        steps: random points after the first.
    """

    kind: ClassVar[str] = "noise"
    version: ClassVar[int] = 1
    needs_grad: ClassVar[bool] = False
    memoryless: ClassVar[bool] = False

    steps: int = 30

    def init(self, p: Problem, ball: Ball) -> State:
        """Start inside the ball."""
        return {"x": ball.random(p)}

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Draw another point. The answer plays no part."""
        # The counter of a draw is one number for all lanes, so each step that some lane is at is drawn for all.
        x = s["x"]
        for step in set(t.tolist()):
            here = per_lane(t == step, x)
            x = torch.where(here, ball.random(p, step=step + 1, surface=step % 2 == 0), x)
        return {"x": x}
