"""The public names of `robbench`: they are there, load lazily, warn, and do what docs/api.md shows."""

import copy
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import robbench as rb
from robbench.core.numbers import parse_threat
from robbench.core.threat import Ball


@pytest.fixture(scope="module")
def digits():
    return rb.load_model("digits/at"), *rb.load_data("digits", n=40)


class Probabilities(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).softmax(1)


def test_every_public_name_is_there_and_no_other():
    assert dir(rb) == rb.__all__ == sorted(rb.__all__)
    assert all(getattr(rb, name) is not None for name in rb.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'evalute'; it has: .*evaluate"):
        rb.evalute  # noqa: B018


@pytest.mark.whole
def test_importing_robbench_imports_no_torch():
    code = "import sys, robbench; dir(robbench); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_load_data_and_load_model_fit_each_other(digits):
    model, x, y = digits
    assert x.shape == (40, 1, 8, 8) and x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
    assert y.shape == (40,) and y.dtype == torch.int64
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert rb.clean_accuracy(model, x, y, lanes=7) == float((model(x).argmax(1) == y).double().mean())


@pytest.mark.parametrize("n", [0, -1, 2.5, True, "3"])
def test_load_data_refuses_a_count_that_is_none(n):
    with pytest.raises(rb.RobbenchError, match="allowed: a whole number"):
        rb.load_data("digits", n=n)
    assert len(rb.load_data("digits", n=np.int64(3))[0]) == 3


def test_load_data_refuses_an_unknown_split():
    with pytest.raises(rb.RobbenchError, match="split: 'validation' given; allowed: test, train"):
        rb.load_data("digits", split="validation")


def test_a_source_without_its_data_set_is_refused():
    with pytest.raises(rb.RobbenchError, match="a source needs the data set"):
        rb.load_model("file:net.safetensors", architecture="digits_convnet")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, y: rb.load_data(5), "name: 5 given; allowed: digits"),
        (lambda m, x, y: rb.load_data("digits", data_dir=5), "data_dir: 5 given"),
        (lambda m, x, y: rb.load_model(m), "name: .* given; allowed: a registered name"),
        (lambda m, x, y: rb.load_model("digits/at", device="foo"), "Device 'foo' given"),
        (lambda m, x, y: rb.load_model("digits/at", device=5), "device: 5 given"),
        (lambda m, x, y: rb.load_model("digits/at", models="models"), "models: 'models' given; allowed: a list"),
        (lambda m, x, y: rb.clean_accuracy("digits/at", x, y), r"robbench\.load_model\('digits/at'\)"),
        (lambda m, x, y: rb.clean_accuracy(None, x, y), "model: .*NoneType given"),
        (lambda m, x, y: rb.clean_accuracy(m, x.tolist(), y), "x: builtins.list given"),
        (lambda m, x, y: rb.clean_accuracy(m, x, y, lanes=0), "lanes: 0 given"),
        (lambda m, x, y: rb.clean_accuracy(m, x, y + 10), "the labels go up to"),
        (lambda m, x, y: rb.clean_accuracy(copy.deepcopy(m).train(), x, y), "training mode"),
        (lambda m, x, y: rb.attack("digits/at", rb.attacks.FGSM(), x, y, eps=0.1), r"robbench\.load_model"),
        (lambda m, x, y: rb.assert_robust(m, x=x, y=y, eps=0.1, at_least=True), "at_least: True given"),
        (lambda m, x, y: rb.assert_robust(m, x=x, y=y, eps=0.1, at_least=0.1, alpha=5), "alpha: 5.0 given"),
        (lambda m, x, y: rb.assert_robust(m, x=x, y=y, eps=0.1, at_least=0.1, max_drop="a"), "max_drop: 'a'"),
        (lambda m, x, y: rb.assert_robust(m, suite=[], x=x, y=y, eps=0.1, at_least=0.1), "An empty list of attacks"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(digits, call, message):
    with pytest.raises(rb.RobbenchError, match=message):
        call(*digits)


def test_attack_has_the_verdicts_of_evaluate_and_points_that_hold(digits):
    model, x, y = digits
    outcome = rb.attack(model, rb.attacks.PGD(steps=10), x, y, eps="0.2")
    result = rb.evaluate(model, [rb.attacks.PGD(steps=10)], x=x, y=y, eps="0.2")
    assert outcome.robust_accuracy == result.robust_accuracy.value
    assert outcome.clean_accuracy == result.clean_accuracy.value == rb.clean_accuracy(model, x, y)
    assert int(outcome.forwards.sum()) == result.attacks[0].forwards
    assert outcome.broken.any() and not (outcome.broken & outcome.misclassified).any()
    broken = outcome.broken
    assert bool((model(outcome.x_adv).argmax(1) != y)[broken].all())
    assert bool(Ball.of(parse_threat("Linf", "0.2")).contains(x, outcome.x_adv).all())
    assert torch.equal(outcome.x_adv[~broken], x[~broken])
    assert torch.equal(outcome.distance.isnan(), ~broken)
    assert re.fullmatch(r"AttackOutcome\(40 images: [\d.]+ % clean, [\d.]+ % robust\)", repr(outcome))


def test_several_radii_give_a_list_each(digits):
    model, x, y = digits
    outcomes = rb.attack(model, rb.attacks.FGSM(), x, y, eps=[0.05, "1/5"])
    results = rb.evaluate(model, [rb.attacks.FGSM()], x=x, y=y, eps=(0.05, "1/5"))
    assert [o.robust_accuracy for o in outcomes] == [r.robust_accuracy.value for r in results]
    assert outcomes[0].robust_accuracy > outcomes[1].robust_accuracy


class Aging(nn.Module):
    """Answers differently after some gradients were asked for."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x):
        self.calls += torch.is_grad_enabled()
        return self.inner(x) * (1 if self.calls < 15 else -1)


def test_a_model_that_changes_during_the_attack_is_flagged(digits):
    model, x, y = digits
    with pytest.warns(rb.RobustnessWarning, match="state: The model answers differently after the attacks"):
        outcome = rb.attack(Aging(model).eval(), rb.attacks.PGD(steps=20), x, y, eps=0.05)
    assert "state" in outcome.flags


@pytest.mark.parametrize("eps", [[], {}, object(), b"0.1", [0.1, "far"], [0.1, None], [0.1, 5], ["-1"]])
def test_radii_that_are_none_are_refused_before_anything_runs(digits, eps):
    model, x, y = digits
    for call in (
        lambda: rb.attack(model, rb.attacks.FGSM(), x, y, eps=eps),
        lambda: rb.evaluate(model, [rb.attacks.FGSM()], x=x, y=y, eps=eps),
    ):
        with pytest.raises(rb.RobbenchError, match=r"eps|radius"):
            call()


def test_a_model_that_errs_on_every_image_is_not_attacked(digits):
    model, x, y = digits
    with pytest.warns(rb.RobustnessWarning, match="chance"):
        outcome = rb.attack(model, rb.attacks.FGSM(), x, (y + 1) % 10, eps=0.1)
    assert outcome.robust_accuracy == outcome.clean_accuracy
    assert int(outcome.forwards[outcome.misclassified].sum()) == 0


def test_flags_warn_at_the_line_of_the_caller(digits):
    model, x, y = digits
    model = Probabilities(model).eval()
    for call in (
        lambda: rb.attack(model, rb.attacks.FGSM(), x, y, eps=0.1),
        lambda: rb.attack(model, rb.attacks.FGSM(), x, y, eps=[0.1, 0.2]),
        lambda: rb.evaluate(model, [rb.attacks.FGSM()], x=x, y=y, eps=0.1),
        lambda: rb.evaluate(model, [rb.attacks.FGSM()], x=x, y=y, eps=[0.1, 0.2]),
        lambda: rb.clean_accuracy(model, x, y),
        lambda: rb.assert_robust(model, suite=[rb.attacks.FGSM()], x=x, y=y, eps=0.1, at_least=0.1),
    ):
        with pytest.warns(rb.RobustnessWarning, match="probabilities: The model's outputs are probabilities") as seen:
            call()
        assert [w.filename for w in seen] == [__file__]


def test_what_an_attack_does_not_take_is_refused(digits):
    model, x, y = digits
    with pytest.raises(rb.RobbenchError, match=r"Unknown option 'sede'.*seed"):
        rb.attack(model, rb.attacks.FGSM(), x, y, eps=0.1, sede=3)
    with pytest.raises(rb.RobbenchError, match="Unknown option 'results'"):
        rb.attack(model, rb.attacks.FGSM(), x, y, eps=0.1, results="build")
    with pytest.raises(rb.RobbenchError, match="judge: 'last' given; allowed: any, final"):
        rb.attack(model, rb.attacks.FGSM(), x, y, eps=0.1, judge="last")
    with pytest.raises(rb.RobbenchError, match="given in a list of attacks"):
        rb.attack(model, "fgsm", x, y, eps=0.1)


def examples(repo):
    return re.findall(r"^```python\n(.*?)^```$", (repo / "docs" / "api.md").read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.whole
def test_the_examples_of_the_page_run_and_show_every_name(repo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(examples(repo))
    exec(compile(code, "api.md", "exec"), {"__name__": "page"})
    shown = set(re.findall(r"\brb\.(\w+)", (repo / "docs" / "api.md").read_text()))
    assert set(rb.__all__) - {"__version__"} <= shown


@pytest.mark.whole
def test_the_examples_of_the_page_have_types(repo, tmp_path):
    """py.typed and the signatures work for a user's type checker."""
    page = tmp_path / "page.py"
    page.write_text(
        "\n".join(examples(repo))
        .replace("def __init__(self, inner)", "def __init__(self, inner: torch.nn.Module) -> None")
        .replace("def forward(self, x)", "def forward(self, x: torch.Tensor) -> torch.Tensor")
    )
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import robbench as rb\n"
        "model = rb.load_model('digits/at')\n"
        "x, y = rb.load_data('digits')\n"
        "rb.evaluate(model, 'quick', x=x, y=y, samples='3')\n"
        "rb.attack(model, rb.attacks.PGD(stepps=3), x, y, eps=0.1)\n"
        "rb.attack(model, rb.attacks.PGD(), x, y, eps=[0.1]).broken\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(repo / "pyproject.toml"), str(page), str(wrong)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repo)
    assert sorted(set(re.findall(r"(\w+\.py:\d+): error", done.stdout))) == [
        "wrong.py:4",
        "wrong.py:5",
        "wrong.py:6",
    ], done.stdout + done.stderr
