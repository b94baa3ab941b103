"""Graphs compute what modules compute; intervals and bounds hold for every point; what is not understood is refused."""

from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robbench.certify.bounds import Region, default_slopes, find_bounds, margin_rows, relax
from robbench.certify.layers import Affine
from robbench.certify.trace import trace_graph
from robbench.core.errors import ModelError
from robbench.core.threat import Ball
from robbench.core.types import Problem, Threat
from robbench.models.architectures import Normalized, build
from support.networks import seeded, zoo

NAMES = sorted(zoo())


def image(seed=0, shape=(1, 4, 4)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).double()


def sample(region, threat, n, seed=0):
    """Points of the ball in the box; in Linf a third of them are corners."""
    count = torch.arange(n)
    x = region.x.expand(n, *region.x.shape)
    p = Problem(x, torch.zeros(n, dtype=torch.int64), count, count, (seed, 1))
    points = Ball.of(threat).random(p)
    if threat.norm == "Linf":
        points[: n // 3] = torch.where(points[: n // 3] > x[: n // 3], region.high, region.low)
    return points


@pytest.mark.parametrize("name", NAMES)
def test_affine_maps_have_their_transposes_and_absolute_values(name):
    graph = trace_graph(zoo()[name], image()[None].float())
    for node in graph.nodes:
        if isinstance(node, Affine):
            shape = graph.shape(node.parent)
            basis = torch.eye(torch.Size(shape).numel(), dtype=torch.float64)
            matrix = node.apply(basis.view(-1, *shape)).flatten(1).T
            outs = torch.eye(len(matrix), dtype=torch.float64).view(-1, *node.shape)
            assert torch.allclose(node.transpose(outs).flatten(1), matrix, atol=1e-12)
            assert torch.allclose(node.absolute(basis.view(-1, *shape)).flatten(1).T, matrix.abs(), atol=1e-12)
            assert (node.bias_size >= node.bias.abs() - 1e-12).all()
            assert node.terms >= (matrix != 0).sum(1).max() or node.terms == 0
            assert node.terms or ((matrix != 0).sum(1) == 1).all()


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("name", NAMES)
def test_no_sample_leaves_an_interval_or_falls_below_a_bound(name, norm):
    eps = {"Linf": "0.1", "L2": "0.3", "L1": "0.6"}[norm]
    threat = Threat(norm, Fraction(eps))
    for seed in range(3):
        graph = trace_graph(zoo(seed)[name], image()[None].float())
        region = Region.of(image(seed), threat)
        points = sample(region, threat, 3000)
        logits = graph.run(points)
        rows = margin_rows(graph, 0, [1, 2])
        reached = (logits @ rows[len(graph.nodes) - 1].T).min(0).values
        plain, found = find_bounds(graph, region, relaxed=False), find_bounds(graph, region)
        last = len(graph.nodes) - 1
        for bounds in (plain, found):
            assert (logits >= bounds.low[last]).all() and (logits <= bounds.high[last]).all()
            for slopes in (default_slopes(bounds.gaps), {at: 0.3 * g.new_ones(1) for at, g in bounds.gaps.low.items()}):
                assert (relax(graph, region, bounds.gaps, rows, slopes).bound <= reached + 1e-9).all()
        for at in graph.maxima:  # relaxation only tightens
            assert (found.gaps.low[at] >= plain.gaps.low[at] - 1e-12).all()
            assert (found.gaps.high[at] <= plain.gaps.high[at] + 1e-12).all()


def test_the_bound_of_a_linear_network_is_its_closed_form():
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, -1.0]])
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        net[1].weight.copy_(weight)
        net[1].bias.copy_(torch.tensor([0.25, -0.5]))
    x = torch.tensor([0.5, 0.95, 0.5]).view(1, 1, 3)
    graph = trace_graph(net, x[None])
    region = Region.of(x, Threat("Linf", Fraction(1, 10)))
    bound = relax(graph, region, find_bounds(graph, region).gaps, margin_rows(graph, 0, [1]), {}).bound
    # The margin is x1 − 3 x2 + 1.5 x3 + 0.75. Its least value has x1 and x3 at 0.4, and x2 at the box's 1.
    assert float(bound) == pytest.approx(0.4 - 3 + 0.6 + 0.75, abs=1e-5)
    ball = Region.of(x, Threat("L2", Fraction(1, 25)))
    bound = relax(graph, ball, find_bounds(graph, ball).gaps, margin_rows(graph, 0, [1]), {}).bound
    length = float(torch.tensor([1, -3, 1.5]).norm())
    assert float(bound) == pytest.approx(0.5 - 2.85 + 0.75 + 0.75 - 0.04 * length, abs=1e-4)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_the_region_holds_every_point_that_the_judge_lets_count(norm):
    threat, x = Threat(norm, Fraction(1, 4)), torch.full((1, 1, 1, 4), 0.5)
    region, step = Region.of(x[0], threat), torch.zeros_like(x)
    step[..., 0] = 1
    reach = torch.linspace(0.25, 0.2502, 4001, dtype=torch.float64)
    allowed = Ball.of(threat).contains(x.expand(len(reach), -1, -1, -1).double(), x + reach.view(-1, 1, 1, 1) * step)
    assert allowed.any() and not allowed.all()
    assert region.eps > float(reach[allowed].max())


