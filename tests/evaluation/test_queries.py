"""The suite `queries`: any model without gradients, on any images, under each norm."""

import pytest
import torch
from torch import nn

from robbench.core.errors import ModelError, SuiteError
from robbench.evaluation.run import evaluate
from robbench.suite import load_suite
from support.models import small

X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))
Y = small()(X).argmax(1)


class Blind(nn.Module):
    """Answers with the predicted class alone, outside of autograd."""

    def __init__(self):
        super().__init__()
        self.net = small()
        self.eval()

    def forward(self, x):
        with torch.no_grad():
            return nn.functional.one_hot(self.net(x.detach()).argmax(1), 10).to(x.dtype)


@pytest.mark.parametrize(
    ("norm", "eps", "stages"),
    [
        ("Linf", "0.3", ["Square", "RayS", "SPSA"]),
        ("L2", "3", ["Square", "HopSkipJump", "SPSA"]),
        ("L1", "9", ["Square"]),
    ],
)
def test_it_runs_on_labels_alone_with_the_attacks_that_fit_the_norm(norm, eps, stages):
    result = evaluate(Blind(), "queries", x=X, y=Y, norm=norm, eps=eps)
    assert [a.name for a in result.attacks] == stages
    assert result.robust_accuracy.value == 0


def test_an_attack_that_needs_gradients_names_it():
    with pytest.raises(ModelError, match="--suite queries"):
        evaluate(Blind(), "quick", x=X, y=Y, eps="0.3")


SUITE = 'version = 1\n[[attack]]\nname = "a"\nkind = "hopskipjump"\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "Attack 'a' .hopskipjump. given a threat of norm Linf; it is made for: L2"),
        ("optional = true", "No attack of the suite 'mine' is made for Linf"),
        ('optional = "no"', "optional: 'no' given; allowed: true or false"),
        ("optional = 1", "optional: 1 given"),
    ],
)
def test_only_an_optional_attack_is_left_out_and_not_all_of_them(tmp_path, line, message):
    path = tmp_path / "mine.toml"
    path.write_text(SUITE + line)
    with pytest.raises(SuiteError, match=message):
        evaluate(small(), load_suite(str(path)), x=X, y=Y, norm="Linf", eps="0.3")
