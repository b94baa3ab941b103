"""What Tsipras et al. 2019 look at in loss gradients and large perturbations, as numbers. Imports no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from robbench.analysis.logits import Integers
from robbench.linear.theory import Values

__all__ = ["align", "clip_gradients", "compute_contrasts", "find_nearest", "measure_roughness", "measure_sparsity"]

Levels = NDArray[np.uint8]
_BYTES = 2**28  # of distances in memory at once


def align(gradients: Values, directions: Values) -> Values:
    """Return the cosine between each gradient and its direction, [n, d] and [n, d] -> [n]. No row may be 0."""
    lengths = np.linalg.norm(gradients, axis=1) * np.linalg.norm(directions, axis=1)
    cosines: Values = (gradients * directions).sum(1) / lengths
    return cosines


def compute_contrasts(x: Values, y: Integers, classes: int) -> Values:
    """Return for each class the mean image of the class minus the mean image of the others: [n, d], [n] -> [K, d].

    Every class must have an image.
    """
    return np.stack([x[y == k].mean(0) - x[y != k].mean(0) for k in range(classes)])


def measure_roughness(gradients: Values) -> Values:
    """Return how much neighbouring pixels differ: [n, C, H, W] -> [n].

    It is the mean square of the differences of neighbours (right and below), over twice the mean square of the pixels.
    White noise has 1 in the mean. A constant has 0, and a chessboard of -1 and 1 has 2. No gradient may be 0.
    """
    right, below = np.diff(gradients, axis=3), np.diff(gradients, axis=2)
    axes = (1, 2, 3)
    pairs = (right[0].size + below[0].size) * 2
    roughness: Values = ((right**2).sum(axes) + (below**2).sum(axes)) / pairs / (gradients**2).mean(axes)
    return roughness


def measure_sparsity(gradients: Values) -> Values:
    """Return Hoyer's sparsity (√d − ‖g‖₁/‖g‖₂) / (√d − 1): [n, d] -> [n] (Hoyer 2004).

    It is 1 if one pixel has all of the gradient, and 0 if all pixels have equally much. No gradient may be 0.
    """
    root = np.sqrt(gradients.shape[1])
    ratio = np.abs(gradients).sum(1) / np.linalg.norm(gradients, axis=1)
    sparsity: Values = (root - ratio) / (root - 1)
    return sparsity


def clip_gradients(gradients: Values) -> Levels:
    """Clip each gradient at ±3σ and write it in levels: 127 is 0, 0 is −3σ, 254 is 3σ. [n, ...] -> the same.

    σ is the standard deviation of the pixels of the gradient.
    """
    sigma = gradients.reshape(len(gradients), -1).std(1).reshape(-1, *[1] * (gradients.ndim - 1))
    scaled = np.divide(gradients, 3 * sigma, out=np.zeros_like(gradients), where=sigma > 0)
    levels: Levels = np.rint(127 + 127 * np.clip(scaled, -1, 1)).astype(np.uint8)
    return levels


def find_nearest(x: Values, known: Values) -> tuple[Integers, Values]:
    """Find for each row of x [n, d] the nearest row of `known` [m, d] in L2. Return positions and distances, [n]."""
    squares = (known**2).sum(1)
    at, distance = np.empty(len(x), np.int64), np.empty(len(x))
    step = max(1, _BYTES // (8 * len(known)))
    for start in range(0, len(x), step):
        part = x[start : start + step]
        at[start : start + step] = (squares - 2 * part @ known.T).argmin(1)
    for i, row in enumerate(x):  # exact, where the product above rounds
        distance[i] = np.linalg.norm(row - known[at[i]])
    return at, distance
