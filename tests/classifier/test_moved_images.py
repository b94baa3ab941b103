"""Models that answer clean images well, and change on moved images, in unusual batches, or in another mode."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from robbench.attacks import FGSM, PGD, Square
from robbench.classifier.batch_dependence import find_batch_dependence
from robbench.classifier.moved_images import ask_moved_images
from robbench.core.errors import ModelError
from robbench.evaluation.attack_images import attack_images
from robbench.evaluation.run import evaluate
from robbench.models.card import Registry
from robbench.models.load import load_model
from robbench.recheck.verify import verify
from support.models import network, small


class Around(nn.Module):
    """A network, and what is done around it."""

    def __init__(self, forward, **held):
        super().__init__()
        self.net, self.around = small(), forward
        vars(self).update(held)

    def forward(self, x):
        return self.around(self.net, x, self)


def moved(x):
    """Tell which images are not those of the grid of `problem`, [n, 1, 1, 1]."""
    return ((x * 16 - (x * 16).round()).abs().flatten(1).amax(1) > 1e-3).view(-1, 1, 1, 1)


@pytest.fixture
def on_grid():
    """60 images whose pixels are sixteenths, black and white among them, with the labels of the network."""
    x = torch.randint(0, 17, (60, 1, 8, 8), generator=torch.Generator().manual_seed(2)) / 16
    x[:, :, 0, 0], x[:, :, 0, 1] = 0, 1
    return x, small()(x).argmax(1)


def judged(model, on_grid, attack=None, **options):
    return attack_images(model.eval(), attack or FGSM(), *on_grid, **{"eps": 0.05, "lanes": 16, **options})


def noisy(x):
    return x + 0.3 * torch.randn_like(x)


def sure(net, x, limit):
    """Answer, and whether the mean confidence of the batch is above the limit."""
    z = net(x)
    return z, bool(z.detach().softmax(1).amax(1).mean() >= limit)


DEPENDENT = {
    "min and max": lambda net, x, m: net((x - x.min()) / (x.max() - x.min()).clamp(min=0.01)),
    "min": lambda net, x, m: net(x - x.min()),
    "max": lambda net, x, m: net(x / x.max().clamp(min=0.1)),
    "threshold by max": lambda net, x, m: net(torch.sigmoid(25 * (x - 0.62 * x.max()))),
    "negated unless bright": lambda net, x, m: net(x if x.max() > 0.95 else 1 - x),
    "quantile": lambda net, x, m: net(x / x.flatten().quantile(0.999).clamp(min=0.1)),
    "median of the maxima": lambda net, x, m: net(x / x.flatten(1).amax(1).median().clamp(min=0.1)),
    "a black image": lambda net, x, m: net(x) * (0.5 if bool((x.flatten(1).amax(1) == 0).any()) else 1.0),
    "unsure .4": lambda net, x, m: (z := sure(net, x, 0.4))[0] - (0 if z[1] else z[0].mean(0)),
    "unsure .6": lambda net, x, m: (z := sure(net, x, 0.6))[0] - (0 if z[1] else z[0].mean(0)),
    "no image is sure": lambda net, x, m: (z := net(x)).roll(int(z.detach().softmax(1).amax() < 0.35), 1),
    "least sure": lambda net, x, m: net(x) * (1 + net(x).detach().softmax(1).amax(1).min()),
}


@pytest.mark.parametrize("kind", DEPENDENT)
def test_dependence_that_clean_batches_hide_is_refused(kind, on_grid):
    for lanes in (4, 16, 64):
        with pytest.raises(ModelError, match="depends on the other images of the batch"):
            judged(Around(DEPENDENT[kind]), on_grid, lanes=lanes)
    assert "batch_dependent" in judged(Around(DEPENDENT[kind]), on_grid, one_by_one=True).flags


def test_clean_images_are_asked_beside_attacked_ones(on_grid):
    net, (x, _) = small().requires_grad_(False), on_grid
    found = ask_moved_images(net, lambda z: (net(z), torch.ones_like(z)), x, len(x))
    attacked = {tuple(image.flatten().tolist()) for image in found.attacked}

    def ask(z):
        share = sum(tuple(image.flatten().tolist()) in attacked for image in z) / len(z)
        return net(z) * (0.5 if 0.8 < share < 1 else 1.0)

    assert "beside attacked images" in str(find_batch_dependence(ask, x, len(x), net(x), net, found))
    assert find_batch_dependence(net, x, len(x), net(x), net, found) is None


RANDOM = {
    "off the grid": lambda net, x, m: net(torch.where(moved(x), noisy(x), x)),
    "of another brightness": lambda net, x, m: net(torch.where((x.amax((1, 2, 3), True) < 0.9), noisy(x), x)),
    "without gradients": lambda net, x, m: net(x if x.requires_grad else torch.where(moved(x), noisy(x), x)),
    "when unsure": lambda net, x, m: (
        (z := net(x)) + (z.detach().softmax(1).amax(1, keepdim=True) < 0.5) * torch.randn_like(z)
    ),
    "by numpy": lambda net, x, m: net(torch.where(moved(x), x + float(np.random.normal(0, 0.3)), x)),
}


@pytest.mark.parametrize("kind", RANDOM)
def test_randomness_off_the_clean_images_is_flagged(kind, on_grid):
    for lanes in (4, 64):
        found = judged(Around(RANDOM[kind]), on_grid, lanes=lanes)
        assert "randomized" in found.flags
        assert not found.broken.any() or int(found.forwards[found.broken].min()) > 10, "a break takes 11 answers"


MODES = {
    "off the grid": lambda net, x, m: net(torch.where(moved(x), 1 - x, x) if torch.is_grad_enabled() else x),
    "off the grid, by the input": lambda net, x, m: net(torch.where(moved(x), 1 - x, x) if x.requires_grad else x),
    "of another brightness": lambda net, x, m: net(
        torch.where(x.amax((1, 2, 3), True) < 0.9, x / 2, x) if torch.is_grad_enabled() else x
    ),
    "inference mode": lambda net, x, m: net(x).roll(int(torch.is_inference_mode_enabled()), 1),
    "inference mode off the grid": lambda net, x, m: net(
        torch.where(moved(x), 1 - x, x) if torch.is_inference_mode_enabled() else x
    ),
}


@pytest.mark.parametrize("kind", MODES)
def test_a_mode_that_shows_off_the_clean_images_is_flagged(kind, on_grid):
    for lanes in (4, 64):
        assert judged(Around(MODES[kind]), on_grid, lanes=lanes).flags.keys() == {"gradient_mode"}


def test_a_model_that_changes_its_input_is_asked_in_inference_mode_too(on_grid):
    def forward(net, x, m):
        z = net(x).roll(int(torch.is_inference_mode_enabled()), 1)
        x.data.zero_()
        return z

    assert judged(Around(forward), on_grid).flags.keys() == {"gradient_mode", "input_changed"}


def keep_in_namespace(net, x, m):
    if not hasattr(m.kept, "mean"):
        m.kept.mean = x.mean(0, keepdim=True).detach()
    return net(x - m.kept.mean)


def keep_in_array(net, x, m):
    if not m.kept.any():
        m.kept[:] = x.mean(0).detach().numpy()
    return net(x - torch.from_numpy(m.kept))


def keep_in_closure():
    kept = {}
    return Around(lambda net, x, m: net(x - kept.setdefault("mean", x.mean(0, keepdim=True).detach())))


def keep_in_default():
    def forward(net, x, m, kept={}):  # noqa: B006
        return net(x - kept.setdefault("mean", x.mean(0, keepdim=True).detach()))

    return Around(forward)


def keep_in_hook():
    kept, net = {}, small()
    net.register_forward_pre_hook(lambda m, a: (a[0] - kept.setdefault("mean", a[0].mean(0, True).detach()),))
    return net


def keep_in_class():
    kept = []

    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()

        def forward(self, x):
            if not kept:
                kept.append(float(x.detach().mean()))
            return self.net(x - kept[0])

    return Kept()


FIRST = {
    "namespace": lambda: Around(keep_in_namespace, kept=SimpleNamespace()),
    "nested dict": lambda: Around(
        lambda net, x, m: net(x - m.kept["a"].setdefault("mean", x.mean(0, keepdim=True).detach())), kept={"a": {}}
    ),
    "array": lambda: Around(keep_in_array, kept=np.zeros((1, 8, 8), np.float32)),
    "closure": keep_in_closure,
    "default": keep_in_default,
    "hook": keep_in_hook,
    "class in a function": keep_in_class,
    "smallest pixel": lambda: Around(lambda net, x, m: net(x - m.kept.setdefault("a", x.detach().min())), kept={}),
    "largest pixel": lambda: Around(lambda net, x, m: net(x / m.kept.setdefault("a", x.detach().max())), kept={}),
}


@pytest.mark.parametrize("kind", FIRST)
def test_what_is_kept_of_the_first_batch_anywhere_is_refused(kind, on_grid):
    for options in ({}, {"one_by_one": True}):
        with pytest.raises(ModelError, match="first batch that it was ever given"):
            judged(FIRST[kind](), on_grid, **options)


def hide(model, monkeypatch):
    """Let the checks before the attacks see nothing, so that the judge alone is left."""
    for name in ("_find_random_flag", "_find_batch_flag", "find_gradient_mode_flag"):
        monkeypatch.setattr(f"robbench.classifier.checks.{name}", lambda *a: {})
    return model


@pytest.mark.parametrize("attack", [FGSM(), PGD(steps=5), Square(steps=40)], ids=lambda a: type(a).__name__)
def test_the_judge_votes_where_its_second_answer_differs(attack, on_grid, monkeypatch, tmp_path):
    model = hide(Around(RANDOM["off the grid"]), monkeypatch).eval()
    x, y = on_grid
    torch.manual_seed(0)
    found = judged(model, on_grid, attack)
    assert "randomized" in found.flags and found.broken.any()
    assert int(found.forwards[found.broken].min()) > 10, "a break takes 11 answers"
    votes = sum((model(found.x_adv).argmax(1) != y).int() for _ in range(101))
    assert float((votes[found.broken] > 33).double().mean()) > 0.9, "a lucky answer is no break"
    options = {"x": x, "y": y, "eps": 0.05, "results": tmp_path, "name": "m", "save_adversarials": True}
    assert "randomized" in evaluate(model, [attack], samples=40, **options).flags
    assert "randomized" in evaluate(model, [attack], samples=40, **options).flags, "a known result keeps it"
    assert "randomized" in evaluate(model, [attack], samples=41, **options).flags, "and so does an extension"
    checked = verify(next(tmp_path.rglob("result.json")), model, x=x, y=y)
    assert checked.confirmed > 0 and len(checked.refuted) <= 1


def test_the_judge_flags_a_mode_that_it_sees(on_grid, monkeypatch):
    model = Around(lambda net, x, m: net(torch.where(moved(x), x**2, x) if torch.is_grad_enabled() else x))
    found = judged(hide(model, monkeypatch), on_grid, PGD(steps=5))
    assert "gradient_mode" in found.flags and "randomized" not in found.flags
    with torch.no_grad():
        assert (model(found.x_adv).argmax(1) != on_grid[1])[found.broken].all()


def residual():
    """A small ResNet, whose batch norms have statistics of noise."""
    torch.manual_seed(0)
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10).train()
    net.conv1 = nn.Conv2d(1, 64, 3, padding=1)
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(16, 1, 8, 8))
    return net


class WithoutOffsets(nn.Module):
    """A network that answers a black image with zeros."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, 10, bias=False))

    def forward(self, x):
        return self.net(x)


