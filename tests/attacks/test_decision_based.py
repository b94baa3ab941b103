"""Attacks that see predicted classes alone: exact radii, what they may look at, and where they may go."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from robbench.attacks import HopSkipJump, RayS
from robbench.core import rng
from robbench.core.errors import SuiteError
from robbench.core.threat import Ball
from robbench.core.types import Problem
from robbench.engine import engine
from support.attacks import differing, run_attack
from support.models import DUAL, equally_far, hyperplane, random_images, trained

BOTH = pytest.mark.parametrize(("attack", "norm"), [(RayS(steps=2000), "Linf"), (HopSkipJump(steps=2000), "L2")])
SHORT = pytest.mark.parametrize(
    ("attack", "norm"), [(RayS(steps=120), "Linf"), (HopSkipJump(steps=200, starts=20, probes=20), "L2")]
)


class Fan(nn.Module):
    """A linear model of which every class matters, and the exact radius of every image."""

    def __init__(self, norm, classes, seed, n=6):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(classes, 16, dtype=torch.float64, generator=generator))
        self.x = 0.5 + 0.05 * torch.randn(n, 1, 4, 4, dtype=torch.float64, generator=generator)
        self.b = 0.1 * torch.randn(classes, dtype=torch.float64, generator=generator) - 0.5 * self.w.detach().sum(1)
        logits = self(self.x).detach()
        self.y = logits.argmax(1)
        gap = logits.gather(1, self.y[:, None]) - logits
        reach = torch.linalg.vector_norm((self.w[None] - self.w[self.y][:, None]).detach(), ord=DUAL[norm], dim=2)
        self.radius = (gap / reach).scatter(1, self.y[:, None], torch.inf).amin(1)

    def forward(self, x):
        return x.flatten(1) @ self.w.T + self.b


def nearest(model, attack, x, y, norm):
    """The distance of the nearest misclassified query of each image."""
    lanes = torch.arange(len(y))
    p, ball = Problem(x, y, lanes, lanes * 0, rng.make_key(0, "test")), Ball(norm, 1e-9)
    s, best = attack.init(p, ball), torch.full((len(y),), torch.inf, dtype=torch.float64)
    with torch.no_grad():
        for t in range(attack.steps):
            logits = model(s["x"])
            best = torch.where(logits.argmax(1) != y, torch.minimum(best, ball.distance(x, s["x"])), best)
            s = attack.step(p, ball, s, torch.full_like(lanes, t), logits, logits[:, 0], torch.zeros_like(x))
    return best


@BOTH
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_comes_within_5_percent_of_the_radius_in_2000_queries(attack, norm, classes):
    model, x, y, radius = hyperplane(norm, seed=classes, classes=classes)
    r = float(radius.mean())
    with torch.no_grad():  # along the normal, until all have the same radius
        s = x.flatten(1) @ model.w + model.b
        x += ((r / radius - 1) * s / (model.w @ model.w))[:, None, None, None] * model.w.view(1, 1, 4, 4)
    assert run_attack(model, attack, x, y, Ball(norm, 1.05 * r)).broken.all()
    assert not run_attack(model, replace(attack, steps=400), x, y, Ball(norm, 0.99 * r)).broken.any()


@pytest.mark.whole
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_rays_finds_the_nearest_of_many_classes(classes):
    for seed in range(3):
        model = Fan("Linf", classes, seed)
        assert (nearest(model, RayS(steps=2000), model.x, model.y, "Linf") < 1.05 * model.radius).all()


@pytest.mark.whole
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a_walk_finds_the_nearest_of_many_classes_from_most_starts(classes):
    """A walk may end at another class's boundary, which is a local minimum: the best of two walks counts."""
    for seed in range(2):
        model = Fan("L2", classes, seed)
        x, y, radius = model.x.repeat(2, 1, 1, 1), model.y.repeat(2), model.radius
        found = nearest(model, HopSkipJump(steps=2000), x, y, "L2").view(2, -1).amin(0)
        assert (found < 1.05 * radius).float().mean() > 0.8 and (found >= radius * (1 - 1e-9)).all()


