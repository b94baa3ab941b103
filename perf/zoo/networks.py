"""Modules that change a network: its gradient, its activations, its logits, or the choice of the network.

Names and attributes of these classes are part of the identity of results. Do not rename them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robbench.core.errors import ModelError
from zoo.images import Described

__all__ = [
    "Decoy",
    "DetachedMember",
    "Dropout",
    "EveryOtherColumn",
    "KWinners",
    "KillGradient",
    "LogProbabilities",
    "MeanOf",
    "NoisyGradient",
    "Probabilities",
    "RandomMember",
    "ReverseGradient",
    "RoundedReLU",
    "Scale",
    "Shift",
    "SomeImages",
    "replace_activations",
]


class _GradientTimes(torch.autograd.Function):
    """Returns x, and multiplies the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class KillGradient(nn.Module):
    """Returns x with a gradient of zero (fra31/auto-attack, issue 43)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        out: Tensor = _GradientTimes.apply(x, 0.0)
        return out


class ReverseGradient(nn.Module):
    """Returns x with the sign of the gradient reversed. Every step of an attack then lowers the loss."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        out: Tensor = _GradientTimes.apply(x, -1.0)
        return out


class _NoisyGradient(torch.autograd.Function):
    """Returns x, and adds new noise to the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        scale = ctx.share * grad.square().flatten(1).mean(1).sqrt()
        return grad + scale.view(-1, 1, 1, 1) * torch.randn_like(grad), None


class NoisyGradient(Described):
    """Returns x. Adds Gaussian noise to the gradient, `share` times as large as the gradient. The answer has none."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Return x, [N, C, H, W]."""
        out: Tensor = _NoisyGradient.apply(x, self.share)
        return out


class EveryOtherColumn(nn.Module):
    """Returns x. Every other column of pixels has a gradient of zero."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x, [N, C, H, W]."""
        kept = torch.arange(x.shape[3], device=x.device) % 2 == 0
        return torch.where(kept, x, x.detach())


class SomeImages(Described):
    """Returns x. A share of all images, which their pixels choose, has a gradient of zero."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Return x, [N, C, H, W]."""
        cut = (97 * x.detach().flatten(1).sum(1)) % 1 < self.share
        return torch.where(cut.view(-1, 1, 1, 1), x.detach(), x)


class RoundedReLU(Described):
    """Rounds ReLU to multiples of `step`, as in a quantized network. The gradient is zero everywhere."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step

    def forward(self, h: Tensor) -> Tensor:
        """Map activations of any shape."""
        return torch.round(F.relu(h) / self.step) * self.step


class KWinners(Described):
    """Keeps the largest activations of each image, a share `keep` of a layer, and sets the rest to zero.

    This is k-winners-take-all (Xiao et al. 2020). The set of kept activations changes often along a path. The function
    therefore jumps, and its gradient does not predict the next point.
    """

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, h: Tensor) -> Tensor:
        """Map activations [N, ...] to the same shape."""
        flat = h.flatten(1)
        k = max(1, round(self.keep * flat.shape[1]))
        least = flat.topk(k, dim=1).values[:, -1:]
        return (flat * (flat >= least)).view_as(h)


class Dropout(Described):
    """ReLU with dropout that is active in eval mode too (Feinman et al. 2017). Each call drops other activations."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, h: Tensor) -> Tensor:
        """Map activations of any shape."""
        return F.dropout(F.relu(h), self.p, training=True)


def replace_activations(network: nn.Module, activation: Callable[[], nn.Module]) -> nn.Module:
    """Return a copy of a network with another activation in place of every ReLU.

    Raises:
        ModelError: the network has no `nn.ReLU`.
    """
    changed = copy.deepcopy(network)
    found = [(part, name) for part in changed.modules() for name, child in part.named_children() if _is_relu(child)]
    if not found:
        raise ModelError(f"{type(network).__name__} holds no nn.ReLU; expected: a network whose ReLUs are modules.")
    for part, name in found:
        setattr(part, name, activation())
    return changed


def _is_relu(module: nn.Module) -> bool:
    return isinstance(module, nn.ReLU)


class Scale(Described):
    """Multiplies logits by `factor`, which changes no prediction.

    Large factors saturate the softmax. In float32, the gradient of the plain cross-entropy is exactly zero if the
    margin exceeds about 104. Defensive distillation has the same effect (Papernot et al. 2016; Carlini & Wagner 2016).
    The rescaled cross-entropy and the margin do not depend on the factor.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor) -> Tensor:
        """Map [N, K] to the same shape."""
        return logits * self.factor


class Shift(Described):
    """Adds `offset` to all logits, which changes no prediction and no loss."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, logits: Tensor) -> Tensor:
        """Map [N, K] to the same shape."""
        return logits + self.offset


class Probabilities(nn.Module):
    """Returns probabilities. The attack then applies the softmax twice (fra31/auto-attack, flags_doc.md)."""

    def forward(self, logits: Tensor) -> Tensor:
        """Map [N, K] to the same shape."""
        return logits.softmax(1)


class LogProbabilities(nn.Module):
    """Returns log-probabilities. Their softmax equals that of the logits, so nothing is hidden."""

    def forward(self, logits: Tensor) -> Tensor:
        """Map [N, K] to the same shape."""
        return logits.log_softmax(1)


class Decoy(nn.Module):
    """Returns the logits of one network with the gradient of another."""

    def __init__(self, answers: nn.Module, gradients: nn.Module) -> None:
        super().__init__()
        self.answers, self.gradients = answers, gradients

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to logits [N, K]."""
        answer: Tensor = self.answers(x).detach()
        decoy: Tensor = self.gradients(x)
        return answer + (decoy - decoy.detach())


class MeanOf(nn.Module):
    """Returns the mean logits of several networks. Such an ensemble hides nothing."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to logits [N, K]."""
        return torch.stack([member(x) for member in self.members]).mean(0)


class DetachedMember(nn.Module):
    """Returns the mean logits of two networks with the gradient of the first alone."""

    def __init__(self, seen: nn.Module, detached: nn.Module) -> None:
        super().__init__()
        self.seen, self.detached = seen, detached

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to logits [N, K]."""
        logits: Tensor = (self.seen(x) + self.detached(x).detach()) / 2
        return logits


class RandomMember(nn.Module):
    """Returns for every image the logits of one of several networks, drawn at random on each call."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to logits [N, K]."""
        answers = torch.stack([member(x) for member in self.members])
        chosen = torch.randint(len(self.members), (len(x),), device=x.device)
        logits: Tensor = answers[chosen, torch.arange(len(x), device=x.device)]
        return logits
