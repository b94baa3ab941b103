"""Clean accuracy at chance: predictions that are no better than the same answer to every image. Imports no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["find_chance_flag"]

_LEVEL = 0.0125  # probability that a weak but honest model gets as few images right
_CHANCE_LEVEL = 0.05  # probability that chance gets as many images right
_WEAK = 0.3  # share of what chance leaves that a weak but honest model gets right

_REMEDY = (
    "Look at the labels (shifted by one, shuffled), at the normalization, at the order of the classes, at images that "
    "the model expects in 0 to 255, and at the weights."
)


def find_chance_flag(label: NDArray[Any], prediction: NDArray[Any]) -> dict[str, str]:
    """Look for a model that is no better than chance.

    Chance is the same predictions in a random order: they are right on c = Σ_k (share of label k) · (share of
    prediction k) of the images. A weak but honest model is right on c + 0.3 · (1 − c). A model is flagged if one of
    these holds:

    * Chance gets as many images right with a probability above 5 %, and a weak but honest model gets as few right with
      a probability below 1.25 % (binomial tests).
    * All predictions are the same, and there are so many images of other classes (13) that a weak but honest model gets
      none of them right with a probability below 1.25 %.

    No number of images is too small in itself. Of ten classes, 0 right of 12 is flagged, 1 of 16, and 3 of 30. In
    simulations with 8 to 100 images, honest models were flagged so often at most: 6 % with an accuracy of 30 % and ten
    classes, 5 % with 20 % and a hundred classes, 1 % from 40 % and ten classes on. Of models that guess one of ten
    classes, 28 % were flagged with 12 images, 52 % with 16, 89 % with 30, 98 % with 100: few images cannot tell more.

    Args:
        label: true classes, [n].
        prediction: predicted classes of the clean images, -1 where the answer is not finite, [n].

    Returns:
        A flag: name of the problem -> sentence.
    """
    n, right = len(label), int((label == prediction).sum())
    classes, counts = np.unique(label, return_counts=True)
    chance = sum(int(count) * int((prediction == k).sum()) for k, count in zip(classes, counts, strict=True)) / n**2
    weak = chance + (1 - chance) * _WEAK
    if len(np.unique(prediction)) == 1 and (1 - _WEAK) ** int((label != prediction[0]).sum()) < _LEVEL:
        what = f"The model predicts class {int(prediction[0])} for all {n} clean images."
    elif (
        right < weak * n
        and _compute_binomial_tail(right, n, weak) < _LEVEL
        and _compute_binomial_tail(n - right, n, 1 - chance) > _CHANCE_LEVEL
    ):
        what = (
            f"The model classifies {right} of {n} clean images correctly; the same predictions in a random order get "
            f"{chance * n:.1f} right on average."
        )
    else:
        return {}
    return {"chance": f"{what} So its clean accuracy is at chance, and its robust accuracy means nothing. {_REMEDY}"}


def _compute_binomial_tail(most: int, n: int, share: float) -> float:
    """Compute the probability of at most `most` successes in n trials, each with this probability."""
    from scipy.special import bdtr  # scipy.stats takes three times as long to import

    return float(bdtr(most, n, share))