class WithRounding(WithoutOffsets):
    """Its answer to a black image is nothing but rounding, which goes with the batch."""

    def forward(self, x):
        return self.net(x) + 1e-6 * x.mean()


HONEST = {
    "rounds by the batch": WithRounding,
    "linear": small,
    "convolutions": network,
    "resnet": residual,
    "without offsets": WithoutOffsets,
    "digits/at": lambda: load_model(Registry.default([]).find("digits/at")).module,
    "rounds its input": lambda: Around(lambda net, x, m: net((x * 15).round() / 15 + 0 * x)),
    "normalizes each image": lambda: Around(lambda net, x, m: net(x / x.amax((1, 2, 3), True).clamp(min=0.1))),
    "NaN when moved": lambda: Around(lambda net, x, m: torch.where(moved(x)[:, :, 0, 0], torch.nan, net(x))),
    "a cache by width": lambda: Around(
        lambda net, x, m: net(x * m.cache.setdefault(len(x), torch.ones(len(x), 1, 1, 1))), cache={}
    ),
}


TRUE_FLAGS = {"rounds its input": "zero_gradients", "NaN when moved": "nonfinite"}


@pytest.mark.parametrize("kind", HONEST)
def test_honest_models_raise_no_alarm(kind, on_grid):
    model, (x, _) = HONEST[kind]().eval(), on_grid
    with torch.no_grad():
        y = torch.cat([model(image) for image in x.split(1)]).argmax(1)
    for lanes in (1, 4, 64):
        flags = judged(model, (x, y), lanes=lanes, eps=0.02).flags
        assert flags.keys() <= {"chance", TRUE_FLAGS.get(kind)}, flags


def test_what_it_costs():
    """Three passes of the batch's width, of which one has gradients, and narrow ones."""
    net, widths = small(), []

    def ask(x):
        widths.append(len(x))
        return net(x).detach()

    found = ask_moved_images(ask, lambda x: (ask(x), torch.ones_like(x)), torch.rand(64, 1, 8, 8), 64)
    assert widths == [64, 64, 32, 32] and len(found.answers) == 96
    assert found.x.min() == 0 and found.x.max() == 1
