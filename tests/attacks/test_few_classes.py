"""Two, three and four classes, and ties: linear models whose exact radius is known, and no attack may miss it."""

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
    HopSkipJump,
    Hunt,
    RayS,
    Relax,
    Square,
)  # fmt: skip
from robbench.core.losses import LOSSES, TARGETED
from robbench.core.threat import Ball
from support.attacks import run_attack
from support.models import DUAL

RADIUS = {"Linf": 0.02, "L2": 0.06, "L1": 0.2}
N = 2


BY_RANK = {  # that try every class
    **{f"pgd {loss}": PGD(objective=loss, targets=3, steps=30, relative_step=0.1) for loss in TARGETED},
    "apgd dlr_targeted": APGD(objective="dlr_targeted", targets=3, steps=30),
    "odi dlr_targeted": ODI(objective="dlr_targeted", targets=3, steps=40, restarts=2),
    "fab": FAB(targets=3, steps=30),
    "deepfool": DeepFool(candidates=3, iterations=10, overshoot=0.001),
    "relax": Relax(targets=3, inside=30, patience=9.0),  # the nearest class may be the least likely
    "hunt": Hunt(starts=1, targets=3, run=30, chase=30, hopeless=1.0),  # it would give up after the starts
}
TOWARD_THE_FIRST = {
    **{f"pgd {loss}": PGD(objective=loss, steps=30, relative_step=0.1) for loss in LOSSES},
    "apgd dlr": APGD(objective="dlr", steps=30),
    "mifgsm margin": MIFGSM(objective="margin", steps=30),
    "odi margin": ODI(objective="margin", steps=40, restarts=2),
    "eot margin": EOT(inner=PGD(objective="margin", steps=30, relative_step=0.1), draws=2),
    "fgsm margin": FGSM(objective="margin"),
    "cw": CW(search_steps=5, iterations=100),
}
BLIND = {  # without gradients they need more room
    **{f"square {loss}": Square(objective=loss, steps=200) for loss in ("margin", "dlr")},
    "square ce_scaled": Square(objective="ce_scaled", steps=200),
    "square dlr_targeted": Square(objective="dlr_targeted", targets=3, steps=200),
    "brief": Brief(steps=200, hopeless=4.0),
    "spsa margin": SPSA(iterations=20, samples=16),
    "rays": RayS(steps=400),
    "hopskipjump": HopSkipJump(steps=600, starts=50, probes=50),
}
EVERY = {**BY_RANK, **TOWARD_THE_FIRST, **BLIND}


class Affine(nn.Module):
    """Logits w·(x − 0.5) + b."""

    def __init__(self, w, b):
        super().__init__()
        self.w, self.b = nn.Parameter(w), nn.Parameter(b)

    def forward(self, x):
        return (x.flatten(1) - 0.5) @ self.w.T + self.b


def nearest(norm, classes, last):
    """Images in the middle of the box that class 0 holds up to RADIUS, where one other class is.

    The nearest class has the largest of the other logits, or with `last` the smallest one. The third and the fourth
    class are three times as far away.
    """
    generator = torch.Generator().manual_seed(classes)
    w = torch.randn(classes, 16, dtype=torch.float64, generator=generator)
    w = w / torch.linalg.vector_norm(w, ord=DUAL[norm], dim=1, keepdim=True)
    steep = torch.full((classes, 1), 30.0, dtype=torch.float64)
    away = torch.full((classes,), 3 * RADIUS[norm], dtype=torch.float64)
    which = classes - 1 if last else 1
    if last:
        steep[which] = 3000.0  # a steep logit can be low, and near
    else:
        steep[2:] = 60.0
    away[which] = RADIUS[norm]
    w, b = w * steep, -steep.squeeze(1) * away
    w[0], b[0] = 0, 0
    return Affine(w, b), torch.full((N, 1, 4, 4), 0.5, dtype=torch.float64), torch.zeros(N, dtype=torch.int64)


def missed(attack, model, x, y, ball):
    return int((~run_attack(model, attack, x, y, ball, lanes=N).broken).sum())


def every(attacks):
    return pytest.mark.parametrize(
        ("name", "norm"), [(name, norm) for name, attack in attacks.items() for norm in attack.norms]
    )


def test_every_kind_and_every_loss_is_here():
    assert {a.kind for a in EVERY.values()} | {"noise"} == {*ATTACKS, "eot"}  # noise follows nothing
    assert {a.objective for a in EVERY.values() if hasattr(a, "objective")} == {*LOSSES, *TARGETED}


@every({**BY_RANK, **TOWARD_THE_FIRST})
def test_the_exact_radius_is_found(name, norm):
    for classes in (2, 3, 4):
        model, x, y = nearest(norm, classes, last=name in BY_RANK)
        model, x = model.float(), x.float()  # in float64 the 1e-12 in a denominator leaves a trace of a gradient
        near = classes - 1 if name in BY_RANK else 1
        others = model(x)[0, 1:]
        assert int(others.argmin() if name in BY_RANK else others.argmax()) + 1 == near
        assert missed(EVERY[name], model, x, y, Ball(norm, RADIUS[norm] * 0.99)) == N
        assert missed(EVERY[name], model, x, y, Ball(norm, RADIUS[norm] * 1.05)) == 0, classes


@every(BLIND)
def test_random_search_finds_what_lies_well_inside(name, norm):
    for classes in (2, 3, 4):
        model, x, y = nearest(norm, classes, last=name.split()[-1] in TARGETED)
        assert missed(EVERY[name], model, x, y, Ball(norm, RADIUS[norm] * 2.5)) == 0, classes


@every(EVERY)
def test_a_tie_of_all_classes_breaks_at_any_radius(name, norm):
    """The clean image lies on the boundary of all classes, and the judge gives it to the lowest class."""
    for classes in (2, 3, 4):
        generator = torch.Generator().manual_seed(classes)
        w = torch.randn(classes, 16, dtype=torch.float64, generator=generator)
        model, x = Affine(w, torch.full((classes,), 3.0).double()), torch.full((N, 1, 4, 4), 0.5).double()
        assert missed(EVERY[name], model, x, torch.zeros(N, dtype=torch.int64), Ball(norm, RADIUS[norm])) == 0, classes


@every(EVERY)
def test_other_classes_that_are_always_tied_hide_nothing(name, norm):
    """One against the rest: with four classes a ratio of logits is constant here, and keeps its definition."""
    for classes in (2, 3) if "dlr" in name or name == "square ce_scaled" else (2, 3, 4):
        model, x, y = nearest(norm, 2, last=False)
        rows = [0] + [1] * (classes - 1)
        model = Affine(model.w[rows].detach(), model.b[rows].detach())
        room = 2.5 if name in BLIND else 1.05
        assert missed(EVERY[name], model, x, y, Ball(norm, RADIUS[norm] * room)) == 0, classes
