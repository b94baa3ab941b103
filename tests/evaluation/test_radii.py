"""A radius that reaches every image means nothing, and is refused before any attack."""

import pytest
import torch

from robbench.attacks import FGSM
from robbench.core.errors import SuiteError
from robbench.evaluation.attack_images import attack_images
from robbench.evaluation.run import evaluate
from support.models import small

X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
Y = small()(X).argmax(1)


@pytest.mark.parametrize(("norm", "eps"), [("L2", 7.9), ("L1", 63.9), ("Linf", 1)])
def test_radii_below_the_diameter_run(norm, eps):
    assert evaluate(small(), [FGSM()], x=X, y=Y, eps=eps, norm=norm).n == 4


@pytest.mark.parametrize(
    ("norm", "eps", "words"),
    [
        ("L2", 128, r"L2 128 given; no two images of 64 values.*L2 8, .*0 to 255\?.*128 of 255 levels is L2 0\.502"),
        ("L2", 8, r"L2 8 given; no two images"),
        ("L1", 64, r"L1 64 given; no two images of 64 values.*L1 64,"),
        ("L1", "2000", r"L1 2000 given"),
        ("Linf", 1.01, r"an Linf radius lies in \[0, 1\]"),
        ("Linf", 8, r'write 8 of 255 levels as "8/255"'),
    ],
)
def test_radii_from_the_diameter_on_are_refused_before_an_attack(norm, eps, words, monkeypatch):
    monkeypatch.setattr("robbench.evaluation.run.Worker", None)
    with pytest.raises(SuiteError, match=words):
        evaluate(small(), [FGSM()], x=X, y=Y, eps=eps, norm=norm)
    with pytest.raises(SuiteError, match=words):
        attack_images(small(), FGSM(), X, Y, eps=eps, norm=norm)


def test_the_diameter_is_that_of_the_images_at_hand():
    x = X.repeat(1, 3, 2, 2)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 10)).eval()
    assert evaluate(model, [FGSM()], x=x, y=model(x).argmax(1), eps=8, norm="L2").n == 4
