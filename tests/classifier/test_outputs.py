"""Outputs that are no plain logits are flagged in words, and those of honest models are not."""

import pytest
import torch

from robbench.attacks import FGSM
from robbench.classifier.outputs import find_output_flags
from robbench.data.sets import load
from robbench.evaluation.attack_images import attack_images
from robbench.models.card import Registry
from robbench.models.load import load_model
from support.models import small

CHANGES = {
    "probabilities": [lambda z: z.softmax(1), lambda z: (5 * z).softmax(1)],
    "bounded_outputs": [torch.sigmoid, lambda z: (10 * z).sigmoid(), lambda z: (z / 4 + 0.5).clamp(0, 1)],
    "log_probabilities": [lambda z: z.log_softmax(1), lambda z: z.softmax(1).log()],
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
