"""DeepFool: which plane it takes, how it counts, and what it finds."""

import pytest
import torch
from torch import nn

from robbench.attacks import FAB, DeepFool
from robbench.core.errors import SuiteError
from robbench.core.threat import Ball
from support.attacks import differing, queried, run_attack, smallest
from support.models import Linear, correct, hyperplane, labelled, network, trained


class Planes(nn.Module):
    """A linear classifier of several classes: logits W x + b."""

    def __init__(self, w, b):
        super().__init__()
        self.w, self.b = nn.Parameter(w), nn.Parameter(b)

    def forward(self, x):
        return x.flatten(1) @ self.w.T + self.b


@pytest.mark.parametrize("norm", DeepFool.norms)
def test_takes_the_nearest_plane_not_the_next_logit(norm):
    """Class 1 has the second largest logit, but a flat one; the plane of class 2 is nearer, by hand."""
    w = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.0, 4.0]], dtype=torch.float64)
    x = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    logits = torch.tensor([1.0, 0.9, 0.2], dtype=torch.float64)
    model = Planes(w, logits - w @ x.flatten())
    attack = DeepFool(candidates=2, iterations=2)
    points, _ = queried(model, attack, x, torch.tensor([0]), Ball(norm, 1.0))
    assert [torch.equal(v, x) for v in points[:3]] == [True, True, False], "one query per candidate, then a move"
    assert points[2].flatten().tolist() == pytest.approx([0.5, 0.5 + 1.02 * 0.2])
    only = DeepFool(candidates=1, iterations=2)
    points, _ = queried(model, only, x, torch.tensor([0]), Ball(norm, 1.0))
    assert points[1].flatten().tolist() == pytest.approx([1.0, 0.5]), "class 1 alone: as far as the box goes"


@pytest.mark.parametrize("norm", DeepFool.norms)
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_smallest_distance_on_linear_classes_is_the_radius(norm, classes):
    generator = torch.Generator().manual_seed(classes)
    w = torch.randn(classes, 16, dtype=torch.float64, generator=generator)
    x = 0.5 + 0.02 * torch.randn(12, 1, 4, 4, dtype=torch.float64, generator=generator)
    model = Planes(w, -w @ x.flatten(1).mean(0))
    z = model(x).detach()
    y = z.argmax(1)
    gaps = z.gather(1, y[:, None]) - z
    size = torch.linalg.vector_norm(w[None] - w[y][:, None], ord=1 if norm == "Linf" else 2, dim=2)
    radius = (gaps / size).scatter(1, y[:, None], torch.inf).amin(1)
    ball = Ball(norm, 5.0)
    points, wrong = queried(model, DeepFool(iterations=4), x, y, ball)
    assert smallest(points, wrong, x, ball).tolist() == pytest.approx(radius.tolist(), rel=1e-6)


def test_fewer_classes_take_fewer_queries_per_move():
    model, x, y, _ = hyperplane("L2", seed=0, classes=3)
    attack = DeepFool(candidates=9, iterations=2)
    assert attack.steps == 18
    points, _ = queried(model, attack, x, y, Ball("L2", 5.0))
    assert torch.equal(points[1], x) and not torch.equal(points[2], x)


@pytest.mark.parametrize("norm", DeepFool.norms)
def test_every_point_stays_in_the_box_and_no_gradient_means_no_move(norm):
    net = network()
    x, y = labelled(net, 30)
    points, _ = queried(net, DeepFool(iterations=6), x.round(decimals=1), y, Ball(norm, 2.0))
    assert all(((v >= 0) & (v <= 1)).all() for v in points)
    flat = Linear(torch.zeros(64), 1.0)
    points, _ = queried(flat, DeepFool(iterations=3), x, torch.zeros(30, dtype=torch.int64), Ball(norm, 2.0))
    assert all(torch.equal(v, x) for v in points)


@pytest.mark.whole
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.2), ("L2", 0.8)])
def test_float64_records_do_not_depend_on_width_or_order(norm, eps):
    """Points follow the gradients' values, not their signs: another batch shape may move a distance's last bits."""
    net, x, y = trained(24)
    attack, ball = DeepFool(candidates=4, iterations=8), Ball(norm, eps)
    base = run_attack(net, attack, x, y, ball, lanes=64)
    assert 0 < base.broken.sum() < len(y)
    for lanes in (3, 64):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(lanes))
        other = run_attack(net, attack, x[order], y[order], ball, sample=order.numpy(), lanes=lanes)
        assert set(differing(base, other)) <= {"distance"}, lanes
        assert other.distance == pytest.approx(base.distance, rel=1e-9, nan_ok=True)


@pytest.mark.whole
@pytest.mark.parametrize("norm", DeepFool.norms)
def test_finds_every_sample_of_a_trained_model_close_to_what_fab_finds(norm):
    """Half of the pixels of these images are exactly 0: moves that are only cut off at the box find 39 of 60."""
    model, x, y, _ = correct("digits/natural", 60)
    ball = Ball(norm, 10.0)
    found = smallest(*queried(model, DeepFool(iterations=20), x, y, ball), x, ball)
    fab = smallest(*queried(model, FAB(targets=1, steps=30), x, y, ball), x, ball)
    assert found.isfinite().all()
    assert found.median() <= 1.2 * fab.median()


@pytest.mark.parametrize(
    "given", [{"candidates": 0}, {"iterations": 0}, {"overshoot": -0.1}, {"overshoot": 1.0}], ids=str
)
def test_meaningless_parameters_are_refused(given):
    with pytest.raises(SuiteError, match=next(iter(given))):
        DeepFool(**given)