def test_bounds_cover_what_float32_rounds():
    for seed in range(3):
        net = seeded(build("digits_convnet", {}, 10, (1, 8, 8)), seed).eval()
        x = image(seed, (1, 8, 8)).float()
        graph = trace_graph(net, x[None])
        exact = x.double()
        bounds = find_bounds(graph, Region(exact, "Linf", 0.0, exact, exact))
        low, high = bounds.low[len(graph.nodes) - 1], bounds.high[len(graph.nodes) - 1]
        with torch.no_grad():
            logits = net(x[None])
        assert (logits != graph.run(exact[None])).any()
        assert (low <= logits).all() and (logits <= high).all() and float((high - low).max()) < 0.1
        slack = relax(
            graph, Region(exact, "Linf", 0.0, exact, exact), bounds.gaps, margin_rows(graph, 0, [1]),
            default_slopes(bounds.gaps),
        ).bound  # fmt: skip
        difference = float(graph.run(exact[None])[0] @ margin_rows(graph, 0, [1])[len(graph.nodes) - 1][0]) - slack
        assert abs(float(logits[0, 0] - logits[0, 1]) - (slack + difference)) <= difference < 0.05


def test_registered_architectures_are_understood():
    for name, args, shape in (
        ("mlp", {"width": 8}, (1, 8, 8)), ("madry_mnist", {}, (1, 28, 28)), ("resnet18", {}, (3, 8, 8)),
        ("wide_resnet", {"depth": 10, "widen_factor": 1}, (3, 8, 8)),
    ):  # fmt: skip
        net = Normalized(build(name, args, 10, shape), [0.4] * shape[0], [0.2] * shape[0]).eval()
        trace_graph(net, image(0, shape)[None].float())


class Strange(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.step, self.head = step, nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.step(x).flatten(1))


@pytest.mark.parametrize(
    ("step", "named"),
    [
        (nn.Sigmoid(), r"layer step \(Sigmoid\) is not understood"),
        (nn.LeakyReLU(), r"layer step \(LeakyReLU\)"),
        (torch.tanh, "layer tanh"),
        (lambda x: x * x, "multiplies two values"),
        (lambda x: F.softmax(x, 1), "softmax"),
        (lambda x: x.view(-1, 2, 4), "moves values between images"),
        (lambda x: x - x.mean(0), "mean over the batch"),
        (lambda x: x.half().float(), "half"),
        (lambda x: x if x.sum() > 0 else -x, "cannot be listed"),
        (lambda x: x / x.sum(), "not understood"),
        (nn.BatchNorm2d(1, track_running_stats=False), "no running statistics"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), "reflect"),
    ],
)
def test_what_is_not_understood_is_refused_in_a_sentence_that_names_it(step, named):
    with pytest.raises(ModelError, match=named):
        trace_graph(Strange(step).eval(), image()[None].float())


def test_a_hook_that_changes_the_logits_is_noticed():
    net = seeded(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
    net[1].register_forward_hook(lambda layer, args, out: out * 1.001)
    with pytest.raises(ModelError, match="do not give its logits"):
        trace_graph(net, image()[None].float())
