"""SPSA: the estimate, the order of its queries, and what it may never do."""

import numpy as np
import pytest
import torch
from torch import nn

from robbench.attacks import SPSA
from robbench.core import rng
from robbench.core.errors import SuiteError
from robbench.core.threat import Ball
from robbench.core.types import Problem
from robbench.engine import engine
from support.attacks import differing, run_attack
from support.models import equally_far, random_images, trained

SMALL = SPSA(iterations=4, samples=3)


def start(x, key=(1, 2)):
    sample = torch.arange(len(x))
    return Problem(x=x, y=sample * 0, sample=sample, trial=sample * 0, key=key)


class Recorder(nn.Module):
    """Answers with a linear score and remembers what it was asked."""

    def __init__(self, w):
        super().__init__()
        self.w, self.asked = w, []

    def forward(self, x):
        self.asked.append(x.clone())
        s = x.flatten(1) @ self.w
        return torch.stack([-s, s], dim=1)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)], ids=str)
def test_every_query_lies_in_ball_and_box(norm, shape):
    x, ball = random_images(5, *shape), Ball(norm, {"Linf": 0.03, "L2": 0.2}[norm])
    model = Recorder(torch.randn(x[0].numel(), generator=torch.Generator().manual_seed(0)))
    final = engine.perturb(model, SPSA(iterations=12, samples=3), start(x), ball)
    assert len(model.asked) == 12 * 7
    assert all(ball.contains(x, asked).all() for asked in [*model.asked, final])
    assert (ball.distance(x, final) > 0.5 * ball.eps).all(), "it has gone somewhere"


def test_queries_come_in_mirrored_pairs_around_the_centre():
    x = torch.full((4, 1, 4, 4), 0.5, dtype=torch.float64)
    model = Recorder(torch.zeros(16, dtype=torch.float64))  # nothing to gain: the centre stays
    engine.perturb(model, SMALL, start(x), Ball("Linf", 0.2))
    asked = torch.stack(model.asked)
    assert len(asked) == SMALL.steps == 4 * 7
    seen = set()
    for first in range(0, 28, 7):
        assert torch.equal(asked[first], x)
        for i in range(first + 1, first + 7, 2):
            assert torch.allclose((asked[i] - x).abs(), torch.full_like(x, SMALL.delta))
            assert torch.allclose(asked[i] + asked[i + 1], 2 * x)
            seen |= {tuple((lane > 0.5).flatten().tolist()) for lane in asked[i]}
    assert len(seen) > 40, "every pair and every lane has a direction of its own"


@pytest.mark.whole
def test_the_estimate_points_along_the_gradient():
    """On a linear loss the mean over many pairs is the gradient, with an error of about √(n / samples)."""
    n, samples = 16, 1000
    w = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attack, ball = SPSA(iterations=1, samples=samples), Ball("Linf", 0.2)
    p = start(torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64))
    s, model = attack.init(p, ball), Recorder(w)
    for t in range(2 * samples):
        s = attack.step(p, ball, s, torch.tensor([t]), *engine.query(model, attack, p, s, with_grad=False))
    last = (s["loss_plus"] - attack.loss(model(s["x"]), p, s)) / (2 * attack.delta * samples)
    estimate = (s["grad"] + last.view(-1, 1, 1, 1) * s["v"]).flatten()
    assert torch.allclose(estimate, 2 * w, atol=5 * 2 * float(w.norm()) / samples**0.5)  # the margin is 2 w·x


def test_directions_are_fair_and_depend_on_the_counter_alone():
    p = start(torch.zeros(50, 3, 7, 9))
    attack, ball = SPSA(iterations=1, samples=500), Ball("Linf", 0.1)
    step = torch.arange(50) * 2 + 1  # a pair begins at each odd step
    v = attack.step(p, ball, attack.init(p, ball), step - 1, torch.zeros(50, 2), torch.zeros(50), None)["v"]
    assert v.shape == p.x.shape and (v.abs() == 1).all()
    assert abs(float(v.mean())) < 4 / v.numel() ** 0.5
    words = rng.bits(p.key, p.sample[7:8], p.trial[7:8], int(step[7]), 6)
    assert v[7].flatten().tolist() == [2 * (int(words[0, i // 32]) >> i % 32 & 1) - 1 for i in range(189)]


@pytest.mark.whole
@pytest.mark.parametrize(("norm", "objective"), [("Linf", "margin"), ("L2", "margin"), ("Linf", "ce")])
def test_breaks_a_linear_model_beyond_its_radius_and_never_below(norm, objective):
    """495 queries on 64 pixels."""
    attack = SPSA(objective=objective, iterations=15, samples=16)
    model, x, y, radius = equally_far(norm)
    assert run_attack(model, attack, x, y, Ball(norm, radius * 1.5), lanes=40).broken.all()
    assert not run_attack(model, attack, x, y, Ball(norm, radius * (1 - 1e-4)), lanes=40).broken.any()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_moves_saturated_pixels(norm, value):
    x, ball = torch.full((4, 1, 4, 4), value), Ball(norm, {"Linf": 0.1, "L2": 0.4}[norm])
    model = Recorder(torch.full((16,), 1.0 - 2 * value))
    final = engine.perturb(model, SPSA(iterations=20, samples=8), start(x), ball)
    assert ((final - x).abs().flatten(1).sum(1) > 0.9 * 1.6).all(), "1.6 is all there is to gain"


@pytest.mark.whole
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_records_do_not_depend_on_width_or_order(norm):
    net, x, y = trained(30)
    attack, ball = SPSA(iterations=3, samples=4, restarts=2), Ball(norm, {"Linf": 0.3, "L2": 1.5}[norm])
    ids = np.arange(30) * 7
    base = run_attack(net, attack, x, y, ball, sample=ids, lanes=64)
    assert 0 < base.broken.sum() < 30, "the comparison must see both outcomes"
    assert set(base.forwards[~base.broken]) == {2 * 28} and not base.backwards.any()
    for lanes in (3, 64):
        order = torch.randperm(30, generator=torch.Generator().manual_seed(lanes))
        other = run_attack(net, attack, x[order], y[order], ball, sample=ids[order.numpy()], lanes=lanes)
        # The last bits of a loss differ with the width of the model's batch, and the points follow the loss.
        assert set(differing(base, other)) <= {"distance"}, (lanes, differing(base, other))
        assert np.allclose(base.distance, other.distance, rtol=1e-9, atol=0, equal_nan=True)


def test_a_lost_answer_does_not_poison_the_trial():
    x, ball = torch.full((2, 1, 4, 4), 0.5), Ball("Linf", 0.1)
    p, logits = start(x), torch.zeros(2, 2)
    s = SMALL.init(p, ball)
    for t in range(SMALL.steps):
        loss = torch.tensor([1.0 * t, torch.nan if t % 5 == 2 else -torch.inf])
        s = SMALL.step(p, ball, s, torch.full((2,), t), logits, loss, torch.zeros_like(x))
        assert ball.contains(x, s["x"]).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": 0}, "samples 0"),
        ({"iterations": 0}, "iterations 0"),
        ({"restarts": 0}, "restarts 0"),
        ({"delta": 0.0}, "delta"),
        ({"relative_step": -1.0}, "relative_step"),
        ({"objective": "xent"}, "objective"),
    ],
)
def test_refuses_what_means_nothing(given, message):
    with pytest.raises(SuiteError, match=message):
        SPSA(**given)
