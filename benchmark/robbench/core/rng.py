"""Counter-based random numbers on tensors, by `philox.philox4x32`.

A number is a pure function of (key, sample, trial, step, element). It does not depend on the device, the batch width,
the sharding, the order or a global generator.

`bits` and `uniform` are bit-identical on all devices. `normal` uses log, cos and sin, whose last bit may differ between
devices.
"""

import math

import torch
from torch import Tensor

from robbench.core.philox import make_key, philox4x32

__all__ = ["below", "bits", "make_key", "normal", "philox4x32", "uniform"]

_MASK = 0xFFFFFFFF


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
