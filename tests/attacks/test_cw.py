"""Carlini & Wagner's L2 attack: its optimum on linear models, the search over c, and pixels on the edge of the box."""

import copy
import math

import pytest
import torch

from robbench.attacks import CW
from robbench.core.errors import SuiteError
from robbench.core.losses import margin
from robbench.core.threat import Ball
from support.attacks import differing, queried, run_attack, smallest
from support.models import Linear, labelled, network, trained

QUICK = CW(search_steps=7, iterations=200)


def far_problem(classes, n=6):
    """A random hyperplane at L2 distances of 0.2 to 0.6, images away from the edge of the box."""
    generator = torch.Generator().manual_seed(classes)
    w = torch.randn(16, dtype=torch.float64, generator=generator)
    unit = w / w.norm()
    noise = 0.1 * torch.rand(n, 16, dtype=torch.float64, generator=generator) - 0.05
    radius = torch.linspace(0.2, 0.6, n, dtype=torch.float64)
    x = 0.5 + noise - (noise @ unit)[:, None] * unit + radius[:, None] * unit
    assert ((x > 0.05) & (x < 0.95)).all()
    model = Linear(w, -0.5 * float(w.sum()), classes)
    return model, x.view(n, 1, 4, 4), torch.zeros(n, dtype=torch.int64), radius


@pytest.mark.whole
@pytest.mark.parametrize("classes", [2, 10])
def test_breaks_a_linear_model_up_to_two_percent_from_its_radius(classes):
    model, x, y, radius = far_problem(classes)
    for i in (0, 5):
        one, r = slice(i, i + 1), float(radius[i])
        assert run_attack(model, QUICK, x[one], y[one], Ball("L2", 1.02 * r), lanes=1).broken.all(), r
    r = float(radius[0])
    assert not run_attack(model, QUICK, x[:1], y[:1], Ball("L2", r * (1 - 1e-4)), lanes=1).broken.any()


@pytest.mark.whole
def test_the_smallest_distance_on_a_linear_model_is_its_radius():
    model, x, y, radius = far_problem(10)
    ball = Ball("L2", 5.0)
    points, wrong = queried(model, QUICK, x, y, ball)
    found = smallest(points, wrong, x, ball)
    assert (found >= radius * (1 - 1e-9)).all()
    assert (found <= radius * 1.02).all()


@pytest.mark.whole
def test_c_grows_tenfold_and_is_then_halved():
    """On z = ⟨w, x⟩ the smallest c that succeeds is 2 r / ‖w‖: the gradients of both terms cancel at the plane."""
    model, x, y, radius = far_problem(2)
    exact = 2 * radius / model.w.norm()
    cs = []

    class Watched(CW):
        def step(self, p, ball, s, t, logits, loss, grad):
            if t[0] % self.iterations == 0:
                cs.append(s["c"])
            return super().step(p, ball, s, t, logits, loss, grad)

    queried(model, Watched(search_steps=12, iterations=150, initial_c=1e-4), x, y, Ball("L2", 5.0))
    tried = torch.stack(cs)
    assert len(tried) == 12
    assert tried[:4, 0].tolist() == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    # Adam swings a little across the plane that the minimum only touches, so slightly smaller values succeed as well.
    assert tried[-1].tolist() == pytest.approx(exact.tolist(), rel=0.15)


