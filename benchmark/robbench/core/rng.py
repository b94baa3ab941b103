"""Counter-based random numbers on tensors: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers").

A number is a pure function of (key, sample, trial, step, element). It does not depend on the device, the batch width,
the sharding, the order or a global generator. The code uses int64 tensors. Their 32 × 32 bit product wraps modulo
2**64 and so has exactly the bits that Philox needs.

`bits` and `uniform` are bit-identical on all devices. `normal` uses log, cos and sin, whose last bit may differ between
devices.
"""

import hashlib
import math

import torch
from torch import Tensor

__all__ = ["below", "bits", "make_key", "normal", "philox4x32", "uniform"]

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # round multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # key increments (golden ratio, sqrt(3) - 1)
_MASK = 0xFFFFFFFF


def make_key(seed: int, stage: str) -> tuple[int, int]:
    """Derive two 32-bit key words from the run's seed and the name of a stage (an attack's name)."""
    digest = hashlib.sha256(f"{seed}\x00{stage}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox4x32(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply ten Philox rounds to counters given as four broadcastable int64 tensors of 32-bit values.

    Returns four int64 tensors of 32-bit values, of the broadcast shape.
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


def bits(key: tuple[int, int], sample: Tensor, trial: Tensor, step: int | Tensor, n: int) -> Tensor:
    """Draw n random 32-bit words per lane: [L], [L] int64 -> [L, n] int64 in [0, 2**32).

    `step` is one number for all lanes, or one per lane, [L] int64.
    """
    block = torch.arange((n + 3) // 4, device=sample.device)
    words = philox4x32(
        sample[:, None] & _MASK,
        trial[:, None] & _MASK,
        (step[:, None] if isinstance(step, Tensor) else torch.full_like(sample[:, None], step)) & _MASK,
        block[None, :],
        key,
    )
    lanes = len(sample), block.shape[0]
    return torch.stack([w.expand(lanes) for w in words], dim=-1).flatten(1)[:, :n]


def below(bound: Tensor, words: Tensor) -> Tensor:
    """Map random 32-bit words to integers in [0, bound). The two shapes broadcast.

    Multiply and shift of Lemire 2019, "Fast random integer generation in an interval", without its rejection step. The
    probabilities of two integers therefore differ by a relative bound / 2**32 at most.
    """
    return (words * bound) >> 32


def uniform(key: tuple[int, int], sample: Tensor, trial: Tensor, step: int | Tensor, n: int) -> Tensor:
    """Draw n numbers per lane, uniform on the 2**24 multiples of 2**-24 in [0, 1): [L, n] float32.

    float32 holds 24 bits exactly, so float64 runs use the same numbers.
    """
    return (bits(key, sample, trial, step, n) >> 8).to(torch.float32) * 2.0**-24


def normal(key: tuple[int, int], sample: Tensor, trial: Tensor, step: int | Tensor, n: int) -> Tensor:
    """Draw n standard normal numbers per lane by Box-Muller: [L, n] float32."""
    pairs = (n + 1) // 2
    u = uniform(key, sample, trial, step, 2 * pairs)
    # 1 - u is in (0, 1], so the logarithm is finite.
    radius = torch.sqrt(-2.0 * torch.log1p(-u[:, :pairs]))
    angle = (2.0 * math.pi) * u[:, pairs:]
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :n]
