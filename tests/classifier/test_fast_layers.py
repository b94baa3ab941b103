"""Layers with kernels of their own: the same answers and gradients, and plain layers wherever that is not so."""

import copy
import pickle

import pytest
import torch
from torch import nn

from robbench.classifier import fast_layers as kernels
from robbench.classifier.batch_width import probe, twin
from robbench.classifier.fast_layers import quicken
from robbench.classifier.guard import in_bfloat16
from robbench.classifier.prepare import prepare
from robbench.models.card import Registry
from robbench.models.load import load_model

CPU = torch.device("cpu")


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def frozen(*parts):
    torch.manual_seed(0)
    return nn.Sequential(*parts).eval().requires_grad_(False)


def images(n, channels, height, width):
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(1))


def both(model, x):
    """The model as it is, and quickened."""
    quick = copy.deepcopy(model)
    assert quicken(quick, x[:2])
    return model, quick


CONVOLUTIONS = {
    "madry": ((28, 28), nn.Conv2d(1, 6, 5, padding=2)),
    "same height": ((16, 16), nn.Conv2d(1, 6, 3, padding=1, bias=False)),
    "no padding": ((20, 16), nn.Conv2d(1, 6, 5)),
    "two by two": ((18, 26), nn.Conv2d(1, 6, 3, padding=1)),
    "uneven kernel": ((16, 20), nn.Conv2d(1, 6, (3, 5), padding=(0, 3))),
    "colours": ((32, 32), nn.Conv2d(3, 16, 3, padding=1)),
    "alpha": ((16, 16), nn.Conv2d(4, 6, 1)),
    # What is left to torch:
    "small": ((8, 8), nn.Conv2d(1, 6, 3, padding=1)),
    "odd": ((17, 16), nn.Conv2d(1, 6, 3, padding=1)),
    "strided": ((16, 16), nn.Conv2d(1, 6, 3, stride=2, padding=1)),
    "dilated": ((16, 16), nn.Conv2d(1, 6, 3, dilation=2, padding=2)),
    "grouped": ((16, 16), nn.Conv2d(2, 6, 3, groups=2, padding=1)),
    "reflecting": ((16, 16), nn.Conv2d(1, 6, 3, padding=1, padding_mode="reflect")),
    "padded by a word": ((16, 16), nn.Conv2d(1, 6, 3, padding="same")),
    "padded beyond the kernel": ((16, 16), nn.Conv2d(1, 6, 3, padding=3)),
    "many channels": ((16, 16), nn.Conv2d(5, 6, 3, padding=1)),
}
OURS = list(CONVOLUTIONS)[:7]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_have_the_gradient_of_torch(name):
    size, layer = CONVOLUTIONS[name]
    x = images(3, layer.in_channels, *size)
    plain, quick = both(frozen(copy.deepcopy(layer).double(), nn.Flatten()), x.double())
    for ours, theirs in zip(probe(quick, x.double()), probe(plain, x.double()), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    assert (quick[0].side(x.requires_grad_()) > 1) == (name in OURS)


def test_products_have_the_answer_and_the_gradient_of_torch():
    x = images(7, 3, 16, 16)
    for bias in (True, False):
        plain, quick = both(frozen(nn.Flatten(), nn.Linear(768, 512, bias=bias), nn.Tanh(), nn.Linear(512, 10)), x)
        assert type(quick[1]) is not nn.Linear
        assert type(quick[3]) is nn.Linear, "too small to gain"
        for ours, theirs in zip(probe(quick, x), probe(plain, x), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        wide = x.flatten(1).view(1, 7, 1, 768)  # tokens, say
        assert torch.allclose(quick[1](wide), plain[1](wide), rtol=1e-5, atol=1e-6)
        finer = plain.double(), quick.double()  # whose weights are others, and no kernel is for them
        assert torch.equal(*(model(x.double()) for model in finer))


def test_a_registered_model_answers_up_to_rounding():
    plain = load_model(Registry.default().find("mnist/at")).module.requires_grad_(False)
    x = images(16, 1, 28, 28)
    quick = prepare(plain, CPU, x[:2])
    assert sum(hasattr(layer, "kept") for layer in layers(quick)) == 3
    for ours, theirs in zip(probe(quick, x), probe(plain, x), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_the_bits_are_those_of_autocast():
    x = images(8, 1, 28, 28)
    parts = [nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten()]
    plain, quick = both(frozen(*parts, nn.Linear(16 * 784, 64), nn.ReLU(), nn.Linear(64, 10)), x)
    for ours, theirs in zip(probe(quick, x, coarse=True), probe(plain, x, coarse=True), strict=True):
        assert torch.equal(ours, theirs)
    with in_bfloat16(CPU), torch.no_grad():
        assert torch.equal(quick(x), plain(x))


def test_an_autocast_of_another_kind_is_left_to_torch():
    x = images(4, 1, 16, 16)
    plain, quick = both(frozen(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 196, 256)), x)
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        ours, theirs = quick(x), plain(x)
    assert ours.dtype == theirs.dtype
    assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2)


def change_in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(2)


def change_data(layer):
    layer.weight.data = layer.weight.data * 2


def change_parameter(layer):
    layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)


