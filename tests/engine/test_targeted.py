"""Targeted attacks: exact radii towards each class, and a judge that lets nothing but the target count."""

import numpy as np
import pytest
import torch
from torch import nn

from robbench.attacks import (
    APGD,
    ATTACKS,
    CW,
    EOT,
    FAB,
    FGSM,
    MIFGSM,
    ODI,
    PGD,
    SPSA,
    Brief,
    DeepFool,
    Hunt,
    Nearest,
    Noise,
    Relax,
    Square,
)  # fmt: skip
from robbench.core.threat import Ball
from robbench.core.types import Problem
from robbench.engine import engine
from robbench.engine.targeted import two_classes
from support.attacks import Scripted, differing, run_attack
from support.models import DUAL, trained

RADIUS = {"Linf": 0.1, "L2": 0.2, "L1": 0.3}
GUIDED = {
    "fgsm": FGSM(objective="margin"),
    "pgd": PGD(objective="margin", steps=60, relative_step=0.1, random_start=False),
    "pgd ce": PGD(objective="ce", steps=60, relative_step=0.1, random_start=False),
    "pgd dlr": PGD(objective="dlr", steps=60, relative_step=0.1, random_start=False),
    "pgd annealed": PGD(objective="margin", steps=60, relative_step=2.0, anneal=True),
    "pgd targeted": PGD(objective="margin_targeted", steps=60, relative_step=0.1, random_start=False),
    "apgd": APGD(objective="ce", steps=100),
    "apgd dlr": APGD(objective="dlr", steps=100),
    "apgd targeted": APGD(objective="dlr_targeted", steps=100, targets=9),
    "mifgsm": MIFGSM(objective="margin", steps=40),
    "odi": ODI(objective="margin", steps=60, restarts=2),
    "hunt": Hunt(starts=1, targets=2, run=60, chase=100, hopeless=1.0),
    "relax": Relax(targets=2, inside=60, hopeless=1.0),
    "eot": EOT(inner=PGD(objective="margin", steps=60, relative_step=0.1, random_start=False), draws=2),
    "fab": FAB(targets=9, steps=60),
    "nearest": Nearest(inner=FAB(targets=9, steps=20)),
    "deepfool": DeepFool(candidates=9, iterations=20, overshoot=1e-4),
}
BLIND = {
    "square": Square(steps=400), "spsa": SPSA(iterations=40, samples=16), "noise": Noise(steps=20),
    "cw": CW(search_steps=6, iterations=100), "brief": Brief(steps=400, hopeless=4.0),
}  # fmt: skip


