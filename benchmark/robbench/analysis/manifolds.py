"""Mean-field manifold analysis (MFTMA): Seguin et al. 2021, App. A.4; Chung et al. 2018; Cohen et al. 2020. No torch.

A manifold is a cloud of points: here one image and its perturbations, as a layer represents them. Capacity is how many
manifolds per feature a linear classifier can label at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import qr
from scipy.optimize import linprog, nnls

from robbench.linear.theory import Values

__all__ = ["Geometry", "analyze_manifolds", "find_anchor", "measure_manifold", "simulate_capacity"]


@dataclass(frozen=True)
class Geometry:
    """The geometry of P manifolds.

    Attributes:
        capacity: α of each manifold, [P]. The capacity of all is 1 / mean(1 / α).
        radius: R_M of each manifold, as a share of the length of its centre, [P].
        dimension: D_M of each manifold, [P].
        correlation: mean |cosine| between the centres, after the mean of all centres was subtracted.
        removed: number of common directions of the centres that were projected out.
    """

    capacity: Values
    radius: Values
    dimension: Values
    correlation: float
    removed: int

    @property
    def mean_capacity(self) -> float:
        """The capacity of all manifolds together."""
        return float(1 / np.mean(1 / self.capacity))


def analyze_manifolds(points: Sequence[Values], draws: int = 200, margin: float = 0.0, seed: int = 0) -> Geometry:
    """Measure the geometry of manifolds.

    Args:
        points: one array per manifold, [M, N]: M points with N features. Two or more manifolds.
        draws: random directions per manifold.
        margin: the margin κ of the linear classifier.
        seed: of the random directions.

    Raises:
        ValueError: fewer than two manifolds, or the centres of all manifolds are equal.
    """
    if len(points) < 2:
        raise ValueError(f"{len(points)} manifolds given; expected two or more")
    origin = np.mean([p.mean(0) for p in points], axis=0)
    centres = np.stack([p.mean(0) - origin for p in points])
    if not np.linalg.norm(centres, axis=1).all():
        raise ValueError("the centre of a manifold is the mean of all centres; expected different centres")
    common = _find_common_directions(centres)
    random = np.random.default_rng(seed)
    rows = []
    for cloud in points:
        moved = cloud - origin
        moved = moved - (moved @ common.T) @ common
        centre = moved.mean(0)
        shape = (moved - centre) / np.linalg.norm(centre)
        if shape.shape[1] > shape.shape[0]:  # only the span of the points matters
            shape = qr(shape.T, mode="r", check_finite=False)[0][: shape.shape[0]].T
        t = random.standard_normal((draws, shape.shape[1] + 1))
        rows.append(measure_manifold(shape, t, margin))
    capacity, radius, dimension = np.array(rows).T
    return Geometry(capacity, radius, dimension, _mean_cosine(centres), len(common))


def _mean_cosine(centres: Values) -> float:
    unit = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    cosine = np.abs(unit @ unit.T)[~np.eye(len(unit), dtype=bool)]
    return float(cosine.mean())


def _find_common_directions(centres: Values) -> Values:
    """Return the directions [k, N] whose removal makes the mean |cosine| between the centres [P, N] least.

    The candidates are the first k principal directions of the centres. Cohen et al. 2020 search all directions; for
    unrelated centres both remove next to nothing.
    """
    unit = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    directions = np.linalg.svd(unit, full_matrices=False)[2]
    best, least = 0, _mean_cosine(centres)
    for k in range(1, len(centres) // 2 + 1):
        rest = centres - (centres @ directions[:k].T) @ directions[:k]
        if (np.linalg.norm(rest, axis=1) < 1e-9 * np.linalg.norm(centres, axis=1)).any():
            break
        if (value := _mean_cosine(rest)) < least:
            best, least = k, value
    return np.asarray(directions[:best])


def find_anchor(points: Values, t: Values, margin: float = 0.0) -> tuple[Values, float]:
    """Return the anchor point s̃ [D + 1] of a manifold for a random direction, and ‖v − t‖² of the nearest v.

    v is the vector nearest to t with v·s ≤ −κ for every point s. By duality, t + κ e − v is the nearest vector to
    t + κ e in the cone of the points, which is a least-squares problem with coefficients ≥ 0. e is the direction of the
    centre.

    Args:
        points: points relative to their centre, as shares of its length, with a last coordinate 1, [M, D + 1].
        t: a random direction, [D + 1].
        margin: κ.
    """
    target = t.copy()
    target[-1] += margin
    weights, _ = nnls(points.T, target)
    if weights.sum() < 1e-10:  # t has the margin already; the anchor is the point that comes nearest to the margin
        anchor: Values = points[np.argmax(points @ t)]
        return anchor, 0.0
    moved = weights @ points
    return moved / weights.sum(), float(moved @ moved)


def measure_manifold(shape: Values, t: Values, margin: float = 0.0) -> tuple[float, float, float]:
    """Return capacity, radius and dimension of one manifold.

    Args:
        shape: points relative to their centre, as shares of the length of the centre, [M, D].
        t: random directions, [draws, D + 1], normally distributed. The last coordinate is along the centre.
        margin: κ.
    """
    points = np.hstack([shape, np.ones((len(shape), 1))])
    anchors, costs = zip(*(find_anchor(points, row, margin) for row in t), strict=True)
    s = np.array(anchors)[:, :-1]
    length = np.linalg.norm(s, axis=1)
    along = np.divide((t[:, :-1] * s).sum(1), length, out=np.zeros(len(s)), where=length > 0)
    mean = float(np.mean(costs))
    return 1 / mean if mean > 0 else float("inf"), float(np.sqrt((length**2).mean())), float((along**2).mean())


def simulate_capacity(points: Sequence[Values], trials: int = 50, seed: int = 0) -> float:
    """Return P over the number of random features at which half of the random labels can be separated linearly.

    The number of features is doubled until it is enough, and then bisected. Every trial projects the points at random
    and labels the manifolds at random; a linear program decides. NaN if all features together separate fewer than half
    of the labels.

    Args:
        points: one array per manifold, [M, N].
        trials: per number of features.
        seed: of projections and labels.
    """
    random = np.random.default_rng(seed)
    everything = np.concatenate(points)
    everything = everything - everything.mean(0)
    sizes = [len(p) for p in points]

    def separates_half(features: int) -> bool:
        yes = 0
        for done in range(trials):
            yes += _is_separable(everything, sizes, features, random)
            if 2 * yes >= trials or 2 * (yes + trials - done - 1) < trials:  # the other trials change nothing
                break
        return 2 * yes >= trials

    low, high, most = 0, 1, int(everything.shape[1])
    while not separates_half(high):  # a linear program of few features is fast
        if high == most:
            return float("nan")
        low, high = high, min(2 * high, most)
    while high - low > 1:
        features = (low + high) // 2
        low, high = (low, features) if separates_half(features) else (features, high)
    return len(points) / high


def _is_separable(points: Values, sizes: Sequence[int], features: int, random: np.random.Generator) -> bool:
    projection = random.standard_normal((points.shape[1], features))
    sign = np.repeat(random.choice([-1.0, 1.0], len(sizes)), sizes)
    rows = -sign[:, None] * (points @ projection)
    return bool(linprog(np.zeros(features), rows, -np.ones(len(rows)), bounds=(None, None)).status == 0)
