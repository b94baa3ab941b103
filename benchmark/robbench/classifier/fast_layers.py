"""A faster input gradient for a frozen model on a CPU.

The input gradient of a convolution with one to four input channels costs more than its arithmetic. Kernels work on 16
channels at once, so most of their output is padding. Here, a square of side² neighbouring pixels counts as side²
channels of one convolution. The sums are the same ones, with zeros added. In channels-last layout and float32, the
bits were the same as torch's in all comparisons (docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from robbench.classifier.batch_width import compute_probe

__all__ = ["FastConv2d", "install_fast_layers", "list_fast_layers"]

_MAX_CHANNELS = 4
_MIN_KERNEL = 5  # side of the kernel; with 3×3 weights on colours nothing was gained
_MIN_PIXELS = 2**8  # below, calls from Python (about 20 µs each) cost more than the kernel saves
# Largest differences of logits and gradients, as a share of their length. Rounding in float32 is far below the first
# two. It may switch a ReLU, hence 1e-2. Without instructions for bfloat16, torch rounds sums in between (0.6 to 0.9 %).
_LOGITS_TOLERANCE, _GRADIENT_TOLERANCE, _BFLOAT16_TOLERANCE = 1e-4, 1e-2, 2**-5


class FastConv2d(nn.Module):
    """A convolution with few input channels, and a faster gradient at its input.

    Args:
        layer: computes the output, and holds the weights.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Compute what the layer computes."""
        answer: Tensor
        if not x.requires_grad or self.layer.weight.requires_grad or (side := _choose_side(self.layer, x)) == 1:
            answer = self.layer(x)
        else:
            answer = _Convolution.apply(x, self.layer, side)
        return answer


def install_fast_layers(module: nn.Module, x: Tensor, bfloat16: bool = False) -> bool:
    """Replace the convolutions that can have a faster input gradient, if the model then answers as before.

    A layer stays as it is if it is of a subclass, if its weights are trained, or if a hook computes its weights.

    Args:
        module: in eval mode, on the CPU. It is changed in place.
        x: images [n, C, H, W] to compare logits and gradients on. With float64 images nothing is replaced.
        bfloat16: whether gradients will run in bfloat16. The comparison then covers bfloat16, too.

    Returns:
        Whether layers were replaced.
    """
    found = [
        (parent, name, layer)
        for parent in module.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Conv2d and _can_be_faster(layer, x)
    ]
    if not found or x.dtype != torch.float32:
        return False
    precisions = (False, True)[: 1 + bfloat16]
    try:
        before = [compute_probe(module, x, precision) for precision in precisions]
    except Exception:  # a user's module may raise anything about its input; the first real query words it
        return False
    for parent, name, layer in found:
        setattr(parent, name, FastConv2d(layer))
    try:
        after = [compute_probe(module, x, precision) for precision in precisions]
        tolerances = (_GRADIENT_TOLERANCE, _BFLOAT16_TOLERANCE)
        is_same = all(_is_close(*both) for both in zip(before, after, tolerances[: len(after)], strict=True))
    except Exception:  # the module, or this build of torch, does not work with the replaced layers
        is_same = False
    if not is_same:
        for parent, name, layer in found:
            setattr(parent, name, layer)
    return is_same


def list_fast_layers(module: nn.Module) -> list[str]:
    """List the names of the layers that were replaced."""
    return [name for name, part in module.named_modules() if isinstance(part, FastConv2d)]


def _can_be_faster(layer: nn.Conv2d, x: Tensor) -> bool:
    """Tell whether a layer can have a faster gradient at images like x."""
    weight = layer.weight
    is_frozen = isinstance(weight, nn.Parameter) and not weight.requires_grad
    return is_frozen and layer.in_channels == x.shape[1] and _choose_side(layer, x) > 1


def _is_close(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], gradient_tolerance: float) -> bool:
    """Compare logits and gradients, image by image."""
    for old, new, tolerance in zip(before, after, (_LOGITS_TOLERANCE, gradient_tolerance), strict=True):
        if old.shape != new.shape:
            return False
        lengths = old.flatten(1).norm(dim=1)
        if not ((new - old).flatten(1).norm(dim=1) <= tolerance * lengths).all():
            return False
    return True


def _choose_side(layer: nn.Conv2d, x: Tensor) -> int:
    """Choose the side of the squares of pixels for inputs [n, C, H, W] like x. With 1, torch computes the gradient."""
    if layer.in_channels > _MAX_CHANNELS or min(layer.kernel_size) < _MIN_KERNEL:
        return 1
    if x.dim() != 4 or x.shape[2] * x.shape[3] < _MIN_PIXELS:
        return 1
    if (layer.stride, layer.dilation, layer.groups, layer.padding_mode) != ((1, 1), (1, 1), 1, "zeros"):
        return 1
    if isinstance(layer.padding, str) or any(p >= k for p, k in zip(layer.padding, layer.kernel_size, strict=True)):
        return 1
    sides = (4, 2) if layer.in_channels == 1 else (2,)
    return next((side for side in sides if x.shape[2] % side == x.shape[3] % side == 0), 1)


class _Convolution(torch.autograd.Function):
    """A convolution whose input gradient is one convolution over squares of pixels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Conv2d, side: int) -> Tensor:
        ctx.layer, ctx.side, ctx.dtype = layer, side, x.dtype
        answer: Tensor = layer(x)
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        layer, side = ctx.layer, ctx.side
        padding = [k - 1 - p for k, p in zip(layer.kernel_size, layer.padding, strict=True)]
        weight = _arrange_squares(layer.weight.to(grad.dtype), side)
        squares = F.conv2d(grad, weight, stride=side, padding=padding)
        return F.pixel_shuffle(squares, side).to(ctx.dtype), None, None


def _arrange_squares(weight: Tensor, side: int) -> Tensor:
    """Turn the weights of a convolution [O, C, h, w] into those of its gradient at squares of side² pixels.

    All pixels of a square depend on the same outputs. Pixel (i, j) of the square uses those from (i, j) on, with the
    weights rotated by 180°.

    Returns:
        [C · side², O, h + side − 1, w + side − 1].
    """
    height, width = (length + side - 1 for length in weight.shape[2:])
    windows = F.pad(weight, [side - 1] * 4).unfold(2, height, 1).unfold(3, width, 1)  # [O, C, i, j, height, width]
    turned = windows.flip(4, 5).permute(1, 2, 3, 0, 4, 5)
    return turned.flatten(0, 2).contiguous(memory_format=torch.channels_last)
