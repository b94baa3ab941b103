"""Held against the implementations that people use today, on the same images, one judge decides the same way."""

import math

import numpy as np
import pytest
import torch

from conftest import run_attack
from robbench.attacks import APGD, PGD
from robbench.classifier.batch_width import default_lanes
from robbench.core.errors import DataError
from robbench.core.threat import Ball
from robbench.data.sets import load
from robbench.models.card import Registry
from robbench.models.load import load_model
from robbench.suite import load_suite

# The peer remarks on it whenever the DLR loss has a flat spot.
pytestmark = pytest.mark.filterwarnings("ignore:there are .* points with zero gradient:Warning")


def correct(name, n):
    """A registered model, the first n test images that it classifies correctly, and the ball of `whitebox`."""
    entry = Registry.default().find(name)
    model = load_model(entry).module
    data = load(entry.dataset, "test")
    x, y = torch.from_numpy(data.x[: 2 * n]).float() / data.scale, torch.from_numpy(data.y[: 2 * n])
    with torch.no_grad():
        right = (model(x).argmax(1) == y).nonzero().squeeze(1)[:n]
    assert len(right) == n
    return model, x[right], y[right], Ball.of(load_suite("whitebox").threat(entry.dataset))


def judged(model, x, y, x_adv, ball):
    """One judge for both sides, apart from the engine's: wrong, finite, inside ball and box, in float32."""
    assert x_adv.dtype == torch.float32
    with torch.no_grad():
        logits = model(x_adv)
    return ((logits.argmax(1) != y) & logits.isfinite().all(1) & ball.contains(x, x_adv)).numpy()


def ours(model, x, y, ball, attack, **options):
    lanes = default_lanes(x.shape[1:], torch.device("cpu"))
    rows = run_attack(model, attack, x, y, ball, lanes=lanes, keep_adversarials=True, **options)
    broken = judged(model, x, y, rows.x_adv, ball)
    assert np.array_equal(broken, rows.broken), "the records say what the adversarial examples show"
    return broken


def pyautoattack(model, x, y, ball, attack):
    from pyautoattack.autopgd_base import APGDAttack

    peer = APGDAttack(
        model, n_iter=attack.steps, norm=ball.norm, n_restarts=1, eps=ball.eps, seed=0, loss=attack.objective,
        device="cpu",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # it seeds the global generator
        return judged(model, x, y, peer.perturb(x, y), ball)


def assert_agree(a, b):
    """The difference in robust accuracy lies in its paired 95 % interval, and few samples are decided differently."""
    n, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    difference = abs(only_a - only_b) / n
    error = math.sqrt(only_a + only_b - (only_a - only_b) ** 2 / n) / n
    told = f"{(~a).sum()} and {(~b).sum()} of {n} stand; only ours broke {only_a}, only theirs {only_b}"
    # The interval, not the test: 1/n corrects it for counts being whole, which for few discordant pairs makes it
    # decide like the exact McNemar test at 5 %.
    assert difference <= 1.96 * error + 1 / n, told
    # Two attacks that are both weak in their own way would have a wide interval.
    assert only_a + only_b <= 0.1 * n, told


@pytest.mark.parametrize("objective", ["ce", "dlr"])
@pytest.mark.parametrize("name", ["digits/natural", "digits/at"])
def test_apgd_agrees_with_pyautoattack(name, objective):
    model, x, y, ball = correct(name, 300)
    attack = APGD(objective=objective, steps=100)
    assert_agree(ours(model, x, y, ball, attack), pyautoattack(model, x, y, ball, attack))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ce", "dlr"])
def test_apgd_agrees_with_pyautoattack_on_cifar10(objective):
    try:
        model, x, y, ball = correct("cifar10/natural_resnet18", 200)
    except DataError as error:
        pytest.skip(f"needs CIFAR-10: {error}")
    attack = APGD(objective=objective, steps=25)  # 100 on a CPU take ten minutes
    assert_agree(ours(model, x, y, ball, attack), pyautoattack(model, x, y, ball, attack))


@pytest.mark.parametrize("name", ["digits/natural", "digits/at"])
def test_pgd_agrees_with_torchattacks(name):
    """Its answer is the last point, so ours is asked for the last point too; any point breaks at least as many."""
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed (robbench[peers])")
    model, x, y, ball = correct(name, 300)
    attack = PGD(objective="ce", steps=20)
    peer = torchattacks.PGD(model, eps=ball.eps, alpha=attack.relative_step * ball.eps, steps=attack.steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = judged(model, x, y, peer(x, y), ball)
    final = ours(model, x, y, ball, attack, judge="final")
    assert_agree(final, theirs)
    assert (ours(model, x, y, ball, attack) | ~final).all()
