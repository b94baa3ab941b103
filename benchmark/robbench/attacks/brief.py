"""A short random search on squares that ends early on images whose margin stays far from zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robbench.attacks.base import check_parameters, clean_logits
from robbench.attacks.square import Square
from robbench.core.errors import SuiteError
from robbench.core.losses import margin
from robbench.core.threat import Ball, per_lane
from robbench.core.types import NORMS, Norm, Problem, State

__all__ = ["Brief"]

_LOOKS = (16, 4, 2)  # the search is looked at after a 16th, a quarter and half of its steps


@dataclass(frozen=True, kw_only=True)
class Brief:
    """`Square` on the margin, with three looks at which it may end.

    A look compares the best margin so far with the margin of the clean image. The trial ends if the share that is left
    is above `hopeless` after a 16th of the steps, above half of `hopeless` after a quarter, or above a quarter of
    `hopeless` after half of the steps. Shares do not change with the scale of the logits.

    It queries step by step: where it ends depends on each step, so the engine cannot look ahead.

    Attributes:
        steps: queries after the first. The sizes of the squares follow the schedule of `Square` for this number.
        p_init: share of the image that the first squares cover.
        hopeless: the share of the clean margin that may be left at the first look.
    """

    kind: ClassVar[str] = "brief"
    version: ClassVar[int] = 1
    memoryless: ClassVar[bool] = False
    norms: ClassVar[tuple[Norm, ...]] = NORMS
    needs_grad: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = True
    trials: ClassVar[int] = 1

    steps: int = 600
    p_init: float = 0.8
    hopeless: float = 0.2

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        check_parameters(self)
        if self.hopeless <= 0:
            raise SuiteError(f"hopeless {self.hopeless} given; it must be above 0")
        self._search()  # refuses its own hyperparameters

    def init(self, p: Problem, ball: Ball) -> State:
        """Start as `Square` does."""
        return self._search().init(p, ball) | {"done": torch.zeros_like(p.y, dtype=torch.bool)}

    def loss(self, logits: Tensor, p: Problem, s: State) -> Tensor:
        """Evaluate the margin."""
        return margin(logits, p.y)

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Take a step of the search, or end it."""
        done = s["done"]
        after = self._search().step(p, ball, {k: v for k, v in s.items() if k != "done"}, t, logits, loss, grad)
        left = after["loss_best"] / margin(clean_logits(p), p.y)  # both are negative
        for look, part in enumerate(_LOOKS):
            done = done | ((t + 1 == self.steps // part) & (left > self.hopeless / 2**look))
        # From there on nothing may change. The best point is what a judge of final points sees.
        held = {"x": after["x_best"], "x_best": after["x_best"], "loss_best": after["loss_best"]}
        was = {name: torch.where(per_lane(s["done"], value), s[name], value) for name, value in held.items()}
        return after | was | {"x": torch.where(per_lane(done, grad), was["x"], after["x"]), "done": done}

    def _search(self) -> Square:
        return Square(steps=self.steps, p_init=self.p_init)
