"""Squares and windows on images, for random searches: many lanes at once, each with its own side."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from robbench.core import rng

__all__ = ["bands", "lay", "mass", "place", "windows"]


def mass(v: Tensor, order: int) -> Tensor:
    """Compute the terms that a norm of this order (1 or 2) adds up: absolute values or squares."""
    return v.square() if order == 2 else v.abs()


def _bump(h: int, w: int, order: int) -> Tensor:
    """Make one half of a window, [h, w] of unit norm: a pyramid that falls in rings from its middle."""
    rings = torch.arange(1, max(h, w) // 2 + 2, dtype=torch.float64) ** (-2 if order == 2 else -4)
    height = rings.flip(0).cumsum(0).flip(0)
    ring = torch.maximum((torch.arange(h) - h // 2).abs()[:, None], (torch.arange(w) - w // 2).abs()[None, :])
    return height[ring] / mass(height[ring], order).sum().pow(1 / order)


@lru_cache(maxsize=64)
def windows(sides: tuple[int, ...], order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make the windows η of the Square Attack (Andriushchenko et al. 2020, Sec. 3.4) of all these sides.

    A window is a positive half and a negative one below it; each half is a pyramid of rings whose heights add up
    1 / j² (order 2, Eq. 2) or 1 / j⁴ (order 1, AutoAttack).

    Returns:
        [len(sides), 2, S + 1, S + 1] with S the largest side: each as it is and transposed, of unit norm, with zeros
        beyond its side.
    """
    found = torch.zeros(len(sides), 2, max(sides) + 1, max(sides) + 1, dtype=torch.float64)
    for i, side in enumerate(sides):
        halves = [sign * _bump(rows, side, order) for sign, rows in ((1, side // 2), (-1, side - side // 2)) if rows]
        eta = torch.cat(halves) / len(halves) ** (1 / order)
        found[i, 0, :side, :side], found[i, 1, :side, :side] = eta, eta.T
    return found.to(dtype).to(device)


def _band(word: Tensor, side: Tensor, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    first = rng.below(n - side + 1, word)
    at = torch.arange(n, device=side.device) - first[:, None]
    return ((at >= 0) & (at < side[:, None])).to(dtype), at


def bands(words: Tensor, side: Tensor, h: int, w: int, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], ...]:
    """Choose the rows and the columns of a square anywhere on h × w pixels, by two random words [L, 2], side [L].

    Returns:
        For the rows, then for the columns: 1 inside the square and 0 outside (numbers, because torch selects by
        booleans several times slower than it multiplies), and how far each lies from the square's first; [L, H or W].
    """
    return _band(words[:, 0], side, h, dtype), _band(words[:, 1], side, w, dtype)


def place(words: Tensor, side: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Place a square on images [L, C, H, W] as `bands` does.

    Returns:
        1 inside the square and 0 outside, [L, 1, H, W], and how far each row [L, H] and column [L, W] lies from the
        square's first.
    """
    (rows, row), (cols, col) = bands(words, side, like.shape[2], like.shape[3], like.dtype)
    return rows[:, None, :, None] * cols[:, None, None, :], row, col


def lay(table: Tensor, level: Tensor, turned: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Put one window per lane, `table[level, turned]`, where `place` put its square: [L, 1, H, W], zero outside."""
    beyond = table.shape[-1] - 1  # a row and a column of zeros
    row, col = (torch.where(at < 0, beyond, at).clamp(max=beyond) for at in (row, col))
    rows = table.flatten(0, 2)[((level * 2 + turned) * (beyond + 1))[:, None] + row]
    return rows.gather(2, col[:, None, :].expand(-1, row.shape[1], -1))[:, None]
