"""Commands on models without a card: what they advise works, their results are shown, refused runs leave nothing."""

import numpy as np
import pytest

from support.commands import run

CODE = """
import torch
from torch import nn
import robbench

class Hot(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = robbench.load_model("digits/natural")
    def forward(self, x):
        return torch.softmax(100 * self.net(x), 1)

def hot():
    return Hot().eval()

def gray():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)).eval()

def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()

def rows():
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    digits = load_digits()
    return LogisticRegression(max_iter=20).fit(digits.data / 16, digits.target)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_nets.py").write_text(CODE)
    rng = np.random.default_rng(0)
    np.savez(folder / "colour.npz", x=rng.integers(0, 255, (4, 16, 16, 3), dtype=np.uint8), y=np.arange(4) % 2)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_the_suite_that_sanity_advises_is_run_by_the_command_that_it_names(place):
    command = ("sanity", "own_nets:hot", "--dataset", "digits", "--samples", "8", "--results", "r")
    said = run(*command, cwd=place).stdout
    assert "Next: --suite" in said and "Give the same command with --act" in said
    said = run(*command, "--act", cwd=place).stdout
    assert "The lower of this run and suite" in said and "--act" not in said
    command = ("eval", "--model", "own_nets:hot", *command[2:-1], "other")
    said = run(*command, "--suite", "sanity", cwd=place).stdout
    advised = said.partition("Give the same command with --suite ")[2].partition(",")[0]
    assert f"suite {advised}" in run(*command, "--suite", advised, cwd=place).stdout


def test_results_of_a_model_without_a_card_are_shown(place):
    asked = ("--dataset", "digits", "--samples", "4", "--results", "shown")
    run("eval", "-m", "own_nets:linear", "-s", "quick", *asked, cwd=place)
    for name in ("digits/own_nets-linear", "own_nets-linear", "own_nets:linear"):
        said = run("show", name, "--results", "shown", cwd=place).stdout
        assert "suite quick" in said and "own_nets-linear: " in said
    assert '"card": null' in run("show", name, "--results", "shown", "--json", cwd=place).stdout
    said = run("show", "digits/nothing", "--results", "shown", cwd=place, code=2).stderr
    assert "In shown there are also: digits/own_nets-linear." in said
    assert "ambiguous" in run("show", "natural", "--results", "shown", cwd=place, code=2).stderr


def test_a_run_that_is_refused_leaves_nothing_behind(place):
    asked = ("--data", "colour.npz", "--eps", "0.1", "--results", "refused")
    for command in (("own_nets:gray", "-s", "quick"), ("own_nets:linear", "-s", "quick")):
        run("eval", "-m", *command, *asked, cwd=place, code=2)
    said = run("runs", "--results", "refused", cwd=place).stdout
    assert said.strip() == "(none)" and not [*(place / "refused").glob("[!.]*")]
