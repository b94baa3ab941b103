"""Models that hide their gradients by construction, for the tests of the checks that notice it."""

from __future__ import annotations

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


class Misleading(nn.Module):
    """The right answer with the gradient's sign turned, so that climbing the loss descends it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(2 * x.detach() - x)


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
