"""Intervals and paired tests against published or independently computed values."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from robbench.stats import mcnemar, wilson


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (81, 263), (899, 899), (5, 5)])
def test_wilson_equals_scipy(k, n):
    interval = scipy_stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_wilson_at_the_ends():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 7)[0] == 0.0 and wilson(7, 7)[1] == 1.0
    with pytest.raises(ValueError, match="8 successes of 7"):
        wilson(8, 7)


@pytest.mark.parametrize("n", [100, 256, 899, 10000])
def test_wilson_covers(n):
    """Of all outcomes, weighted by their exact probability, 93 to 97 % have the truth inside, averaged over truths."""
    low, high = np.array([wilson(k, n) for k in range(n + 1)]).T
    covered = []
    for p in np.linspace(0.01, 0.99, 99):
        inside = np.flatnonzero((low <= p) & (p <= high))
        covered.append(scipy_stats.binom.cdf(inside[-1], n, p) - scipy_stats.binom.cdf(inside[0] - 1, n, p))
    assert 0.93 < np.mean(covered) < 0.97
    assert min(covered) > 0.85  # single truths near the ends oscillate with n
    middle = covered[19:80]  # 0.20 to 0.80
    assert min(middle) > 0.93 and max(middle) < 0.97


def test_mcnemar_exact():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 256)
