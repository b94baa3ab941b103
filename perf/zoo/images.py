"""What changes an image before a network sees it: [N, C, H, W] in [0, 1] to the same shape.

Those that round or compare have no gradient; `StraightThrough(module)` gives any of them that of the identity.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import median_filter
from torch import Tensor, nn

from robbench.core.errors import ModelError

__all__ = [
    "Described",
    "InputNoise",
    "Jpeg",
    "MedianFilter",
    "Quantize",
    "RandomResizePad",
    "Ripple",
    "StraightThrough",
    "Thermometer",
]


class Described(nn.Module):
    """A module whose `repr` holds its numbers, which are part of the identity of a result as weights are."""

    def extra_repr(self) -> str:
        """List the numbers that the constructor was given."""
        return ", ".join(f"{k}={v}" for k, v in vars(self).items() if type(v) in (int, float))


class Quantize(Described):
    """Round pixels to `levels` values evenly spaced in [0, 1]; the gradient of rounding is zero everywhere.

    Reducing bit depth is one of the transformations of Guo et al. 2018.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        return torch.round(x * (self.levels - 1)) / (self.levels - 1)


class Jpeg(Described):
    """What JPEG loses: cosine coefficients of 8x8 blocks rounded to multiples of a step; the gradient is zero.

    Dziugaite et al. 2016, Guo et al. 2018. The step rises linearly with the frequency, from `step` at the constant
    term to eight times that at the highest one, which is the shape of the luminance table in the standard's Annex K.

    Args:
        step: of the constant term, in [0, 1] pixel units per coefficient of the orthonormal transform.
    """

    basis: Tensor
    table: Tensor

    def __init__(self, step: float) -> None:
        super().__init__()
        u, i = torch.arange(8.0)[:, None], torch.arange(8.0)[None, :]
        basis = torch.cos(math.pi * (2 * i + 1) * u / 16) / 2
        basis[0] /= math.sqrt(2)
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("table", step * (1 + (u + u.T) / 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape.

        Raises:
            ModelError: H or W is no multiple of 8.
        """
        n, channels, rows, columns = x.shape
        if rows % 8 or columns % 8:
            raise ModelError(f"Jpeg: images of {rows}x{columns} given; allowed: multiples of 8. Pad them first.")
        blocks = x.reshape(n, channels, rows // 8, 8, columns // 8, 8).transpose(3, 4)
        coefficients = self.basis @ blocks @ self.basis.T
        kept = torch.round(coefficients / self.table) * self.table
        back = self.basis.T @ kept @ self.basis
        return back.transpose(3, 4).reshape(x.shape).clamp(0, 1)


class Thermometer(Described):
    """Thermometer code (Buckman et al. 2018), read back by a layer of equal weights.

    A pixel becomes `levels` bits, bit l saying whether it exceeds (l + ½) / levels; the fixed layer behind averages
    them, so that any network can follow. Comparisons leave no autograd graph: there is no gradient to ask for.
    """

    thresholds: Tensor

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.register_buffer("thresholds", (torch.arange(levels) + 0.5) / levels, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        return (x[..., None] > self.thresholds).to(x.dtype).mean(-1)


class MedianFilter(Described):
    """The median of `size` x `size` pixels, through numpy (feature squeezing, Xu et al. 2018): no autograd graph."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        smooth = median_filter(x.detach().cpu().numpy(), size=(1, 1, self.size, self.size), mode="nearest")
        return torch.from_numpy(np.ascontiguousarray(smooth)).to(x.device)


class StraightThrough(nn.Module):
    """Compute `inner(x)` with the gradient of the identity (Bengio et al. 2013; as an attack: BPDA, Athalye 2018)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        inner: Tensor = self.inner(x)
        return x + (inner - x).detach()


class Ripple(Described):
    """Add `amplitude` · sin(2π `frequency` x): invisible, but its slope drowns that of everything behind it.

    The gradient is exact, and of random sign from one point to the next: shattered (Athalye et al. 2018, Sec. 3).
    """

    def __init__(self, amplitude: float, frequency: float) -> None:
        super().__init__()
        self.amplitude, self.frequency = amplitude, frequency

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape, up to `amplitude` outside [0, 1]."""
        return x + self.amplitude * torch.sin(2 * math.pi * self.frequency * x)


class InputNoise(Described):
    """Add fresh Gaussian noise of standard deviation `sigma` to every image on every call."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        return x + self.sigma * torch.randn_like(x)


class RandomResizePad(Described):
    """Shrink to a random size and pad with zeros at a random place (Xie et al. 2018), once per call.

    Theirs enlarges; a small network takes one size only, so the image shrinks to at least `smallest` pixels a side.
    """

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest = smallest

    def forward(self, x: Tensor) -> Tensor:
        """Map square images [N, C, H, H] to the same shape."""
        whole = x.shape[-1]
        side = int(torch.randint(self.smallest, whole + 1, ()))
        small = x if side == whole else F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
        top, left = torch.randint(0, whole - side + 1, (2,)).tolist()
        return F.pad(small, (left, whole - side - left, top, whole - side - top))