class Separate(nn.Module):
    """Class 0 has logit 0. Every other class has pixels of its own, and a radius in closed form.

    Target t is RADIUS away, the class before it half as far, and all others twice as far.
    """

    def __init__(self, norm, classes, target):
        super().__init__()
        generator = torch.Generator().manual_seed(classes)
        w, b = torch.zeros(classes, 16, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
        for k in range(1, classes):
            mine = slice((k - 1) * 16 // (classes - 1), k * 16 // (classes - 1))
            w[k, mine] = torch.randn(w[k, mine].shape, dtype=torch.float64, generator=generator)
            w[k] *= 20 / torch.linalg.vector_norm(w[k], ord=DUAL[norm])
            share = {target: 1.0, target - 1: 0.5}.get(k, 2.0)
            b[k] = -20 * share * RADIUS[norm]
        self.w, self.b = nn.Parameter(w), nn.Parameter(b)

    def forward(self, x):
        return (x.flatten(1) - 0.5) @ self.w.T + self.b


def attack_towards(attack, norm, classes, target, share, extra=0.0):
    model, x = Separate(norm, classes, target), torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64)
    y, goal = torch.zeros(1, dtype=torch.int64), torch.tensor([target])
    return run_attack(model, attack, x, y, Ball(norm, RADIUS[norm] * share + extra), lanes=1, target=goal)


def every(attacks):
    pairs = [(name, norm) for name, attack in attacks.items() for norm in attack.norms]
    return pytest.mark.parametrize(("name", "norm"), pairs)


def test_every_kind_is_here():
    kinds = {a.kind for a in (*GUIDED.values(), *BLIND.values())}
    assert kinds == {k for k, cls in ATTACKS.items() if getattr(cls, "can_target", True)} | {"eot", "nearest"}


@pytest.mark.whole
@every(GUIDED)
def test_the_radius_towards_the_target_is_found_within_1e_4(name, norm):
    """A nearer class is in the way, and does not count."""
    for classes in (2, 3, 10):
        target = classes - 1
        rows = attack_towards(GUIDED[name], norm, classes, target, 1, 1e-4)
        assert rows.broken.all() and (rows.prediction == target).all(), classes
        assert not attack_towards(GUIDED[name], norm, classes, target, 1, -1e-4).broken.any(), classes


@pytest.mark.whole
@every(BLIND)
def test_searches_break_nothing_below_the_radius_and_find_what_lies_well_inside(name, norm):
    for classes in (2, 3, 10):
        assert not attack_towards(BLIND[name], norm, classes, classes - 1, 1, -1e-4).broken.any()
    if name != "noise":
        assert attack_towards(BLIND[name], norm, 3, 2, 1.02 if name == "cw" else 2).broken.all()


def test_only_the_target_counts():
    """The points of the script are of class 1, then of class 2."""

    class Steps(nn.Module):
        def forward(self, x):
            v = x.flatten(1).mean(1)
            return torch.stack([0.3 - v, v - 0.3, 10 * (v - 0.6)], dim=1)

    model, x, y = Steps(), torch.full((3, 1, 2, 2), 0.1), torch.zeros(3, dtype=torch.int64)
    attack = Scripted(points=(0.5, 0.9))
    rows = run_attack(model, attack, x, y, Ball("Linf", 1), lanes=3, target=torch.tensor([1, 2, 2]))
    assert rows.broken.all() and rows.prediction.tolist() == [1, 2, 2] and rows.step.tolist() == [0, 1, 1]
    rows = run_attack(model, Scripted(points=(0.5,)), x, y, Ball("Linf", 1), lanes=3, target=torch.tensor([1, 2, 2]))
    assert rows.broken.tolist() == [True, False, False] and rows.prediction.tolist() == [1, 1, 1]


def test_the_two_classes_agree_with_the_judge():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 5, generator=generator).mul(2).round()  # with ties
    target = torch.randint(0, 5, (500,), generator=generator)
    seen = two_classes(logits, target)
    others = logits.scatter(1, target[:, None], -torch.inf).amax(1)
    assert torch.equal(seen, torch.stack([others, logits.gather(1, target[:, None])[:, 0]], dim=1))
    assert two_classes(logits, None) is logits
    for value in (torch.nan, torch.inf, -torch.inf):
        for k in range(5):  # of any class, also of one that is not the largest
            broken = logits.clone()
            broken[:, k] = value
            assert two_classes(broken, target).isnan().all()


@pytest.mark.parametrize(
    "attack", [APGD(steps=10), FAB(targets=2, steps=10), Square(steps=50), PGD(steps=5, restarts=3)]
)
def test_records_do_not_depend_on_width_and_order(attack):
    net, x, y = trained(20)
    target, ball = (y + 1 + torch.arange(20) % 9) % 10, Ball("Linf", 0.3)
    base = run_attack(net.double(), attack, x.double(), y, ball, lanes=64, target=target)
    assert 0 < base.broken.sum() < 20 and (base.prediction[base.broken] == target.numpy()[base.broken]).all()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    other = run_attack(
        net.double(), attack, x.double()[order], y[order], ball, sample=order.numpy(), lanes=3, target=target[order]
    )
    assert set(differing(base, other)) <= {"distance"}
    assert np.allclose(base.distance, other.distance, rtol=1e-6, equal_nan=True)


def test_the_plain_loop_takes_the_same_steps():
    net, x, y = trained(6)
    target, ball = (y + 1) % 10, Ball("Linf", 0.1)
    lane = torch.arange(6)
    for attack in (PGD(objective="margin", steps=5), FAB(targets=1, steps=8)):
        p = Problem(x, y, lane, lane * 0, (1, 2), target=target)
        final = engine.perturb(net, attack, p, ball)
        margin = two_classes(net(x), target).diff().squeeze(1), two_classes(net(final), target).diff().squeeze(1)
        assert (margin[1] > margin[0]).all()
