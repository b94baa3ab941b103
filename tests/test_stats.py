"""Intervals and paired tests against published or independently computed values."""

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


def test_wilson_covers():
    """Of all outcomes at n = 200, weighted by their probability, 93 to 97 % have the truth inside."""
    for p in (0.03, 0.2, 0.5, 0.9):
        covered = sum(
            scipy_stats.binom.pmf(k, 200, p) for k in range(201) if wilson(k, 200)[0] <= p <= wilson(k, 200)[1]
        )
        assert 0.93 < covered < 0.97, p


def test_mcnemar_exact():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 256)
