"""L1 on images of a usual size: the radius is worth many more pixels than an attack takes steps."""

import pytest
import torch

from robbench.attacks import APGD, FGSM, MIFGSM, ODI, PGD, Hunt, Relax
from robbench.core.threat import Ball
from support.attacks import run_attack
from support.models import Linear

PIXELS = 100  # that must move from the middle of the box to its end
ATTACKS = [
    FGSM(objective="margin"),
    PGD(steps=20),
    PGD(objective="margin", steps=10, relative_step=2.0, anneal=True),
    MIFGSM(objective="margin"),
    ODI(steps=20),
    APGD(steps=20),
    Hunt(starts=1, targets=1, run=10, chase=10, probe=1),
    Relax(targets=1, restarts=0),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.kind)
def test_the_radius_of_a_linear_model_is_found(attack):
    w = torch.randn(3 * 32 * 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gap = float(w.abs().sort(descending=True).values[:PIXELS].sum() / 2)
    x, y = torch.full((2, 3, 32, 32), 0.5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    model = Linear(w, gap - float(w.sum()) / 2)
    near, far = (Ball("L1", PIXELS / 2 * share) for share in (0.99, 1.05))
    assert not run_attack(model, attack, x, y, near, lanes=2).broken.any()
    assert run_attack(model, attack, x, y, far, lanes=2).broken.all()
