"""Intervals and paired tests for robust accuracies. Imports no torch."""

import math
from statistics import NormalDist

__all__ = ["mcnemar", "wilson"]


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


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test: the p-value of "both are equally often right" from the discordant pairs.

    Args:
        only_first: samples that only the first run left standing.
        only_second: samples that only the second run left standing.
    """
    n = only_first + only_second
    if n == 0:
        return 1.0
    from scipy.stats import binomtest  # half a second to import, needed here only

    return float(binomtest(only_first, n, 0.5).pvalue)
