"""What holds for every attack: more budget never breaks less, and only points of the ball and the box count."""

import itertools

import numpy as np
import pytest
import torch

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
    HopSkipJump,
    Hunt,
    Noise,
    RayS,
    Relax,
    Square,
)  # fmt: skip
from robbench.core.threat import Ball
from support.attacks import run_attack
from support.models import DUAL, Linear

GUIDED = {  # that follow a gradient, and so find the edge of a linear model: by the number of steps
    "fgsm": lambda steps: FGSM(),
    "pgd": lambda steps: PGD(steps=steps),
    "pgd annealed": lambda steps: PGD(objective="margin", steps=steps, relative_step=2.0, anneal=True),
    "pgd targeted": lambda steps: PGD(objective="margin_targeted", steps=steps, targets=1),
    "mifgsm": lambda steps: MIFGSM(steps=steps, relative_step=0.25),
    "odi": lambda steps: ODI(steps=steps + 2),
    "apgd": lambda steps: APGD(steps=steps),
    "apgd targeted": lambda steps: APGD(objective="margin_targeted", steps=steps, targets=1),
    "hunt": lambda steps: Hunt(starts=1, targets=1, run=steps + 2, chase=steps, probe=1),
    "relax": lambda steps: Relax(targets=1, inside=steps, again=steps, patience=9.0),
    "eot": lambda steps: EOT(inner=PGD(steps=steps), draws=2),
    "fab": lambda steps: FAB(targets=1, steps=steps + 3),
    "deepfool": lambda steps: DeepFool(candidates=1, iterations=steps),
    "cw": lambda steps: CW(search_steps=5, iterations=3 * steps),
}
BLIND = {
    "square": lambda steps: Square(steps=8 * steps),
    "brief": lambda steps: Brief(steps=8 * steps, hopeless=8.0),
    "spsa": lambda steps: SPSA(iterations=steps, samples=4),
    "noise": lambda steps: Noise(steps=steps),
    "rays": lambda steps: RayS(steps=8 * steps),
    "hopskipjump": lambda steps: HopSkipJump(steps=12 * steps, starts=10, probes=10),
}
MADE = GUIDED | BLIND
EVERY = pytest.mark.parametrize(("name", "norm"), [(name, norm) for name in MADE for norm in MADE[name](4).norms])


class Watched(Linear):
    """Remembers what it took for 1, the wrong class."""

    def __init__(self, w, b):
        super().__init__(w, b)
        self.wrong = []

    def forward(self, x):
        logits = super().forward(x)
        self.wrong.append(x.detach()[logits.detach().argmax(1) == 1].flatten(1))
        return logits


def lined_up(norm, n=20):
    """A hyperplane, and images of class 0 in the middle of the box 0.05, 0.15 … 1.95 eps away from it."""
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(16, dtype=torch.float64, generator=generator)
    eps = {"Linf": 0.1, "L2": 0.3, "L1": 0.2}[norm]
    gaps = torch.linspace(0.05, 1.95, n, dtype=torch.float64) * eps * torch.linalg.vector_norm(w, ord=DUAL[norm])
    x = 0.5 + gaps[:, None] * w / (w @ w)
    return Watched(w, float(-0.5 * w.sum())), x.view(n, 1, 4, 4), torch.zeros(n, dtype=torch.int64), eps


def test_every_kind_of_attack_is_tested_here():
    assert {MADE[name](4).kind for name in MADE} == {*ATTACKS, "eot"}


@pytest.mark.whole
@EVERY
def test_more_eps_never_breaks_less(name, norm):
    model, x, y, eps = lined_up(norm)
    broken = [
        run_attack(model, MADE[name](20), x, y, Ball(norm, eps * share), lanes=20).broken for share in (0, 0.5, 1, 2.1)
    ]
    assert not broken[0].any()
    assert all((more | ~less).all() for less, more in itertools.pairwise(broken))
    if name in GUIDED:
        assert [int(b.sum()) for b in broken] == [0, 5, 10, 20]


@EVERY
def test_more_steps_never_break_less(name, norm):
    model, x, y, eps = lined_up(norm)
    broken = [run_attack(model, MADE[name](steps), x, y, Ball(norm, eps), lanes=20).broken for steps in (1, 3, 10, 30)]
    assert all((more | ~less).all() for less, more in itertools.pairwise(broken))


@EVERY
def test_only_points_of_ball_and_box_count(name, norm):
    """Each finds the wrong class where it may not look, too: the judge has the last word."""

    class Wide(Ball):
        def project(self, x0, x):
            stretch = 3 if name == "fgsm" else 1  # it steps by eps once
            return Ball(norm, 3 * eps).project(x0, x0 + stretch * (x - x0))

    model, x, y, eps = lined_up(norm)
    kept = run_attack(model, MADE[name](20), x, y, Ball(norm, eps), lanes=20, keep_adversarials=True)
    assert Ball(norm, eps).contains(x[kept.broken], kept.x_adv[kept.broken].to(x.dtype)).all()
    far = x[-4:], y[-4:]  # from 1.7 eps on
    model.wrong.clear()
    assert not run_attack(model, MADE[name](20), *far, Wide(norm, eps)).broken.any()
    distance = torch.cdist(torch.cat(model.wrong), far[0].flatten(1), p={"Linf": torch.inf, "L2": 2, "L1": 1}[norm])
    assert bool((distance < 3.01 * eps).any()) or name in BLIND, "it went there"


@pytest.mark.parametrize(
    ("make", "norm"),
    [
        (make, norm)
        for make in (
            lambda n: PGD(objective="margin", steps=3, restarts=n),
            lambda n: APGD(objective="dlr", steps=4, restarts=n),
            lambda n: ODI(steps=4, restarts=n),
            lambda n: MIFGSM(steps=3, random_start=True, restarts=n),
            lambda n: FAB(targets=1, steps=4, restarts=n),
            lambda n: Square(steps=20, restarts=n),
            lambda n: SPSA(iterations=2, samples=4, restarts=n),
            lambda n: Noise(steps=5, restarts=n),
            lambda n: RayS(steps=100, restarts=n),
            lambda n: HopSkipJump(steps=100, starts=10, probes=20, restarts=n),
            lambda n: EOT(inner=PGD(steps=3, restarts=n), draws=2),
        )
        for norm in make(2).norms
    ],
    ids=lambda value: value if isinstance(value, str) else value(2).kind,
)
def test_further_restarts_only_add_breaks(make, norm, problem):
    model, x, y = problem
    right = model(x).argmax(1) == y
    ball = Ball(norm, {"Linf": 0.03, "L2": 0.15, "L1": 0.6}[norm])
    one, three = (run_attack(model.double(), make(n), x[right].double(), y[right], ball, lanes=54) for n in (1, 3))
    assert (three.broken | ~one.broken).all()
    assert np.array_equal(one.step[one.broken], three.step[one.broken])
    assert not one.broken.all() and (one.broken.any() or make(1).kind == "noise")
