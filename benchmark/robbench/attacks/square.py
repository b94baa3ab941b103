"""The Square Attack (Andriushchenko, Croce, Flammarion & Hein 2020): random search on squares, without gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robbench.attacks.base import Climbing
from robbench.attacks.windows import bands, lay, mass, place, windows
from robbench.core import rng
from robbench.core.errors import SuiteError
from robbench.core.threat import Ball
from robbench.core.types import Norm, Problem, State

__all__ = ["Square"]

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # p is halved after these of 10,000 iterations
_ORDER: dict[Norm, int] = {"L2": 2, "L1": 1}
_TILES = 5  # L2 and L1 start from a tiling of 5 × 5
_AHEAD = 64  # steps that are drawn at once: it takes hardly longer than one
_FURTHEST = 16  # steps that are looked ahead at most


@lru_cache(maxsize=64)
def _halvings(steps: int, device: torch.device) -> Tensor:
    """Tabulate how often p has been halved by each step of so many: [steps + 1] int64."""
    t = torch.arange(steps + 1)[:, None]
    return (t * 10_000 // steps > torch.tensor(_HALVINGS)).sum(1).to(device)


@lru_cache(maxsize=64)
def _on(sides: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(sides, device=device)


def _signs(words: Tensor, dtype: torch.dtype) -> Tensor:
    return ((words & 1) * 2 - 1).to(dtype)


def _bring(x: Tensor, delta: Tensor, ball: Ball) -> Tensor:
    """Bring x + delta into ball and box: L1 is projected, L2 scaled to length eps and clamped, as published."""
    if ball.norm == "L1":
        return ball.project(x, x + delta)
    length = delta.square().sum((1, 2, 3), keepdim=True).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
    return (x + delta * (ball.radius(x) / length)).clamp(0, 1)


def _exchange(ball: Ball, x: Tensor, best: Tensor, eta: Tensor, to: Tensor, other: Tensor) -> Tensor:
    """Clear two windows, and put what they held and the unused radius into the first (Algorithm 3).

    `eta` [L, C, H, W] is zero outside the first window; `to` and `other` [L, 1, H, W] are 1 inside theirs.
    """
    order, c, tiny = _ORDER[ball.norm], x.shape[1], torch.finfo(x.dtype).tiny
    delta, cleared = best - x, torch.maximum(to, other)
    amount = mass(delta, order)
    unused = (ball.radius(x) ** order - amount.sum((1, 2, 3), keepdim=True)).clamp(min=0)
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
    is spent. The search keeps the proposal if the loss rose. Linf follows Algorithm 2, from vertical stripes at ±eps.
    L2 follows Algorithm 3: it starts from a tiling, and mass moves from one window to another. L1 follows AutoAttack's
    version of Algorithm 3 (Croce & Hein 2021, "Mind the box"), with a steeper window and the exact projection. The last
    query is the best point again, so that a judge of final points sees it.

    Squares lie anywhere in the image, as in the paper. AutoAttack's code never lets one touch the last row and column,
    which on small images makes it weaker.

    Attributes:
        steps: queries after the first. The published schedule of p, made for 10,000, is scaled to this number.
        p_init: share of the image that the first squares cover; AutoAttack takes 0.8 for every norm.
    """

    kind: ClassVar[str] = "square"
    version: ClassVar[int] = 1
    needs_grad: ClassVar[bool] = False
    memoryless: ClassVar[bool] = False

    objective: str = "margin"
    steps: int = 5000
    p_init: float = 0.8

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
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
        return _halvings(self.steps, t.device)[t.clamp(max=self.steps)]

    def ahead(self, p: Problem, ball: Ball, t: Tensor, n: int = _AHEAD) -> State:
        """Draw the random numbers of the next n steps, from each lane's own step on.

        Returns:
            drawn: the first of these steps, [L].
            Linf: the squares of each step, as factors: rows [L, n, H], and cols [L, n, C, W] with the sign in
            each channel, twice because that is further than any pixel may go, and zero where the search is over.
            L2, L1: words [L, n, 5 + C]: two for a square, three for another one and how η lies, C for the signs.
        """
        lanes, c, h, w = p.x.shape
        steps = (t[:, None] + torch.arange(n, device=t.device)).flatten()
        sample, trial = (v.repeat_interleave(n) for v in (p.sample, p.trial))
        words = rng.bits(p.key, sample, trial, steps + 1, c + (2 if ball.norm == "Linf" else 5))
        if ball.norm != "Linf":
            return {"drawn": t, "words": words.view(lanes, n, -1)}
        side = _on(self.sides(h, w, ball.norm), t.device)[self.halvings(steps)]
        rows, cols = (inside for inside, _ in bands(words[:, :2], side, h, w, p.x.dtype))
        sign = 2 * _signs(words[:, 2:], p.x.dtype) * (steps + 1 < self.steps)[:, None]
        cols = sign[:, :, None] * cols[:, None, :]
        return {"drawn": t, "rows": rows.view(lanes, n, h), "cols": cols.view(lanes, n, c, w)}

    def propose(self, p: Problem, ball: Ball, best: Tensor, t: Tensor) -> Tensor:
        """Change any best point [L, C, H, W] as step t [L] would, for searches that start elsewhere: [L, C, H, W]."""
        return self.proposals(p, ball, best, t, self.ahead(p, ball, t, 1), 1)[:, 0]

    def init(self, p: Problem, ball: Ball) -> State:
        """Start at random stripes (Linf) or at a random tiling (L2, L1)."""
        lanes, c, h, w = p.x.shape
        if ball.norm == "Linf":
            stripes = _signs(rng.bits(p.key, p.sample, p.trial, 0, c * w), p.x.dtype).view(lanes, c, 1, w)
            x = (p.x + ball.radius(p.x) * stripes).clamp(0, 1)
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
        best = {"x_best": x.clone(), "loss_best": torch.full_like(x[:, 0, 0, 0], -torch.inf)}
        return {"x": x} | best | self.ahead(p, ball, torch.zeros_like(p.sample))

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Keep the proposal if the loss rose, and propose a change in another square."""
        better = self.keeps(s, loss[:, None])[:, 0]
        best = torch.where(better[:, None, None, None], s["x"], s["x_best"])
        loss_best = torch.where(better, loss, s["loss_best"])
        drawn = s["drawn"]
        kept: State = {name: s[name] for name in ("drawn", "rows", "cols", "words") if name in s}
        if bool(((t < drawn) | (t + _FURTHEST > drawn + _AHEAD)).any()):  # one lane runs out: all draw, and are in step
            kept = self.ahead(p, ball, t)
        x = self.proposals(p, ball, best, t, kept, 1)[:, 0]
        return {"x": x, "x_best": best, "loss_best": loss_best} | kept

    def keeps(self, s: State, loss: Tensor) -> Tensor:
        """Tell where the loss rose."""
        return loss > s["loss_best"][:, None]

    def further(self, p: Problem, ball: Ball, s: State, t: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Propose the points of the next steps, as they follow if the search keeps none of them.

        In a grayscale image, a small square often has the proposed values already. Such a point needs no query. So more
        points are listed than may be queried.
        """
        changeless = ball.norm == "Linf" and p.x.shape[1] == 1
        more = min(2 * n + 2 if changeless else n, _FURTHEST)
        points = torch.cat([s["x"][:, None], self.proposals(p, ball, s["x_best"], t, s, more - 1)], dim=1)
        known = torch.zeros_like(points[:, :, 0, 0, 0], dtype=torch.bool)
        if changeless:
            known = (points == s["x_best"][:, None]).flatten(2).all(2) & (s["loss_best"] > -torch.inf)[:, None]
        return points, known

    def proposals(self, p: Problem, ball: Ball, best: Tensor, t: Tensor, drawn: State, n: int) -> Tensor:
        """Change the best point [L, C, H, W] as n steps from step t [L] on would: [L, n, C, H, W]."""
        lane = torch.arange(len(t), device=t.device)[:, None]
        step = t[:, None] + torch.arange(n, device=t.device)
        at = lane, step - drawn["drawn"][:, None]
        if ball.norm == "Linf":
            change = drawn["rows"][at][:, :, None, :, None] * drawn["cols"][at][:, :, :, None, :]
            return ball.project(p.x[:, None], best[:, None] + change)
        lane = lane.expand_as(step).flatten()
        x = self.exchanged(p.x[lane], ball, best[lane], step.flatten(), drawn["words"][at].flatten(0, 1))
        return x.view(len(t), n, *best.shape[1:])

    def exchanged(self, x: Tensor, ball: Ball, best: Tensor, t: Tensor, words: Tensor) -> Tensor:
        """Move mass between two windows, except at the last step: L2 and L1."""
        c, h, w = best.shape[1:]
        sides, level = self.sides(h, w, ball.norm), self.halvings(t)
        side = _on(sides, t.device)[level]
        to, row, col = place(words[:, :2], side, best)
        other, _, _ = place(words[:, 2:4], side, best)
        table = windows(sides, _ORDER[ball.norm], best.dtype, best.device)
        eta = _signs(words[:, -c:], best.dtype)[:, :, None, None] * lay(table, level, words[:, 4] & 1, row, col)
        last = (t + 1 >= self.steps)[:, None, None, None]
        return torch.where(last, best, _exchange(ball, x, best, eta, to, other))
