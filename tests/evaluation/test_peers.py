"""Held against the implementations that people use today, on the same images, one judge decides the same way."""

import math

import pytest
import torch

from robbench.attacks import APGD, PGD
from robbench.core.errors import DataError
from support.attacks import judged, ours
from support.models import correct

# The peer remarks on it whenever the DLR loss has a flat spot.
pytestmark = [pytest.mark.whole, pytest.mark.filterwarnings("ignore:there are .* points with zero gradient:Warning")]


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


@pytest.mark.parametrize(("name", "objective"), [("digits/natural", "ce"), ("digits/at", "ce"), ("digits/at", "dlr")])
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
