"""`attack` and `clean_accuracy` tell what `evaluate` tells about the same model and images."""

import pytest
import torch
from torch import nn

import robbench
from robbench.attacks import PGD
from support.models import correct, small

ATTACK = PGD(steps=5, objective="ce")


class Changed(nn.Module):
    def __init__(self, net, change):
        super().__init__()
        self.net, self.change = net, change

    def forward(self, x):
        return self.change(self.net, x)


def off_grid(x):
    return ((x * 16 - (x * 16).round()).abs().flatten(1).amax(1) > 1e-3)[:, None]


MODELS = {  # flag: models that must have it
    "zero_gradients": [
        lambda net, x: 1000 * net(x),
        lambda net, x: net((x * 15).round() / 15 + 0 * x),
        lambda net, x: 20 * net(x)[:, :3],
        lambda net, x: torch.where(net(x) > 0, 1e4, 0.0) + 0 * net(x),
    ],
    "nonfinite": [
        lambda net, x: torch.where(off_grid(x), torch.nan, net(x)),
        lambda net, x: torch.where(off_grid(x), -torch.inf, net(x)),
    ],
    "chance": [lambda net, x: net(x).roll(1, 1)],
    "bounded_outputs": [lambda net, x: net(x).sigmoid()],
    None: [lambda net, x: net(x)],
}


@pytest.mark.parametrize(("flag", "change"), [(flag, change) for flag in MODELS for change in MODELS[flag]])
@pytest.mark.filterwarnings("ignore::robbench.RobustnessWarning")
def test_attack_has_the_flags_of_evaluate(flag, change):
    net, x, y, _ = correct("digits/natural", 40)
    x, y = (x[y < 3], y[y < 3]) if change(net, x).shape[1] == 3 else (x, y)
    model = Changed(net, change).eval()
    asked = robbench.attack(model, ATTACK, x, y, eps=0.1)
    stored = robbench.evaluate(model, [ATTACK], x=x, y=y, eps=0.1)
    assert asked.robust_accuracy == pytest.approx(stored.robust_accuracy.value)
    assert asked.flags == stored.flags and (flag in asked.flags if flag else not asked.flags)


def test_attack_tells_that_bfloat16_changes_the_leads(monkeypatch):
    monkeypatch.setattr("robbench.evaluation.attack_images.explain_bfloat16_cost", lambda *_: None)
    net, x, y, _ = correct("digits/natural", 20)
    model = Changed(net, lambda net, x: 1000 + net(x)).eval()
    with pytest.warns(robbench.RobustnessWarning, match="bfloat16"):
        found = robbench.attack(model, ATTACK, x, y, eps=0.1, gradients="bfloat16")
    assert "bfloat16" in found.flags


@pytest.mark.parametrize(("flag", "change"), [("dark", lambda x: x / 256), ("clipped", lambda x: x * (1 + 1.2e-7))])
@pytest.mark.filterwarnings("ignore::robbench.RobustnessWarning")
def test_all_functions_tell_what_is_odd_about_the_images(flag, change):
    model = small()
    x = change(torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)).round(decimals=1).clamp(0, 1))
    with torch.no_grad():
        y = model(x).argmax(1)
    with pytest.warns(robbench.RobustnessWarning, match=flag):
        robbench.clean_accuracy(model, x, y)
    assert flag in robbench.attack(model, ATTACK, x, y, eps=0.001).flags
    assert flag in robbench.evaluate(model, [ATTACK], x=x, y=y, eps=0.001).flags
