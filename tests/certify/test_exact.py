"""The exact verdict equals enumeration; bounds never exceed it; no sample contradicts a proof."""

import time
from fractions import Fraction

import pytest
import torch
from torch import nn

from robbench.certify import bounds as bounding
from robbench.certify import decide as deciding
from robbench.certify.bounds import Gaps, Region, find_bounds
from robbench.certify.branch import bound_margins, prove_by_branching
from robbench.certify.decide import decide
from robbench.certify.exact import Program, solve_margin
from robbench.certify.layers import Affine, Input, Sum
from robbench.certify.trace import trace_graph
from robbench.core.types import Threat
from support.networks import enumerate_margin, mlp, seeded, zoo

FAR = 1e6
LARGE = ("conv", "residual", "padded_pool")  # too many signs to enumerate


def image(seed, shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).double()


def cases():
    for seed in range(4):
        yield f"mlp-{seed}", mlp(seed), (1, 2, 2), 0.15
    for seed in range(2):
        for name, net in zoo(seed).items():
            if name not in LARGE:
                yield f"{name}-{seed}", net, (1, 4, 4), 0.15


CASES = list(cases())


@pytest.mark.parametrize(("name", "net", "shape", "eps"), CASES, ids=[c[0] for c in CASES])
def test_exact_equals_enumeration_and_bounds_never_exceed_it(name, net, shape, eps):
    x = image(3, shape)
    graph = trace_graph(net, x[None].float())
    y = int(graph.run(x[None]).argmax())
    region = Region.of(x, Threat("Linf", Fraction(str(eps))))
    gaps, others = find_bounds(graph, region).gaps, [k for k in range(3) if k != y]
    truth = {k: enumerate_margin(graph, x, region.eps, y, k) for k in others}
    for k, bound in zip(others, bound_margins(graph, region, gaps, y, others, FAR), strict=True):
        assert bound <= truth[k] + 1e-7
    program = Program.of(graph, region, gaps)
    for k in others:
        # Just below the truth the solver proves, just above it finds a point or cannot tell.
        for cutoff, is_proven in ((truth[k] - 1e-4, True), (truth[k] + 1e-4, False)):
            answer = solve_margin(graph, region, program, y, k, cutoff, time.monotonic() + 60)
            assert bool(answer and answer.is_proven) == is_proven
            if answer is not None and answer.point is not None:
                assert truth[k] < 0 and float(graph.run(answer.point[None])[0] @ _row(y, k)) < 0
    least = min(truth.values())
    for method in ("exact", "bounds"):
        decision = decide(graph, x, y, Threat("Linf", Fraction(str(eps))), method, 60)
        assert decision.is_proven == (least > 0), "these truths are far from the tolerance"
        assert abs(least) > 1e-3 and (decision.point is not None) == (least < 0)
        assert not decision.is_proven or decision.margin <= least + 1e-7


def _row(y, k):
    row = torch.zeros(3, dtype=torch.float64)
    row[y], row[k] = 1, -1
    return row


@pytest.mark.parametrize("name", LARGE)
def test_branching_and_program_agree_where_signs_are_too_many(name):
    seen = set()
    for seed in range(3):
        x = image(seed, (1, 4, 4))
        graph = trace_graph(zoo(seed)[name], x[None].float())
        y = int(graph.run(x[None]).argmax())
        for eps in ("0.02", "0.1", "0.3"):
            threat = Threat("Linf", Fraction(eps))
            verdicts = {m: decide(graph, x, y, threat, m, 60) for m in ("exact", "bounds")}
            assert len({(d.is_proven, d.point is None) for d in verdicts.values()}) == 1
            seen.add(verdicts["exact"].is_proven)
            if verdicts["exact"].is_proven:
                region, generator = Region.of(x, threat), torch.Generator().manual_seed(9)
                noise = torch.rand((10_000, *x.shape), generator=generator).double()
                points = region.low + torch.where(noise < 0.3, 0.0, torch.where(noise > 0.7, 1.0, noise)) * (
                    region.high - region.low
                )
                assert (graph.run(points).argmax(1) == y).all()
    assert seen == ({True} if name == "padded_pool" else {True, False})


def test_a_margin_within_the_tolerance_is_open(monkeypatch):
    x = image(3, (1, 4, 4))
    graph = trace_graph(zoo()["linear"], x[None].float())
    y = int(graph.run(x[None]).argmax())
    threat = Threat("Linf", Fraction(1, 1000))
    assert decide(graph, x, y, threat, "exact", 10).is_proven
    truth = min(enumerate_margin(graph, x, Region.of(x, threat).eps, y, k) for k in range(3) if k != y)
    monkeypatch.setattr(deciding, "_SOLVER", truth)
    decision = decide(graph, x, y, threat, "exact", 10)
    assert not decision.is_proven and decision.point is None


def test_without_time_a_verdict_is_open():
    x = image(0, (1, 4, 4))
    graph = trace_graph(zoo()["conv"], x[None].float())
    region = Region.of(x, Threat("Linf", Fraction(1, 5)))
    gaps = find_bounds(graph, region).gaps

    def leaf(part: Gaps):
        raise AssertionError("no part is linear yet")

    y = int(graph.run(x[None]).argmax())
    answers = [prove_by_branching(graph, region, gaps, y, k, FAR, 0.0, leaf) for k in range(3) if k != y]
    assert not any(a.is_proven for a in answers)


@pytest.mark.parametrize("name", sorted(zoo()))
def test_bounds_and_program_hold_for_networks_whose_layers_err(name, monkeypatch):
    size = 0.02
    monkeypatch.setattr(bounding, "bound_noise", lambda node, sizes: torch.full((1, *node.shape), size).double())
    for seed in range(3):
        x = image(seed, (1, 4, 4))
        graph = trace_graph(zoo(seed)[name], x[None].float())
        y, region = int(graph.run(x[None]).argmax()), Region.of(x, Threat("Linf", Fraction(1, 20)))
        gaps, others = find_bounds(graph, region).gaps, [k for k in range(3) if k != y]
        generator = torch.Generator().manual_seed(seed)

        def err(like, generator=generator):
            return size * (2 * torch.randint(2, like.shape, generator=generator) - 1)

        points = region.low + torch.rand((2000, *x.shape), generator=generator).double() * (region.high - region.low)
        values = []
        for node in graph.nodes:
            match node:
                case Input():
                    value = points
                case Affine():
                    value = node.apply(values[node.parent]) + node.bias
                    value = value + err(value)
                case Sum():
                    value = values[node.parents[0]] + values[node.parents[1]]
                    value = value + err(value)
                case _:
                    value = torch.maximum(values[node.a], torch.zeros(()) if node.b is None else values[node.b])
            values.append(value)
        least = {k: float((values[-1] @ _row(y, k)).min()) for k in others}
        for k, bound in zip(others, bound_margins(graph, region, gaps, y, others, FAR), strict=True):
            assert bound <= least[k] + 1e-7
            answer = solve_margin(graph, region, Program.of(graph, region, gaps), y, k, least[k] + 1e-6, FAR**2)
            assert answer is None or not answer.is_proven


def test_rounding_of_deep_networks_does_not_hide_their_margins():
    layers = [part for _ in range(6) for part in (nn.Linear(64, 64), nn.ReLU())]
    net = seeded(nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 3)), 0, 1.4)
    x = image(0, (1, 8, 8))
    y = int(net(x[None].float()).argmax())
    assert decide(trace_graph(net, x[None].float()), x, y, Threat("Linf", Fraction(1, 1000)), "bounds", 30).is_proven
