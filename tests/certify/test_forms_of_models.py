"""Models as people write them: settings of layers, functional calls, wrappers, several outputs, work in place."""

from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robbench.certify.bounds import Region, find_bounds
from robbench.certify.decide import decide
from robbench.certify.layers import Affine
from robbench.certify.run import Balls, certify
from robbench.certify.trace import trace_graph
from robbench.core.errors import ModelError
from robbench.core.threat import Ball
from robbench.core.types import Problem, Threat
from robbench.evaluation.options import Options
from robbench.models.spec import ModelSpec
from support.networks import seeded

SHAPE = (2, 5, 7)
X = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """Two modules and a forward; the last layer gets what is left."""

    def __init__(self, step, *parts):
        super().__init__()
        self.parts, self.step = nn.ModuleList(parts), step
        with torch.no_grad():
            self.head = nn.Linear(self.features(X).shape[1], 3)

    def features(self, x):
        return self.step(x, *self.parts).flatten(1)

    def forward(self, x):
        return self.head(self.features(x))


def branch(x, conv):
    return torch.cat([torch.relu(conv(x)), -x, F.avg_pool2d(x, 3, 1, 1)], dim=1)


def twice(x, conv):
    x = torch.relu(conv(x))
    x += torch.relu(conv(x))
    return x


def checked(x, conv):
    if x.dim() == 3:
        x = x.unsqueeze(0)
    assert x.shape[1] == 2 and len(x) == x.size(0)
    return conv(x).relu().view(x.shape[0], -1)


def conv(*args, **kwargs):
    return nn.Conv2d(2, 2, *args, **kwargs)


FORMS = {
    "groups, dilation, strides": lambda: Model(
        lambda x, c, d: torch.relu(d(torch.relu(c(x)))), nn.Conv2d(2, 4, (1, 3), (1, 2), (0, 2), (1, 2), groups=2),
        nn.Conv2d(4, 2, (3, 2), (2, 1), (1, 1)),
    ),
    "even same": lambda: Model(lambda x, c: torch.relu(c(x)), conv((2, 4), padding="same", dilation=(1, 1))),
    "avg pool": lambda: Model(
        lambda x, c: torch.relu(F.avg_pool2d(c(x), (3, 2), 2, (1, 1), True, False)), conv(2)
    ),
    "max pool ceil": lambda: Model(lambda x, c: F.max_pool2d(c(x), 2, ceil_mode=True), conv(1)),
    "max pool ceil, padding": lambda: Model(lambda x: F.max_pool2d(x - 0.5, (3, 2), (3, 2), (1, 0), ceil_mode=True)),
    "max pool dilation": lambda: Model(lambda x, p: p(x - 0.5), nn.MaxPool2d(2, 1, 1, 2)),
    "adaptive max pool": lambda: Model(lambda x, c: F.adaptive_max_pool2d(c(x), (2, 1)), conv(2)),
    "adaptive avg pool": lambda: Model(lambda x, c: F.adaptive_avg_pool2d(torch.relu(c(x)), (2, 3)), conv(2)),
    "asymmetric padding": lambda: Model(lambda x, p, c: torch.relu(c(p(x))), nn.ZeroPad2d((0, 2, 1, 0)), conv(3, 2)),
    "cat": lambda: Model(branch, nn.Conv2d(2, 3, 3, padding=1)),
    "a layer used twice": lambda: Model(twice, conv(3, padding=1)),
    "permute": lambda: Model(lambda x, c: torch.relu(c(x)).permute(0, 2, 3, 1).reshape(len(x), -1), conv(3)),
    "transpose and slices": lambda: Model(lambda x, c: torch.relu(c(x)[:, 1:, ::2].transpose(-1, 1)), conv(3)),
    "squeeze": lambda: Model(lambda x, c: F.adaptive_avg_pool2d(c(x).relu(), 1).squeeze(3).squeeze(-1), conv(3)),
    "in place": lambda: Model(lambda x, c: nn.ReLU(inplace=True)(c(x)) + 0.5, conv(2)),
    "conditions on shapes": lambda: Model(checked, conv(3)),
}  # fmt: skip


def points(region, threat, n=300):
    count = torch.arange(n)
    x = region.x.expand(n, *SHAPE)
    found = Ball.of(threat).random(Problem(x, torch.zeros(n, dtype=torch.int64), count, count, (0, 1)))
    if threat.norm == "Linf":
        found[: n // 2] = torch.where(found[: n // 2] > x[: n // 2], region.high, region.low)
    return found


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("name", FORMS)
def test_forms_of_layers_have_sound_bounds_and_proofs(name):
    net = seeded(FORMS[name](), 3, 2.0)
    graph = trace_graph(net, X)
    for node in graph.nodes:
        if isinstance(node, Affine):
            shape = graph.shape(node.parent)
            basis = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).view(-1, *shape)
            matrix = node.apply(basis).flatten(1).T
            outs = torch.eye(len(matrix), dtype=torch.float64).view(-1, *node.shape)
            assert torch.allclose(node.transpose(outs).flatten(1), matrix, atol=1e-12)
            assert torch.allclose(node.absolute(basis).flatten(1).T, matrix.abs(), atol=1e-12)
            assert node.terms or ((matrix == 0) | (matrix == 1)).all()
    y = int(net(X[:1]).argmax())
    for norm, eps in (("Linf", "0.02"), ("Linf", "0.2"), ("L2", "0.1")):
        threat = Threat(norm, Fraction(eps))
        region = Region.of(X[0], threat)
        logits = graph.run(points(region, threat))
        bounds, last = find_bounds(graph, region), len(graph.nodes) - 1
        assert (logits >= bounds.low[last]).all() and (logits <= bounds.high[last]).all()
        if eps != "0.2":
            decision = decide(graph, X[0], y, threat, "exact" if norm == "Linf" else "bounds", 1.0)
            assert not decision.is_proven or (logits.argmax(1) == y).all()


