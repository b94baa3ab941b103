"""Networks at the limits of number formats and of the solver: none of their errors becomes a proof."""

import re
import time
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robbench.certify import decide as deciding
from robbench.certify import exact
from robbench.certify.bounds import Region, find_bounds
from robbench.certify.branch import Answer
from robbench.certify.decide import decide
from robbench.certify.exact import Program, count_numbers, solve_margin
from robbench.certify.run import Balls
from robbench.certify.trace import trace_graph
from robbench.core.errors import RobbenchError
from robbench.core.threat import Ball
from robbench.core.types import Threat
from support.networks import seeded

THREAT = Threat("Linf", Fraction(1, 5))
PIXELS = torch.tensor([0.5, 0.5]).view(1, 1, 2)


class Explosive(nn.Module):
    """A linear model, plus a sum that is always 0 and whose intervals grow beyond all numbers."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.register_buffer("first", torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        self.register_buffer("next", torch.tensor([[1e37, -1e37], [1e37, -1e37]]))
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
            self.head.bias.copy_(torch.tensor([0.05, 0.0]))

    def forward(self, x):
        x = x.flatten(1)
        z = F.linear(x, self.first)
        for _ in range(10):
            z = torch.relu(F.linear(z, self.next))
        return self.head(x) + z


@pytest.mark.parametrize("method", ["exact", "bounds"])
def test_where_the_rounding_error_is_not_a_number_nothing_is_proven(method):
    net = Explosive().eval()
    graph = trace_graph(net, PIXELS[None])
    region = Region.of(PIXELS, THREAT)
    assert not all(noise.isfinite().all() for noise in find_bounds(graph, region).gaps.noise.values())
    assert net(PIXELS[None]).argmax() == 0 and net(torch.tensor([[[[0.4, 0.6]]]])).argmax() == 1
    decision = decide(graph, PIXELS, 0, THREAT, method, 3)
    assert not decision.is_proven


def test_where_float32_may_overflow_nothing_is_proven():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        for part, weight, bias in ((net[1], [[1, 0], [0, 1]], [1, 0]), (net[3], [[3e38, -2e38], [0, 1e-3]], [0, 0])):
            part.weight.copy_(torch.tensor(weight))
            part.bias.copy_(torch.tensor(bias))
    with torch.no_grad():
        net[1].weight.mul_(0.1)
    graph = trace_graph(net, PIXELS[None])
    assert not decide(graph, PIXELS, 0, THREAT, "exact", 3).is_proven


def scaled(seed, first, last):
    """A network whose hidden values have the size of `first`, and whose logits that of the product."""
    net = seeded(nn.Sequential(nn.Flatten(), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)), seed, 2.0)
    with torch.no_grad():
        net[1].bias.copy_(0.1 * net[1].bias - net[1].weight @ PIXELS.flatten())
        net[3].bias.copy_(net[3].bias - net(PIXELS[None])[0] + torch.tensor([0.2, 0.0]))
        for part, factor in ((net[1].weight, first), (net[1].bias, first), (net[3].weight, last)):
            part.mul_(factor)
        net[3].bias.mul_(first * last)
    return net.requires_grad_(False)


@pytest.mark.parametrize(
    ("first", "last"), [(1, 1), (1, 1e16), (1e16, 1), (1e10, 1), (1e-5, 1e5), (1e-10, 1e10), (1e4, 1e4)]
)
def test_the_program_misses_no_break_at_any_scale(first, last):
    breaks = 0
    for seed in range(8):
        graph = trace_graph(scaled(seed, first, last), PIXELS[None])
        y, region = int(graph.run(PIXELS[None].double()).argmax()), Region.of(PIXELS, THREAT)
        grid = torch.linspace(0, 1, 81, dtype=torch.float64)
        points = region.low + torch.cartesian_prod(grid, grid).view(-1, 1, 1, 2) * (region.high - region.low)
        logits = graph.run(points)
        size, least = float(logits.abs().max()), float((logits[:, y] - logits[:, 1 - y]).min())
        program = Program.of(graph, region, find_bounds(graph, region).gaps)
        answer = solve_margin(graph, region, program, y, 1 - y, 1e-4 * size, time.monotonic() + 30)
        if least < -1e-3 * size:
            breaks += 1
            assert answer is not None and answer.point is not None
        elif least > 1e-2 * size:
            assert answer is not None and answer.is_proven
    assert breaks


def test_a_program_that_the_solver_refuses_proves_nothing(monkeypatch):
    real = exact.milp

    def refuse(cost, constraints, **rest):
        constraints.A.data[0] = 1e200
        return real(cost, constraints=constraints, **rest)

    graph = trace_graph(scaled(0, 1, 1), PIXELS[None])
    region = Region.of(PIXELS, THREAT)
    program = Program.of(graph, region, find_bounds(graph, region).gaps)
    monkeypatch.setattr(exact, "milp", refuse)
    assert solve_margin(graph, region, program, 0, 1, 1e-5, time.monotonic() + 30) is None


def test_coefficients_that_the_solver_would_drop_widen_the_constraints():
    program = Program(low=[0.0, -3.0], high=[2.0, 1.0], integer=[0, 0])
    coefficients = torch.tensor([[1.0, 1e-9], [0.5, 1e-3]]).numpy()
    rows = exact.csr_array(coefficients)
    program.rows.append((rows, torch.zeros(2).double().numpy(), torch.ones(2).double().numpy()))
    limit, count = program.constraints(exact.csr_array(coefficients[:1]), 0.25)
    assert count == 3 and abs(limit.A).min(axis=1).toarray().max() < 1 and (abs(limit.A.data) > 1e-8).all()
    assert limit.lb == pytest.approx([-3e-9, 0, 0.25 - 3e-9], abs=1e-12)
    assert limit.ub[:2] == pytest.approx([1 + 3e-9, 1], abs=1e-12)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_layers_in_channels_last_layout_have_the_same_bounds(norm):
    net = seeded(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1),
            nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3),
        )
    )  # fmt: skip
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    threat, found = Threat(norm, Fraction(1, 10)), []
    for layout in (torch.contiguous_format, torch.channels_last):
        graph = trace_graph(net.to(memory_format=layout), x)
        region = Region.of(x.to(memory_format=layout)[0], threat)
        bounds = find_bounds(graph, region)
        assert any(bounds.gaps.unstable(at).any() for at in bounds.gaps.low)
        found.append([bounds.low[at].flatten() for at in bounds.low])
    for first, second in zip(*found, strict=True):
        assert torch.allclose(first, second, atol=1e-12)


def test_the_margin_of_an_open_image_is_a_lower_bound(monkeypatch):
    monkeypatch.setattr(deciding, "solve_margin", lambda *args: None)  # every leaf stays open
    seen = set()
    for seed in range(8):
        graph = trace_graph(scaled(seed, 1, 1), PIXELS[None])
        region = Region.of(PIXELS, THREAT)
        decision = decide(graph, PIXELS, 0, THREAT, "bounds", 3)
        points = region.low + torch.rand(4000, 1, 1, 2).double() * (region.high - region.low)
        logits = graph.run(points)
        assert decision.margin <= float((logits[:, 0] - logits[:, 1]).min()) + 1e-9
        seen.add((decision.is_proven, decision.point is None))
    assert (False, False) in seen


def wide():
    return seeded(nn.Sequential(nn.Flatten(), nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)))


def test_when_the_time_is_over_intervals_must_do():
    graph, region = trace_graph(wide(), PIXELS[None]), Region.of(PIXELS, THREAT)
    late, plain = find_bounds(graph, region, deadline=time.monotonic() - 1), find_bounds(graph, region, relaxed=False)
    for at in plain.low:
        assert torch.equal(late.low[at], plain.low[at]) and torch.equal(late.high[at], plain.high[at])


def test_programs_that_would_fill_the_memory_are_not_written(monkeypatch):
    graph, region = trace_graph(wide(), PIXELS[None]), Region.of(PIXELS, THREAT)
    gaps = find_bounds(graph, region).gaps
    program, numbers = Program.of(graph, region, gaps), count_numbers(graph, gaps)
    assert numbers >= len(program.low) and numbers <= len(program.low) * 6
    monkeypatch.setattr(deciding, "prove_by_branching", lambda *args: Answer(-1.0, False))
    monkeypatch.setattr(deciding, "MOST_NUMBERS", numbers - 1)
    refused = deciding._decide_class(
        graph, region, gaps, 0, 1, 5.0, "exact", lambda: pytest.fail("the program was written")
    )
    assert not refused.is_proven


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_a_point_that_breaks_barely_is_moved_into_the_ball_and_further(norm):
    threat = Threat(norm, Fraction(1, 5))
    graph, x = trace_graph(wide(), PIXELS[None]), PIXELS.double()
    point = x + 0.01
    y = int(graph.run(point[None])[0].argmax())
    deep = deciding._deepen(graph, x, y, threat, point)
    margins = [float((z[y] - z[1 - y]).detach()) for z in graph.run(torch.stack([point, deep]))]
    assert margins[1] < margins[0] and Ball.of(threat).contains(x[None], deep[None]).all()


@pytest.mark.parametrize(
    ("method", "norm", "seconds", "message"),
    [
        ("exact", "L2", 1.0, "norm L2 given for the method exact; allowed: Linf. Use the method bounds."),
        ("bounds", "L0", 1.0, "norm L0 given for the method bounds; allowed: Linf, L2, L1."),
        ("complete", "Linf", 1.0, "method 'complete' given; allowed: exact, bounds."),
        ("exact", "Linf", float("inf"), "seconds inf given; allowed: a finite number, at least 0."),
        ("exact", "Linf", float("nan"), "seconds nan given"),
    ],
)
def test_settings_that_mean_nothing_are_refused(method, norm, seconds, message):
    with pytest.raises(RobbenchError, match=re.escape(message)):
        Balls(method, Threat(norm, Fraction(1, 10)), seconds)
