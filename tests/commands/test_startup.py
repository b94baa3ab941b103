"""What a command imports before it answers. Counts modules: seconds depend on the machine."""

import subprocess
import sys

import pytest

from support.terminal import run_in_terminal

pytestmark = pytest.mark.whole

RUN = """
import sys
sys.argv = ["robbench", *{args!r}]
from robbench.__main__ import run_in_process
code = run_in_process()
"""
# The modules that take most of the time, and what else may be imported with them.
HEAVY = ("torch", "sklearn", "scipy", "matplotlib", "pandas", "pyarrow")
# Everything that begins to load torch stops there, and says so.
STOP_AT_TORCH = """
import os, sys
class Stop:
    def find_spec(self, name, *rest):
        if name == "torch":
            sys.stdout.flush(), sys.stderr.flush()
            print(len(sys.modules), "modules, then torch", flush=True)
            os._exit(0)
sys.meta_path.insert(0, Stop())
"""


def imported(*args):
    """Run a command in a process of its own: its exit code, the modules that it imported, and what it printed."""
    code = RUN.format(args=args) + "print('modules:', code, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    *output, last = done.stdout.strip().splitlines()
    _, code, *modules = last.split()
    return int(code), set(modules), "\n".join([*output, done.stderr])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["eval", "-m", "digits/at", "--eps", "8"], "8/255"),
        (["eval", "-m", "digits/at", "--eps", "8", "--norm", "L2"], "every image is in reach"),
        (["eval", "-m", "digits/at", "--norm", "L7", "--eps", "0.1"], "allowed: Linf, L2, L1"),
        (["eval", "-m", "digits/at", "--norm", "L2"], "Give --eps too"),
        (["eval", "-m", "digits/at", "--samples", "0"], "--samples: 0 given"),
        (["eval", "-m", "digits/at", "--device", "tpu"], "--device: 'tpu' given"),
        (["eval", "-m", "digits/at", "--lanes", "0"], "--lanes: 0 given"),
        (["eval", "-m", "digits/at", "-s", "whitebx"], "Did you mean whitebox"),
        (["eval", "-m", "digits/ta"], "digits/at"),
        (["eval", "-m", "mine:make_net"], "name of a data set"),
        (["eval", "-m", "mine:make_net", "--dataset", "mnst"], "Did you mean mnist"),
        (["plan", "-m", "digits/at", "--eps", "8"], "8/255"),
        (["plan", "-m", "digits/at", "--samples", "0"], "--samples: 0 given"),
        (["plan", "-m", "digits/at", "--pilot", "0"], "--pilot: 0 given"),
        (["sanity", "digits/at", "--eps", "8"], "8/255"),
        (["sanity", "digits/at", "--device", "cuda1"], "--device: 'cuda1' given"),
        (["measure", "linear", "-m", "digits/at", "--samples", "0"], "--samples: 0 given"),
        (["measure", "linear", "-m", "digits/ta"], "digits/at"),
        (["train", "digits/at", "--device", "tpu"], "--device: 'tpu' given"),
        (["reproduce", "results", "--samples", "0"], "--samples: 0 given"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_heavy_is_imported(args, message):
    code, modules, output = imported(*args)
    assert code == 2 and message in output
    assert not modules.intersection(HEAVY)
    assert len(modules) < 450


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["baseline", "-m", "digits/at", "--eps", "8", "--out", "none.json"], "8/255"),
        (["verify", "results/none"], "folder of a finished result"),
        (["reproduce", "results/none"], "folder of a finished result"),
    ],
)
def test_arguments_about_stored_results_are_refused_without_torch(args, message):
    code, modules, output = imported(*args)
    assert code == 2 and message in output
    assert not modules.intersection(("torch", "sklearn", "scipy"))


@pytest.mark.parametrize(
    ("args", "allowed", "most"),
    [
        (["list", "models"], (), 420),
        (["list", "suites"], (), 420),
        (["list", "attacks"], (), 420),
        (["list", "data"], (), 550),
        (["list", "figures"], ("pandas", "pyarrow"), 1000),
        (["show", "digits/at"], ("pandas", "pyarrow", "scipy"), 1020),  # for the radii of the smoothed model
        (["show", "mnist/at"], ("pandas", "pyarrow"), 1000),
        (["runs"], ("pandas", "pyarrow", "scipy"), 1020),  # one model answers nearly by chance, which is tested
    ],
)
def test_what_is_stored_is_shown_without_torch(args, allowed, most, repo, monkeypatch):
    monkeypatch.chdir(repo)
    code, modules, output = imported(*args)
    assert code == 0, output
    assert not modules.intersection(HEAVY).difference(allowed)
    assert len(modules) < most


def test_the_list_of_attacks_says_what_the_classes_say():
    from robbench.attacks import ATTACKS, parameters
    from robbench.commands.attack_sources import read_attacks

    assert [source.kind for source in read_attacks()] == list(ATTACKS)
    for source in read_attacks():
        attack = ATTACKS[source.kind]
        assert source.what == attack.__doc__.strip().splitlines()[0]
        assert list(source.parameters.items()) == [(name, f.default) for name, f in parameters(attack).items()]


def test_the_digits_are_read_without_scikit_learn():
    code = "import sys, robbench.data.sets as s; s.load('digits'); assert not {'sklearn', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["eval", "-m", "digits/at", "-s", "quick"], "digits/at · quick: loading"),
        (
            ["eval", "-m", "digits/at", "-m", "digits/natural", "--json"],
            "digits/at · whitebox (the first of 2 runs): load",
        ),
        (["plan", "-m", "digits/at"], "digits/at · whitebox: loading"),
        (["sanity", "digits/at"], "digits/at · sanity: loading"),
        (["train", "digits/at"], "train digits/at: loading"),
        (["measure", "linear", "-m", "digits/at"], "digits/at · linear: loading"),
        (["baseline", "-m", "digits/at", "-s", "quick", "--out", "none.json"], "digits/at · quick: loading"),
        (["check", "--baseline", "baselines/digits.json"], "Reading baselines/digits.json"),
        (["verify", "results/digits/at/quick"], "results/digits/at/quick/result.json: loading"),
        (["reproduce", "results/digits/at/quick"], "results/digits/at/quick/result.json: loading"),
    ],
)
def test_something_is_on_the_screen_before_torch_is_imported(args, line, repo, tmp_path):
    for name in ("results", "baselines"):
        (tmp_path / name).symlink_to(repo / name)
    text = run_in_terminal(STOP_AT_TORCH + RUN.format(args=args), 100, tmp_path)
    assert line in text and "modules, then torch" in text, text
    assert text.index(line) < text.index("modules, then torch")


def test_pipes_get_no_first_line():
    code = STOP_AT_TORCH + RUN.format(args=["eval", "-m", "digits/at", "-s", "quick"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "then torch" in done.stdout and "loading" not in done.stderr + done.stdout
