"""Attack losses: functions (logits [L, K], y [L]) -> [L]. An attack increases them.

The prediction is wrong exactly when `margin` is positive. All losses work for K ≥ 2 classes.
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

_RANGE = 10.0  # largest minus smallest logit after rescaling
_LEAST_CLASSES = 4  # with fewer classes, the ratios of logits have no gradient in some places


def _true_logit(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]).squeeze(1)


def _best_other_logit(logits: Tensor, y: Tensor) -> Tensor:
    # The lowest finite value instead of −inf keeps the gradient finite.
    return logits.scatter(1, y[:, None], torch.finfo(logits.dtype).min).amax(1)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy −log softmax(z)_y."""
    return F.cross_entropy(logits, y, reduction="none")


def cross_entropy_scaled(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits that are scaled to a range of 10. The scale factor has no gradient.

    If a model's logits are very close together, the plain cross-entropy is nearly linear in them and pulls at every
    class alike. If the logits are very large, its gradient underflows to zero. A fixed range avoids both. With fewer
    than four classes the margin is returned: a fixed range of two logits leaves a constant, of which a search that
    compares losses sees nothing.
    """
    if logits.shape[1] < _LEAST_CLASSES:
        return margin(logits, y)
    spread = (logits.amax(1) - logits.amin(1)).detach()
    spread = torch.where(spread > 0, spread, 1)  # where all logits are tied, no factor gives them a range
    return cross_entropy(logits / spread[:, None] * _RANGE, y)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Carlini & Wagner margin max_{j≠y} z_j − z_y (Carlini & Wagner 2017, f6 without the confidence clamp)."""
    return _best_other_logit(logits, y) - _true_logit(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference-of-logits ratio (Croce & Hein 2020, Eq. 6): margin / (z_π1 − z_π3).

    With fewer than four classes the margin is returned. With two classes the ratio is constant. With three classes the
    ratio is constant wherever the two other classes are tied.
    """
    if logits.shape[1] < _LEAST_CLASSES:
        return margin(logits, y)
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def margin_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted margin z_t − z_y (Gowal et al. 2019, the multi-targeted attack)."""
    return _true_logit(logits, target) - _true_logit(logits, y)


def cross_entropy_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted cross-entropy log softmax(z)_t. It rises with the target's probability."""
    return -cross_entropy(logits, target)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted difference-of-logits ratio (Croce & Hein 2020, Eq. 7): (z_t − z_y) / (z_π1 − (z_π3 + z_π4) / 2).

    The formula needs four classes, so with fewer classes the targeted margin is returned. With three classes and z_π3
    in place of z_π4, the ratio would be −1 everywhere for the class with the smallest logit.
    """
    gap = margin_targeted(logits, y, target)
    if logits.shape[1] < _LEAST_CLASSES:
        return gap
    top = logits.topk(4, dim=1).values
    return gap / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "ce_scaled": cross_entropy_scaled,
    "margin": margin,
    "dlr": dlr,
}
"""Untargeted losses, by the name in suites."""

TARGETED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ce_targeted": cross_entropy_targeted,
    "margin_targeted": margin_targeted,
    "dlr_targeted": dlr_targeted,
}
"""Targeted losses, by the name in suites."""
