"""Attack losses: free functions (logits [L, K], y [L]) -> [L], to be increased by the attack.

The prediction is wrong exactly when `margin` is positive. All of them work for any number of classes ≥ 2.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "LOSSES",
    "TARGETED",
    "cross_entropy",
    "cross_entropy_scaled",
    "cross_entropy_targeted",
    "dlr",
    "dlr_targeted",
    "margin",
    "margin_targeted",
]

_RANGE = 10.0  # between the largest and the smallest logit once they are rescaled


def _true(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]).squeeze(1)


def _best_other(logits: Tensor, y: Tensor) -> Tensor:
    # The lowest finite value rather than −inf, so that a gradient through it stays finite.
    return logits.scatter(1, y[:, None], torch.finfo(logits.dtype).min).amax(1)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy −log softmax(z)_y."""
    return F.cross_entropy(logits, y, reduction="none")


def cross_entropy_scaled(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits stretched or shrunk to a range of 10, the factor counting as constant.

    Where a model squeezes its logits towards each other, the plain cross-entropy is nearly linear in all of them and
    pulls at every class alike; where it blows them up, its gradient underflows to zero. Neither happens at a fixed
    range.
    """
    spread = (logits.amax(1) - logits.amin(1)).detach().clamp(min=torch.finfo(logits.dtype).tiny)
    return cross_entropy(logits / spread[:, None] * _RANGE, y)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Carlini & Wagner margin max_{j≠y} z_j − z_y (Carlini & Wagner 2017, f6 without the confidence clamp)."""
    return _best_other(logits, y) - _true(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference-of-logits ratio (Croce & Hein 2020, Eq. 6): margin / (z_π1 − z_π3).

    Three classes have a third-largest logit and are handled as they are. With two, the ratio is constant and has
    no gradient, so the margin itself is returned.
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def margin_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted margin z_t − z_y (Gowal et al. 2019, the multi-targeted attack)."""
    return _true(logits, target) - _true(logits, y)


def cross_entropy_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted cross-entropy log softmax(z)_t: the target's probability is to rise."""
    return -cross_entropy(logits, target)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted difference-of-logits ratio (Croce & Hein 2020, Eq. 7): (z_t − z_y) / (z_π1 − (z_π3 + z_π4) / 2).

    With three classes z_π4 is taken as z_π3, with two the numerator alone is returned.
    """
    gap = margin_targeted(logits, y, target)
    classes = logits.shape[1]
    if classes < 3:
        return gap
    top = logits.topk(min(4, classes), dim=1).values
    return gap / (top[:, 0] - (top[:, 2] + top[:, -1]) / 2 + 1e-12)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "ce_scaled": cross_entropy_scaled,
    "margin": margin,
    "dlr": dlr,
}
"""Untargeted losses by the name that suites use."""

TARGETED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ce_targeted": cross_entropy_targeted,
    "margin_targeted": margin_targeted,
    "dlr_targeted": dlr_targeted,
}
"""Targeted losses by the name that suites use."""
