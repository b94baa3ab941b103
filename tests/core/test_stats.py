"""Intervals and paired tests against published or independently computed values."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from robbench.core.stats import holm, hypergeometric_upper, least_discordant, mcnemar, paired_difference, wilson


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
def test_wilson_intervals_hold_the_truth_in_95_of_100(n):
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


def test_two_sided_mcnemar_equals_values_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 256)


def test_one_sided_mcnemar_equals_values_by_hand():
    assert mcnemar(6, 0, "greater") == pytest.approx(1 / 64)
    assert mcnemar(0, 6, "greater") == 1.0
    assert mcnemar(7, 1, "greater") == pytest.approx((1 + 8) / 256)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 4), (40, 17), (17, 40), (0, 1100), (480, 520), (2000, 2000)])
@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
def test_mcnemar_equals_scipy(first, second, alternative):
    n = first + second
    expected = scipy_stats.binomtest(first, n, 0.5, alternative=alternative).pvalue if n else 1.0
    assert mcnemar(first, second, alternative) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("level", [0.05, 0.01, 0.01 / 25])
def test_the_least_change_that_reaches_a_level(level):
    k = least_discordant(level)
    assert mcnemar(k, 0, "greater") <= level < mcnemar(k - 1, 0, "greater")
    with pytest.raises(ValueError, match="level 0"):
        least_discordant(0)


def test_holm_adjusts_p_values_as_in_the_worked_example():
    """The worked example of Holm's procedure: 4 tests, multiplied by 4, 3, 2, 1 and never decreasing."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.7, 0.9]) == [1.0, 1.0]
    # Weights 8 and 1: the first is held against 8/9 of alpha; once it is out, the second against all of it.
    assert holm([0.008, 0.009], [8, 1]) == pytest.approx([0.009, 0.009])
    assert holm([0.9, 0.001], [8, 1]) == pytest.approx([0.9, 0.009])


def test_holm_bounds_the_chance_of_any_false_alarm():
    """Ten true null hypotheses: raw tests fail far too often, adjusted ones at most at their level."""
    p = np.random.default_rng(0).uniform(size=(4000, 10))
    assert np.mean(p.min(axis=1) <= 0.05) > 0.35
    for weights in (None, [8.0, 1.0] * 5):
        alarms = np.mean([min(holm(row, weights)) <= 0.05 for row in p.tolist()])
        assert 0.035 < alarms < 0.06


def test_paired_difference_is_the_published_formula():
    # n = 500, 43 and 14 discordant: (44 - 15) / 502 +- 1.96 sqrt(((59 / 502) - (29 / 502)^2) / 502)
    assert paired_difference(43, 14, 500) == pytest.approx((0.028208, 0.087330), abs=1e-6)
    assert paired_difference(0, 0, 0) == (-1.0, 1.0)
    with pytest.raises(ValueError, match="8 and 3 discordant pairs of 10"):
        paired_difference(8, 3, 10)


@pytest.mark.parametrize(("first", "second"), [(0.05, 0.05), (0.10, 0.06), (0.03, 0.08), (0.2, 0.1), (0.04, 0.02)])
def test_paired_intervals_hold_the_true_difference_in_95_of_100(first, second):
    """Simulated: 93 to 97 % of the 95 % intervals hold the true difference."""
    pairs = np.random.default_rng(1).multinomial(899, [first, second, 1 - first - second], size=6000)
    ends = np.array([paired_difference(a, b, 899) for a, b, _ in pairs.tolist()])
    assert 0.93 < np.mean((ends[:, 0] <= first - second) & (first - second <= ends[:, 1])) < 0.97


@pytest.mark.parametrize(("population", "marked", "drawn"), [(200, 12, 50), (200, 0, 50), (60, 60, 20), (500, 40, 250)])
def test_the_finite_bound_is_rarely_too_low(population, marked, drawn):
    """Exact, over everything that can be drawn: the bound is below the truth with a probability of at most 5 %."""
    found = np.arange(max(0, drawn - (population - marked)), min(drawn, marked) + 1)
    bounds = np.array([hypergeometric_upper(int(k), drawn, population, 0.05) for k in found])
    chance = scipy_stats.hypergeom.pmf(found, population, marked, drawn)
    assert chance[bounds < marked].sum() <= 0.05
    assert all(found <= bounds) and all(bounds <= population - (drawn - found))


def test_the_finite_bound_at_the_ends():
    assert hypergeometric_upper(3, 10, 10, 0.01) == 3, "all are seen"
    assert hypergeometric_upper(0, 0, 10, 0.01) == 10, "none is seen"
    # 10 of 1000 would show none among the first 500 with a chance of 2^-10.
    assert hypergeometric_upper(0, 500, 1000, 0.01) == 6
    with pytest.raises(ValueError, match="5 of 4 drawn"):
        hypergeometric_upper(5, 4, 10, 0.01)