@SHORT
def test_it_sees_nothing_but_the_prediction(attack, norm):
    """Other logits of the same argmax lead to the same queries, bit by bit."""
    model, x, y, _ = equally_far(norm, n=3)
    lanes = torch.arange(3)
    p, ball = Problem(x, y, lanes, lanes * 0, (1, 2)), Ball(norm, 0.01)
    plain, other = attack.init(p, ball), attack.init(p, ball)
    moved = 0
    for t in range(attack.steps):
        with torch.no_grad():
            logits = model(plain["x"])
        labels = nn.functional.one_hot(logits.argmax(1), 2).double() * (1 + t)
        at = torch.full_like(lanes, t)
        plain = attack.step(p, ball, plain, at, logits, attack.loss(logits, p, plain), torch.zeros_like(x))
        other = attack.step(p, ball, other, at, labels, attack.loss(labels, p, other), torch.ones_like(x))
        assert all(torch.equal(plain[name], other[name]) for name in plain)
        moved += int((plain["nearest" if norm == "L2" else "best"] != x).any())
    assert moved > 0


@SHORT
def test_every_query_is_finite_and_in_the_box_even_if_all_answers_are_lost(attack, norm):
    x = random_images(3, 3, 5, 7)
    lanes = torch.arange(3)
    p, ball = Problem(x, lanes * 0, lanes, lanes * 0, (1, 2)), Ball(norm, 0.1)
    s = attack.init(p, ball)
    for t in range(attack.steps):
        logits = torch.zeros(3, 2)
        logits[:, 1] = torch.tensor([torch.nan, 1.0 if t % 3 else -1.0, 1.0])  # one lane's answers are all wrong
        s = attack.step(p, ball, s, torch.full_like(lanes, t), logits, logits[:, 0] * 0, torch.zeros_like(x))
        assert s["x"].isfinite().all() and (s["x"] >= 0).all() and (s["x"] <= 1).all(), t


@SHORT
def test_the_last_query_is_misclassified_and_as_near_as_the_search_came(attack, norm):
    model, x, y, _ = equally_far(norm, n=4)
    lanes = torch.arange(4)
    p = Problem(x, y, lanes, lanes * 0, rng.make_key(0, "test"))
    final = engine.perturb(model, attack, p, Ball(norm, 0.01))
    assert (model(final).argmax(1) != y).all()
    assert (Ball(norm, 1).distance(x, final) < 1.1 * nearest(model, attack, x, y, norm)).all()


@pytest.mark.whole
@SHORT
def test_records_do_not_depend_on_width(attack, norm):
    net, x, y = trained(12)
    ball = Ball(norm, {"Linf": 0.03, "L2": 0.13}[norm])
    attack = replace(attack, restarts=2, steps=90)
    wide, narrow = (run_attack(net, attack, x, y, ball, lanes=lanes) for lanes in (64, 3))
    assert 0 < wide.broken.sum() < 12, "the comparison must see both outcomes"
    assert set(wide.forwards[~wide.broken]) == {2 * (attack.steps + 1)} and not wide.backwards.any()
    assert set(differing(wide, narrow)) <= {"distance"}


@pytest.mark.parametrize(
    ("kind", "given"),
    [(RayS, {"steps": 0}), (RayS, {"searches": 0}), (HopSkipJump, {"probes": 1}), (HopSkipJump, {"starts": 0})],
)
def test_refuses_what_means_nothing(kind, given):
    name, value = next(iter(given.items()))
    with pytest.raises(SuiteError, match=f"{name} {value}"):
        kind(**given)


def test_rays_ends_at_the_best_point_of_all_its_searches():
    """With 16 pixels, 500 steps are several searches. The last one may be anywhere."""
    model, x, y, radius = hyperplane("Linf", seed=3, n=12)
    ball = Ball("Linf", float(radius.median()) * 1.2)
    some, last = (run_attack(model, RayS(steps=500), x, y, ball, judge=judge, lanes=12) for judge in ("any", "final"))
    assert some.broken.any() and not some.broken.all()
    assert (last.broken == some.broken).all()
