"""Wrong values on the command line: one sentence with what was given, what is allowed, and the closest value."""

import numpy as np
import pytest
from PIL import Image

from robbench.core.errors import suggest_names
from robbench.report.console import TerminalConsole, leave_out_python, protect_terminal
from support.commands import run

CODE = """
import torch
from torch import nn

def gray():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)).eval()

def colour():
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)).eval()

def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()

class Broken(nn.Module):
    def forward(self, x):
        raise ValueError("my own error")

def broken():
    return Broken().eval()

def rows():
    from sklearn.linear_model import LogisticRegression
    x = torch.rand(20, 64, generator=torch.Generator().manual_seed(0)).numpy()
    return LogisticRegression().fit(x, [0, 1] * 10)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "wrong_nets.py").write_text(CODE)
    (folder / "file").write_text("")
    (folder / "folder").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        (folder / f"colour/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"colour/{'ab'[i % 2]}/{i}.png")
    (folder / "list.csv").write_text("path,label\nnowhere.png,0\n")
    return folder


EVAL = ("eval", "-m", "digits/at", "-s", "quick")
OWN = ("eval", "--eps", "0.1", "--results", "r", "--data", "colour", "-s", "quick", "-m")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ((*EVAL, "--samples", "1e3"), "--samples: '1e3' given; allowed: a whole number"),
        ((*EVAL, "--lanes", "x"), "--lanes: 'x' given; allowed: a whole number"),
        ((*EVAL, "--seeds", "2.5"), "--seeds: '2.5' given; allowed: a whole number"),
        ((*EVAL, "--on-broken", "skp"), "--on-broken: 'skp' given; allowed: stop, skip. Did you mean skip"),
        ((*EVAL, "--target", "nxt"), "allowed: least-likely, random, next, the number of a class. Did you mean next?"),
        ((*EVAL, "--target", "most-likely"), "random, next, the number of a class.\n"),
        ((*EVAL, "--norm", "linf"), "allowed: Linf, L2, L1, L0. Did you mean Linf?"),
        ((*EVAL, "--executor", "rai"), "allowed: process, ray. Did you mean ray?"),
        ((*EVAL, "--gradients", "float16"), "allowed: bfloat16. Did you mean bfloat16?"),
        ((*EVAL, "--eps", "0.1,,0.2"), "Several radii have commas between them"),
        (("check", "--baseline", "file", "--alpha", "low"), "--alpha: 'low' given; allowed: a number"),
        (("check", "--baseline", "file", "--max-drop", "-1"), "--max-drop: -1.0 given"),
        (("certify", "digits/at", "--method", "boundz"), "Did you mean bounds?"),
        (("evl",), "Did you mean 'eval'? See"),
        (("sanity", "--model", "digits/at"), "takes the model without it: robbench sanity digits/at. See"),
        (("show", "-m", "digits/at"), "-m given; this command takes the model without it: robbench show digits/at"),
        ((*EVAL, "--results", "file"), "--results: file given, which is a file; allowed: a folder"),
        ((*EVAL, "--results", "file/r"), "--results: file/r given, and file is a file; allowed: a folder"),
        (("show", "digits/at", "--results", "file"), "--results: file given, which is a file"),
        (("runs", "--results", "file"), "--results: file given, which is a file"),
        (("report", "--out", "file"), "--out: file given, which is a file"),
        (("figure", "all", "--output", "file"), "--output: file given, which is a file"),
        (("baseline", "-m", "digits/at", "--out", "folder"), "--out: folder given, which is a folder"),
        (("baseline", "-m", "digits/at", "--out", "file/b.json"), "--out: file given, which is a file"),
        (("leaderboard", "--output", "folder"), "--output: folder given, which is a folder"),
        (("check", "--baseline", "file", "--junit", "folder"), "--junit: folder given, which is a folder"),
        (("plan", "-m", "digits/at", "--workers", "0"), "--workers: 0 given; allowed: a whole number, at least 1"),
        (("plan", "-m", "digits/at", "--gpus", "-1"), "--gpus: -1 given; allowed: a whole number, at least 1"),
        (("train", "digits/at", "--runs", "file"), "--runs: file given, which is a file; allowed: a folder"),
        (("verify", "folder", "--samples", "0"), "--samples: 0 given; allowed: a whole number, at least 1"),
        ((*OWN, "wrong_nets:rows"), "was fitted to 64 numbers an image, and an image of shape (3, 16, 16) has 768"),
        (
            (*OWN, "wrong_nets:gray"),
            "The model takes gray images, and these have 3 channels. With --data, --channels 1",
        ),
        ((*OWN, "wrong_nets:colour", "--channels", "1"), "The model takes colour images, and these have 1 channel."),
        ((*OWN, "wrong_nets:linear"), "takes 64 numbers, and an image has 768. With --data, --resize"),
        ((*OWN, "wrong_nets.py:gray"), "the name of a module has no .py; give wrong_nets:gray."),
        (
            (*OWN, "wrong_nets:gray", "--data", "list.csv"),
            "robbench: nowhere.png: No such file or directory. Remove it",
        ),
        (
            (*OWN, "wrong_nets:gray", "--classes", "none"),
            "--classes: none is not a mapping of classes, a text file with a name a line or .json: No such file",
        ),
    ],
)
def test_a_wrong_value_gives_one_sentence_that_helps(place, command, message):
    said = run(*command, cwd=place, code=2).stderr
    assert message in said and "Traceback" not in said and "Value error" not in said
    assert "parse string" not in said and "Errno" not in said
    assert "None" not in said and "in Python" not in said


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x: 3 given; allowed: a path, or None.", "x: 3 given; allowed: a path."),
        ("a class, or in Python a list with one class for each image, or None. Did", "a class. Did"),
        ("Give one: --eps 8/255 (and --norm); in Python eps= (and norm=).", "Give one: --eps 8/255 (and --norm)."),
        ("Give images (--data PATH; in Python data=, or x= and y=), or", "Give images (--data PATH), or"),
        ("Say which: --output NAME (in Python output=).", "Say which: --output NAME."),
        ("add --import m (in Python, import m first).", "add --import m."),
        ("Give it (--model; in Python: model=). More.", "Give it (--model). More."),
        ("Give them: --data PATH; in Python data=, or x= and y=.", "Give them: --data PATH."),
        ("digits/or None of these, and Python 3.11 given", "digits/or None of these, and Python 3.11 given"),
    ],
)
def test_a_reader_of_the_command_line_gets_no_words_about_python(text, told, capsys):
    assert leave_out_python(text) == told
    console = TerminalConsole(stderr=True)
    console.note(text)
    with protect_terminal():
        console.note(text)
    assert capsys.readouterr().err == f"note: {text}\nnote: {told}\n"


@pytest.mark.parametrize(
    ("given", "known", "close"),
    [
        ("most-likely", ("least-likely", "random"), ""),
        ("box_high", ("box_low", "sphere"), ""),
        ("mnist/xyz", ("mnist/at", "mnist/trades"), ""),
        ("lest-likely", ("least-likely",), "least-likely"),
        ("digits/ta", ("digits/at", "mnist/at"), "digits/at"),
        ("data_set", ("dataset",), "dataset"),
    ],
)
def test_a_name_is_suggested_only_if_each_of_its_words_is_close(given, known, close):
    said = suggest_names(given, known)
    assert said.startswith(f" Did you mean {close}") if close else said == ""


def test_another_error_of_a_model_gets_no_hint_about_images(place):
    said = run(*OWN, "wrong_nets:broken", cwd=place, code=2).stderr
    assert "my own error" in said and "--channels" not in said and "--resize" not in said


def test_a_folder_that_is_new_is_allowed(place):
    run(*EVAL, "--samples", 2, "--results", "new/tree", cwd=place)
    run(*EVAL, "--samples", 2, "--results", "new/tree", cwd=place)
