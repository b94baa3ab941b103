"""Random noise as an attack: where its points lie, that each is new, and that no neighbour changes them."""

import pytest
import torch

from robbench.attacks import Noise
from robbench.core.threat import Ball
from robbench.core.types import NORMS, Problem
from support.attacks import run_attack
from support.models import Linear


def walk(ball, lanes, steps=6):
    """The points of some lanes, [steps + 1, L, C, H, W]; x is far from the box."""
    sample = torch.tensor(lanes)
    x = torch.full((len(lanes), 1, 4, 4), 0.5)
    p = Problem(x=x, y=torch.zeros_like(sample), sample=sample, trial=torch.zeros_like(sample), key=(1, 2))
    state, nothing = Noise(steps=steps).init(p, ball), torch.zeros(len(lanes))
    points = [state["x"]]
    for step in range(steps):
        state = Noise(steps=steps).step(p, ball, state, torch.full_like(sample, step), nothing, nothing, x)
        points.append(state["x"])
    return x, torch.stack(points)


@pytest.mark.parametrize("norm", NORMS)
def test_points_are_allowed_new_and_by_turns_on_the_surface(norm):
    ball = Ball(norm, 0.2)
    x, points = walk(ball, [3, 4])
    assert all(ball.contains(x, at).all() for at in points)
    assert len(torch.unique(points.flatten(2).flatten(0, 1), dim=0)) == 14
    lengths = torch.stack([ball.distance(x, at) for at in points])
    assert torch.allclose(lengths[1::2], torch.tensor(0.2, dtype=torch.float64), atol=1e-6)
    assert (lengths[2::2] < 0.2 - 1e-6).all()


def test_a_lanes_points_do_not_depend_on_its_neighbours():
    ball = Ball("Linf", 0.2)
    assert torch.equal(walk(ball, [7])[1][:, 0], walk(ball, [3, 7])[1][:, 1])


def test_it_breaks_what_lies_on_the_boundary_and_nothing_far_away():
    x = torch.full((8, 1, 4, 4), 0.5)
    w = torch.ones(16)
    y = torch.zeros(8, dtype=torch.int64)
    near, far = (Linear(w, shift - 8.0) for shift in (0.01, 2.0))
    assert run_attack(near, Noise(steps=30), x, y, Ball("Linf", 0.1)).broken.all()
    rows = run_attack(far, Noise(steps=30), x, y, Ball("Linf", 0.1))
    assert not rows.broken.any() and rows.forwards.tolist() == [31] * 8 and rows.backwards.sum() == 0
