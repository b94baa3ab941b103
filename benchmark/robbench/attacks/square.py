"""The Square Attack (Andriushchenko, Croce, Flammarion & Hein 2020): random search on squares, without gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robbench import rng
from robbench.attacks.base import Climbing
from robbench.attacks.windows import lay, mass, place, windows
from robbench.errors import SuiteError
from robbench.threat import Ball
from robbench.types import Norm, Problem, State

__all__ = ["Square"]

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # p is halved after these of 10,000 iterations
_ORDER: dict[Norm, int] = {"L2": 2, "L1": 1}
_TILES = 5  # L2 and L1 start from a tiling of 5 × 5


def _signs(words: Tensor, dtype: torch.dtype) -> Tensor:
    return ((words & 1) * 2 - 1).to(dtype)


def _bring(x: Tensor, delta: Tensor, ball: Ball) -> Tensor:
    """Bring x + delta into ball and box: L1 is projected, L2 scaled to length eps and clamped, as published."""
    if ball.norm == "L1":
        return ball.project(x, x + delta)
    length = delta.square().sum((1, 2, 3), keepdim=True).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
    return (x + delta * (ball.eps / length)).clamp(0, 1)


def _exchange(ball: Ball, x: Tensor, best: Tensor, eta: Tensor, to: Tensor, other: Tensor) -> Tensor:
    """Clear two windows, and put what they held and the unused radius into the first (Algorithm 3).

    `eta` [L, C, H, W] is zero outside the first window; `to` and `other` [L, 1, H, W] are 1 inside theirs.
    """
    order, c, tiny = _ORDER[ball.norm], x.shape[1], torch.finfo(x.dtype).tiny
    delta, cleared = best - x, torch.maximum(to, other)
    amount = mass(delta, order)
    unused = (ball.eps**order - amount.sum((1, 2, 3), keepdim=True)).clamp(min=0)
    held, freed = ((amount * window).sum((2, 3), keepdim=True) for window in (to, cleared))
    fresh = torch.addcmul(eta, delta, to / held.pow(1 / order).clamp(min=tiny))
    length = mass(fresh, order).sum((2, 3), keepdim=True).pow(1 / order).clamp(min=tiny)
    # With L1, AutoAttack's code gives each channel what all may have together, and leaves it to the projection.
    share = (unused / c + freed).pow(1 / order) * (1 if order == 2 else c)
    return _bring(x, torch.addcmul(fresh * (share / length), delta, 1 - cleared), ball)


@dataclass(frozen=True, kw_only=True)
class Square(Climbing):
    """Random search on square windows, scored by the loss alone (Andriushchenko et al. 2020).

    Each step queries one proposal: the best point so far, changed within a random square that shrinks as the budget
    is spent; it is kept where the loss rose. Linf follows Algorithm 2 (start: vertical stripes at ±eps), L2
    Algorithm 3 (start: a tiling; mass moves from one window to another), L1 what AutoAttack made of Algorithm 3
    (Croce & Hein 2021, "Mind the box"): a steeper window and the exact projection. The last query is the best point
    again, so that a judge of final points sees what was found.

    Squares lie anywhere in the image, as in the paper. AutoAttack's code never lets one touch the last row and column,
    which on small images makes it weaker.

    Attributes:
        steps: queries after the first; the published schedule of p, for 10,000, is stretched to it.
        p_init: share of the image that the first squares cover; 0.8 is AutoAttack's for every norm.
    """

    kind: ClassVar[str] = "square"
    version: ClassVar[int] = 1
    needs_grad: ClassVar[bool] = False
    memoryless: ClassVar[bool] = False

    objective: str = "margin"
    steps: int = 5000
    p_init: float = 0.8

    def __post_init__(self) -> None:
        """Refuse budgets and shares that mean nothing."""
        super().__post_init__()
        if not 0 < self.p_init <= 1:
            raise SuiteError(f"p_init {self.p_init} given; allowed: above 0, at most 1")

    def sides(self, h: int, w: int, norm: Norm) -> tuple[int, ...]:
        """List the sides of the squares on h × w pixels, from the start and after each halving of p.

        L2 and L1 take odd sides from 3 on, where the image has room for them.
        """
        sides = [round(math.sqrt(self.p_init / 2**k * h * w)) for k in range(len(_HALVINGS) + 1)]
        if norm != "Linf":
            sides = [max(side, 3) | 1 for side in sides]
        return tuple(min(max(side, 1), h, w) for side in sides)

    def halvings(self, t: Tensor) -> Tensor:
        """Count how often p has been halved at each lane's step: [L] -> [L]."""
        return (t[:, None] * 10_000 // self.steps > torch.tensor(_HALVINGS, device=t.device)).sum(1)

    def init(self, p: Problem, ball: Ball) -> State:
        """Start at random stripes (Linf) or at a random tiling (L2, L1)."""
        lanes, c, h, w = p.x.shape
        if ball.norm == "Linf":
            stripes = _signs(rng.bits(p.key, p.sample, p.trial, 0, c * w), p.x.dtype).view(lanes, c, 1, w)
            x = (p.x + ball.eps * stripes).clamp(0, 1)
        else:
            side = max(min(h, w) // _TILES, 1)
            rows, cols = h // side, w // side
            words = rng.bits(p.key, p.sample, p.trial, 0, (1 + c) * rows * cols).view(lanes, 1 + c, rows, cols)
            eta = windows((side,), _ORDER[ball.norm], p.x.dtype, p.x.device)[0, :, :side, :side]
            tiles = eta[words[:, :1] & 1] * _signs(words[:, 1:], p.x.dtype)[..., None, None]
            delta = tiles.transpose(3, 4).reshape(lanes, c, rows * side, cols * side)
            down, right = h - rows * side, w - cols * side
            delta = F.pad(delta, (right // 2, right - right // 2, down // 2, down - down // 2))
            x = _bring(p.x, delta, ball)
        return {"x": x, "x_best": x.clone(), "loss_best": torch.full_like(x[:, 0, 0, 0], -torch.inf)}

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Keep the proposal where the loss rose, and propose a change in another square."""
        better = loss > s["loss_best"]
        best = torch.where(better[:, None, None, None], s["x"], s["x_best"])
        c, h, w = best.shape[1:]
        sides = self.sides(h, w, ball.norm)
        level = self.halvings(t)
        side = torch.tensor(sides, device=t.device)[level]
        last = (t + 1 >= self.steps)[:, None, None, None]
        # Two words for a square, three for another one and how η lies, one for the sign in each channel.
        words = rng.bits(p.key, p.sample, p.trial, t + 1, c + (2 if ball.norm == "Linf" else 5))
        sign = _signs(words[:, -c:], best.dtype)[:, :, None, None]
        to, row, col = place(words[:, :2], side, best)
        if ball.norm == "Linf":
            x = ball.project(p.x, best + to * (2 * sign * ~last))  # 2 is further than any pixel may go
        else:
            table = windows(sides, _ORDER[ball.norm], best.dtype, best.device)
            eta = sign * lay(table, level, words[:, 4] & 1, row, col)
            other, _, _ = place(words[:, 2:4], side, best)
            x = torch.where(last, best, _exchange(ball, p.x, best, eta, to, other))
        return {"x": x, "x_best": best, "loss_best": torch.where(better, loss, s["loss_best"])}
