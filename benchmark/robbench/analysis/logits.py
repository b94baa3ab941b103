"""What Seguin et al. 2021 look at in logits: gaps, confidence, and the order of the classes. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from robbench.core.stats import paired_difference, wilson
from robbench.linear.theory import Values

__all__ = [
    "Estimate",
    "average_overlap",
    "change_tail",
    "compare_shares",
    "compute_confidence",
    "compute_divergence",
    "compute_gaps",
    "count_by_gap",
    "estimate_mean",
    "estimate_median",
    "estimate_share",
    "rank_classes",
    "rank_errors",
    "rank_within_class",
]

Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval [low, high], from n images."""

    value: float
    low: float
    high: float
    n: int

    def is_apart_from(self, other: Estimate) -> bool:
        """Return whether the two intervals have no number in common."""
        return self.high < other.low or other.high < self.low


def estimate_share(yes: Booleans) -> Estimate:
    """Return the share of images with a property, with its Wilson interval. NaN for no image."""
    n, count = len(yes), int(yes.sum())
    return Estimate(count / n if n else float("nan"), *wilson(count, n), n)


def compare_shares(first: Booleans, second: Booleans) -> Estimate:
    """Return the share of one list of yes and no minus that of another on the same images, with its paired interval."""
    more, less = int((first & ~second).sum()), int((second & ~first).sum())
    return Estimate((more - less) / len(first), *paired_difference(more, less, len(first)), len(first))


def estimate_mean(values: Values) -> Estimate:
    """Return the mean over images with its normal interval. One image allows none: then it is infinite.

    Raises:
        ValueError: there is no value.
    """
    if not len(values):
        raise ValueError("no value given; expected at least one")
    mean = float(values.mean())
    if len(values) == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    half = NormalDist().inv_cdf(0.975) * float(values.std(ddof=1)) / len(values) ** 0.5
    return Estimate(mean, mean - half, mean + half, len(values))


def estimate_median(values: Values) -> Estimate:
    """Return the median with the interval of its order statistics, which holds for any distribution.

    The interval is the narrowest symmetric one with a coverage of at least 95 % (the ranks come from the binomial
    distribution with p = 1/2). Fewer than six values allow none: then it is infinite.

    Raises:
        ValueError: there is no value.
    """
    n = len(values)
    if not n:
        raise ValueError("no value given; expected at least one")
    ordered = np.sort(values)
    cut, ways, tail = 0, 1, 1  # of 2^n: in how many ways `cut` of n values, and at most `cut`, are below the median
    while 40 * tail <= 2**n:
        cut += 1
        ways = ways * (n - cut + 1) // cut
        tail += ways
    low, high = (float(ordered[cut - 1]), float(ordered[n - cut])) if cut else (-math.inf, math.inf)
    return Estimate(float(np.median(ordered)), low, high, n)


def compute_gaps(logits: Values) -> Values:
    """Return the largest minus the second largest logit of each image, [n], from logits [n, K]."""
    top = np.sort(logits, axis=1)
    gaps: Values = top[:, -1] - top[:, -2]
    return gaps


def count_by_gap(gaps: Values, robust: Booleans, edges: Values) -> list[Estimate]:
    """Return the adversarial accuracy of the images in each bin of the logit gap, with its Wilson interval.

    Args:
        gaps: logit gap of each image, [n].
        robust: whether each image is classified correctly and was not broken, [n].
        edges: edges of the bins, ascending. A gap on an edge belongs to the bin to the right.
    """
    at = np.searchsorted(edges, gaps, side="right") - 1
    return [estimate_share(robust[at == i]) for i in range(len(edges) - 1)]


def compute_confidence(logits: Values) -> Values:
    """Return the largest softmax probability of each image, [n], from logits [n, K]."""
    confidence: Values = 1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1)
    return confidence


