"""Faster layers: the same logits and gradients, and plain layers wherever that is not so."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robbench.classifier import fast_layers
from robbench.classifier.batch_width import compute_probe
from robbench.classifier.fast_layers import FastConv2d, install_fast_layers, list_fast_layers
from robbench.classifier.prepare import prepare
from robbench.evaluation import inputs
from robbench.evaluation.request import RunRequest
from robbench.evaluation.run import evaluate
from robbench.models.card import Registry
from robbench.models.load import load_model
from support.commands import run

CPU = torch.device("cpu")


def frozen(*parts):
    torch.manual_seed(0)
    return nn.Sequential(*parts).eval().requires_grad_(False)


def images(n, channels=1, height=16, width=16):
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(1))


def conv(**options):
    return nn.Conv2d(1, 8, 5, **{"padding": 2, **options})


def both(model, x, **options):
    """The model as it is, and a copy with faster layers."""
    fast = copy.deepcopy(model)
    assert install_fast_layers(fast, x[:2], **options)
    return model, fast


def assert_same(fast, plain, x, bfloat16=False):
    """Compare logits and gradients up to rounding: processors and builds of torch sum in different orders.

    A processor that emulates bfloat16 rounds some of the sums, too: one of these gradients was over 1.5 % off there.
    """
    for ours, theirs in zip(compute_probe(fast, x, bfloat16), compute_probe(plain, x, bfloat16), strict=True):
        assert (ours - theirs).norm() <= (2**-5 if bfloat16 else 1e-5) * theirs.norm()


FASTER = {
    "madry": ((28, 28), conv()),
    "no bias": ((16, 16), conv(bias=False)),
    "no padding": ((20, 16), conv(padding=0)),
    "two by two": ((18, 26), conv()),
    "uneven kernel": ((16, 20), nn.Conv2d(1, 6, (5, 7), padding=(0, 5))),
    "colours": ((32, 32), nn.Conv2d(3, 16, 5, padding=2)),
    "alpha": ((16, 16), nn.Conv2d(4, 6, 5)),
}
PLAIN = {
    "small": ((8, 8), conv()),
    "odd": ((17, 16), conv()),
    "small kernel": ((16, 16), nn.Conv2d(1, 6, 3, padding=1)),
    "strided": ((16, 16), conv(stride=2)),
    "dilated": ((16, 16), conv(dilation=2)),
    "grouped": ((16, 16), nn.Conv2d(2, 6, 5, groups=2)),
    "reflecting": ((16, 16), conv(padding_mode="reflect")),
    "padded by a word": ((16, 16), conv(padding="same")),
    "padded beyond the kernel": ((16, 16), conv(padding=5)),
    "many channels": ((16, 16), nn.Conv2d(5, 6, 5)),
}


@pytest.mark.parametrize("name", FASTER)
def test_the_gradient_is_that_of_torch(name):
    size, layer = FASTER[name]
    x = images(3, layer.in_channels, *size)
    plain, fast = both(frozen(copy.deepcopy(layer), nn.Flatten()), x, bfloat16=True)
    assert list_fast_layers(fast) == ["0"] and not list_fast_layers(plain)
    assert_same(fast, plain, x)
    assert_same(fast, plain, x, bfloat16=True)
    plain, fast = plain.double(), fast.double()
    for ours, theirs in zip(compute_probe(fast, x.double()), compute_probe(plain, x.double()), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PLAIN)
def test_other_convolutions_stay_plain(name):
    size, layer = PLAIN[name]
    net = frozen(copy.deepcopy(layer), nn.Flatten())
    assert not install_fast_layers(net, images(2, layer.in_channels, *size))
    assert net[0].__class__ is nn.Conv2d


def test_at_other_sizes_of_images_torch_computes_the_gradient():
    plain, fast = both(frozen(conv(), nn.AdaptiveAvgPool2d(4), nn.Flatten()), images(2))
    for size in ((8, 8), (17, 16)):
        for ours, theirs in zip(
            compute_probe(fast, images(3, 1, *size)), compute_probe(plain, images(3, 1, *size)), strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("channels", "side"), [(1, 4), (1, 2), (3, 2)])
def test_the_weights_for_squares_are_those_of_the_transposed_convolution(channels, side):
    weight = torch.randn(6, channels, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(2, 6, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    squares = F.conv2d(grad, fast_layers._arrange_squares(weight, side), stride=side, padding=(2, 3))
    assert torch.allclose(F.pixel_shuffle(squares, side), F.conv_transpose2d(grad, weight, padding=(2, 3)))


def test_a_registered_model_answers_as_before():
    plain = load_model(Registry.default().find("mnist/at")).module.requires_grad_(False)
    x = images(16, 1, 28, 28)
    fast = prepare(plain, CPU, x[:2])
    assert len(list_fast_layers(fast)) == 1 and not list_fast_layers(prepare(plain, CPU, x[:2], fast_layers=False))
    assert_same(fast, plain, x)


def change_in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(2)


def change_data(layer):
    layer.weight.data = layer.weight.data * 2


def change_parameter(layer):
    layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)


@pytest.mark.parametrize("change", [change_in_place, change_data, change_parameter])
def test_changed_weights_are_used(change):
    x = images(4)
    plain, fast = both(frozen(conv(), nn.Flatten()), x)
    compute_probe(fast, x)
    change(plain[0])
    change(fast[0].layer)
    assert_same(fast, plain, x)


def test_layers_with_trained_weights_are_plain():
    x = images(4)
    net = nn.Sequential(conv(), nn.Flatten()).eval()
    assert not install_fast_layers(net, x)
    net.requires_grad_(False)
    assert install_fast_layers(net, x)
    net.requires_grad_(True)
    net(x.requires_grad_()).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_float64_models_stay_plain():
    assert not install_fast_layers(frozen(conv(), nn.Flatten()).double(), images(2).double())


class Jittery(nn.Module):
    """Adds noise to its weights where no version counter sees it."""

    def __init__(self):
        super().__init__()
        self.inner = conv()

    def forward(self, x):
        kept = self.inner.weight.data.clone()
        self.inner.weight.data.add_(torch.randn_like(kept))
        out = self.inner(x).flatten(1)
        self.inner.weight.data.copy_(kept)
        return out


class Particular(Jittery):
    """Reads an attribute that only the layer itself has."""

    def forward(self, x):
        return self.inner(x).flatten(1) * self.inner.weight.abs().mean()


class Failing(Jittery):
    """Fails on every image."""

    def forward(self, x):
        raise ValueError("no digit")


@pytest.mark.parametrize("model", [Jittery, Particular, Failing])
def test_models_that_then_answer_otherwise_keep_their_layers(model):
    net = frozen(model())
    before = copy.deepcopy(net.state_dict())
    assert not install_fast_layers(net, images(4))
    assert type(net[0].inner) is nn.Conv2d
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def off_in(dtype):
    """A wrong gradient for outputs of one precision."""
    arrange = fast_layers._arrange_squares
    return lambda weight, side: arrange(weight, side) * (1 + (weight.dtype == dtype))


@pytest.mark.parametrize(
    ("broken", "bfloat16", "installed"),
    [
        (lambda weight, side: 1 / 0, False, False),
        (off_in(torch.float32), False, False),
        (off_in(torch.bfloat16), True, False),
        (off_in(torch.bfloat16), False, True),  # bfloat16 is not asked for
    ],
)
def test_a_kernel_that_fails_or_computes_something_else_is_not_used(monkeypatch, broken, bfloat16, installed):
    net = frozen(conv(), nn.Flatten())
    monkeypatch.setattr(fast_layers, "_arrange_squares", broken)
    assert install_fast_layers(net, images(2), bfloat16) == installed
    assert (type(net[0]) is nn.Conv2d) != installed


def test_subclasses_and_weights_that_a_hook_computes_stay_plain():
    class Own(nn.Conv2d):
        pass

    for layer in (Own(1, 8, 5), nn.utils.spectral_norm(conv()), nn.utils.parametrizations.weight_norm(conv())):
        net = frozen(layer, nn.Flatten())
        assert not install_fast_layers(net, images(2))
        assert net[0] is layer


def test_a_layer_in_two_places_is_replaced_in_both():
    layer = conv()
    net = frozen(nn.Sequential(layer, nn.AvgPool2d(1)), nn.Conv2d(8, 1, 1), nn.Sequential(layer), nn.Flatten())
    plain, fast = both(net, images(2))
    assert list_fast_layers(fast) == ["0.0", "2.0"]
    assert fast[0][0].layer is fast[2][0].layer
    assert_same(fast, plain, images(4))


def test_a_model_with_faster_layers_can_be_sent_to_another_process():
    _, fast = both(frozen(conv(), nn.Flatten()), images(2))
    other = pickle.loads(pickle.dumps(fast))
    assert isinstance(other[0], FastConv2d)
    for ours, theirs in zip(compute_probe(other, images(4)), compute_probe(fast, images(4)), strict=True):
        assert torch.equal(ours, theirs)


def test_the_callers_model_keeps_its_layers():
    net = nn.Sequential(conv(), nn.Flatten()).eval()
    assert list_fast_layers(prepare(net, CPU, images(2))) == ["inner.0"]
    assert type(net[0]) is nn.Conv2d


@pytest.mark.parametrize(("asked", "layers"), [({}, ["inner.0"]), ({"fast_layers": False}, [])])
def test_the_environment_of_a_result_lists_the_faster_layers(asked, layers):
    net, x = frozen(conv(), nn.Flatten(), nn.Linear(8 * 256, 10)), images(4)
    result = evaluate(net, "quick", x=x, y=net(x).argmax(1), eps=0.01, norm="Linf", **asked)
    assert result.environment["fast_layers"] == layers
    assert "fast_layers" not in result.identity


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), {"fast_layers": True, "bfloat16": False, "one_by_one": False}),
        (("--no-fast-layers",), {"fast_layers": False, "bfloat16": False, "one_by_one": False}),
        (("--fast-layers", "--gradients", "bfloat16"), {"fast_layers": True, "bfloat16": True, "one_by_one": False}),
    ],
)
def test_the_options_of_the_command_line_reach_the_model(tmp_path, monkeypatch, options, expected):
    given = []
    monkeypatch.setattr(inputs, "prepare", lambda *args, **told: given.append(told) or prepare(*args, **told))
    run("eval", "-m", "digits/natural", "-s", "quick", "--samples", 2, "--results", tmp_path, *options)
    assert given == [expected]


def test_an_unfinished_run_goes_on_with_its_own_choice():
    assert "--resume" in run("eval", "--resume", "--no-fast-layers", code=2).stderr
    assert RunRequest.of("digits/natural", "quick", fast_layers=False).describe()["fast_layers"] is False