def load_state(layer):
    layer.load_state_dict({k: v * (2 if k == "weight" else 1) for k, v in layer.state_dict().items()})


@pytest.mark.parametrize("change", [change_in_place, change_data, change_parameter, load_state])
def test_weights_that_become_others_are_noticed(change):
    x = images(4, 1, 16, 16)
    plain, quick = both(frozen(nn.Conv2d(1, 8, 3, padding=1), nn.Flatten(), nn.Linear(2048, 256)), x)
    for coarse in (False, True):
        probe(quick, x, coarse)  # whatever is kept, is kept now
    for model in (plain, quick):
        for layer in layers(model):
            change(layer)
    for coarse in (False, True):
        for ours, theirs in zip(probe(quick, x, coarse), probe(plain, x, coarse), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_layers_that_are_trained_are_plain():
    x = images(4, 1, 16, 16)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 196, 256)).eval()
    assert not quicken(model, x)
    model.requires_grad_(False)
    assert quicken(model, x)
    model.requires_grad_(True)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class Jittery(nn.Module):
    """Adds noise to its weights where no version counter sees it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(256, 1024)

    def forward(self, x):
        kept = self.inner.weight.data.clone()
        self.inner.weight.data.add_(torch.randn_like(kept))
        out = self.inner(x.flatten(1))
        self.inner.weight.data.copy_(kept)
        return out


class Particular(nn.Module):
    """Works with layers of one exact type only."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(256, 1024)

    def forward(self, x):
        if type(self.inner) is not nn.Linear:
            raise TypeError(type(self.inner))
        return self.inner(x.flatten(1))


@pytest.mark.parametrize("model", [Jittery, Particular])
def test_models_that_then_answer_otherwise_keep_their_layers(model):
    x = images(4, 1, 16, 16)
    net = frozen(model())
    before = copy.deepcopy(net.state_dict())
    assert not quicken(net, x)
    assert type(net[0].inner) is nn.Linear
    assert not hasattr(net[0].inner, "kept")
    net(x)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_a_kernel_that_fails_or_lies_is_not_used(monkeypatch):
    x = images(4, 1, 16, 16)
    net = frozen(nn.Flatten(), nn.Linear(256, 1024))
    expected = net(x)
    for broken in (lambda x, w, b: 1 / 0, lambda x, w, b: torch.zeros(len(x), 1024)):
        monkeypatch.setattr(kernels, "_product", broken)
        assert not quicken(net, x)
        assert torch.equal(net(x), expected)


def test_a_model_that_fails_on_images_is_left_alone():
    net = frozen(nn.Linear(3, 2**18))
    assert not quicken(net, images(2, 1, 16, 16))
    assert type(net[0]) is nn.Linear


def test_a_quick_model_can_be_sent_to_another_process():
    x = images(4, 1, 16, 16)
    _, quick = both(frozen(nn.Conv2d(1, 8, 3, padding=1), nn.Flatten(), nn.Linear(2048, 256)), x)
    for ours, theirs in zip(probe(pickle.loads(pickle.dumps(quick)), x), probe(quick, x), strict=True):
        assert torch.equal(ours, theirs)


def test_copies_share_what_is_kept_and_subclasses_stay_as_they_are():
    class Own(nn.Linear):
        pass

    x = images(4, 1, 16, 16)
    net = frozen(nn.Flatten(), Own(256, 1024), nn.Linear(1024, 512))
    assert quicken(net, x)
    assert type(net[1]) is Own
    assert type(net[2]) is not nn.Linear
    other = twin(net)
    assert other[2].kept is net[2].kept
    assert torch.equal(other(x), net(x))


def test_weights_that_a_hook_computes_are_left_to_torch():
    x = images(4, 1, 16, 16)
    net = frozen(nn.Flatten(), nn.utils.spectral_norm(nn.Linear(256, 1024)))
    assert not quicken(net, x)
    assert type(net[1]) is nn.Linear


def test_the_callers_model_keeps_its_layers():
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 1024)).eval()
    prepared = prepare(net, CPU, images(2, 1, 16, 16))
    assert type(net[1]) is nn.Linear
    assert [type(layer) is nn.Linear for layer in layers(prepared)] == [False]
