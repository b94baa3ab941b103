"""Intervals and paired tests for robust accuracies. Imports no torch.

Paired tests compare two runs image by image. Only pairs that differ (discordant pairs) carry information. An image is
"right" in a run if it is robust there.
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
    # At the ends the formula gives 0 and 1 up to rounding. Return exact values there.
    return (0.0 if successes == 0 else max(centre - half, 0.0)), (1.0 if successes == n else min(centre + half, 1.0))


def mcnemar(only_first: int, only_second: int, alternative: Literal["two-sided", "greater"] = "two-sided") -> float:
    """Exact McNemar test: the p-value of the hypothesis that both runs are right equally often.

    Args:
        only_first: number of samples that are right in the first run only.
        only_second: number of samples that are right in the second run only.
        alternative: "greater" tests on one side, whether `only_first` is larger than by chance.
    """
    n = only_first + only_second
    if alternative == "greater":
        return _binomial_tail(only_second, n)
    return min(1.0, 2 * _binomial_tail(min(only_first, only_second), n))


def _binomial_tail(k: int, n: int) -> float:
    """Return the probability of at most k heads in n throws of a fair coin, computed with integers.

    `scipy.stats.binom` gives the same. Importing it takes a second.
    """
    ways = total = 1
    for i in range(k):
        ways = ways * (n - i) // (i + 1)
        total += ways
    return total / (1 << n)


def least_discordant(level: float) -> int:
    """Return the least number of changes, all in one direction, at which a one-sided `mcnemar` reaches the level.

    Raises:
        ValueError: the level is not in (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level {level} given; allowed: above 0 and below 1")
    return math.ceil(-math.log2(level))


def holm(p_values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """Adjust the p-values of several tests. Comparing each with alpha keeps the chance of any false alarm below alpha.

    Step-down method of Holm (1979), "A simple sequentially rejective multiple test procedure". The paper also has
    weights: a test with twice the weight gets twice the share of alpha.

    Args:
        p_values: one per test.
        weights: one per test, above 0; None gives all tests the same weight.
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
    """Confidence interval of the difference of two paired proportions, first minus second: (low, high) in [-1, 1].

    Adjusted Wald interval of Bonett & Price (2012), "Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data". It adds one pair to each discordant count. (-1, 1) for n = 0.

    Raises:
        ValueError: a count is negative, or the counts add up to more than n.
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
    """Exact upper confidence bound of the number of members of a finite population that have a property.

    The bound is the largest number K of such members for which a draw without replacement finds at most `found` of them
    with a probability above `error`. The bound is below the true number with a probability of at most `error`.

    Args:
        found: number of drawn members with the property.
        drawn: number of members drawn at random.
        population: number of all members.
        error: allowed probability that the bound is too low.

    Raises:
        ValueError: the counts do not fit each other.
    """
    if not 0 <= found <= drawn <= population:
        raise ValueError(f"{found} of {drawn} drawn of {population} given; expected found <= drawn <= population")
    from scipy.stats import hypergeom

    low, high = found, population - (drawn - found)  # the true number certainly lies in this range
    while low < high:
        middle = (low + high + 1) // 2
        if float(hypergeom.cdf(found, population, middle, drawn)) > error:
            low = middle
        else:
            high = middle - 1
    return low
