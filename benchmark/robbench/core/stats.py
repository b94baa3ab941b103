"""Intervals and paired tests for robust accuracies. Imports no torch.

Paired tests compare two runs image by image: of the pairs, only those that differ (the discordant ones) carry
information. `lost` are images that only the first run left standing, `gained` those that only the second did.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

__all__ = ["holm", "hypergeometric_upper", "least_discordant", "mcnemar", "paired_difference", "wilson"]


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927): (low, high) in [0, 1]; (0, 1) for n = 0.

    Raises:
        ValueError: successes outside 0..n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} given; expected 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the ends the formula gives 0 and 1 up to rounding; say them exactly.
    return (0.0 if successes == 0 else max(centre - half, 0.0)), (1.0 if successes == n else min(centre + half, 1.0))


def mcnemar(only_first: int, only_second: int, alternative: Literal["two-sided", "greater"] = "two-sided") -> float:
    """Exact McNemar test: the p-value of "both are equally often right" from the discordant pairs.

    Args:
        only_first: samples that only the first run left standing.
        only_second: samples that only the second run left standing.
        alternative: "greater" is one-sided: `only_first` is larger than chance explains.
    """
    n = only_first + only_second
    if n == 0:
        return 1.0
    from scipy.stats import binomtest  # half a second to import, needed here only

    return float(binomtest(only_first, n, 0.5, alternative=alternative).pvalue)


def least_discordant(level: float) -> int:
    """Return how many images must change, all in one direction, before a one-sided `mcnemar` reaches the level.

    Raises:
        ValueError: the level is not in (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level {level} given; allowed: above 0 and below 1")
    return math.ceil(-math.log2(level))


def holm(p_values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """Adjust p-values of several tests: comparing each with alpha keeps the chance of any false alarm below alpha.

    Step-down method of Holm (1979), "A simple sequentially rejective multiple test procedure", there also with
    weights: a test of twice the weight is given twice the part of alpha.

    Args:
        p_values: of the tests.
        weights: above 0, one per test; None means that all are equal.
    """
    shares = [1.0] * len(p_values) if weights is None else list(weights)
    ratio = [p / w for p, w in zip(p_values, shares, strict=True)]
    adjusted, largest, left = [0.0] * len(p_values), 0.0, sum(shares)
    for i in sorted(range(len(ratio)), key=ratio.__getitem__):
        largest = max(largest, min(1.0, left * ratio[i]))
        adjusted[i] = largest
        left -= shares[i]
    return adjusted


def paired_difference(only_first: int, only_second: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the difference of two paired proportions, first minus second: (low, high) in [-1, 1].

    Adjusted Wald interval of Bonett & Price (2012), "Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data": one pair is added to either discordant count. (-1, 1) for n = 0.

    Raises:
        ValueError: the counts are negative, or more than n together.
    """
    if min(only_first, only_second) < 0 or only_first + only_second > n:
        raise ValueError(f"{only_first} and {only_second} discordant pairs of {n} given; expected at most n together")
    if n == 0:
        return -1.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    first, second = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    half = z * math.sqrt((first + second - (first - second) ** 2) / (n + 2))
    return max(first - second - half, -1.0), min(first - second + half, 1.0)


def hypergeometric_upper(found: int, drawn: int, population: int, error: float) -> int:
    """Upper confidence bound of how many members of a finite population have a property, exact.

    The largest number K for which drawing `drawn` of them without replacement shows at most `found` with a probability
    above `error`: whatever the true number is, the bound lies below it with a probability of at most `error`.

    Args:
        found: members with the property among those drawn.
        drawn: how many were drawn, in random order.
        population: how many there are.
        error: chance that the bound is too low.

    Raises:
        ValueError: the counts do not fit each other.
    """
    if not 0 <= found <= drawn <= population:
        raise ValueError(f"{found} of {drawn} drawn of {population} given; expected found <= drawn <= population")
    from scipy.stats import hypergeom

    low, high = found, population - (drawn - found)  # the true number lies between them for certain
    while low < high:
        middle = (low + high + 1) // 2
        if float(hypergeom.cdf(found, population, middle, drawn)) > error:
            low = middle
        else:
            high = middle - 1
    return low
