"""What a model's logits and their gradients at an image predict: Eq. 2-4 of Shafahi et al. 2019. Imports no torch.

To first order, moving x by δ with ‖δ‖_∞ = ε closes the gap between the logit of the true class y and that of another
class ȳ once ε exceeds

    L(ȳ) = (z_y − z_ȳ) / ‖∇z_y − ∇z_ȳ‖_1                                                            (Eq. 4)

The image changes its class at the smallest of these, so L without a class is the minimum over ȳ ≠ y. The approximation
knows neither curvature nor the box [0, 1]: clipping at 0 and 1 takes something from a real attack, curvature may give
or take.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["QUANTITIES", "Linearization", "Per"]

Per = NDArray[np.float64]
"""A number per image, [n], or per image and class, [n, K]."""

QUANTITIES = ("logit_gap", "gradient_gap", "radius", "cosine")
"""What Eq. 4 is made of, per image and wrong class."""


@dataclass(frozen=True, eq=False)
class Linearization:
    """A classifier around n images, to first order; gradients are with respect to x in [0, 1] pixel units.

    Attributes:
        sample: official index of each image, [n] int64.
        label: true class y, [n] int64.
        logits: z, [n, K].
        gradient: ‖∇z_k‖_1, [n, K].
        gradient_gap: ‖∇z_y − ∇z_k‖_1, [n, K]; 0 at k = y.
        cosine: of the angle between ∇z_y and ∇z_k, [n, K]; NaN where one of them is zero.
    """

    sample: NDArray[np.int64]
    label: NDArray[np.int64]
    logits: Per
    gradient: Per
    gradient_gap: Per
    cosine: Per

    def __len__(self) -> int:
        """Count the images."""
        return len(self.sample)

    @property
    def wrong(self) -> NDArray[np.bool_]:
        """Tell which classes are not the true one, [n, K]."""
        return np.asarray(np.arange(self.logits.shape[1]) != self.label[:, None])

    @property
    def logit_gap(self) -> Per:
        """z_y − z_k, [n, K]: negative where another class is ahead."""
        return np.take_along_axis(self.logits, self.label[:, None], 1) - self.logits

    @property
    def radius(self) -> Per:
        """L(k) of Eq. 4, [n, K], in pixel units; NaN at k = y.

        Negative where class k is ahead already. Infinite where the two gradients are equal: to first order, no
        perturbation changes the order of these classes.
        """
        gap = self.logit_gap
        with np.errstate(divide="ignore", invalid="ignore"):
            radius = gap / self.gradient_gap
        radius[(self.gradient_gap == 0) & (gap == 0)] = 0.0
        radius[~self.wrong] = np.nan
        return radius

    @property
    def nearest(self) -> NDArray[np.int64]:
        """The class ȳ ≠ y of the smallest L(ȳ), [n]; the lower of two equal ones. NaN counts as nearest."""
        radius = self.radius
        radius[np.isnan(radius)] = -np.inf
        radius[~self.wrong] = np.inf
        # Where every radius is infinite, the first wrong class stands for all of them.
        first = np.argmax(self.wrong, axis=1)
        found: NDArray[np.int64] = np.where(np.isposinf(radius.min(1)), first, radius.argmin(1)).astype(np.int64)
        return found

    def at_nearest(self, quantity: str) -> Per:
        """Return a quantity at the class that is nearest by Eq. 4, [n]; `radius` there is the L of the image.

        Args:
            quantity: one of `QUANTITIES`.
        """
        values: Per = np.take_along_axis(getattr(self, quantity), self.nearest[:, None], 1)[:, 0]
        return values

    def of_pairs(self, quantity: str) -> Per:
        """Return a quantity for every image and wrong class, image by image, [n · (K − 1)].

        Args:
            quantity: one of `QUANTITIES`.
        """
        values: Per = getattr(self, quantity)[self.wrong]
        return values

    def standing(self, eps: float) -> NDArray[np.bool_]:
        """Tell which images Eq. 4 predicts to withstand a radius, [n]: L > eps. Misclassified ones never do.

        Args:
            eps: Linf radius in [0, 1] pixel units.
        """
        return np.asarray(self.at_nearest("radius") > eps)
