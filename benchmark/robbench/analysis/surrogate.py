"""The analytic model of logits of Seguin et al. 2021, Appendix C. Imports no torch.

The model fixes the largest logit of an image, β, and asks which values of the K − 1 others make the cross-entropy
stationary. The others are f for a correctly classified image. For a misclassified one they are g at the true class and
ψ at the K − 2 others.

Three things do not hold in the text of the paper, and the tests of this module show each:

* The cross-entropy itself is stationary nowhere: it falls when f falls, and when ψ falls. Only its expansion to third
  order, Eq. 3, has stationary points.
* The f of Eq. 4 and the g and ψ of Eq. 5, as printed, are no stationary points of Eq. 3. `solve_correct` and
  `solve_wrong` give these points; `printed_correct` and `printed_wrong` give what the paper prints.
* Eq. 10 has (β − g)(g − ψ) where Eq. 9 gives (β − ψ)(g − ψ).
"""

from __future__ import annotations

import numpy as np
from numpy.polynomial import Polynomial

from robbench.linear.theory import Values

__all__ = [
    "change_gap",
    "change_gap_of_groups",
    "change_logits",
    "cross_entropy",
    "expand_cross_entropy",
    "find_least_beta",
    "make_logits",
    "printed_correct",
    "printed_wrong",
    "solve_correct",
    "solve_wrong",
]


def make_logits(beta: float, others: float, true: float | None, classes: int) -> Values:
    """Return surrogate logits [K]: β at class 0, `true` at class 1, `others` elsewhere.

    Args:
        beta: the largest logit.
        others: f, or ψ.
        true: g, the logit of the true class 1 of a misclassified image; None if class 0 is the true class.
        classes: number of classes, K.
    """
    z = np.full(classes, others)
    z[0] = beta
    if true is not None:
        z[1] = true
    return z


def cross_entropy(z: Values, label: int) -> float:
    """Return the cross-entropy of logits [K]."""
    top = z.max()
    return float(top + np.log(np.exp(z - top).sum()) - z[label])


def expand_cross_entropy(beta: float, v: Values, label: int) -> float:
    """Return Eq. 3: the cross-entropy of β at class 0 plus v, expanded to third order around v = 0.

    Args:
        beta: the largest logit.
        v: the other logits, [K]; v[0] = 0.
        label: the true class.
    """
    at = make_logits(beta, 0.0, None, len(v))
    h = np.exp(at - at.max())
    h /= h.sum()
    mean = h @ v
    second = h @ v**2 - mean**2  # v·Qv, and with v ⊙ v for the first v: (h·v³ − mean · h·v²)
    third = h @ v**3 - mean * (h @ v**2) - 2 * mean * second
    return float(cross_entropy(at, label) + mean - (v[label] if label else 0.0) + second / 2 + third / 6)


def solve_correct(beta: float, classes: int) -> list[float]:
    """Return every f at which Eq. 3 is stationary for a correctly classified image, ascending. Often there is none.

    They exist only for β ≤ ln 2(K − 1).
    """
    w = (classes - 1) * np.exp(-beta)
    return _real_roots(Polynomial([1.0, 1 / (1 + w), (1 - w) / (1 + w) ** 2 / 2]))


def solve_wrong(beta: float, classes: int) -> list[tuple[float, float]]:
    """Return every (g, ψ) at which Eq. 3 is stationary for a misclassified image, by ascending g − ψ."""
    p = 1 / (np.exp(beta) + classes - 1)  # softmax probability of each other class at v = 0
    rest = (classes - 1) * p
    # With d = g − ψ, the difference of both derivatives gives ψ d = n(d); the derivative by ψ is then quartic in d.
    d = Polynomial([0.0, 1.0])
    n = Polynomial([1 / p, -1.0, p - 0.5]) / (1 - rest)
    mean = p * d**2 + rest * n  # d · h·v
    square = p * (d**4 + 2 * d**2 * n + (classes - 1) * n**2)  # d² · h·v²
    derivative = d**2 + d * n - d * mean + (n**2 - square) / 2 - mean * n + mean**2
    solutions = []
    for gap in _real_roots(derivative):
        psi = float(n(gap) / gap)
        solutions.append((gap + psi, psi))
    return solutions


