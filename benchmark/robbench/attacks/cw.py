"""The L2 attack of Carlini & Wagner (2017, "Towards Evaluating the Robustness of Neural Networks", Sec. V and VI.A)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robbench.attacks.base import check_parameters
from robbench.attacks.boundary import is_wrong
from robbench.core.errors import SuiteError
from robbench.core.losses import margin
from robbench.core.threat import Ball, per_lane
from robbench.core.types import Norm, Problem, State

__all__ = ["CW"]

_MOMENTUM, _SQUARES, _EPSILON = 0.9, 0.999, 1e-8  # Adam's
_MOST = 1e10  # the largest c: without a success up to here, the search gives up growing it
_EDGE = 1e-3  # how far the angles start from those of pixel values 0 and 1, where the derivative vanishes


@dataclass(frozen=True, kw_only=True)
class CW:
    """Minimise ‖x' − x‖² + c · max(z_y − max_j z_j, −κ) by Adam, with a binary search over c.

    The paper sets x' = (tanh w + 1) / 2, so that no w leaves the box. A pixel of 0 or 1 has an infinite w. Even with w
    moved back from infinity, such a pixel hardly changes for hundreds of Adam's steps. Here x' = sin²(θ / 2). No θ
    leaves the box either. The derivative in the middle of the box is the same, and θ in [0, π] reaches every value.
    Angles start at least 0.001 from the ends, which changes a pixel by at most 2.5e-7.

    Attributes:
        search_steps: number of values of c to try.
        iterations: steps of Adam for each c (the paper's implementation: up to 10,000).
        lr: Adam's step size.
        initial_c: the first c. It grows tenfold until an attack succeeds. Then the search halves the interval.
        kappa: the lead that another class should have over y, in logits.
    """

    kind: ClassVar[str] = "cw"
    version: ClassVar[int] = 2
    norms: ClassVar[tuple[Norm, ...]] = ("L2",)
    needs_grad: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False
    memoryless: ClassVar[bool] = False
    precise: ClassVar[bool] = True  # Adam's steps are as long for small gradients, and rounding errors, as for large
    trials: ClassVar[int] = 1

    search_steps: int = 9
    iterations: int = 1000
    lr: float = 0.01
    initial_c: float = 1e-3
    kappa: float = 0.0

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        check_parameters(self)
        if self.search_steps < 1 or self.iterations < 1:
            raise SuiteError(
                f"search_steps {self.search_steps}, iterations {self.iterations} given; both must be at least 1"
            )
        if not (self.lr > 0 and 0 < self.initial_c <= _MOST and self.kappa >= 0):
            raise SuiteError(
                f"lr {self.lr}, initial_c {self.initial_c}, kappa {self.kappa} given; "
                f"allowed: lr above 0, initial_c above 0 and up to {_MOST:g}, kappa at least 0"
            )

    @property
    def steps(self) -> int:
        """All iterations for all values of c."""
        return self.search_steps * self.iterations

    def init(self, p: Problem, ball: Ball) -> State:
        """Start at x, with the first c."""
        theta = _angle(p.x)
        lanes = torch.zeros_like(p.x.flatten(1)[:, 0])
        return {
            "x": _pixels(theta),
            "theta": theta,
            "start": theta,
            "mean": torch.zeros_like(theta),  # Adam's running averages of the gradient and its square
            "square": torch.zeros_like(theta),
            "c": lanes + self.initial_c,
            "too_small": lanes,
            "large_enough": lanes + _MOST,
            "succeeded": torch.zeros_like(p.y, dtype=torch.bool),  # with this c
        }

    def loss(self, logits: Tensor, p: Problem, s: State) -> Tensor:
        """Compute max_j z_j − z_y. `step` applies the limit κ, so that a zero gradient here means a flat model."""
        return margin(logits, p.y)

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Take one step of Adam, or start from x again with the next c."""
        succeeded = s["succeeded"] | (is_wrong(logits, p.y) & (loss >= self.kappa))
        pull = per_lane(torch.where(loss < self.kappa, s["c"], 0), grad)
        slope = (s["x"] - p.x).addcmul_(pull, grad, value=-0.5).mul_(s["theta"].sin())
        mean = torch.lerp(s["mean"], slope, 1 - _MOMENTUM)
        square = (s["square"] * _SQUARES).addcmul_(slope, slope, value=1 - _SQUARES)
        n = per_lane((t % self.iterations + 1).to(slope.dtype), grad)
        length = (square / (1 - _SQUARES**n)).sqrt_().add_(_EPSILON)
        theta = s["theta"].addcdiv(mean * (self.lr / (1 - _MOMENTUM**n)), length, value=-1)

        large_enough = torch.where(succeeded, torch.minimum(s["large_enough"], s["c"]), s["large_enough"])
        too_small = torch.where(succeeded, s["too_small"], torch.maximum(s["too_small"], s["c"]))
        halved = (too_small + large_enough) / 2
        c = torch.where(large_enough < _MOST, halved, (s["c"] * 10).clamp(max=_MOST))

        again = ((t + 1) % self.iterations == 0) & (t + 1 < self.steps)
        if self.search_steps > 1:
            theta = torch.where(per_lane(again, grad), s["start"], theta)
            mean, square = (torch.where(per_lane(again, grad), 0, v) for v in (mean, square))
        return {
            "x": _pixels(theta),
            "theta": theta,
            "start": s["start"],
            "mean": mean,
            "square": square,
            "c": torch.where(again, c, s["c"]),
            "too_small": torch.where(again, too_small, s["too_small"]),
            "large_enough": torch.where(again, large_enough, s["large_enough"]),
            "succeeded": succeeded & ~again,
        }


def _angle(x: Tensor) -> Tensor:
    """Invert `_pixels`, except close to 0 and 1, where angles keep a distance from the ends."""
    return (2 * x.sqrt().asin()).clamp(_EDGE, math.pi - _EDGE)


def _pixels(theta: Tensor) -> Tensor:
    """Map angles to pixels in [0, 1]: (1 − cos θ) / 2, written so that small values keep their digits."""
    return (theta / 2).sin_().square_()
