"""The measurements of a model in sanity.json. The checks read them. Imports no torch.

"The usual PGD" is the first attack of the suite `sanity`: PGD on the rescaled cross-entropy with 20 steps of eps/4 and
one start. "The control" is the same attack with another random start. Records up to probe version 2 (`PROBE_VERSION` in
`record`) have the plain cross-entropy instead, and None where a later version measures more.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from robbench.results.schema import Accuracy, Name, StrictModel

__all__ = [
    "Binarization",
    "Challenge",
    "Cost",
    "GradientQuality",
    "LinearEstimate",
    "LogitScale",
    "LossTraces",
    "Measurements",
    "RadiusCurve",
    "Randomness",
    "Role",
    "StepGrid",
    "Transferred",
]

Role = Literal[
    "control", "single step", "noise", "more steps", "other loss", "other steps", "hunt", "transfer", "square"
]
"""In what an attack of the suite differs from the usual PGD."""


class Challenge(StrictModel):
    """Counts of images for one attack on the images that the usual PGD did not break."""

    name: Name
    role: Role
    given: int
    """Images that the attack got."""
    broken: int
    """Images that the attack broke."""
    beyond: int
    """Images that the attack broke and the control did not."""
    behind: int
    """Images that the control broke and the attack did not."""
    alone: int
    """Images that the attack broke and no attack with the model's gradient did."""


class Transferred(StrictModel):
    """Counts of images for one transfer attack. Its points are computed on a surrogate and tried on the model."""

    name: Name
    images: int
    fooled: int
    """Images whose point the surrogate classifies wrongly."""
    broken: int
    """Images whose point the surrogate and the model classify wrongly."""


class Randomness(StrictModel):
    """Differences between repeated answers to the same images."""

    draws: int
    """Answers per image."""
    images: int
    flips: int
    """Images with more than one prediction."""
    change: float
    """Largest change of the logits, divided by their Euclidean length (both without the mean logit of the image)."""
    points: int | None = None
    """Points within the ball that were queried as often."""
    flips_off: int | None = None
    """Points with more than one prediction."""
    change_off: float | None = None
    """Largest change of the logits at the points, measured as `change`."""


class LogitScale(StrictModel):
    """Size of the logits and of the cross-entropy's gradients at correctly classified clean images."""

    images: int
    unavailable: float
    """Share of images where the gradient of the rescaled cross-entropy does not exist or is exactly zero."""
    underflow: float
    """Share of the other images where no entry of the plain cross-entropy's gradient is above 1e-20."""
    logit_range: float
    """Median over images of the largest minus the smallest logit."""
    log_odds: float
    """Median of the largest logit minus the mean of the others."""
    wrong_spread: float | None
    """Median of the standard deviation of the other logits, divided by the log-odds. None with two classes."""
    confidence: float
    """Mean softmax probability of the predicted class."""


class GradientQuality(StrictModel):
    """The margin's gradient at random points of the ball, compared with finite differences and nearby gradients."""

    images: int
    directions: int
    """Directions of the finite differences, per image."""
    radius: float
    """Radius of the neighbourhood for `nearby`, in the threat's norm."""
    cosine: float | None
    """Median over images of the cosine between slopes and finite differences. None if all of them are zero."""
    nearby: float | None
    """Median cosine between the gradients at a point and at random points within `radius` of it."""
    nonlinearity: float | None
    """Median of |ΔL − δ·∇L| / |ΔL| for random δ on the surface of the threat's ball, capped at 1."""
    flat: int
    """Images whose gradient is exactly zero at the random point."""
    cosine_low: float | None = None
    """As `cosine`, but the fifth percentile over the random points and the end points of the usual PGD together."""
    unrepeatable: float | None = None
    """Share of points where the gradient differs between repeated queries by more than 1 % of its length."""


