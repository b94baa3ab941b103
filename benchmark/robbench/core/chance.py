"""Clean accuracy at chance: predictions that are no better than the same answer to every image. Imports no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MIN_IMAGES", "find_chance_flag"]

MIN_IMAGES = 16
"""Fewer images cannot tell a weak model from chance."""

_LEVEL = 0.005  # of the binomial test
_WEAK = 0.2  # share of the images of the rarer classes that a weak but honest model gets right

_REMEDY = (
    "Look at the labels (shifted by one, shuffled), at the normalization, at the order of the classes, at images that "
    "the model expects in 0 to 255, and at the weights."
)


def find_chance_flag(label: NDArray[Any], prediction: NDArray[Any]) -> dict[str, str]:
    """Look for a model that is no better than a constant answer.

    It is flagged if one of these holds, and if a weak but honest model would hardly ever do so (binomial test, 0.5 %):

    * The most frequent label is right at least as often as the model. A weak but honest model closes a fifth of the
      gap between the most frequent label and all images. Where all labels are the same, it gets a fifth of them right.
    * All predictions are the same. A weak but honest model gets a fifth of the images of the other classes.

    Args:
        label: true classes, [n].
        prediction: predicted classes of the clean images, -1 where the answer is not finite, [n].

    Returns:
        A flag: name of the problem -> sentence.
    """
    n, right = len(label), int((label == prediction).sum())
    if n < MIN_IMAGES:
        return {}
    classes, counts = np.unique(label, return_counts=True)
    most = int(counts.max())
    share = most / n
    weak = _WEAK if len(classes) == 1 else share + (1 - share) * _WEAK
    if len(np.unique(prediction)) == 1 and (1 - _WEAK) ** int((label != prediction[0]).sum()) < _LEVEL:
        what = f"The model predicts class {int(prediction[0])} for all {n} clean images."
    elif right <= most and _compute_binomial_tail(right, n, weak) < _LEVEL:
        what = f"The model classifies {right} of {n} clean images correctly"
        rival = f", no more than the {most} that the answer {int(classes[counts.argmax()])} to every image gets right"
        what += "." if len(classes) == 1 else f"{rival}."
    else:
        return {}
    return {"chance": f"{what} So its clean accuracy is at chance, and its robust accuracy means nothing. {_REMEDY}"}


def _compute_binomial_tail(most: int, n: int, share: float) -> float:
    """Compute the probability of at most `most` successes in n trials."""
    from scipy.stats import binom  # importing it takes half a second, and few models need it

    return float(binom.cdf(most, n, share))
