"""The search of `relax`: squares and steps along the gradient by turns, and when it ends."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from robbench.attacks import Relax
from robbench.attacks.square import Square
from support.relax import EPS, Slopes, follow, leaves, list_targets

FIRST, FURTHER = 50 + 11, 100 + 11


class Corner(torch.nn.Module):
    """Class 1 gains by the part of the image at the upper rim of the ball, where no gradient leads."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, x):
        rim = (x.flatten(1) > 0.5 + EPS["Linf"] - 1e-6).to(x.dtype).mean(1)
        return torch.stack([torch.zeros_like(rim), -1 + self.gain * rim + 0 * x.flatten(1).sum(1)], 1)


def searching(attack, states):
    """Return the states of the search, whose number follows those of targets and restarts."""
    number = attack.starts + min(attack.targets, states[0]["came"].shape[1] - 1) + attack.restarts + 1
    return [s for s in states if int(s["at"]) == number and not s["done"]]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_round_tries_squares_on_the_best_point_and_then_follows_the_gradient_from_it(norm):
    attack = Relax(starts=0, targets=1, restarts=0, patience=9.0)
    model = Slopes([-1.0, -2.0, -3.0], [5.0, 4.0, 3.0])
    p, ball, states = follow(attack, model, norm)
    found = searching(attack, states)
    assert all(float(ball.distance(p.x, s["x"])) <= EPS[norm] + 1e-9 for s in found)
    square = Square(steps=5000, p_init=0.15)
    for s in found[:50]:
        proposed = square.propose(replace(p, trial=p.trial + 1), ball, s["peak"], s["taken"])
        assert torch.equal(s["x"], proposed)
    assert torch.equal(found[50]["x"], found[50]["peak"])
    for before, after in pairwise(found[50:FIRST]):
        x = before["x"].clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(attack.loss(model(x), p, before).sum(), x)
        ahead = ((after["x"] - before["x"]) * grad).sum()
        assert ahead >= -1e-12, "every step climbs the linear margin, up to the rim of the ball"


def test_squares_win_where_no_gradient_leads():
    attack = Relax(starts=0, targets=1, restarts=0, patience=9.0)
    found = searching(attack, follow(attack, Corner(0.99), classes=16)[2])
    best = [float(s["came"].max()) for s in found]
    assert best == sorted(best)
    assert best[49] > best[0]


class Ridge(torch.nn.Module):
    """Class 1 gains by pixel 0 alone, once pixel 1 is at the rim, where its slope is zero."""

    def forward(self, x):
        first, second = x.flatten(1)[:, 0], x.flatten(1)[:, 1]
        open_ = (second > 0.5 + EPS["Linf"] - 1e-6).to(x.dtype)
        return torch.stack([torch.zeros_like(first), -1 + 0.2 * open_ + open_ * (first - 0.5) + 0 * second], 1)


def test_the_gradient_goes_on_from_what_squares_found():
    attack = Relax(starts=0, targets=1, restarts=0, patience=9.0)
    found = searching(attack, follow(attack, Ridge(), classes=16)[2])
    opened, climbed = float(found[50]["came"].max()), float(found[FIRST]["came"].max())
    assert opened >= -0.8 - 0.1
    assert climbed == pytest.approx(-0.8 + EPS["Linf"])


@pytest.mark.parametrize(("gain", "queries"), [(0.0, FIRST), (0.95, FIRST + 2 * FURTHER)])
def test_the_search_ends_once_a_round_gains_too_little(gain, queries):
    """With no gain nothing is won in a round. With one, the last pixel reaches the rim in the second round."""
    attack = Relax(starts=0, targets=1, restarts=0, patience=9.0)
    states = follow(attack, Corner(gain), classes=16)[2]
    assert len(searching(attack, states)) == queries


class Lattice(torch.nn.Module):
    """Class 1 gains by the part of the image at the upper rim of the ball, from one pixel on by the same amount."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, x):
        some = (x.flatten(1) > 0.5 + EPS["Linf"] - 1e-6).any(1).to(x.dtype)
        return torch.stack([torch.zeros_like(some), -0.1 + self.gain * some + 0 * x.flatten(1).sum(1)], 1)


@pytest.mark.parametrize(("left", "queries"), [(0.015, FIRST + 3 * FURTHER), (0.04, FIRST + FURTHER)])
def test_a_search_that_came_very_close_goes_on_for_three_hundred_queries(left, queries):
    """The first square puts pixels at the rim, and no further one gains."""
    attack = Relax(starts=0, targets=1, restarts=0, patience=9.0)
    found = searching(attack, follow(attack, Lattice(0.1 * (1 - left)), classes=16)[2])
    assert len(found) == queries


@pytest.mark.parametrize(("reached", "queries"), [(0.015, FIRST + 3 * FURTHER), (0.03, FIRST)])
def test_so_does_one_whose_first_round_gains_nothing(reached, queries):
    """Squares win nothing on a linear model."""
    attack = Relax(starts=0, targets=1, restarts=0, patience=9.0)
    assert len(searching(attack, follow(attack, leaves(reached))[2])) == queries


@pytest.mark.parametrize("most", [1, 30, 70])
def test_the_search_takes_no_more_queries_than_it_may(most):
    attack = Relax(starts=0, targets=1, restarts=1, patience=9.0, search=most)
    states = follow(attack, Corner(0.99), classes=16)[2]
    assert len(searching(attack, states)) == most


@pytest.mark.parametrize(("reached", "queries"), [(0.14, FIRST), (0.16, 0)])
def test_an_image_that_came_close_gets_the_search_before_it_is_given_up(reached, queries):
    """Four cycles after the starts more than 0.75 / 6 is left. Squares win nothing on a linear model."""
    attack = Relax(targets=3, restarts=10)
    states = follow(attack, leaves(reached))[2]
    assert len(searching(attack, states)) == queries
    assert len(list_targets(attack, states)) == (4 if queries else 3)
    assert not searching(attack, follow(replace(attack, search=0), leaves(reached))[2])


def test_the_search_follows_the_restarts():
    attack = Relax(targets=3, restarts=4)
    states = follow(attack, leaves(0.03))[2]
    assert len(list_targets(attack, states)) == 3 + 4
    order = [int(s["at"]) for s in states]
    assert order == sorted(order)
    assert len(searching(attack, states)) == FIRST


def test_the_last_query_is_the_best_point():
    attack = Relax(targets=3, restarts=1)
    model = Slopes([-1.0, -2.0, -3.0], [9.0, 1.0, 1.0])
    states = follow(attack, model)[2]
    assert states[-1]["done"].all()
    last = model(states[-1]["x"])[0]
    assert float(last[1] - last[0]) == float(states[-1]["came"].max())


class Holes(torch.nn.Module):
    """Answers NaN at some points of a linear model, but not at the image."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        first = x.flatten(1)[:, :1]
        hole = ((first * 1e4) % 1 < 0.2) & (first != 0.5)
        return torch.where(hole, torch.nan, self.model(x))


def test_points_whose_logits_are_nan_count_for_nothing():
    attack = Relax(targets=3, restarts=1)
    states = follow(attack, Holes(leaves(0.3)))[2]
    best = states[-1]["came"]
    assert states[-1]["done"].all()
    assert not best.isnan().any()
    assert float(best.max()) == pytest.approx(-0.3, abs=0.01)


def test_the_search_ends_at_a_tie():
    attack = Relax(starts=0, targets=1, restarts=0, patience=9.0)
    states = follow(attack, Lattice(0.1), classes=16)[2]
    assert float(states[-1]["came"].max()) == 0.0
    assert len(searching(attack, states)) == FIRST + 3 * FURTHER
