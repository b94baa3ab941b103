"""`assert_robust` as a user's own test calls it."""

import pytest
import torch
from torch import nn

from robbench.api import RobustnessWarning
from robbench.core.errors import RobbenchError
from robbench.data.sets import load
from robbench.evaluation.options import Options
from robbench.evaluation.run import evaluate
from robbench.gate.baseline import write_baseline
from robbench.gate.measure import measure_entry
from robbench.models.card import Registry
from robbench.models.load import load_model
from robbench.models.spec import ModelSpec
from robbench.testing import assert_robust

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def net():
    return load_model(Registry.default([]).find("digits/at")).module


@pytest.fixture(scope="module")
def written(net, tmp_path_factory):
    """A baseline of the module on 250 images."""
    folder = tmp_path_factory.mktemp("assert")
    options = Options(results=folder / "results", device="cpu", samples=250, sample_seed=0)
    run = measure_entry(ModelSpec(net, name="net", dataset="digits"), "quick", options)
    write_baseline(folder / "one.json", [run])
    write_baseline(folder / "two.json", [run, run.model_copy(update={"model": "other"})])
    return folder


def test_the_model_of_the_baseline_passes(net, written):
    assert_robust(net, baseline=written / "one.json", at_least=0.4)
    assert_robust(net, baseline=written / "two.json", name="digits/net")
    with pytest.raises(RobbenchError, match="holds digits/net, digits/other; name=None given"):
        assert_robust(net, baseline=written / "two.json")


def test_a_worse_model_fails_with_the_report(written):
    natural = load_model(Registry.default([]).find("digits/natural")).module
    with pytest.raises(AssertionError) as failed:
        assert_robust(natural, baseline=written / "one.json")
    text = str(failed.value)
    assert "Gate FAILED" in text and "worst case: significantly lower" in text and "What changed: weights" in text


def test_a_model_below_at_least_fails_the_assertion(net):
    robust = evaluate(net, "quick", dataset="digits", samples=60).robust_accuracy.value
    assert_robust(net, at_least=robust, suite="quick", dataset="digits", samples=60)
    with pytest.raises(AssertionError, match=r"on 60 images under quick; at least \d+\.\d % is required"):
        assert_robust(net, at_least=robust + 0.01, suite="quick", dataset="digits", samples=60)


def test_images_of_ones_own():
    data = load("digits", "test")
    x, y = torch.from_numpy(data.x[:30]).float() / data.scale, torch.from_numpy(data.y[:30])
    constant = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    nn.init.zeros_(constant[1].weight)
    with torch.no_grad():
        constant[1].bias.copy_(torch.arange(10.0))
    right = int((y == 9).sum()) / 30
    with pytest.warns(RobustnessWarning) as told:  # it cannot be attacked at all
        assert_robust(constant, at_least=right, suite="quick", x=x, y=y, eps=0.3)
    assert {str(warning.message).partition(":")[0] for warning in told} == {"zero_gradients", "chance"}
    with pytest.warns(RobustnessWarning), pytest.raises(AssertionError, match="robust accuracy"):
        assert_robust(constant, at_least=right + 0.01, suite="quick", x=x, y=y, eps=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to compare with"),
        ({"at_least": 40}, "a share from 0 to 1"),
        ({"baseline": "b.json", "suite": "quick"}, "those of the baseline"),
        ({"baseline": "none.json"}, r"none.json cannot be read: No such file.*robbench baseline"),
    ],
)
def test_wrong_options_of_assert_robust_are_refused(options, message):
    with pytest.raises(RobbenchError, match=message):
        assert_robust("digits/natural", **options)
