"""The linear model of robustness: Eq. 2-4 of Shafahi et al. 2019. Imports no torch.

To first order, a perturbation δ of x with ‖δ‖_∞ = ε can close the gap between the logit of the true class y and the
logit of another class ȳ if ε exceeds

    L(ȳ) = (z_y − z_ȳ) / ‖∇z_y − ∇z_ȳ‖_1                                                            (Eq. 4)

The image changes its class at the smallest of these radii. L without a class is therefore the minimum over ȳ ≠ y. The
approximation ignores curvature and the box [0, 1]. Clipping to the box weakens a real attack. Curvature can weaken or
strengthen it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["QUANTITIES", "Linearization", "Values"]

Values = NDArray[np.float64]
"""One number per image, [n], or per image and class, [n, K]."""

QUANTITIES = ("logit_gap", "gradient_gap", "radius", "cosine")
"""The quantities of Eq. 4, per image and wrong class."""


@dataclass(frozen=True, eq=False)
class Linearization:
    """The first-order approximation of a classifier at n images. Gradients are with respect to x in [0, 1] pixel units.

    Attributes:
        sample: official index of each image, [n] int64.
        label: true class y, [n] int64.
        logits: z, [n, K].
        gradient: ‖∇z_k‖_1, [n, K].
        gradient_gap: ‖∇z_y − ∇z_k‖_1, [n, K]; 0 at k = y.
        cosine: cosine of the angle between ∇z_y and ∇z_k, [n, K]; NaN if one of them is zero.
    """

    sample: NDArray[np.int64]
    label: NDArray[np.int64]
    logits: Values
    gradient: Values
    gradient_gap: Values
    cosine: Values

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.sample)

    @property
    def is_wrong_class(self) -> NDArray[np.bool_]:
        """Whether each class is not the true class, [n, K]."""
        return np.asarray(np.arange(self.logits.shape[1]) != self.label[:, None])

    @property
    def logit_gap(self) -> Values:
        """The gap z_y − z_k, [n, K]. It is negative if the logit of class k is larger."""
        return np.take_along_axis(self.logits, self.label[:, None], 1) - self.logits

    @property
    def radius(self) -> Values:
        """The radius L(k) of Eq. 4, [n, K], in [0, 1] pixel units; NaN at k = y.

        It is negative if the logit of class k is larger than that of the true class. It is infinite if the two
        gradients are equal, because then no perturbation changes the logit gap to first order.
        """
        gap = self.logit_gap
        with np.errstate(divide="ignore", invalid="ignore"):
            radius = gap / self.gradient_gap
        radius[(self.gradient_gap == 0) & (gap == 0)] = 0.0
        radius[~self.is_wrong_class] = np.nan
        return radius

    @property
    def nearest(self) -> NDArray[np.int64]:
        """The class ȳ ≠ y with the smallest L(ȳ), [n]. Of equal ones, the lowest class. NaN counts as the smallest."""
        radius = self.radius
        radius[np.isnan(radius)] = -np.inf
        radius[~self.is_wrong_class] = np.inf
        # If every radius is infinite, argmin could return the true class. Take the first wrong class.
        first = np.argmax(self.is_wrong_class, axis=1)
        nearest: NDArray[np.int64] = np.where(np.isposinf(radius.min(1)), first, radius.argmin(1)).astype(np.int64)
        return nearest

    def take_at_nearest(self, quantity: str) -> Values:
        """Return a quantity at the nearest class of each image, [n]. For `radius`, this is the L of the image.

        Args:
            quantity: one of `QUANTITIES`.
        """
        values: Values = np.take_along_axis(getattr(self, quantity), self.nearest[:, None], 1)[:, 0]
        return values

    def take_pairs(self, quantity: str) -> Values:
        """Return a quantity for every pair of an image and a wrong class, image by image, [n · (K − 1)].

        Args:
            quantity: one of `QUANTITIES`.
        """
        values: Values = getattr(self, quantity)[self.is_wrong_class]
        return values

    def predict_robust(self, eps: float) -> NDArray[np.bool_]:
        """Return whether Eq. 4 predicts each image to be robust at a radius (L > eps), [n].

        Misclassified images are never predicted to be robust.

        Args:
            eps: Linf radius in [0, 1] pixel units.
        """
        return np.asarray(self.take_at_nearest("radius") > eps)
