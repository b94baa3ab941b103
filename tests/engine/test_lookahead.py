"""A random search that is asked about several steps at once ends as it does step by step."""

from typing import Protocol, runtime_checkable

import pytest
import torch
from torch import nn

from robbench.attacks import PGD, SPSA, Square
from robbench.attacks.base import Searching
from robbench.core.errors import ModelError
from robbench.core.threat import Ball
from robbench.core.types import NORMS
from robbench.engine import lanes
from robbench.engine.lookahead import MAX_QUERIES
from support.attacks import differing, run_attack, walk

EPS = {"Linf": 0.12, "L2": 0.8, "L1": 2.0}


class Asked(nn.Module):
    """A network that notes how much it is asked; it may answer NaN to images whose first pixel is dark."""

    def __init__(self, channels: int = 1, dark: float = -1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 32), nn.ReLU(), nn.Linear(32, 10)).double()
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (2 / p[0].numel()) ** 0.5)
        self.net, self.dark, self.widths = net.requires_grad_(False), dark, []

    def forward(self, x):
        self.widths.append(len(x))
        logits = self.net(x)
        return torch.where(x[:, :1, 0, 0] < self.dark, torch.nan, logits)


def problem(net, channels=1, n=24):
    x = torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    return x, net.net(x).argmax(1)


@pytest.fixture
def step_by_step(monkeypatch):
    """Call a function with no attack being known as a search."""

    @runtime_checkable
    class Nothing(Protocol):
        def no_attack_has_this(self): ...

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(lanes, "Searching", Nothing)
            return function()

    return call


@pytest.mark.parametrize(("judge", "dark"), [("any", 0.2), ("final", -1.0)], ids=["any, some NaN", "final"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_the_records_are_those_of_single_steps(norm, channels, judge, dark, step_by_step):
    net = Asked(channels, dark)
    x, y = problem(net, channels)
    attack, ball = Square(steps=80, restarts=2), Ball(norm, EPS[norm] / channels)

    def attacked(width=64):
        net.widths.clear()
        rows = run_attack(net, attack, x, y, ball, lanes=width, judge=judge, keep_adversarials=True)
        return rows, len(net.widths)

    singly, rounds = step_by_step(attacked)
    assert 0 < singly.broken.sum() < len(y)
    assert (singly.nonfinite > 0).any() == (dark > 0)
    for width in (64, 7):
        rows, fewer = attacked(width)
        assert not differing(rows, singly)
        assert torch.equal(rows.x_adv, singly.x_adv)
        if width == 64:
            assert fewer < 0.8 * rounds


def test_what_is_looked_at_is_what_comes_when_nothing_is_kept():
    x, steps = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1)), 40
    for norm in NORMS:
        attack, ball, lane = Square(steps=steps), Ball(norm, EPS[norm]), torch.arange(5)
        losses = torch.full((steps, 5), -1.0)
        losses[0] = losses[12] = torch.arange(5.0)
        states = walk(attack, x, ball, losses)
        p = lanes.Problem(x=x, y=lane, sample=lane, trial=0 * lane, key=(1, 2))
        for t in (1, 13, 14, 30):
            points, known = attack.further(p, ball, states[t], torch.full_like(lane, t), MAX_QUERIES)
            assert points.shape[1] >= MAX_QUERIES
            last = min(points.shape[1], 12 - t + 1 if t < 12 else steps + 1 - t)
            for k in range(last):
                assert torch.equal(points[:, k], states[t + k]["x"])
                same = (states[t + k]["x"] == states[t]["x_best"]).flatten(1).all(1)
                assert not (known[:, k] & ~same).any()
    assert isinstance(attack, Searching)
    assert not isinstance(PGD(), Searching)
    assert not isinstance(SPSA(), Searching)


def test_points_that_change_nothing_are_not_asked_about():
    """On a plateau nothing is kept; pixels that are where a square would put them need no answer."""

    class Plateau(Asked):
        def forward(self, x):
            self.widths.append(len(x))
            return torch.tensor([1.0, 0.0], dtype=x.dtype).expand(len(x), 2) + 0 * x.sum((1, 2, 3))[:, None]

    net, n, steps = Plateau(), 4, 400
    x = torch.full((n, 1, 4, 4), 0.5, dtype=torch.float64)
    rows = run_attack(net, Square(steps=steps), x, torch.zeros(n, dtype=torch.int64), Ball("Linf", 0.1), lanes=4)
    assert (rows.forwards == steps + 1).all()
    assert len(net.widths) < 0.75 * steps


def test_samples_that_a_search_fails_on_are_named():
    class Fails(Asked):
        def forward(self, x):
            if ((x[:, 0, 0, :4] - 0.75).abs() < 0.02).all(1).any():
                raise ModelError("too bright")
            return super().forward(x)

    net = Fails()
    x, y = problem(net)
    x[[3, 5], 0, 0, :4] = 0.75
    y = net.net(x).argmax(1)
    with pytest.raises(ModelError, match=r"it fails on samples? (3, 5|3|5)\)"):
        run_attack(net, Square(steps=100), x, y, Ball("Linf", 0.01), lanes=64)
