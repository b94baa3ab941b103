"""What is measured of a model, as it is stored and as the checks read it. Imports no torch."""

from __future__ import annotations

from typing import Literal

from robbench.results.schema import Accuracy, StrictModel

__all__ = [
    "Binarization",
    "Challenge",
    "Cost",
    "Curve",
    "Gradients",
    "Grid",
    "Linear",
    "Measurements",
    "Randomness",
    "Role",
    "Scale",
    "Traces",
    "Transferred",
]

Role = Literal["control", "single step", "noise", "more steps", "other loss", "other steps", "transfer", "square"]
"""What an attack of the suite differs in from the usual PGD."""


class Challenge(StrictModel):
    """What one attack did with the images that the usual PGD left standing."""

    name: str
    role: Role
    given: int
    """How many images it was given."""
    broken: int
    beyond: int
    """Broken by it and not by the control, which is the usual PGD from another start."""
    behind: int
    """Broken by the control and not by it."""
    alone: int
    """Broken by it and by no attack that climbs the model's gradient."""


class Transferred(StrictModel):
    """Points made on a surrogate, on the surrogate and on the model."""

    name: str
    images: int
    fooled: int
    """Images that the surrogate gets wrong there."""
    broken: int
    """Of these, how many the model gets wrong too."""


class Randomness(StrictModel):
    """Answers to the same images, asked again."""

    draws: int
    images: int
    flips: int
    """Images whose prediction changed."""
    change: float
    """Largest change of the logits, as a share of their length."""


class Scale(StrictModel):
    """Logits and cross-entropy gradients at the clean images that are classified correctly."""

    images: int
    unavailable: float
    """Share of images whose gradient does not exist or is exactly zero everywhere."""
    underflow: float
    """Share whose largest gradient entry is above zero and below 1e-20."""
    logit_range: float
    """Median over images of the largest minus the smallest logit."""
    log_odds: float
    """Median of the largest logit minus the mean of the others."""
    wrong_spread: float | None
    """Median of the standard deviation of the other logits over the log-odds; None with two classes."""
    confidence: float
    """Mean softmax probability of the prediction."""


class Gradients(StrictModel):
    """The margin's gradient at random points of the ball, against finite differences and against its neighbours."""

    images: int
    directions: int
    radius: float
    """Length of a half step of the difference quotients, in the threat's norm."""
    cosine: float | None
    """Median over images; None where both are zero for all."""
    nearby: float | None
    """Median cosine between gradients at a point and at random points within `radius` of it."""
    nonlinearity: float | None
    """Median of |ΔL − δ·∇L| / |ΔL| for random δ of the whole radius of the threat, capped at 1."""
    flat: int
    """Images whose gradient is exactly zero there."""


class Traces(StrictModel):
    """The usual PGD and one of twice its steps, without early stop: loss curves and what they tell."""

    images: int
    standing: int
    """How many of the images it broke at no step."""
    silent: int
    """Images broken on the way whose final point is not adversarial."""
    unfinished: float | None
    """Among images that stand: median share of the loss's whole rise that came in the last 10 of twice the steps."""
    unstable: float | None
    """Median over images of mean |ΔL| / |L|, capped at 1, over 100 neighbours of the final points."""
    loss: list[float]
    """Median cross-entropy at each step of the usual PGD."""
    loss_low: list[float]
    loss_high: list[float]
    """Deciles."""
    longer: list[float]
    """Median cross-entropy at each step with twice the steps."""
    share: list[float]
    """Share of images not broken until each step (the usual PGD)."""


class Curve(StrictModel):
    """The usual PGD at other radii: whether each image is broken."""

    eps: list[float]
    """Increasing; the last is the whole box."""
    broken: list[list[bool]]
    """[radius][image]."""


class Grid(StrictModel):
    """PGD on cross-entropy by step size and iterations (Mosbach et al. 2018)."""

    images: int
    sizes: list[float]
    """As shares of eps."""
    iterations: list[int]
    standing: list[list[int]]
    """[size][iterations]: images not broken."""
    usual: tuple[int, int]
    """Position of the usual cell."""
    beyond: int
    """Images broken in the strongest cell of all and not in the usual one."""
    behind: int


class Binarization(StrictModel):
    """The binarization test (Zimmermann et al. 2022)."""

    images: int
    separable: int
    """For how many a linear readout tells the boundary point from all inner ones."""
    attack: int
    """Of these, how many the usual PGD or the annealed one breaks."""
    random: int
    """How many random sampling breaks."""
    features: int
    """Their number."""


class Linear(StrictModel):
    """The linear estimate of the nearest boundary (Shafahi et al. 2019, Eq. 4) beside what was measured."""

    images: int
    defined: int
    """Images with a gradient gap that is not zero."""
    radius: float | None
    """Median estimate in the threat's norm."""
    predicted: int
    """Of the defined, how many the estimate calls robust at eps."""
    standing: int
    """How many of these images the usual PGD leaves standing."""


class Cost(StrictModel):
    """What the measurements cost, over all images."""

    forwards: int
    """Forward passes alone."""
    pairs: int
    """Forward and backward passes together."""
    seconds: float


class Measurements(StrictModel):
    """Everything that the checks look at."""

    n: int
    correct: int
    classes: int
    pgd: Accuracy
    """What the usual PGD on cross-entropy, one start, leaves standing."""
    best: Accuracy
    """What nothing of the suite broke."""
    differentiable: bool
    autograd_calls: int
    """Calls of autograd inside one forward pass."""
    probabilities: bool
    zero_gradients: float
    """Share of exactly zero gradients over all steps and images of the usual PGD and its control."""
    challenges: list[Challenge]
    randomness: Randomness
    scale: Scale
    gradients: Gradients
    traces: Traces
    curve: Curve
    grid: Grid
    binarization: Binarization
    linear: Linear
    transferred: list[Transferred]
    cost: dict[str, Cost]
