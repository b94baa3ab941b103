"""Labels and images of a user are checked before a conversion could hide a mistake."""

import re

import pytest
import torch
from torch.utils.data import TensorDataset

from robbench.attacks import FGSM
from robbench.classifier.own_images import check_own_images
from robbench.core.errors import DataError
from robbench.evaluation.attack_images import attack_images
from robbench.evaluation.run import evaluate
from support.models import small

X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))
Y = small()(X).argmax(1)
ULP = 1.2e-7


def with_pixel(value):
    x = X.clone()
    x[0, 0, 0, 0] = value
    return x


def ask(x):
    return evaluate(small(), [FGSM()], x=x, y=Y, eps=0.02)


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (Y + 0.9, "torch.float32"),
        (Y.double(), "torch.float64"),
        (torch.full((6,), torch.nan), "torch.float32"),
        (torch.eye(10)[Y], "soft labels"),
        (Y > 3, "torch.bool"),
        (Y.to(torch.complex64), "torch.complex64"),
        (Y[:, None], "y.squeeze"),
        (Y[:5], "expected 6 integer labels"),
        (Y - 20, "labels are 0 or more"),
        (Y.to("meta"), "device meta"),
    ],
)
def test_labels_that_are_no_integers_from_0_are_refused(y, words):
    with pytest.raises(DataError, match=words):
        check_own_images(X, y)


@pytest.mark.parametrize("value", [1 + 4 * ULP, -1e-6, 255])
def test_pixels_outside_the_box_are_refused_with_all_digits(value):
    with pytest.raises(DataError, match=r"x spans \[(?!0, 1\])"):
        check_own_images(with_pixel(value), Y)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_pixels_without_a_value_are_counted(value):
    with pytest.raises(DataError, match="NaN or infinity in 1 of 6 images, the first at position 0"):
        check_own_images(with_pixel(value), Y)


def test_labels_of_every_integer_type_are_taken():
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        assert torch.equal(check_own_images(X, Y.to(dtype))[1], Y)


def test_pixels_within_a_rounding_error_are_clipped_and_told():
    for value in (1 + ULP, -6e-8):
        x = with_pixel(value)
        bound = with_pixel(float(value > 0.5))
        found, expected = ask(x=x), ask(x=bound)
        assert re.search(r"1 values? of x lay outside.*(1\.0000001|-6e-08)", found.flags["clipped"])
        assert found.robust_accuracy == expected.robust_accuracy and found.run_id == expected.run_id
        assert "clipped" in attack_images(small(), FGSM(), x, Y, eps=0.02).flags
        assert x[0, 0, 0, 0] == torch.tensor(value)


def test_images_in_float16_are_attacked_in_float32():
    """Rounded to float16, most points of an attack lay outside the ball, and no break counted."""
    x = X.half()
    y = small()(x.float()).argmax(1)
    wide, half = (attack_images(small(), FGSM(), images, y, eps="8/255") for images in (x.float(), x))
    assert half.x_adv.dtype == torch.float32 and torch.equal(half.x_adv, wide.x_adv) and wide.broken.any()
    given = evaluate(small(), [FGSM()], data=TensorDataset(x, y), eps="8/255", dataset="half")
    assert given.robust_accuracy.value == wide.robust_accuracy
