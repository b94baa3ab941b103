"""Checks of the images and labels that a user brings. They run before any conversion could hide a mistake."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robbench.core.errors import DataError

__all__ = ["check_own_images"]

_FLOATS = (torch.float16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_own_images(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, dict[str, str]]:
    """Check images and labels, and bring them to the CPU.

    Args:
        x: images [N, C, H, W] in [0, 1], float16, float32 or float64; or pixel values 0 to 255 in uint8.
        y: labels [N], integers from 0.

    Returns:
        The images, those in float16 as float32, because float16 would round the points of attacks out of the ball; the
        labels as int64; and flags, name of a problem -> sentence. A pixel that leaves [0, 1] by less than the rounding
        of float32 near 1 is set to the bound, and flag `clipped` says so. Flag `dark` says that no pixel exceeds 1/255.

    Raises:
        DataError: a wrong type or shape, no images, a value that is NaN or outside [0, 1], or a negative label.
    """
    for name, tensor in (("x", x), ("y", y)):
        if kind := _find_special_kind(name, tensor):
            raise DataError(f"{name} is {kind}")
    if x.dim() == 4:
        _check_labels(x, y)
    if x.dim() != 4 or x.dtype not in (*_FLOATS, torch.uint8):
        raise DataError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; expected images [N, C, H, W] in [0, 1] in float16, float32 or "
            "float64, or pixel values 0 to 255 in uint8. x.float() / 255 makes them of other pixel values 0 to 255."
        )
    if not x.numel():
        raise DataError(f"x holds no images: its shape is {tuple(x.shape)}.")
    x, y = x.detach().cpu(), y.detach().cpu().long()
    flags: dict[str, str] = {}
    if x.dtype == torch.float16:
        x = x.float()
    if x.dtype != torch.uint8:
        x, flags = _clip_rounding(x)
    flags |= _find_dark_flag(x)
    if (least := int(y.min())) < 0:
        raise DataError(f"y holds the label {least}; labels are 0 or more.")
    return x, y, flags


def _find_special_kind(name: str, tensor: Tensor) -> str:
    """Say what is special about a tensor that does not simply hold values, and what to do; "" if nothing is."""
    expected = "expected a plain dense tensor."
    if tensor.is_nested:
        return f"a nested tensor; {expected} torch.stack({name}.unbind()) makes one of entries of one shape."
    if tensor.is_meta:
        return f"on the device meta, which holds no values; {expected} Load the values on the CPU."
    if tensor.is_quantized:
        return f"a quantized tensor; {expected} {name}.dequantize() makes one."
    if tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout}; {expected} {name}.to_dense() may make one."
    if isinstance(tensor, torch.masked.MaskedTensor):
        return f"a masked tensor; {expected} {name}.get_data() makes one, without the mask."
    return ""


def _check_labels(x: Tensor, y: Tensor) -> None:
    if y.dtype not in _INTEGERS:
        remedy = {
            torch.bool: "If they stand for two classes, y.long() makes labels 0 and 1.",
        }.get(y.dtype, "If each is a whole number, y.long() converts them; of soft labels, take y.argmax(1).")
        raise DataError(f"y is {y.dtype} of shape {tuple(y.shape)}; expected integer labels [N]. {remedy}")
    if y.shape != x.shape[:1]:
        column = y.dim() == 2 and y.shape[1] == 1
        remedy = "y.squeeze(1) removes the second axis." if column else "A one-hot y becomes labels by y.argmax(1)."
        remedy = remedy if y.dim() == 2 else "Each image needs one label."
        raise DataError(
            f"y has shape {tuple(y.shape)}; expected {len(x) if x.dim() else 0} integer labels [N]. {remedy}"
        )


def _clip_rounding(x: Tensor) -> tuple[Tensor, dict[str, str]]:
    low, high = float(x.min()), float(x.max())
    slack = torch.finfo(torch.float32).eps
    if not math.isfinite(low + high):  # the least value of a tensor with a NaN is NaN
        bad = ~x.isfinite().flatten(1).all(1)
        raise DataError(
            f"x holds NaN or infinity in {int(bad.sum())} of {len(x)} images, the first at position "
            f"{int(bad.nonzero()[0])}; expected finite pixels in [0, 1]. Remove these images."
        )
    if not (low >= -slack and high <= 1 + slack):
        raise DataError(
            f"x spans [{_exact(low)}, {_exact(high)}]; expected [0, 1]. Divide pixel values by 255, and put mean/std "
            "normalization inside the model: eps is measured on what the model is given."
        )
    if low >= 0 and high <= 1:
        return x, {}
    outside = int(((x < 0) | (x > 1)).sum())
    values = "1 value of x lay" if outside == 1 else f"{outside} values of x lay"
    return x.clamp(0, 1), {
        "clipped": (
            f"{values} outside [0, 1] by a rounding error (x spans [{_exact(low)}, {_exact(high)}]); "
            "robbench set what lay outside to 0 or 1."
        )
    }


def _find_dark_flag(x: Tensor) -> dict[str, str]:
    """Look for images that were divided by 255 twice: no pixel is brighter than one step of 8 bits."""
    high = float(x.max()) / (255 if x.dtype == torch.uint8 else 1)
    if high > 1.01 / 255:  # one percent is for rounding, in float16 too
        return {}
    return {
        "dark": (
            f"The largest value of x is {_exact(high)}, at most one step of 8 bits (1/255), so all images are nearly "
            "black. Was x divided by 255 twice? Expected: images that fill [0, 1]."
        )
    }


def _exact(value: float) -> str:
    """Print with six digits, or with all of them where six would hide that a bound is exceeded."""
    short = f"{value:g}"
    return short if float(short) == value or short not in ("0", "1", "-0") else repr(value)
