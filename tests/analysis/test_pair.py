"""The linear classifier of two classes: correlations, exact worst images, and what an adversary does to weak pixels."""

from itertools import product

import numpy as np
import pytest

from robbench.analysis.pair import compute_correlations, compute_margins, share_of_weak_pixels, train_linear


def test_correlations_are_pearsons_and_0_for_a_pixel_that_never_changes():
    random = np.random.default_rng(0)
    x, y = random.uniform(size=(50, 4)), random.choice([-1.0, 1.0], 50)
    x[:, 2] = 0.3
    found = compute_correlations(x, y)
    assert found[2] == 0
    assert found[[0, 1, 3]] == pytest.approx([np.corrcoef(x[:, j], y)[0, 1] for j in (0, 1, 3)])


def test_margins_are_the_least_of_all_corners_of_the_ball_in_the_box():
    random = np.random.default_rng(1)
    x, y = random.uniform(size=(20, 3)), random.choice([-1.0, 1.0], 20)
    x[0] = (0.02, 0.97, 0.5)  # two pixels meet the box
    weights, bias, eps = np.array([1.5, -2.0, 0.0]), 0.1, 0.2
    for image, label, margin in zip(x, y, compute_margins(x, y, weights, bias, eps), strict=True):
        ends = [(max(p - eps, 0), min(p + eps, 1)) for p in image]
        assert margin == pytest.approx(min(label * (np.dot(corner, weights) + bias) for corner in product(*ends)))
    assert compute_margins(x, y, weights, bias, 0) == pytest.approx(y * (x @ weights + bias))


def test_an_adversary_takes_the_weight_off_a_pixel_that_it_can_turn_over():
    y = np.tile([-1.0, 1.0], 10)
    x = np.stack([0.5 + 0.4 * y, 0.5 + 0.05 * y], axis=1)  # eps 0.1 turns the second pixel over
    standard, adversarial = (train_linear(x, y, eps, 200)[0] for eps in (0.0, 0.1))
    assert standard[0] == pytest.approx(standard[1], rel=0.2)  # Adam scales each pixel
    assert adversarial[0] > 1
    assert abs(adversarial[1]) < 0.02
    weak = np.array([False, True])
    assert share_of_weak_pixels(standard, weak) == pytest.approx(standard[1] / standard.sum())
    assert share_of_weak_pixels(adversarial, weak) < 0.02
    assert share_of_weak_pixels(np.zeros(2), weak) == 0


def test_training_finds_the_least_logistic_loss():
    y = np.array([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
    x = np.array([0, 0, 1, 0, 1, 1])[:, None].astype(float)  # a third of each class is like the other class
    weights, bias = train_linear(x, y, 0.0, 2000)
    # The logit of each value of the pixel is that of its share of the class: log 1/2 at 0, log 2 at 1.
    assert (bias, weights[0]) == pytest.approx((-np.log(2), 2 * np.log(2)), abs=1e-3)
