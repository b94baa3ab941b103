"""Advice that works when it is followed: its command has the folders of the command that gave it."""

import json

import pytest
import torch
from torch import nn

import robbench as rb
from robbench.core.errors import ResultError
from robbench.core.words import advise_overwrite
from support.commands import run

NETS = """
import numpy as np
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, classes)
        self.eval()

    def forward(self, x):
        return self.layer(x.flatten(1))

def ten():
    return Net()

def one():
    return Net(1)

def labels(x):
    return np.zeros(len(x), int)

def scores(x):
    return np.eye(10)[np.full(len(x), 8)]

def wrong(x):
    return np.eye(10)[np.full(len(x), 7)]

model = Net()
"""
QUICK = ("--suite", "quick", "--samples", "4")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with modules, a results tree `mine` with one result, and a baseline of it."""
    place = tmp_path_factory.mktemp("advice")
    (place / "advice_nets.py").write_text(NETS)
    run("eval", "--model", "digits/at", *QUICK, "--results", "mine", cwd=place)
    run("measure", "linear", "--model", "digits/at", "--samples", "4", "--results", "mine", cwd=place)
    run("baseline", "--model", "digits/at", "--suite", "quick", "--samples", "10", "--out", "base.json", cwd=place)
    return place


@pytest.mark.parametrize(
    ("command", "code", "advice"),
    [
        (("show", "digits/natural", "--results", "mine"), 0, "robbench eval --model digits/natural --results mine"),
        (("figure", "shafahi2019-1", "--dataset", "digits", "--results", "mine", "--output", "figures"), 0,
         "robbench measure linear -m digits/natural --results mine\n"),
        (("figure", "per-class", "--dataset", "digits", "--results", "mine"), 2,
         "robbench eval -m digits/natural --suite whitebox --results mine"),
        (("table", "all", "--check", "--results", "mine"), 1, "run `robbench table all --results mine`"),
        (("table", "audit", "--check", "--results", "mine", "--output", "a.md"), 1,
         "run `robbench table audit --results mine --output a.md`"),
        (("leaderboard", "--check", "--results", "mine", "--output", "l.md"), 1,
         "run `robbench leaderboard --results mine --output l.md`"),
        (("trained", "--check", "--results", "mine", "--output", "t.md"), 1,
         "run `robbench trained --results mine --output t.md`"),
        (("figure", "shafahi2019-1", "--dataset", "digits", "--check", "--results", "mine"), 1,
         "run `robbench figure shafahi2019-1 --dataset digits --results mine`"),
        (("verify", "mine/digits/at"), 2, "Near it: mine/digits/at/quick."),
        (("export", "mine/digits/at/quik"), 2, "Near it: mine/digits/at/quick."),
        (("show", "advice_nets:ten", "--results", "mine"), 2, "No result of advice_nets:ten in mine."),
        (("certify", "digits/at"), 2, "--method exact given without --eps. Give it, such as --eps 0.03."),
        (("certify", "digits/at", "--eps=-1"), 2, "robbench: --eps: '-1' given"),
        (("reproduce", "mine/digits/at/quick", "--suite", "whitebox"), 2,
         "attacks: stored FGSM-xent, PGD-10-CW, APGD-CE-20, this run FGSM-xent, FGSM-CW"),
    ],
)  # fmt: skip
def test_advice_has_the_folders_of_the_command(place, command, code, advice):
    done = run(*command, cwd=place, code=code)
    assert advice in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("source", "suite", "message"),
    [
        ("model", "quick", "model is a model itself, a Net; expected: a function that returns it."),
        ("labels", "queries", "return 1.0 at the predicted class and 0.0 elsewhere"),
        ("one", "quick", "The model has 1 class; the data set has 10."),
    ],
)
def test_a_model_of_the_wrong_kind_is_told_what_to_return(place, source, suite, message):
    about = ("--dataset", "digits", "--suite", suite, "--samples", "2", "--results", "own")
    assert message in run("eval", "--model", f"advice_nets:{source}", *about, cwd=place, code=2).stderr


def test_predicted_classes_as_scores_are_taken(place):
    about = ("--dataset", "digits", "--suite", "queries", "--samples", "2", "--results", "own")
    assert "100.0 % clean" in run("eval", "--model", "advice_nets:scores", *about, cwd=place).stdout


def test_a_baseline_of_a_data_set_is_compared_with_a_source(place):
    done = run("check", "--baseline", "base.json", "--model", "advice_nets:ten", cwd=place, code=1)
    assert "Gate FAILED" in done.stdout and "\n  (l" not in done.stdout, "a module is named in one line"
    assert rb.assert_robust(rb.load_model("digits/at"), baseline=place / "base.json") is None


def test_a_baseline_that_every_check_would_refuse_is_not_written(place):
    command = ("baseline", "--model", "advice_nets:wrong", "--dataset", "digits", "--suite", "queries")
    done = run(*command, "--samples", "2", "--sample-seed", "3", "--out", "none.json", cwd=place, code=2)
    assert "none.json was not written" in done.stderr and not (place / "none.json").exists()


def test_a_damaged_measurement_is_made_again_by_the_command_that_its_message_names(place):
    path = place / "mine/digits/at/linear/linear.json"
    path.write_text("x" + path.read_text())
    message = run("measure", "linear", "-m", "digits/at", "--samples", "4", "--results", "mine", cwd=place, code=2)
    command = message.stderr.split("Measure it again: robbench ")[1].split()
    assert command == ["measure", "linear", "--model", "digits/at", "--results", "mine", "--overwrite"]
    run(*command, "--samples", "4", cwd=place)
    assert json.loads(path.read_text())["n"] == 4


def test_a_command_without_a_tree_of_its_own_names_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "results" / "digits" / "a b" / "linear"
    found = advise_overwrite("measure linear --model {}", folder.relative_to(tmp_path))
    assert found == "robbench measure linear --model 'digits/a b' --overwrite"


def test_what_python_returns_prints_in_a_few_short_lines(place):
    found = {
        "plan": rb.plan("digits/at", "quick", samples=4),
        "check": rb.check("digits/at", place / "base.json"),
        "reproduce": rb.reproduce(place / "mine/digits/at/quick"),
    }
    for name, value in found.items():
        assert "object at" not in repr(value) and "\n" not in repr(value) and len(repr(value)) < 250, name
        assert "np.float64" not in str(value) and len(str(value)) < 1000, name
    assert "np.float64" not in repr(found["plan"].stages)
    assert str(found["check"]).startswith("Gate passed: 5 tests")


def test_a_decision_lists_what_did_not_pass(place):
    class Wrong(nn.Module):
        def forward(self, x):
            return torch.eye(10)[torch.full((len(x),), 7)] + 0 * x.sum()

    decision = rb.check(Wrong().eval(), place / "base.json")
    assert decision.failed and "worst case: failed, 8 of 10 images before" in str(decision)


def test_the_number_of_images_is_named_as_it_was_given():
    with pytest.raises(rb.RobbenchError, match=r"^n: 0 given"):
        rb.load_data("digits", n=0)
    with pytest.raises(ResultError, match=r"^No nowhere; expected"):
        rb.verify("nowhere")
