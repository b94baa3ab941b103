"""Models that hide their gradients by construction, for the tests of the checks that notice it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    """Logits times a constant: the cross-entropy saturates."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.factor


class Quantized(nn.Module):
    """The image on few levels; the gradient passes straight through, or not at all."""

    def __init__(self, inner: nn.Module, levels: int, straight: bool) -> None:
        super().__init__()
        self.inner, self.levels, self.straight = inner, levels, straight

    def forward(self, x: Tensor) -> Tensor:
        q = (x * (self.levels - 1)).round() / (self.levels - 1)
        return self.inner(x + (q - x).detach() if self.straight else q)


class Noisy(nn.Module):
    """Noise on the image at every answer."""

    def __init__(self, inner: nn.Module, sigma: float) -> None:
        super().__init__()
        self.inner, self.sigma = inner, sigma

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.sigma * torch.randn_like(x))


class Softmax(nn.Module):
    """Probabilities instead of logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).softmax(1)


class NoisyGradient(nn.Module):
    """The right answer; the gradient has new noise wherever `where` holds (images [N, C, H, W] -> [N] bool)."""

    def __init__(self, inner: nn.Module, where: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.where = inner, where

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x) * self.where(x.detach()).view(-1, 1, 1, 1)
        return self.inner(x + noise * (x - x.detach()))  # the gradient of every pixel times 1 + noise


class Cut(nn.Module):
    """The right answer; no gradient where `where` holds (images [N, C, H, W] -> bool of the same shape)."""

    def __init__(self, inner: nn.Module, where: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.where = inner, where

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.where(self.where(x.detach()), x.detach(), x))


class NoisyWhere(nn.Module):
    """Noise on the image at every answer wherever `where` holds (images [N, C, H, W] -> [N] bool)."""

    def __init__(self, inner: nn.Module, sigma: float, where: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.sigma, self.where = inner, sigma, where

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.sigma * torch.randn_like(x) * self.where(x.detach()).view(-1, 1, 1, 1))


class KWTA(nn.Module):
    """k winners take all (Xiao et al. 2020): only the largest activations pass."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(max(int(self.share * flat.shape[1]), 1), dim=1).values[:, -1:]
        return (flat * (flat >= least)).view_as(x)


class NoGradient(nn.Module):
    """Answers without a path back to the image."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inner(x)


class Inside(nn.Module):
    """Calls autograd while it answers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x.detach().requires_grad_(True)
            torch.autograd.grad(self.inner(at).sum(), at)
        return self.inner(x)


class Reversed(nn.Module):
    """The right answer with the gradient's sign turned wherever `where` holds (images [N, C, H, W] -> [N] bool)."""

    def __init__(self, inner: nn.Module, where: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.where = inner, where

    def forward(self, x: Tensor) -> Tensor:
        turned = self.where(x.detach()).view(-1, 1, 1, 1)
        return self.inner(torch.where(turned, 2 * x.detach() - x, x))


class OneRow(nn.Module):
    """The gradient of one row of pixels alone, the one that is closest to gray: an attack needs many steps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[2]
        chosen = (x.detach() - 0.5).abs().mean((1, 3)).argmin(1)
        mask = torch.arange(rows).view(1, 1, -1, 1) == chosen.view(-1, 1, 1, 1)
        return self.inner(torch.where(mask, x, x.detach()))


class Rippled(nn.Module):
    """Pixels with a ripple on them, too small to matter and too steep for gradients to mean anything."""

    def __init__(self, inner: nn.Module, height: float, length: float) -> None:
        super().__init__()
        self.inner, self.height, self.length = inner, height, length

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.height * torch.sin(x * (2 * torch.pi / self.length)))


class Periodic(nn.Module):
    """Two classes that alternate along a direction, so that a step too long lands in the right one again."""

    def __init__(self, w: Tensor, b: float, period: float) -> None:
        super().__init__()
        self.w, self.b, self.period = nn.Parameter(w.flatten()), b, period

    def forward(self, x: Tensor) -> Tensor:
        s = torch.cos((x.flatten(1) @ self.w + self.b) * (2 * torch.pi / self.period))
        return torch.stack([s, -s], dim=1)
