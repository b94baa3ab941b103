"""Outputs that are no plain logits are flagged in words, and those of honest models are not."""

import pytest
import torch
from torch import nn

from robbench.attacks import FGSM
from robbench.classifier.outputs import find_output_flags
from robbench.data.sets import load
from robbench.evaluation.attack_images import attack_images
from robbench.models.card import Registry
from robbench.models.load import load_model
from support.models import correct, small

CHANGES = {
    "probabilities": [lambda z: z.softmax(1), lambda z: (5 * z).softmax(1)],
    "bounded_outputs": [torch.sigmoid, lambda z: (10 * z).sigmoid(), lambda z: (z / 4 + 0.5).clamp(0, 1)],
    "log_probabilities": [lambda z: z.log_softmax(1), lambda z: z.softmax(1).log(), lambda z: z.log_softmax(1) - 7],
    "rounded_outputs": [
        lambda z: z.round(),
        lambda z: z.round(decimals=1),
        lambda z: z.round(decimals=2),
        lambda z: (z * 64).floor() / 64 + 0.3,
        lambda z: z + (z.round() - z).detach(),
        lambda z: z.sign(),
    ],
}


@pytest.mark.parametrize(("flag", "change"), [(flag, change) for flag in CHANGES for change in CHANGES[flag]])
def test_the_kind_of_outputs_is_named(flag, change, problem):
    _, x, y = problem

    class Changed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()

        def forward(self, x):
            return change(self.net(x)) + 0 * x.sum((1, 2, 3))[:, None]

    assert flag in attack_images(Changed().eval(), FGSM(), x, y, eps=0.01).flags


SQUASHED = {  # flag: functions of trained logits, at any offset and scale
    "probabilities": [
        lambda z: z.softmax(1) - 0.5,
        lambda z: 100 * z.softmax(1),
        lambda z: 0.9 * z.softmax(1) + 0.01,
        lambda z: -nn.functional.softmin(z, 1),
    ],
    "bounded_outputs": [
        lambda z: 10 * z.sigmoid(),
        lambda z: 2 * z.sigmoid() - 1,
        lambda z: 10 * (z / 3).tanh(),
        lambda z: 1e6 * z.tanh() + 1e6,
        nn.functional.softsign,
        torch.atan,
        torch.erf,
        lambda z: 3 * nn.functional.hardtanh(z),
        lambda z: z.clamp(-2, 2),
        lambda z: z.clamp(max=4),
        nn.functional.relu,
        nn.functional.relu6,
        nn.functional.softplus,
        nn.functional.logsigmoid,
        nn.functional.elu,
        torch.exp,
        lambda z: z.softmax(1).clamp(min=1e-3).log(),
        lambda z: torch.where(z >= z.topk(3, 1).values[:, -1:], z, -100.0),
    ],
    "log_probabilities": [lambda z: (z.softmax(1) + 0.01).log(), lambda z: z.log_softmax(1) + 5],
}


def trained_logits(name, n):
    entry = Registry.default().find(name)
    data = load(entry.dataset, "test")
    with torch.no_grad():
        return load_model(entry).module(torch.from_numpy(data.x[:n]).float() / data.scale)


@pytest.mark.parametrize("flag", SQUASHED)
@pytest.mark.parametrize("n", [16, 100])
def test_squashed_outputs_are_flagged_at_any_offset_and_scale(flag, n):
    z = trained_logits("digits/natural", n)
    for k, change in enumerate(SQUASHED[flag]):
        found = find_output_flags(change(z))
        assert flag in found and "Return the logits" in found[flag], k


def test_small_lanes_do_not_hide_squashed_outputs():
    class Squashed(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return 10 * self.net(x).sigmoid()

    model, x, y, _ = correct("digits/natural", 20)
    assert "bounded_outputs" in attack_images(Squashed(model).eval(), FGSM(), x, y, eps=0.01, lanes=3).flags


@pytest.mark.parametrize("name", ["digits/natural", "digits/at", "digits/ls095_sigma03", "digits/lsq2_sigma03"])
def test_honest_logits_are_not_flagged_in_other_forms_and_draws(name):
    z = trained_logits(name, 256)
    generator = torch.Generator().manual_seed(0)
    flagged = 0
    for n in [5, 8, 16, 16, 40] * 20:
        some = z[torch.randperm(len(z), generator=generator)[:n]]
        pair = some[:, :1] - some[:, 1:2]
        forms = (some, some - some.mean(1, keepdim=True), 100 * some + 1e3, torch.cat([pair, -pair], 1), some[:, :3])
        flagged += sum(bool(find_output_flags(form)) for form in forms)
    assert flagged <= 2  # of 500


@pytest.mark.parametrize("n", [1, 2, 3, 10, 256])
@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_plain_logits_are_not_flagged(n, classes):
    for seed in range(50):
        z = torch.randn(n, classes, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 5 - 2)
        z[:, -1] = -10.0  # a class that never occurs
        for logits in (z - 1, torch.cat([z, z]), torch.stack([z[:, 0], -z[:, 0]], 1)):
            by_chance = {"bounded_outputs"} if n * classes < 12 else set()
            assert find_output_flags(logits).keys() <= by_chance


def test_no_registered_model_is_flagged():
    found = [entry for entry in Registry.default().entries() if not entry.needs_training]
    assert len(found) > 5
    for entry in found:
        data = load(entry.dataset, "test")
        x = torch.from_numpy(data.x[: 200 if entry.dataset in ("digits", "mnist") else 16]).float() / data.scale
        with torch.no_grad():
            assert not find_output_flags(load_model(entry).module(x)), entry.name
