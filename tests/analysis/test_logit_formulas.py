"""Gaps, ranks and overlaps of logits, by hand on 4 images and 3 classes."""

import numpy as np
import pytest

from robbench.analysis.logits import (
    Estimate,
    average_overlap,
    change_tail,
    compute_confidence,
    compute_divergence,
    compute_gaps,
    count_by_gap,
    estimate_mean,
    estimate_share,
    rank_classes,
    rank_errors,
    rank_within_class,
)
from robbench.core.stats import wilson

FIRST = np.array([[3.0, 1.0, 0.0], [2.0, 0.0, 1.0], [0.0, 5.0, 1.0], [4.0, 1.0, 0.0]])
SECOND = np.array([[3.0, 1.0, 0.0], [2.0, 1.0, 0.0], [1.0, 5.0, 0.0], [0.0, 1.0, 4.0]])
LABEL = np.array([0, 0, 1, 1])


def test_gaps_and_confidence():
    assert compute_gaps(FIRST).tolist() == [2, 1, 4, 3]
    assert compute_confidence(np.log([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])) == pytest.approx([0.5, 0.7])
    assert compute_confidence(np.array([[1e4, 0.0, 0.0]])) == [1]


def test_accuracy_by_gap_has_the_wilson_band_of_each_bin():
    robust = np.array([False, False, True, True])
    low, high, none = count_by_gap(np.array([2.0, 1.0, 4.0, 3.0]), robust, np.array([1.0, 3.0, 5.0, 6.0]))
    assert low == Estimate(0.0, *wilson(0, 2), 2)
    assert high == Estimate(1.0, *wilson(2, 2), 2), "a gap on an edge belongs to the bin to the right"
    assert none.n == 0
    assert np.isnan(none.value)


def test_intervals_of_means_and_shares():
    mean = estimate_mean(np.array([1.0, 2.0, 3.0, 4.0]))
    half = 1.959964 * np.std([1, 2, 3, 4], ddof=1) / 2
    assert (mean.value, mean.low, mean.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    assert estimate_mean(np.array([2.0])) == Estimate(2, -np.inf, np.inf, 1), "one image shows nothing"
    assert estimate_share(np.array([True, False, True, False])) == Estimate(0.5, *wilson(2, 4), 4)
    with pytest.raises(ValueError, match="at least one"):
        estimate_mean(np.array([]))
    assert Estimate(1, 0, 2, 9).is_apart_from(Estimate(4, 3, 5, 9))
    assert not Estimate(1, 0, 3, 9).is_apart_from(Estimate(4, 3, 5, 9))


def test_ranks_within_a_class_are_shares_of_the_largest_rank():
    values = np.array([0.9, 0.1, 0.5, 0.5, 0.3, 0.7])
    assert rank_within_class(values, np.array([0, 0, 0, 1, 1, 2])).tolist() == [1, 0, 0.5, 1, 0, 0]
    assert rank_within_class(np.array([1.0, 1.0, 2.0]), np.zeros(3, int)).tolist() == [0.25, 0.25, 1]


def test_errors_are_ranked_by_the_mean_logits_of_the_true_class():
    clean = np.array([[3.0, 0.0, 1.0], [3.0, 2.0, 1.0], [0.0, 9.0, 1.0], [0.0, 2.0, 1.0]])
    label = np.array([0, 0, 0, 1])
    # Class 0: the mean of its two correct images is (3, 1, 1); class 1 comes before class 2 at equal logits.
    answer = np.array([2, 0, 1, 2])
    assert rank_errors(clean, answer, label).tolist() == [3, 2, 2]


def test_average_overlap_image_by_image():
    # Orders: 012 and 012; 021 and 012; 120 and 102; 012 and 210.
    assert rank_classes(FIRST).tolist() == [[0, 1, 2], [0, 2, 1], [1, 2, 0], [0, 1, 2]]
    expected = [[1, 1, 1], [1, (1 + 0.5) / 2, 2.5 / 3], [1, (1 + 0.5) / 2, 2.5 / 3], [0, (0 + 0.5) / 2, 1.5 / 3]]
    assert average_overlap(FIRST, SECOND) == pytest.approx(np.array(expected))


def test_average_overlap_within_the_class_is_the_mean_over_the_other_images():
    # Image 0 (012) meets 1 (012), 1 (021) meets 0 (012), image 2 (120) meets 3 (210), image 3 (012) meets 2 (102).
    expected = [[1, 1, 1], [1, (1 + 0.5) / 2, 2.5 / 3], [0, (0 + 1) / 2, 2 / 3], [0, (0 + 1) / 2, 2 / 3]]
    assert average_overlap(FIRST, SECOND, LABEL) == pytest.approx(np.array(expected))
    with pytest.raises(ValueError, match="class 1 has one image"):
        average_overlap(FIRST, SECOND, np.array([0, 0, 0, 1]))


def test_overlap_within_the_class_is_what_permutations_without_fixed_points_have_on_average():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 4, 5))
    label = np.zeros(4, int)
    moved = [average_overlap(a, b[np.roll(np.arange(4), s)]) for s in (1, 2, 3)]
    assert average_overlap(a, b, label) == pytest.approx(np.mean(moved, axis=0))


def test_the_largest_logits_are_kept_and_the_others_changed():
    z = np.array([[5.0, 1.0, 2.0, 3.0], [0.0, 4.0, 8.0, 2.0]])
    assert change_tail(z, 1, "average").tolist() == [[5, 2, 2, 2], [2, 2, 8, 2]]
    assert change_tail(z, 2, "average").tolist() == [[5, 1.5, 1.5, 3], [1, 4, 8, 1]]
    assert change_tail(z, 4, "average").tolist() == z.tolist()
    many = np.tile(z[0], (200, 1))
    mixed = change_tail(many, 2, "permute")
    assert (mixed[:, [0, 3]] == [5, 3]).all()
    assert {tuple(row) for row in mixed[:, 1:3]} == {(1, 2), (2, 1)}
    assert (mixed == change_tail(many, 2, "permute")).all(), "one seed, one permutation"


def test_divergence_of_targets():
    p, q = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    assert compute_divergence(p + 3, q) == pytest.approx([0.5 * np.log(2) - 0.25 * np.log(2)])
    assert compute_divergence(FIRST, FIRST) == pytest.approx(np.zeros(4))