class Answers(nn.Module):
    def __init__(self, form=lambda z: z, classes=3):
        super().__init__()
        self.net, self.form = nn.Sequential(nn.Flatten(), nn.Linear(70, classes)), form

    def forward(self, x, features=False):
        return (x, self.net(x)) if features else self.form(self.net(x))


@pytest.mark.parametrize(
    ("net", "output", "binary"),
    [
        (Answers(), None, False),
        (Answers(lambda z: {"logits": z, "twice": 2 * z}), None, False),
        (Answers(lambda z: (z.view(-1, 3, 1), z)), None, False),
        (Answers(lambda z: (2 * z, z)), 1, False),
        (Answers(lambda z: {"a": z, "b": -z}), "b", False),
        (Answers(classes=1), None, True),
        (Answers(lambda z: z.squeeze(1), classes=1), None, True),
        (nn.DataParallel(Answers()), None, False),
        (nn.Sequential(nn.DataParallel(Answers()), nn.Identity()), None, False),
        (nn.Sequential(nn.Flatten(), nn.Linear(70, 3)).to(memory_format=torch.channels_last), None, False),
    ],
)
def test_answers_of_every_form_are_certified(net, output, binary):
    seeded(net)
    spec = ModelSpec(net, X, torch.zeros(3, dtype=torch.int64), name="net", output=output, binary=binary)
    file = certify(spec, Balls("bounds", Threat("Linf", Fraction(1, 1000)), 5.0), Options(samples=3))
    assert sum(file.counts.values()) == 3 and "open" not in file.counts


def test_layers_that_nothing_uses_are_left_out():
    net = seeded(Answers(lambda z: (z, torch.relu(torch.relu(z) - 0.1))))
    graph = trace_graph(net, X, output=0)
    assert graph.maxima == []
    assert len(trace_graph(net, X, output=1).maxima) == 2


class Late(nn.Module):
    """Its logits are the value that a layer changed in place; all images and noise leave that unnoticed."""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, x):
        h = x.flatten(1)[:, :3] + self.shift
        torch.nn.functional.relu(h, inplace=True)
        return h


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_a_value_that_is_changed_in_place_is_the_new_one_for_later_layers(shift):
    net = Late(shift).eval()
    graph = trace_graph(net, X)
    far = torch.full((1, *SHAPE), -500.0, dtype=torch.float64)
    assert torch.equal(graph.run(far), net(far)) and float(net(far).max()) == 0


def test_differences_far_from_the_images_are_noticed():
    class Alias(nn.Module):
        def forward(self, x):
            z = 10 * x.flatten(1)[:, :3]
            y = z + 20
            w = y
            y += torch.relu(-z - 20)  # also changes w, but only where z is far below 0
            return w + y

    with pytest.raises(ModelError, match="in place"):
        trace_graph(Alias().eval(), X)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning", "ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda net: nn.Sequential(torch.jit.script(net))])
def test_torchscript_is_refused_with_what_to_do(make):
    net = make(nn.Sequential(nn.Flatten(), nn.Linear(70, 3)).eval())
    with pytest.raises(ModelError, match=r"TorchScript, which hides its layers\. Give .* MODULE:FUNCTION"):
        trace_graph(net, X)


class Loose(nn.Module):
    """Its weight is no parameter, so it stays float32 where the model is run in float64."""

    def __init__(self):
        super().__init__()
        self.weight = torch.ones(3, 70)

    def forward(self, x):
        return F.linear(x.flatten(1), self.weight)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(70, 3))

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x)


@pytest.mark.parametrize(
    ("net", "x", "message"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(70, 3)).half(),
            X.half(),
            r"torch\.float16.* call model\.float\(\) first",
        ),
        (Mixed(), X, r"proofs are for float32 and float64\. The model answers in torch.bfloat16"),
    ],
)
def test_models_in_half_precision_are_refused(net, x, message):
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.ones_like(p))
    spec = ModelSpec(net.eval(), x, torch.zeros(3, dtype=torch.int64), name="net")
    with pytest.raises(ModelError, match=message):
        certify(spec, Balls("bounds", Threat("Linf", Fraction(1, 1000)), 5.0), Options(samples=3))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 70))

    def forward(self, x):
        return F.linear(x.view(2, -1), self.weight)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Loose(), "register_buffer"),
        (Two(), "leave the batch size open"),
        (Answers(lambda z: z[[1, 0]]), "moves values between images"),
        (Answers(lambda z: torch.cat([z, z])), "joins images"),
        (Answers(lambda z: F.pad(z, (1, 0), value=2.0)), "pads with 2.0; zeros are understood"),
        (nn.Sequential(nn.AdaptiveMaxPool2d(3), nn.Flatten()), "sizes that divide"),
        (nn.Sequential(nn.Flatten(), nn.Linear(70, 3), nn.Tanh()), r"layer 2 \(Tanh\).*smoothing takes any layer"),
    ],
)
def test_what_cannot_be_certified_is_refused_with_what_to_do(net, message):
    with pytest.raises(ModelError, match=message):
        trace_graph(net.eval(), X)
