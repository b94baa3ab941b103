"""Losses against values computed by hand."""

import math

import pytest
import torch

from robbench.core.losses import LOSSES, cross_entropy, dlr, dlr_targeted, margin

Z = torch.tensor([[3.0, 1.0, 0.0, -1.0], [0.5, 2.0, 1.0, 0.0]])
Y = torch.tensor([0, 0])


def test_losses_equal_values_computed_by_hand():
    assert margin(Z, Y).tolist() == pytest.approx([-2.0, 1.5])
    # (3, 1, 0): -(3 - 1) / (3 - 0); (2, 1, 0.5): -(0.5 - 2) / (2 - 0.5)
    assert dlr(Z, Y).tolist() == pytest.approx([-2 / 3, 1.0])
    # target 3: (-1 - 3) / (3 - (0 + -1) / 2); (0 - 0.5) / (2 - (0.5 + 0) / 2)
    assert dlr_targeted(Z, Y, torch.tensor([3, 3])).tolist() == pytest.approx([-4 / 3.5, -0.5 / 1.75])
    assert float(cross_entropy(Z, Y)[0]) == pytest.approx(-3 + math.log(sum(math.exp(v) for v in (3, 1, 0, -1))))


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_any_number_of_classes_has_a_gradient(name, classes):
    z = Z[:, :classes].clone().requires_grad_(True)
    y = torch.tensor([0, 1])  # classified correctly: where the label ranks third, the published DLR is constant
    loss = LOSSES[name](z, y)
    assert loss.shape == (2,)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert grad.isfinite().all() and (grad != 0).any(1).all()
    target = torch.tensor([1, 1])
    assert dlr_targeted(z, Y, target).isfinite().all()


def test_the_sign_of_the_margin_is_the_prediction():
    z = torch.randn(500, 7, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, 7, (500,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(margin(z, y) > 0, z.argmax(1) != y)
    assert torch.equal(dlr(z, y) > 0, z.argmax(1) != y)
