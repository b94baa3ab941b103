"""A linear classifier of two classes against an exact adversary, and what it uses of the pixels. Imports no torch.

For a linear classifier the worst image of an Linf ball inside the box [0, 1] is known: every pixel moves by eps against
the sign of its weight, and stops at the box. So training and judging need no attack (Tsipras et al. 2019, Figure 5).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from robbench.linear.theory import Values

__all__ = ["compute_correlations", "compute_margins", "share_of_weak_pixels", "train_linear"]

_BETAS = (0.9, 0.999)  # of Adam
_RATE = 0.05  # largest learning rate of Adam


def compute_correlations(x: Values, y: Values) -> Values:
    """Return the Pearson correlation of each pixel with the label: [n, d], [n] of -1 and 1 -> [d].

    It is 0 for a pixel that is the same in all images.
    """
    x, y = x - x.mean(0), y - y.mean()
    scale = np.sqrt((x * x).sum(0) * (y * y).sum())
    found: Values = np.divide(y @ x, scale, out=np.zeros(x.shape[1]), where=scale > 1e-12)
    return found


def compute_margins(x: Values, y: Values, weights: Values, bias: float, eps: float) -> Values:
    """Return the least margin y (w·x' + b) over all x' of the Linf ball around each image in the box [0, 1], [n].

    An image is classified correctly under every perturbation if and only if its margin is above 0.

    Args:
        x: images in [0, 1], [n, d].
        y: labels -1 and 1, [n].
        weights: w, [d].
        bias: b.
        eps: radius; 0 leaves the images as they are.
    """
    margins: Values = y * (_find_worst(x, y, weights, eps) @ weights + bias)
    return margins


def _find_worst(x: Values, y: Values, weights: Values, eps: float) -> Values:
    worst: Values = np.clip(x - eps * y[:, None] * np.sign(weights), 0, 1) if eps else x
    return worst


def train_linear(x: Values, y: Values, eps: float, iterations: int) -> tuple[Values, float]:
    """Train a linear classifier on the logistic loss of the worst images, by Adam on all images from weights of 0.

    The gradient at the worst images is that of the worst loss (Danskin's theorem). The learning rate falls to 0 along
    half a cosine.

    Args:
        x: images in [0, 1], [n, d].
        y: labels -1 and 1, [n].
        eps: Linf radius; 0 trains on the images as they are.
        iterations: number of updates.

    Returns:
        The weights [d] and the bias.
    """
    n, d = x.shape
    values, mean, square = np.zeros(d + 1), np.zeros(d + 1), np.zeros(d + 1)
    for t in range(1, iterations + 1):
        worst = _find_worst(x, y, values[:d], eps)
        slope = -y / (1 + np.exp(np.clip(y * (worst @ values[:d] + values[d]), -500, 500))) / n
        gradient = np.append(slope @ worst, slope.sum())
        mean = _BETAS[0] * mean + (1 - _BETAS[0]) * gradient
        square = _BETAS[1] * square + (1 - _BETAS[1]) * gradient**2
        rate = _RATE * 0.5 * (1 + math.cos(math.pi * (t - 1) / iterations))
        corrected = square / (1 - _BETAS[1] ** t)
        values = values - rate * mean / (1 - _BETAS[0] ** t) / (np.sqrt(corrected) + 1e-8)
    return values[:d], float(values[d])


def share_of_weak_pixels(weights: Values, weak: NDArray[np.bool_]) -> float:
    """Return the share of the sum of |w| that lies on the weak pixels [d]. 0 if all weights are 0."""
    total = float(np.abs(weights).sum())
    return float(np.abs(weights[weak]).sum()) / total if total else 0.0