def test_kappa_asks_for_a_margin():
    model, x, y, _ = far_problem(2)
    sure = CW(search_steps=7, iterations=150, kappa=1.0)
    points, _ = queried(model, sure, x, y, Ball("L2", 5.0))
    margins = torch.stack([(model(v)[:, 1] - model(v)[:, 0]).detach() for v in points])
    assert (margins.amax(0) >= 1.0).all()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_pixels_on_the_edge_move_at_once(value):
    x = torch.full((1, 1, 4, 4), value)
    w = torch.full((16,), 1.0 if value else -1.0)
    model = Linear(w, 1.6 - float(x.flatten() @ w))
    points, wrong = queried(
        model, CW(search_steps=1, iterations=60, initial_c=10.0), x, torch.tensor([0]), Ball("L2", 1)
    )
    assert float((points[0] - x).abs().max()) <= 2.6e-7
    assert any(w.all() for w in wrong)
    assert all(((v >= 0) & (v <= 1)).all() for v in points)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_finds_a_break_that_needs_saturated_pixels_to_move(value):
    """Half of the pixels are saturated, and only those matter. torchattacks fails here (perf/peer_weaknesses.py)."""
    x = torch.full((1, 1, 4, 4), value)
    x[..., 2:] = 0.5
    w = torch.zeros(1, 1, 4, 4)
    w[..., :2] = 1.0 if value else -1.0
    model = Linear(w, 0.8 - float(x.flatten() @ w.flatten()))  # eight pixels by 0.1 each
    y, ball = torch.tensor([0]), Ball("L2", 1.02 * 0.1 * 8**0.5)
    rows = run_attack(model, QUICK, x, y, ball, lanes=1, keep_adversarials=True)
    assert rows.broken.all()
    assert (rows.x_adv[..., :2] != x[..., :2]).all()


@pytest.mark.whole
@pytest.mark.parametrize("search_steps", [1, 2])
def test_the_points_are_those_of_torchs_adam_up_to_the_last(search_steps):
    net = copy.deepcopy(network()).double()
    x, y = labelled(network(), 5)
    x, iterations, c = x.double(), 15, 0.5
    attack = CW(search_steps=search_steps, iterations=iterations, initial_c=c, lr=0.03)
    points, _ = queried(net, attack, x, y, Ball("L2", 1.0))
    theta = (2 * x.sqrt().asin()).clamp(1e-3, math.pi - 1e-3).requires_grad_()
    adam = torch.optim.Adam([theta], lr=0.03)
    expected = []
    for _ in range(iterations + 1):
        new = (1 - theta.cos()) / 2
        expected.append(new.detach())
        objective = (new - x).square().sum() + c * (-margin(net(new), y)).clamp(min=0).sum()
        adam.zero_grad()
        objective.backward()
        adam.step()
    last = iterations + 1 if search_steps == 1 else iterations
    for ours, theirs in zip(points[:last], expected[:last], strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)
    assert len(points) == search_steps * iterations + 1
    assert not torch.allclose(points[-1], points[0], atol=1e-3), "what the last step found is asked about"
    if search_steps > 1:
        assert torch.equal(points[iterations], points[0])


def test_points_stay_in_the_box_and_numbers_finite():
    net = network()
    x, y = labelled(net, 20)
    points, wrong = queried(net, CW(search_steps=3, iterations=20, initial_c=1e9), x.round(), y, Ball("L2", 1.0))
    assert all(v.isfinite().all() and ((v >= 0) & (v <= 1)).all() for v in points)
    assert torch.stack(wrong).any(0).any()


@pytest.mark.whole
def test_float64_records_do_not_depend_on_width_or_order():
    """Points follow the gradients' values, not their signs: another batch shape may move a distance's last bits."""
    net, x, y = trained(24)
    attack, ball = CW(search_steps=3, iterations=12, initial_c=1.0, lr=0.03), Ball("L2", 1.0)
    base = run_attack(net, attack, x, y, ball, lanes=64)
    assert 0 < base.broken.sum() < len(y)
    for lanes in (3, 64):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(lanes))
        other = run_attack(net, attack, x[order], y[order], ball, sample=order.numpy(), lanes=lanes)
        assert set(differing(base, other)) <= {"distance"}, lanes
        assert other.distance == pytest.approx(base.distance, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize(
    "given",
    [{"search_steps": 0}, {"iterations": 0}, {"lr": 0.0}, {"initial_c": 0.0}, {"initial_c": 1e11}, {"kappa": -1.0}],
    ids=str,
)
def test_meaningless_parameters_are_refused(given):
    with pytest.raises(SuiteError, match=next(iter(given))):
        CW(**given)
