"""How wide a batch is: a default that depends on nothing but the images, and narrower widths that change no bit."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from robbench import rng

__all__ = ["NARROWEST", "default_lanes", "device_of", "verified_widths"]

NARROWEST = 16  # below this, kernels change and the width of a lane costs little anyway


def default_lanes(shape: Sequence[int], device: torch.device) -> int:
    """Choose a lane width for images of this shape: wide enough to be efficient, the same on every such machine."""
    pixels = int(np.prod(shape))
    budget, low, high = (2**23, 64, 2048) if device.type == "cuda" else (2**17, 32, 256)
    return min(max(1 << max(budget // pixels, 1).bit_length() - 1, low), high)


def device_of(model: nn.Module) -> torch.device:
    """Tell where a model lives: where its first parameter or buffer does."""
    return next((v.device for v in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def verified_widths(model: nn.Module, shape: Sequence[int], lanes: int, dtype: torch.dtype) -> list[int]:
    """List the narrower widths (halves of `lanes`, down to 16) at which a model gives the same bits as at `lanes`.

    Which kernel runs, and so how sums are rounded, depends on the shape of a batch and not on its values: one
    comparison of logits and input gradients on random images settles it for this model on this machine.

    Args:
        model: in eval mode.
        shape: of one image, [C, H, W].
        lanes: the full width.
        dtype: of the images.
    """
    lane = torch.arange(lanes, device=device_of(model))
    images = rng.uniform((0, 0), lane, torch.zeros_like(lane), 0, int(np.prod(shape)))
    images = images.to(dtype).view(lanes, *shape)

    def answer(width: int) -> tuple[Tensor, Tensor]:
        x = images[:width].clone().requires_grad_(True)
        with torch.enable_grad():
            logits = model(x)
            # Unequal weights on the logits: no cancellation as in a cross-entropy that is already zero.
            weighted = (logits * torch.linspace(1, 2, logits.shape[1], dtype=dtype, device=x.device)).sum()
            grad = torch.autograd.grad(weighted, x, allow_unused=True)[0] if weighted.requires_grad else None
        return logits.detach(), torch.zeros_like(x) if grad is None else grad

    logits, grad = answer(lanes)
    found, width = [], lanes // 2
    while width >= NARROWEST:
        z, g = answer(width)
        if torch.equal(z, logits[:width]) and torch.equal(g, grad[:width]):
            found.append(width)
        width //= 2
    return found
