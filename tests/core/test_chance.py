"""Clean accuracy at chance: models of no use are flagged, weak honest ones and a handful of images are not."""

import numpy as np
import pytest

from robbench.core.chance import find_chance_flag


def labels(n, classes=10, seed=0):
    return np.random.default_rng(seed).integers(0, classes, n)


def right_in(share, y, classes=10, seed=1):
    """Predictions that are right with this probability, and else any other class."""
    rng = np.random.default_rng(seed)
    other = (y + rng.integers(1, classes, len(y))) % classes
    return np.where(rng.random(len(y)) < share, y, other)


Y = labels(60)
USELESS = {
    "labels shifted by one": (Y, (Y + 1) % 10),
    "order of the classes reversed": (Y, 9 - Y),
    "always one class": (Y, np.full(60, 3)),
    "always the most frequent class of skewed labels": (np.repeat([0, 1], [270, 30]), np.zeros(300, int)),
    "all answers NaN or wrong": (Y, np.where(np.arange(60) % 2, -1, (Y + 2) % 10)),
    "random answers": (Y, labels(60, seed=9)),
    "random answers, two classes": (labels(200, 2, 3), labels(200, 2, 4)),
    "random answers, a hundred classes": (labels(60, 100, 3), labels(60, 100, 4)),
    "0 right of 12": (Y[:12], (Y[:12] + 1) % 10),
    "0 right of 15": (Y[:15], (Y[:15] + 1) % 10),
    "1 right of 16, one class in y": (np.zeros(16, int), np.arange(16)),
    "13 right of 100": (
        np.arange(100) % 10,
        (np.arange(100) + (np.arange(100) >= 13)) % 10,
    ),
    "one class in y, and nothing right": (np.full(30, 3), np.arange(30) % 3),
}


@pytest.mark.parametrize("name", USELESS)
def test_a_useless_model_is_flagged_and_told_what_to_look_at(name):
    y, prediction = USELESS[name]
    sentence = find_chance_flag(y, prediction)["chance"]
    assert all(word in sentence for word in ("labels", "normalization", "order of the classes", "0 to 255"))


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_a_handful_of_images_is_never_flagged(n):
    for y in (np.zeros(n, int), np.arange(n) % 10):
        for right in range(n + 1):
            assert not find_chance_flag(y, np.where(np.arange(n) < right, y, y + 1))
        assert not find_chance_flag(y, np.full(n, 7))


@pytest.mark.parametrize(("share", "classes"), [(0.3, 10), (0.4, 10), (0.7, 2), (0.2, 100), (0.9, 10)])
@pytest.mark.parametrize("n", [8, 10, 12, 16, 20, 60, 200])
def test_a_weak_but_honest_model_is_not_flagged(share, classes, n):
    flagged = 0
    for seed in range(100):
        y = labels(n, classes, seed)
        flagged += bool(find_chance_flag(y, right_in(share, y, classes, 1000 + seed)))
    assert flagged <= 6


def test_images_of_one_class_are_no_reason_for_a_flag():
    y = np.full(30, 4)
    assert not find_chance_flag(y, right_in(0.5, y))
    assert not find_chance_flag(y, y)
