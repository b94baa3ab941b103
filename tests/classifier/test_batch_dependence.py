"""Models whose answer to an image depends on the other images of its batch, and models that only look like it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robbench.attacks import FGSM
from robbench.classifier.batch_dependence import find_batch_dependence
from robbench.core.errors import ModelError
from robbench.evaluation.attack_images import attack_images
from robbench.evaluation.run import evaluate
from robbench.recheck.verify import verify
from support.models import network, small


class Wrapped(nn.Module):
    """A network, and what is done around it."""

    def __init__(self, around):
        super().__init__()
        self.net, self.around = small(), around

    def forward(self, x):
        return self.around(self.net, x)


class WithBatchNorm(nn.Module):
    """A convolutional network with batch statistics in eval mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.net = nn.BatchNorm2d(1, track_running_stats=False), network()

    def forward(self, x):
        return self.net(self.norm(x))


class KeepsLogits(nn.Module):
    """Keeps the logits of the first batch of each width, and answers them again as often as the width comes."""

    def __init__(self):
        super().__init__()
        self.net, self.kept = small(), {}

    def forward(self, x):
        if len(x) not in self.kept:
            self.kept[len(x)] = self.net(x).detach()
        return self.kept[len(x)] + 0 * self.net(x)


class KeepsMean(nn.Module):
    """Subtracts the mean image of the first batch."""

    def __init__(self):
        super().__init__()
        self.net, self.mean = small(), None

    def forward(self, x):
        if self.mean is None:
            self.mean = x.detach().mean(0)
        return self.net(x - self.mean)


class Alternates(nn.Module):
    """Adds an offset at every second call."""

    def __init__(self):
        super().__init__()
        self.net, self.calls = small(), 0

    def forward(self, x):
        self.calls += 1
        return self.net(x) + (self.calls % 2) * torch.arange(10.0)