def rank_within_class(values: Values, label: Integers) -> Values:
    """Rank the images of each class by a value, as a share of the largest rank: 0 is the lowest, 1 the highest, [n].

    Equal values share their mean rank. The only image of a class has rank 0.
    """
    from scipy.stats import rankdata  # takes a second, which commands that draw nothing do not wait for

    ranks = np.zeros(len(values))
    for c in np.unique(label):
        mine = label == c
        ranks[mine] = (rankdata(values[mine]) - 1) / max(mine.sum() - 1, 1)
    return ranks


def rank_classes(logits: Values) -> Integers:
    """Order the classes of each image by logit, the largest first, [n, K]. Of equal ones, the lower class is first."""
    return np.argsort(-logits, axis=1, kind="stable").astype(np.int64)


def rank_errors(clean: Values, answer: Integers, label: Integers) -> Integers:
    """Return the rank of each wrong answer in the mean logits of the true class: 1 is the class with the largest mean.

    The mean logits of a class are over the images of that class that the model classifies correctly (Fig. 3C). Images
    of a class without a correct answer are left out.

    Args:
        clean: logits of the clean images, [n, K].
        answer: predictions, on clean or adversarial images, [n].
        label: true classes, [n].
    """
    correct = clean.argmax(1) == label
    ranks = []
    for c in np.unique(label[correct]):
        order = rank_classes(clean[correct & (label == c)].mean(0)[None])[0]
        wrong = answer[(label == c) & (answer != c)]
        ranks += [int(np.flatnonzero(order == a)[0]) + 1 for a in wrong]
    return np.array(ranks, np.int64)


def average_overlap(first: Values, second: Values, label: Integers | None = None) -> Values:
    """Compute the average overlap AO@k of the class orders of two models, for each image and k = 1..K, [n, K].

    AO@k = 1/k Σ_{i ≤ k} |top i of the first ∩ top i of the second| / i (Webber et al. 2010).

    Args:
        first: logits of a model, [n, K].
        second: logits of another model on the same images.
        label: None compares each image with itself. True classes [n] compare it with all other images of its class and
            take the mean: what a random permutation within the class that leaves no image in place has on average.

    Raises:
        ValueError: a class has only one image.
    """
    n, k = first.shape
    place = [np.argsort(rank_classes(z), axis=1) for z in (first, second)]  # place of each class, 0 is the first
    overlap = np.empty((n, k))
    for i in range(k):
        a, b = ((p <= i).astype(float) for p in place)
        if label is not None:
            for c in np.unique(label):
                mine = label == c
                if mine.sum() < 2:
                    raise ValueError(f"class {c} has one image; expected two or more images of each class")
                b[mine] = (b[mine].sum(0) - b[mine]) / (mine.sum() - 1)
        overlap[:, i] = (a * b).sum(1) / (i + 1)
    averages: Values = np.cumsum(overlap, axis=1) / np.arange(1, k + 1)
    return averages


def change_tail(logits: Values, keep: int, how: Literal["permute", "average"], seed: int = 0) -> Values:
    """Keep the `keep` largest logits of each image and change the others: the targets of "fix-k" (Fig. 4A).

    Args:
        logits: [n, K].
        keep: number of logits to keep, k.
        how: permute: exchange the other logits at random. average: set them to their mean.
        seed: of the permutations.
    """
    order = rank_classes(logits)[:, keep:]
    tail = np.take_along_axis(logits, order, 1)
    if how == "permute":
        tail = np.random.default_rng(seed).permuted(tail, axis=1)
    elif tail.shape[1]:
        tail = np.repeat(tail.mean(1, keepdims=True), tail.shape[1], axis=1)
    changed = logits.copy()
    np.put_along_axis(changed, order, tail, 1)
    return changed


def compute_divergence(logits: Values, changed: Values) -> Values:
    """Return the Kullback-Leibler divergence of each image from softmax(changed) to softmax(logits), [n], in nats."""
    p, q = (z - z.max(1, keepdims=True) for z in (logits, changed))
    p, q = (z - np.log(np.exp(z).sum(1, keepdims=True)) for z in (p, q))
    divergence: Values = (np.exp(p) * (p - q)).sum(1)
    return divergence
