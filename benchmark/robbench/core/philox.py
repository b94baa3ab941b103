"""Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers") on tensors or NumPy arrays. Imports no torch.

The code uses int64 values. Their 32 × 32 bit product wraps modulo 2**64 and so has exactly the bits that Philox needs.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["draw_order", "draw_targets", "make_key", "philox4x32"]

_Words = TypeVar("_Words", "Tensor", NDArray[np.int64])

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # round multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # key increments (golden ratio, sqrt(3) - 1)
_MASK = 0xFFFFFFFF
_BLOCK = 2**14  # positions; the words of a block stay in the processor's cache


def make_key(seed: int, stage: str) -> tuple[int, int]:
    """Derive two 32-bit key words from the run's seed and the name of a stage (an attack's name)."""
    digest = hashlib.sha256(f"{seed}\x00{stage}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox4x32(
    c0: _Words, c1: _Words, c2: _Words, c3: _Words, key: tuple[int, int]
) -> tuple[_Words, _Words, _Words, _Words]:
    """Apply ten Philox rounds to counters given as four broadcastable int64 tensors or arrays of 32-bit values.

    Returns four int64 tensors or arrays of 32-bit values, of the broadcast shape.
    """
    k0, k1 = key
    for _ in range(10):
        # The signed product wraps modulo 2**64, so the arithmetic shift followed by the mask is the high word.
        p0, p1 = c0 * _M0, c2 * _M1
        hi0, lo0 = (p0 >> 32) & _MASK, p0 & _MASK
        hi1, lo1 = (p1 >> 32) & _MASK, p1 & _MASK
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def draw_order(total: int, seed: int) -> NDArray[np.int64]:
    """Return the positions 0 to total − 1 in the random order of a sample seed, [total] int64."""
    key, seeds = make_key(seed, "samples"), []
    for start in range(0, total, _BLOCK):
        position = np.arange(start, min(start + _BLOCK, total), dtype=np.int64)
        zero = np.zeros_like(position)
        first, second, _, _ = philox4x32(position, zero, zero, zero, key)
        seeds.append(first.astype(np.uint64) << np.uint64(32) | second.astype(np.uint64))
    # Two words make a tie, which position would break, as good as impossible.
    return np.argsort(np.concatenate(seeds, dtype=np.uint64) if seeds else np.empty(0), kind="stable")


def draw_targets(seed: int, sample: NDArray[np.int64], label: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Return a random class other than the label for each sample: official indices [n], labels [n] -> [n] int64."""
    zero = np.zeros_like(sample)
    word = philox4x32(sample & _MASK, zero, zero, zero, make_key(seed, "target"))[0]
    drawn = (word * (classes - 1)) >> 32  # as `rng.below`
    return drawn + (drawn >= label)
