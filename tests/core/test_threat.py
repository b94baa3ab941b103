"""Exact radii, and the geometry of balls in the box."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from robbench.core.numbers import parse_eps, parse_threat
from robbench.core.threat import Ball
from robbench.core.types import NORMS, Problem

SETTINGS = settings(max_examples=60, deadline=None)
norms = st.sampled_from(NORMS)
pixels = st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6)
anywhere = st.lists(st.floats(-2, 3, width=32), min_size=6, max_size=6)


def image(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype).view(1, 1, 2, 3)


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", Fraction(8, 255)), ("0.3", Fraction(3, 10)), (0.3, Fraction(3, 10)), (1, Fraction(1))]
)
def test_eps_is_exact(text, value):
    assert parse_eps(text) == value


@pytest.mark.parametrize("text", ["8/0", "eight", "-0.1", "", float("nan"), float("inf"), None])
def test_unreadable_eps_says_what_is_allowed(text):
    with pytest.raises(ValueError, match=r"eps: .* given"):
        parse_eps(text)


def test_threat_prints_as_people_write_it():
    assert str(parse_threat("Linf", "8/255")) == "Linf 8/255"
    assert str(parse_threat("Linf", 0.3)) == "Linf 0.3"
    assert str(parse_threat("L2", "0.5")) == "L2 0.5"
    with pytest.raises(ValueError, match="8/255"):
        parse_threat("Linf", 8)
    with pytest.raises(ValueError, match="Linf, L2, L1"):
        parse_threat("linf", 0.1)


@SETTINGS
@given(norms, pixels, anywhere, st.floats(0.01, 3))
def test_projection_is_inside_and_idempotent(norm, x0, x, eps):
    ball = Ball(norm, eps)
    once = ball.project(image(x0), image(x))
    assert ball.contains(image(x0), once).all()
    assert torch.allclose(ball.project(image(x0), once), once, atol=2e-6)


@SETTINGS
@given(norms, pixels, pixels, st.floats(0.01, 3))
def test_points_inside_stay(norm, x0, x, eps):
    ball = Ball(norm, eps)
    x0, x = image(x0, torch.float64), image(x, torch.float64)
    if bool((ball.distance(x0, x) <= eps).all()):
        assert torch.allclose(ball.project(x0, x), x, atol=1e-12)


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_projection_is_the_nearest_point(norm):
    """Against a general solver: no point of the intersection is nearer."""
    generator = np.random.default_rng(0)
    for _ in range(10):
        x0, x, eps = generator.uniform(0, 1, 6), generator.uniform(-1, 2, 6), generator.uniform(0.2, 1.5)
        ours = Ball(norm, eps).project(image(x0, torch.float64), image(x, torch.float64)).numpy().ravel()

        # Split x - x0 into positive and negative parts, so that both norms are smooth constraints.
        def moved(d, x0=x0):
            return x0 + d[:6] - d[6:]

        def slack(d, eps=eps):
            return eps - d.sum() if norm == "L1" else eps**2 - ((d[:6] - d[6:]) ** 2).sum()

        best = minimize(
            lambda d, x=x: ((moved(d) - x) ** 2).sum(),
            np.full(12, 0.01),
            bounds=[(0, 1 - v) for v in x0] + [(0, v) for v in x0],
            constraints={"type": "ineq", "fun": slack},
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-12},
        )
        assert ((ours - x) ** 2).sum() <= best.fun + 1e-6
        assert np.allclose(ours, moved(best.x), atol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("surface", [False, True])
def test_random_points_are_allowed_and_fill_the_ball(norm, surface):
    n, shape = 256, (1, 4, 4)
    p = Problem(
        x=torch.full((n, *shape), 0.5),
        y=torch.zeros(n, dtype=torch.int64),
        sample=torch.arange(n),
        trial=torch.zeros(n, dtype=torch.int64),
        key=(5, 6),
    )
    ball = Ball(norm, 0.4)
    x = ball.random(p, surface=surface)
    assert ball.contains(p.x, x).all()
    length = ball.distance(p.x, x)
    assert float(length.max()) > 0.37
    if surface:
        assert torch.allclose(length, torch.full_like(length, 0.4), atol=1e-4)
    saturated = Problem(x=torch.ones_like(p.x), y=p.y, sample=p.sample, trial=p.trial, key=p.key)
    assert ball.contains(saturated.x, ball.random(saturated, surface=surface)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_points_outside_ball_or_box_are_not_contained(norm):
    ball = Ball(norm, 0.25)
    x0 = torch.full((1, 1, 2, 2), 0.5)
    nudge = torch.zeros_like(x0)
    nudge[..., 0, 0] = 0.25
    assert ball.contains(x0, x0 + nudge)
    assert not ball.contains(x0, x0 + 1.001 * nudge)
    assert not ball.contains(x0, x0 + float("nan") * nudge)
    near_one = torch.full_like(x0, 0.999)
    assert not ball.contains(near_one, near_one + 0.01 * nudge), "outside [0, 1] is outside, however near"


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_has_unit_norm_and_zero_for_zero(norm):
    grad = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    x = torch.full_like(grad, 0.5)
    direction = Ball(norm, 1.0).steepest(x, grad)
    assert torch.allclose(Ball(norm, 1.0).distance(x, x + direction), torch.ones(4, dtype=torch.float64), atol=1e-5)
    assert not Ball(norm, 1.0).steepest(x, torch.zeros_like(grad)).any()


def test_l1_steepest_picks_a_pixel_that_can_move():
    x = torch.tensor([1.0, 0.5, 0.0]).view(1, 1, 1, 3)
    grad = torch.tensor([3.0, 1.0, -2.0]).view(1, 1, 1, 3)
    assert Ball("L1", 1.0).steepest(x, grad).flatten().tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_move_is_the_steepest_direction_times_its_length(norm):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.rand(4, 1, 3, 3, generator=generator), torch.randn(4, 1, 3, 3, generator=generator)
    ball = Ball(norm, 1.0)
    assert torch.equal(ball.climb(x, grad, 0.3), 0.3 * ball.steepest(x, grad))


def test_a_move_in_l1_uses_up_its_length_on_the_steepest_pixels():
    x = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0, 0.5]).view(1, 1, 1, 6).repeat(4, 1, 1, 1)
    grad = torch.tensor([9.0, 4.0, -3.0, 2.0, -8.0, 0.0]).view(1, 1, 1, 6).repeat(4, 1, 1, 1)
    size = torch.tensor([0.0, 0.25, 1.0, 9.0]).view(4, 1, 1, 1)
    expected = [[0, 0, 0, 0], [0.25, 0, 0, 0], [0.25, -0.5, 0.25, 0], [0.25, -0.5, 0.75, 0]]
    moves = Ball("L1", 1.0).climb(x, grad, size).view(4, 6)
    assert moves[:, 1:5].tolist() == expected and not moves[:, [0, 5]].any()
    assert torch.equal(Ball("L1", 1.0).climb(x[:1], grad[:1], 1.0).view(6), moves[2])


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1", "L0"])
def test_a_radius_for_each_lane_does_what_a_ball_for_each_lane_does(norm):
    generator = torch.Generator().manual_seed(5)
    x, far = torch.rand(5, 1, 3, 4, generator=generator), 2 * torch.rand(5, 1, 3, 4, generator=generator) - 0.5
    radii = torch.tensor([0.01, 0.1, 0.3, 0.7, 1.0]) * {"L1": 6, "L0": 12}.get(norm, 1)
    together = Ball(norm, radii)
    lanes = torch.arange(5)
    p = Problem(x=x, y=lanes, sample=lanes, trial=lanes, key=(1, 2))
    drawn = {surface: together.random(p, surface=surface) for surface in (False, True)}
    for i, radius in enumerate(radii.tolist()):
        one = slice(i, i + 1)
        alone = Ball(norm, radius)
        assert torch.allclose(together.project(x, far)[one], alone.project(x[one], far[one]), atol=1e-6)
        q = Problem(x=x[one], y=lanes[one], sample=lanes[one], trial=lanes[one], key=(1, 2))
        for surface, points in drawn.items():
            assert torch.allclose(points[one], alone.random(q, surface=surface), atol=1e-5)
    assert together.contains(x, together.project(x, far)).all()


def test_an_l0_ball_keeps_the_largest_moves():
    x = torch.tensor([[[[0.5, 0.5, 0.9, 0.2]]]])
    far = x + torch.tensor([[[[0.3, -0.4, 0.8, 0.0]]]])  # the box leaves 0.1 of the third
    assert torch.allclose(Ball("L0", 2).project(x, far), x + torch.tensor([[[[0.3, -0.4, 0.0, 0.0]]]]))
    assert Ball("L0", 2).contains(x, far.clamp(0, 1)).tolist() == [False]
    assert Ball("L0", 3).contains(x, far.clamp(0, 1)).tolist() == [True]