class BatchFirst(nn.Module):
    """Attention along the batch, because the sequence is expected first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.net = nn.MultiheadAttention(8, 1), small()

    def forward(self, x):
        z = x.flatten(2).view(len(x), 8, 8)
        return self.net(self.attention(z, z, z)[0])


def rank(net, x):
    """Answer which place a logit has among those of the batch."""
    z = net(x)
    return z + z.detach().argsort(0).argsort(0) / len(x)


def pool(net, x):
    """Pool over a window of three neighbours in the batch."""
    z = net(x)
    return z + 0.1 * nn.functional.max_pool1d(z.T[None], 3, 1, 1)[0].T


DEPENDENT = {
    "batch_norm": WithBatchNorm,
    "subtracts the mean image": lambda: Wrapped(lambda net, x: net(x - x.mean(0, keepdim=True))),
    "subtracts a hundredth of the mean logits": lambda: Wrapped(lambda net, x: net(x) - 0.01 * net(x).mean(0)),
    "ranks": lambda: Wrapped(rank),
    "pools": lambda: Wrapped(pool),
    "softmax": lambda: Wrapped(lambda net, x: 10 * net(x).softmax(0)),
    "norm of all": lambda: Wrapped(lambda net, x: net(x) / net(x).norm()),
    "first image": lambda: Wrapped(lambda net, x: net(x - 0.5 * x[:1])),
    "by place": lambda: Wrapped(lambda net, x: net(x) + torch.arange(float(len(x)))[:, None] * torch.eye(10)[0] / 9),
    "width": lambda: Wrapped(lambda net, x: net(x) * (-1 if len(x) < 4 else 1)),
    "attention": BatchFirst,
    "random and mean": lambda: Wrapped(lambda net, x: net(x - x.mean(0)) + 0.1 * torch.randn(len(x), 10)),
}
INDEPENDENT = {
    "honest": small,
    "convolutions": network,
    "noise": lambda: Wrapped(lambda net, x: net(x + 0.3 * torch.randn_like(x))),
    "noise that the batch shares": lambda: Wrapped(lambda net, x: net(x + 0.3 * torch.randn(1, 1, 8, 8))),
    "a random factor": lambda: Wrapped(lambda net, x: net(x) * torch.randn(())),
    "a rare jump": lambda: Wrapped(lambda net, x: net(x) * (-1) ** (torch.rand(len(x), 1) < 0.05)),
    "alternates": Alternates,
    "rounds otherwise": lambda: Wrapped(lambda net, x: net(x) * (1 + (1e-3 if len(x) < 4 else 0) + 1e-6 * x.mean())),
    "nan": lambda: Wrapped(lambda net, x: torch.where(x[:, :1, 0, 0] > 0.5, torch.nan, net(x))),
}


def measured(model, problem, n=60, **options):
    _, x, y = problem
    return attack_images(model.eval(), FGSM(), x[:n], y[:n], eps=0.01, lanes=16, **options)


@pytest.mark.parametrize("n", [1, 10, 60])
@pytest.mark.parametrize("kind", DEPENDENT)
def test_a_model_that_depends_on_the_batch_is_refused(kind, n, problem):
    with pytest.raises(ModelError, match=r"depends on the other images of the batch.*--one-by-one"):
        measured(DEPENDENT[kind](), problem, n)


@pytest.mark.parametrize("kind", INDEPENDENT)
def test_other_models_are_not(kind, problem):
    for seed in range(5):
        torch.manual_seed(seed)
        try:
            assert "batch_dependent" not in measured(INDEPENDENT[kind](), problem).flags
        except ModelError as error:
            pytest.fail(str(error))


@pytest.mark.parametrize("lanes", [1, 2, 64])
def test_the_width_of_the_batch_hides_nothing(lanes, problem):
    _, x, y = problem
    with pytest.raises(ModelError, match=r"norm .BatchNorm2d with track_running_stats=False"):
        attack_images(WithBatchNorm().eval(), FGSM(), x, y, eps=0.01, lanes=lanes)
    with pytest.raises(ModelError, match=r"attention .MultiheadAttention with batch_first=False"):
        attack_images(BatchFirst().eval(), FGSM(), x, y, eps=0.01, lanes=lanes)


def test_one_by_one_gives_the_numbers_of_a_loop_over_single_images(problem, tmp_path):
    _, x, _ = problem
    model = WithBatchNorm().eval()
    y = torch.cat([model(image) for image in x.split(1)]).argmax(1)
    y[::10] = (y[::10] + 1) % 10
    found = []
    for lanes in (7, 32):
        options = {"lanes": lanes, "results": tmp_path / str(lanes), "save_adversarials": True, "one_by_one": True}
        found.append(evaluate(model, [FGSM()], x=x, y=y, eps=0.02, **options))
        assert found[-1].clean_accuracy.value == 0.9 and found[-1].overrides["one_by_one"] == "True"
        assert "one image at a time" in found[-1].flags["batch_dependent"]
    assert found[0].robust_accuracy == found[1].robust_accuracy
    assert 0 < found[0].robust_accuracy.value < 0.9
    checked = verify(next(tmp_path.glob("32/custom/*/*/result.json")), model, x=x, y=y)
    assert checked.confirmed > 0 and not checked.refuted


def test_one_by_one_changes_no_honest_verdict_and_flags_nothing(problem):
    plain, alone = measured(small(), problem), measured(small(), problem, one_by_one=True)
    assert torch.equal(plain.broken, alone.broken) and alone.flags == {}


def test_what_is_kept_of_the_first_batch_is_refused(problem):
    for options in ({}, {"one_by_one": True}):
        with pytest.raises(ModelError, match=r"first batch that it was ever given.*look at mean"):
            measured(KeepsMean(), problem, **options)
        with pytest.raises(ModelError, match=r"depends on the other images|first batch"):
            measured(KeepsLogits(), problem, **options)
    _, x, y = problem
    model = KeepsMean().eval()
    model(x)  # kept before the run: a fixed part of the function, which the copy has too
    assert attack_images(model, FGSM(), x, y, eps=0.01).flags.keys() <= {"chance"}


def test_what_it_costs():
    """One image alone and beside copies, where nothing else can be asked."""
    net, widths = small(), []

    def ask(x):
        widths.append(len(x))
        return net(x)

    x = torch.rand(64, 1, 8, 8)
    assert find_batch_dependence(ask, x, 64, net(x), net, None) is None
    assert widths == [1, 1, 3]
