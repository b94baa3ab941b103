"""Auto-PGD (Croce & Hein 2020, "Reliable evaluation of adversarial robustness …", Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from robbench.attacks.base import Climbing, may_hold
from robbench.core.threat import Ball, per_lane
from robbench.core.types import Problem, State

__all__ = ["APGD"]

_MOMENTUM = 0.75  # weight of the new direction, α in Eq. (3)
_RISES = 0.75  # ρ: halve when fewer than this share of a window's steps raised the loss
_FIRST, _SHRINK, _SHORTEST = 0.22, 0.03, 0.06  # the windows' lengths as shares of the budget


def _windows(steps: int) -> dict[int, int]:
    """Map each checkpoint (a number of steps taken) to the length of the window that ends there."""
    length = max(int(_FIRST * steps), 1)
    found, at = {}, length
    while at <= steps:
        found[at] = length
        length = max(length - max(int(_SHRINK * steps), 1), max(int(_SHORTEST * steps), 1))
        at += length
    return found


@lru_cache(maxsize=64)
def _window_ending(steps: int, device: torch.device) -> Tensor:
    """Tabulate `_windows`: the length of the window that ends after each step, 0 if none ends, [steps + 1] int64."""
    windows = _windows(steps)
    return torch.tensor([windows.get(t, 0) for t in range(steps + 1)], device=device)


@dataclass(frozen=True, kw_only=True)
class APGD(Climbing):
    """PGD with momentum. At checkpoints where progress stalls, it halves its step size and goes back to the best point.

    The checkpoints follow from `steps`.
    """

    kind: ClassVar[str] = "apgd"
    version: ClassVar[int] = 1
    memoryless: ClassVar[bool] = False

    steps: int = 100

    def init(self, p: Problem, ball: Ball) -> State:
        """Start on the surface of the ball, as the authors' implementation does."""
        x = ball.random(p, surface=True)
        lanes = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        return {
            "x": x,
            "x_old": x.clone(),
            "x_best": x.clone(),
            "grad_best": torch.zeros_like(x),
            "loss_best": lanes - torch.inf,
            "loss_last": lanes - torch.inf,
            "loss_check": lanes - torch.inf,  # best loss at the last checkpoint
            "rises": lanes.clone(),  # steps of this window that raised the loss
            "halved": lanes + 1,  # whether the last checkpoint halved; 1 spares the first from the second rule
            "size": lanes + (1.0 if ball.norm == "L1" else 2.0) * ball.eps,
        }

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Keep the best point, halve at checkpoints, step with momentum."""
        x = s["x"]
        rises = s["rises"] + ((loss > s["loss_last"]) & (t > 0))
        better = loss > s["loss_best"]
        x_best = torch.where(per_lane(better, grad), x, s["x_best"])
        grad_best = torch.where(per_lane(better, grad), grad, s["grad_best"])
        loss_best = torch.where(better, loss, s["loss_best"])
        # The first checkpoint compares with the loss at the start.
        loss_check = torch.where(t == 0, loss_best, s["loss_check"])

        window = _window_ending(self.steps, t.device)[t.clamp(max=self.steps)]
        check = window > 0
        oscillates = check & (rises <= _RISES * window)
        stalls = check & (s["halved"] == 0) & (loss_check >= loss_best)
        halve = oscillates | stalls
        size = torch.where(halve, s["size"] / 2, s["size"])
        halved = torch.where(check, halve.to(size.dtype), s["halved"])
        loss_check = torch.where(check, loss_best, loss_check)
        rises = torch.where(check, torch.zeros_like(rises), rises)
        if may_hold(halve):  # most steps end no window
            x = torch.where(per_lane(halve, grad), x_best, x)
            grad = torch.where(per_lane(halve, grad), grad_best, grad)

        z = ball.project(p.x, x + ball.climb(x, grad, per_lane(size, grad)))
        a = per_lane(torch.where(t == 0, 1.0, _MOMENTUM).to(x.dtype), grad)
        x_next = ball.project(p.x, x + a * (z - x) + (1 - a) * (x - s["x_old"]))
        return {
            "x": x_next,
            "x_old": x,
            "x_best": x_best,
            "grad_best": grad_best,
            "loss_best": loss_best,
            "loss_last": loss,
            "loss_check": loss_check,
            "rises": rises,
            "halved": halved,
            "size": size,
        }
