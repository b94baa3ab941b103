"""Averaged answers for models that answer at random, and a judge that does not believe a lucky draw."""

import pytest
import torch
from torch import nn

from robbench.attacks import APGD, EOT, ODI, PGD, describe
from robbench.core.errors import SuiteError
from robbench.core.threat import Ball
from robbench.evaluation.run import evaluate
from robbench.suite import Stage, build_attack
from support.attacks import run_attack
from support.models import Linear


def linear(seed=0, n=6):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(16, dtype=torch.float64, generator=generator)
    x = 0.5 + 0.02 * torch.randn(n, 1, 4, 4, dtype=torch.float64, generator=generator)
    model = Linear(w, -float(x.flatten(1).mean(0) @ w))
    y = (x.flatten(1) @ w + model.b < 0).long()
    return model, x, y


@pytest.mark.parametrize("inner", [PGD(steps=12), APGD(steps=20, objective="dlr_targeted"), ODI(steps=14)])
@pytest.mark.parametrize("lanes", [2, 16])
def test_on_a_model_without_chance_it_is_the_inner_attack(inner, lanes):
    """The mean of equal answers is that answer, so every step is the same, at `draws` times the cost."""
    model, x, y = linear()
    radius = ((x.flatten(1) @ model.w + model.b).abs() / model.w.abs().sum()).detach()
    ball = Ball("Linf", float(radius.median()) * 1.01)
    alone = run_attack(model, inner, x, y, ball, lanes=lanes, keep_adversarials=True)
    averaged = run_attack(model, EOT(inner=inner, draws=4), x, y, ball, lanes=lanes, keep_adversarials=True)
    assert (alone.broken == averaged.broken).all() and alone.broken.any() and not alone.broken.all()
    assert torch.allclose(alone.x_adv, averaged.x_adv, atol=1e-12)
    assert (averaged.step[alone.broken] == 4 * alone.step[alone.broken]).all()


class Noisy(nn.Module):
    """A linear model whose logits are drowned in noise: one gradient in ten points the right way."""

    def __init__(self, model, seed=0):
        super().__init__()
        self.model = model
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x):
        flipped = torch.rand(len(x), 1, dtype=x.dtype, generator=self.generator) < 0.45
        return torch.where(flipped, -self.model(x), self.model(x))


def test_a_lucky_draw_is_no_break():
    """45 % of single answers are wrong whatever the image: believed one by one, everything would break."""
    model, x, y = linear(n=40)
    x, y = x.repeat(5, 1, 1, 1), y.repeat(5)
    still = Ball("Linf", 0.0)
    assert run_attack(Noisy(model), PGD(steps=10), x, y, still, detect_cycles=False).broken.mean() > 0.9
    voted = run_attack(Noisy(model), PGD(steps=1), x, y, still, draws=101, detect_cycles=False)
    assert voted.broken.mean() < 0.3
    claimed = voted.forwards > 2
    assert set(voted.forwards[claimed].tolist()) <= {2 + 100, 2 + 200, 1 + 100}
    eot = EOT(inner=PGD(steps=5), draws=50)
    assert run_attack(Noisy(model), eot, x, y, Ball("Linf", 0.4), draws=11, detect_cycles=False).broken.all()


class Chance(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x.flatten(1)) + 0.3 * torch.randn(len(x), 3)


def test_randomized_models_are_judged_by_votes_in_an_evaluation():
    torch.manual_seed(0)
    model = Chance().eval()
    x = torch.rand(30, 1, 2, 2)
    y = model.layer(x.flatten(1)).argmax(1)
    result = evaluate(model, "quick", x=x, y=y, eps=0.001, name="chance")
    assert "more than half of 11 answers" in result.flags["randomized"]
    clean_margin = model.layer(x.flatten(1)).topk(2).values
    sure = float((clean_margin[:, 0] - clean_margin[:, 1] > 0.6).float().mean())
    assert result.robust_accuracy.value > 0.5 * sure, "images that are almost always right are not broken by one answer"


def test_suites_ask_for_it_with_one_key():
    attack = build_attack(Stage("A", "pgd", {"steps": 3, "eot": 5}))
    assert (attack.steps, attack.inner.steps, attack.draws) == (15, 3, 5)
    assert describe(attack)["inner"]["kind"] == "pgd"
    with pytest.raises(SuiteError, match="eot 1 given"):
        build_attack(Stage("A", "pgd", {"eot": 1}))
    with pytest.raises(SuiteError, match="allowed: int"):
        build_attack(Stage("A", "pgd", {"eot": 2.5}))
