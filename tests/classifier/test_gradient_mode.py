"""Models that answer differently while gradients are on: what is stored must fool the model as it is used."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import nn

from robbench.attacks import APGD, FAB, FGSM, PGD
from robbench.engine import lanes
from robbench.evaluation.attack_images import attack_images
from robbench.evaluation.run import evaluate
from robbench.recheck.verify import verify
from support.models import small

NOISE = 0.2 * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(3))


class Mode(nn.Module):
    """A network that changes its input while gradients are on."""

    def __init__(self, change, is_on=lambda x: torch.is_grad_enabled()):
        super().__init__()
        self.net, self.change, self.is_on = small(), change, is_on

    def forward(self, x):
        return self.net(self.change(x) if self.is_on(x) else x)


def drop(x):
    """Drop every third pixel."""
    keep = torch.ones(64)
    keep[::3] = 0
    return x * keep.view(1, 1, 8, 8)


MODELS = {
    "drops": lambda: Mode(drop),
    "normalizes": lambda: Mode(lambda x: (x - 0.5) / 0.25),
    "adds fixed noise": lambda: Mode(lambda x: x + NOISE),
    "adds random noise": lambda: Mode(lambda x: x + 0.3 * torch.randn_like(x)),
    "looks at the input": lambda: Mode(drop, lambda x: x.requires_grad),
    "negates": lambda: Mode(lambda x: 1 - x),
}
ATTACKS = {"FGSM": FGSM(), "PGD": PGD(steps=5), "APGD": APGD(steps=8), "FAB": FAB(steps=5)}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_break_fools_the_model_as_it_is_used(kind, attack, problem):
    _, x, y = problem
    model = MODELS[kind]().eval()
    found = attack_images(model, attack, x, y, eps=0.1, lanes=16)
    with torch.inference_mode():
        wrong = model(found.x_adv).argmax(1) != y
    assert wrong[found.broken].all(), f"{int((~wrong & found.broken).sum())} of {int(found.broken.sum())} do not hold"
    assert "while gradients are on" in found.flags["gradient_mode"]
    assert "randomized" not in found.flags


@pytest.mark.parametrize(
    "module",
    [small(), Mode(lambda x: x), Mode(lambda x: x, lambda x: False)],
)
def test_honest_models_are_not_flagged(module, problem):
    _, x, y = problem
    assert attack_images(module.eval(), FGSM(), x, y, eps=0.05).flags == {}


def test_a_randomized_model_is_not_mistaken(problem):
    _, x, y = problem
    for seed in range(5):
        torch.manual_seed(seed)
        flags = attack_images(
            Mode(lambda x: x + 0.2 * torch.randn_like(x), lambda x: True).eval(), FGSM(), x, y, eps=0.05
        ).flags
        assert "randomized" in flags and "gradient_mode" not in flags


def test_confirming_a_break_changes_no_honest_record(problem, tmp_path, monkeypatch):
    _, x, y = problem

    def rows(root):
        evaluate(small(), list(ATTACKS.values()), x=x, y=y, eps=0.05, results=tmp_path / root)
        return next((tmp_path / root).rglob("outcomes.parquet"))

    with_it, judge = rows("with"), lanes.judge_points
    monkeypatch.setattr(lanes, "judge_points", lambda *a: judge(*a[:6], False, *a[7:]))
    without = rows("without")
    assert with_it.read_bytes() == without.read_bytes()
    assert (pd.read_parquet(with_it)["status"] == "broken").any()


def test_verify_refutes_what_holds_only_while_gradients_are_on(problem, tmp_path, monkeypatch):
    _, x, y = problem
    model, judge = MODELS["negates"]().eval(), lanes.judge_points

    def believe_the_gradient_pass(job, *rest):
        def ask(p, s, n):
            with torch.enable_grad():
                logits = job.model(s["x"]).detach()
            return logits, job.attack.loss(logits, p, s)

        return judge(job, *rest[:6], ask, rest[7])

    monkeypatch.setattr(lanes, "judge_points", believe_the_gradient_pass)
    evaluate(model, [PGD(steps=5)], x=x, y=y, eps=0.02, results=tmp_path, save_adversarials=True)
    checked = verify(next(tmp_path.rglob("result.json")), model, x=x, y=y)
    assert any("true class" in mismatch.what for mismatch in checked.refuted)