def _real_roots(polynomial: Polynomial) -> list[float]:
    roots = [complex(r) for r in polynomial.roots()]
    return sorted(r.real for r in roots if abs(r.imag) < 1e-9 * (1 + abs(r)))


def printed_correct(beta: float, classes: int) -> tuple[float, float]:
    """Return (f₊, f₋) as Eq. 4 is printed; NaN at the pole β = ln(K − 1) and where the root is not real."""
    with np.errstate(divide="ignore", invalid="ignore"):
        e = np.exp(-np.float64(beta))
        w = (classes - 1) * e
        ratio, root = (1 + w) / (1 - w), np.sqrt(1 + 2 * e**2 * (1 - w) / (1 + w) ** 2)
        return float(ratio * (root - 1)), float(ratio * (-root - 1))


def printed_wrong(beta: float, classes: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return ((g₊, ψ₊), (g₋, ψ₋)) as Eq. 5 is printed; NaN at its poles and where the root is not real."""
    with np.errstate(divide="ignore", invalid="ignore"):
        e = np.exp(-np.float64(beta))
        w, c = (classes - 1) * e, 1 - (classes - 3) * e
        kappa = (1 + w) / c * np.sqrt(1 + 2 * (1 - w) * c / (1 + w))
        pairs = []
        for sign in (1, -1):
            g = -c / (1 - w) * (1 + sign * kappa)
            pairs.append((float(g), float(2 * (e / (1 - w) * g - (1 + w) / c))))
        return pairs[0], pairs[1]


def find_least_beta(classes: int) -> float:
    """Return the β above which the printed solution (g₋, ψ₋) stays below β. The paper reads 3.5 off its Figure C.1.

    Below it, down to the pole at ln(K − 1), g₋ is above β.
    """
    pole = np.log(classes - 1)
    from scipy.optimize import brentq  # takes a second, which commands that draw nothing do not wait for

    return float(brentq(lambda beta: printed_wrong(beta, classes)[1][0] - beta, pole + 1e-6, pole + 20))


def change_logits(z: Values, omega: Values, label: int) -> Values:
    """Return Eq. 8: the first-order change of the logits [K] of an image of this class under FGSM.

    Args:
        z: logits of the training images, [N, K].
        omega: the weight of each training image times ε, [N], not negative.
        label: true class of the attacked image.
    """
    k = z.shape[1]
    toward = z.sum(1) - k * z[:, label]
    change: Values = (omega * toward) @ z
    return change


def change_gap(z: Values, omega: Values) -> float:
    """Return Eq. 9: the change of the gap between the true logit and the mean of the others, the mean over all classes.

    Args:
        z: logits of the training images, [N, K].
        omega: as for `change_logits`.
    """
    k = z.shape[1]
    return float((omega * (z.sum(1) ** 2 - k * (z**2).sum(1))).sum() / (k - 1))


def change_gap_of_groups(
    right: tuple[float, float], wrong: tuple[float, float, float], error: float, omega: float, classes: int
) -> float:
    """Return Eq. 9 where all correct images have the logits (β, f), and all misclassified ones (β, g, ψ).

    The paper's Eq. 10 prints β − g for the last β − ψ.

    Args:
        right: (β, f).
        wrong: (β, g, ψ).
        error: share of misclassified images.
        omega: ε Σ Ω of each group over its share of the images.
        classes: number of classes, K.
    """
    (beta, f), (top, g, psi) = right, wrong
    cross = 2 * (classes - 2) / (classes - 1) * (top - psi) * (g - psi)
    return -omega * ((1 - error) * (beta - f) ** 2 + error * ((top - g) ** 2 + cross))