class LossTraces(StrictModel):
    """Loss curves of the usual PGD and of PGD with twice its steps, both without early stop."""

    images: int
    standing: int
    """Images that the usual PGD broke at no step."""
    silent: int
    """Images that the usual PGD broke at some step, but not at its last point."""
    unfinished: float | None
    """Median over robust images of the share of the loss's rise in the last 10 of twice the steps. None if none is."""
    unstable: float | None
    """Median over images of mean |ΔL| / |L|, capped at 1, over 100 neighbours of the final points."""
    loss: list[float] = Field(fail_fast=True)
    """Median cross-entropy at each step of the usual PGD."""
    loss_low: list[float] = Field(fail_fast=True)
    """First decile of the cross-entropy at each step."""
    loss_high: list[float] = Field(fail_fast=True)
    """Ninth decile of the cross-entropy at each step."""
    longer: list[float] = Field(fail_fast=True)
    """Median cross-entropy at each step of PGD with twice the steps."""
    share: list[float] = Field(fail_fast=True)
    """Share of images that the usual PGD has not broken up to each step."""


class RadiusCurve(StrictModel):
    """The images that the usual PGD breaks at each radius."""

    eps: list[float] = Field(fail_fast=True)
    """The radii, increasing. The last one contains the whole box [0, 1]."""
    broken: list[list[bool]] = Field(fail_fast=True)
    """Whether an image is broken: [radius][image]."""


class StepGrid(StrictModel):
    """PGD on cross-entropy by step size and iterations (Mosbach et al. 2018)."""

    images: int
    sizes: list[float] = Field(fail_fast=True)
    """Step sizes, as shares of eps."""
    iterations: list[int] = Field(fail_fast=True)
    standing: list[list[int]] = Field(fail_fast=True)
    """Number of images that are not broken: [size][iterations]."""
    usual: tuple[int, int]
    """Indices of the cell with the step size and iterations of the usual PGD."""
    beyond: int
    """Images broken in the strongest cell and not in the usual cell."""
    behind: int
    """Images broken in the usual cell and not in the strongest cell."""


class Binarization(StrictModel):
    """The binarization test (Zimmermann et al. 2022)."""

    images: int
    separable: int
    """Images for which a linear readout separates the boundary point from all inner points."""
    attack: int
    """Separable images that the usual PGD or the annealed PGD breaks."""
    random: int
    """Separable images that random sampling breaks."""
    features: int
    """Number of features of the readout."""


class LinearEstimate(StrictModel):
    """The linear estimate of the distance to the boundary (Shafahi et al. 2019, Eq. 4), compared with the usual PGD."""

    images: int
    defined: int
    """Images with a gradient gap other than zero, for which the estimate is defined."""
    radius: float | None
    """Median estimate, in the threat's norm."""
    predicted: int
    """Defined images that the estimate predicts to be robust at eps."""
    standing: int
    """Defined images that the usual PGD did not break."""


class Cost(StrictModel):
    """The cost of one measurement, over all images."""

    forwards: int
    """Forward passes without a backward pass."""
    pairs: int
    """Forward passes with a backward pass."""
    seconds: float
    """Wall time."""


class Measurements(StrictModel):
    """All measurements that the checks read."""

    n: int
    """Test images."""
    correct: int
    """Test images that are classified correctly."""
    classes: int
    pgd: Accuracy
    """Robust accuracy under the usual PGD."""
    best: Accuracy
    """Robust accuracy under all attacks of the suite together."""
    differentiable: bool
    """Whether autograd connects the model's output to its input."""
    autograd_calls: int
    """Calls of autograd inside one forward pass."""
    probabilities: bool
    """Whether the model's outputs are probabilities."""
    zero_gradients: float
    """Share of exactly zero gradients over all steps and images of the usual PGD and the control."""
    nonfinite_gradients: bool = False
    """Whether gradients of the suite held NaN or infinity, though the logits were finite. These entries count as 0."""
    challenges: list[Challenge] = Field(fail_fast=True)
    randomness: Randomness
    scale: LogitScale
    gradients: GradientQuality
    traces: LossTraces
    curve: RadiusCurve
    grid: StepGrid
    binarization: Binarization
    linear: LinearEstimate
    transferred: list[Transferred] = Field(fail_fast=True)
    cost: dict[str, Cost]
    """Name of a measurement -> its cost."""
