"""Kernels for a frozen model on a CPU: layers that lay their weights out once, for passes that come by the thousand.

Three things cost small networks more than their arithmetic:

- The gradient at an image of one to four channels: kernels work on 16 channels at once, most of which are padding.
  Here a square of neighbouring pixels counts as so many channels of one convolution. The sums are the same ones in the
  same order, with zeros added, and so, as far as was seen, are the bits.
- Matrix products whose weights are brought into the order of the kernel at every pass.
- In bfloat16, rounding the weights at every pass: autocast remembers only those of weights that are being trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from robbench.classifier.batch_width import probe

__all__ = ["quicken"]

_FEW = 4  # channels of an image
_WIDE = 2**8  # pixels of an image from which on its gradient gains, and
_LARGE = 2**18  # weights from which on a matrix product does: calls from Python cost some 20 µs each
_ROWS = 64  # that these weights are laid out for
_CLOSE = 1e-4  # share of the length by which answers may differ: far above rounding, as in `target`
_NEAR = 1e-2  # the same for gradients, where rounding may send a ReLU the other way


def quicken(module: nn.Module, x: Tensor) -> bool:
    """Have the layers of a frozen model use these kernels, if it answers as before then.

    Args:
        module: in eval mode, on the CPU; changed in place. Layers of subclasses, and those whose weights are trained or
            computed by a hook, stay as they are.
        x: images [n, C, H, W] to compare answers and gradients on.

    Returns:
        Whether anything was changed.
    """
    layers: list[Any] = [layer for layer in module.modules() if type(layer) in _QUICK and _gains(layer)]
    if not layers:
        return False
    try:
        before = probe(module, x)
    except Exception:  # whatever a user's module raises about its input; whoever asks it next words it
        return False
    for layer in layers:
        layer.__class__, layer.kept = _QUICK[type(layer)], _Kept()
    try:
        after = probe(module, x)
        same = all(_close(*pair) for pair in zip(before, after, (_CLOSE, _NEAR), strict=True))
    except Exception:  # as above, and whatever an operator of another version of torch raises
        same = False
    if not same:
        for layer in layers:
            layer.__class__ = type(layer).plain
            del layer.kept
    return same


def _gains(layer: Any) -> bool:
    weight = layer.weight
    large = isinstance(layer, nn.Conv2d) or weight.numel() >= _LARGE
    return large and isinstance(weight, nn.Parameter) and not weight.requires_grad


def _close(before: Tensor, after: Tensor, share: float) -> bool:
    if before.shape != after.shape:
        return False
    lengths = before.flatten(1).norm(dim=1)
    return bool(((after - before).flatten(1).norm(dim=1) <= share * lengths).all())


class _Kept:
    """What was made of a layer's weights, for as long as they stay what they were; copies of the layer share it."""

    def __init__(self) -> None:
        self._made: dict[object, tuple[tuple[int, int], Tensor, Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()  # another process makes its own

    def get(self, weight: Tensor, what: object, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `make(weight)`, made anew only if another weight is given or this one was written to."""
        stamp = weight.data_ptr(), weight._version
        found = self._made.get(what)
        if found is None or found[0] != stamp:
            with torch.no_grad():
                source = weight.detach()  # held, so that no other weight comes to lie where it does
                found = self._made[what] = stamp, make(source), source
        return found[1]


def _rounds(x: Tensor) -> bool:
    """Tell whether autocast would round this input to bfloat16."""
    return (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and x.dtype in (torch.float32, torch.bfloat16)
    )


def _rounded(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias as autocast would round them at every pass."""
    bias = None if layer.bias is None else layer.kept.get(layer.bias, "bias", Tensor.bfloat16)
    return layer.kept.get(layer.weight, "rounded", Tensor.bfloat16), bias


class _Conv2d(nn.Conv2d):
    plain = nn.Conv2d
    kept: _Kept

    def forward(self, x: Tensor) -> Tensor:
        """Answer as `nn.Conv2d` does."""
        if self.weight.requires_grad:
            return super().forward(x)
        if (side := self.side(x)) == 1:
            return self.answer(x)
        answer: Tensor = _Convolution.apply(x, self, side)
        return answer

    def answer(self, x: Tensor) -> Tensor:
        """Convolve, with weights that have been rounded already if autocast wants them so."""
        if not _rounds(x):
            return super().forward(x)
        answer: Tensor = self._conv_forward(x, *_rounded(self))
        return answer

    def side(self, x: Tensor) -> int:
        """Choose the side of the squares of pixels whose gradients are computed at once; 1 leaves it to torch."""
        if self.in_channels > _FEW or not x.requires_grad or x.dim() != 4 or x.shape[2] * x.shape[3] < _WIDE:
            return 1
        if (self.stride, self.dilation, self.groups, self.padding_mode) != ((1, 1), (1, 1), 1, "zeros"):
            return 1
        if isinstance(self.padding, str) or any(p >= k for p, k in zip(self.padding, self.kernel_size, strict=True)):
            return 1
        sides = (4, 2) if self.in_channels == 1 else (2,)
        return next((side for side in sides if x.shape[2] % side == x.shape[3] % side == 0), 1)


class _Convolution(torch.autograd.Function):
    """A convolution with few input channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Conv2d, side: int) -> Tensor:
        ctx.layer, ctx.side, ctx.dtype = layer, side, x.dtype
        return layer.answer(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        layer, side = ctx.layer, ctx.side
        weight = layer.kept.get(layer.weight, (side, grad.dtype), lambda w: _squares(w.to(grad.dtype), side))
        padding = [k - 1 - p for k, p in zip(layer.kernel_size, layer.padding, strict=True)]
        squares = F.conv2d(grad, weight, stride=side, padding=padding)
        return F.pixel_shuffle(squares, side).to(ctx.dtype), None, None


def _squares(weight: Tensor, side: int) -> Tensor:
    """Turn the weights [O, C, h, w] of a convolution into those of the gradient at squares of side² pixels.

    A pixel at (i, j) of a square depends on the outputs that its square does, from (i, j) on.

    Returns:
        [C · side², O, h + side − 1, w + side − 1].
    """
    out, channels, height, width = weight.shape
    made = weight.new_zeros(channels, side, side, out, height + side - 1, width + side - 1)
    turned = weight.flip(2, 3).transpose(0, 1)
    for i in range(side):
        for j in range(side):
            made[:, i, j, :, i : i + height, j : j + width] = turned
    return made.flatten(0, 2).contiguous(memory_format=torch.channels_last)


class _Linear(nn.Linear):
    plain = nn.Linear
    kept: _Kept

    def forward(self, x: Tensor) -> Tensor:
        """Answer as `nn.Linear` does, up to rounding."""
        if self.weight.requires_grad:
            return super().forward(x)
        if _rounds(x):
            return F.linear(x, *_rounded(self))
        if {x.dtype, self.weight.dtype} != {torch.float32} or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        answer: Tensor = _Product.apply(x, self)
        return answer


class _Product(torch.autograd.Function):
    """A matrix product with frozen weights, in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Linear) -> Tensor:
        ctx.layer = layer
        return _product(x, layer.kept.get(layer.weight, "laid out", _laid_out), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layer = ctx.layer
        return _product(grad, layer.kept.get(layer.weight, "turned", lambda w: _laid_out(w.t())), None), None


def _laid_out(weight: Tensor) -> Tensor:
    # One number of rows, whatever comes: the order of the weights decides in which order sums are taken.
    made: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return made


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return made


_QUICK: dict[type[nn.Module], type] = {nn.Conv2d: _Conv2d, nn.Linear: _Linear}
