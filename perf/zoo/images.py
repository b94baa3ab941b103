"""Modules that change an image before the network: [N, C, H, W] in [0, 1] to the same shape.

Modules that round or compare have no gradient. `StraightThrough(module)` gives them the gradient of the identity.

Names and attributes of these classes are part of the identity of results. Do not rename them.
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
    "NoiseOffGrid",
    "Quantize",
    "RandomResizePad",
    "Ripple",
    "StraightThrough",
    "Thermometer",
]


class Described(nn.Module):
    """A module whose `repr` lists its numbers. The numbers are part of the identity of a result, as weights are."""

    def extra_repr(self) -> str:
        """Return the numbers of the constructor as text."""
        return ", ".join(f"{k}={v}" for k, v in vars(self).items() if type(v) in (int, float))


class Quantize(Described):
    """Rounds pixels to `levels` evenly spaced values in [0, 1]. The gradient of rounding is zero everywhere.

    Reducing the bit depth is one of the transformations of Guo et al. 2018.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        return torch.round(x * (self.levels - 1)) / (self.levels - 1)


class Jpeg(Described):
    """Rounds the cosine coefficients of 8x8 blocks to multiples of a step, as JPEG does. The gradient is zero.

    Dziugaite et al. 2016, Guo et al. 2018. The step rises linearly with the frequency, from `step` at the constant
    term to eight times `step` at the highest frequency. The luminance table in the standard's Annex K has this shape.

    Args:
        step: step of the constant term, in [0, 1] pixel units per coefficient of the orthonormal transform.
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

    A pixel becomes `levels` bits. Bit l says whether the pixel exceeds (l + ½) / levels. The fixed layer averages the
    bits, so that any network can use them. Comparisons leave no autograd graph, so there is no gradient.
    """

    thresholds: Tensor

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.register_buffer("thresholds", (torch.arange(levels) + 0.5) / levels, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        return (x[..., None] > self.thresholds).to(x.dtype).mean(-1)


class MedianFilter(Described):
    """Computes the median of `size` x `size` pixels with numpy (Xu et al. 2018), without an autograd graph."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        smooth = median_filter(x.detach().cpu().numpy(), size=(1, 1, self.size, self.size), mode="nearest")
        return torch.from_numpy(np.ascontiguousarray(smooth)).to(x.device)


class StraightThrough(nn.Module):
    """Computes `inner(x)` with the gradient of the identity (Bengio et al. 2013; BPDA in Athalye et al. 2018)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        inner: Tensor = self.inner(x)
        return x + (inner - x).detach()


class Ripple(Described):
    """Adds `amplitude` · sin(2π `frequency` x). The change is invisible, but its slope dominates the gradient.

    The gradient is exact, but its sign changes at random between close points. It is shattered (Athalye et al. 2018,
    Sec. 3).
    """

    def __init__(self, amplitude: float, frequency: float) -> None:
        super().__init__()
        self.amplitude, self.frequency = amplitude, frequency

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape, up to `amplitude` outside [0, 1]."""
        return x + self.amplitude * torch.sin(2 * math.pi * self.frequency * x)


class InputNoise(Described):
    """Adds new Gaussian noise with standard deviation `sigma` to every image on every call."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        return x + self.sigma * torch.randn_like(x)


class NoiseOffGrid(Described):
    """Adds new Gaussian noise to every image whose pixels are not all multiples of 1 / `levels`.

    The test images have such pixels, so the clean accuracy shows no noise. Attacks meet it.
    """

    def __init__(self, sigma: float, levels: int) -> None:
        super().__init__()
        self.sigma, self.levels = sigma, levels

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        scaled = x.detach() * self.levels
        off = ((scaled - scaled.round()).abs() > 1e-3).flatten(1).any(1)
        return x + self.sigma * torch.randn_like(x) * off.view(-1, 1, 1, 1)


class RandomResizePad(Described):
    """Shrinks to a random size and pads with zeros at a random position (Xie et al. 2018), once per call.

    Xie et al. enlarge the image. A small network accepts one size only, so here the image shrinks to at least
    `smallest` pixels a side.
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
