"""`measure all`: what is known is not repeated, what is missing is trained and measured, and a stopped call goes on."""

import shutil

import pytest
from typer.testing import CliRunner

from robbench.commands import measure_all as module
from robbench.commands.app import app
from robbench.commands.measure import _KINDS
from robbench.commands.measure_all import Task, is_known, measure_all, read_program
from robbench.core.errors import CardError
from robbench.models.card import Registry, locate_builtin_cards
from robbench.report.figures.source import FigureData

PROGRAM = """
version = 1
[[digits]]
run = "logits"
models = ["natural", "tiny"]
samples = 20
[[digits]]
run = "eval"
suite = "quick"
models = ["tiny"]
samples = 20
"""


@pytest.fixture
def registry(tmp_path, repo):
    root = tmp_path / "models"
    (root / "digits").mkdir(parents=True)
    text = (repo / "models/digits/natural.toml").read_text().split("\n[weights]")[0]
    (root / "digits/tiny.toml").write_text(text.replace("iterations = 2000", "iterations = 5"))
    (root / "measurements.toml").write_text(PROGRAM)
    return Registry.default([root])


def test_what_the_program_of_the_package_declares_is_stored(repo):
    tasks = read_program(locate_builtin_cards(), "digits", _KINDS)
    data = FigureData(Registry.default(), repo / "results")
    assert len(tasks) == len(set(tasks)) > 40
    assert [t for t in tasks if not is_known(t, data)] == []


def test_one_command_trains_measures_and_knows_it_the_next_time(registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["measure", "all", "--dataset", "digits", "--models", "models", "--results", "results"]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert "its weights are not here, so it is trained first" in first.stderr
    assert "3 measurements, 0 known before, 3 made" in first.stdout
    again = CliRunner().invoke(app, arguments)
    assert "3 measurements, 3 known before, 0 made" in again.stdout
    assert again.stderr.count("known already") == 3
    shutil.rmtree(tmp_path / "results/digits/tiny/quick")
    third = CliRunner().invoke(app, arguments)
    assert "3 measurements, 2 known before, 1 made" in third.stdout
    assert "trained first" not in third.stderr


def test_a_stopped_call_goes_on_after_what_is_finished(registry, tmp_path):
    done = []

    def measure(task, overwrite):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(str(task))

    def know(task, data):
        return str(task) in done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "is_known", know)
        train = []
        with pytest.raises(BaseException, match="130"):
            measure_all("digits", registry, tmp_path, _KINDS, measure, train.append)
        done.append("digits/tiny: eval quick")
        before = list(done)
        measure_all("digits", registry, tmp_path, _KINDS, measure, train.append)
        assert done == before, "what is known is not measured again"


def test_the_results_tree_is_read_once_for_what_needs_no_training(registry, tmp_path, monkeypatch):
    read = []

    class Counted(FigureData):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            read.append(self)

    (registry.roots[-1] / "measurements.toml").write_text(PROGRAM.replace('"tiny"', '"at"'))
    monkeypatch.setattr(module, "FigureData", Counted)
    done = []
    measure_all("digits", registry, tmp_path / "none", _KINDS, lambda task, _: done.append(str(task)), done.append)
    assert done == ["digits/natural: logits", "digits/at: logits", "digits/at: eval quick"] and len(read) == 1


def test_results_of_other_weights_are_replaced_and_smaller_ones_are_not_known(repo, tmp_path):
    data = FigureData(Registry.default(), repo / "results")
    assert is_known(Task("eval", "digits/at", "whitebox", 899), data)
    assert not is_known(Task("eval", "digits/at", "whitebox", 900), data)
    assert not is_known(Task("eval", "digits/ls03", "masked", 200), data)
    assert is_known(Task("logits", "digits/at", samples=899), data)
    assert not is_known(Task("linear", "digits/ls03", samples=1), data)
    place = tmp_path / "digits/at/logits"
    shutil.copytree(repo / "results/digits/natural/logits", place)
    assert not is_known(Task("logits", "digits/at", samples=1), FigureData(Registry.default(), tmp_path))
    assert module._is_stored(Task("logits", "digits/at"), tmp_path, data)
    assert not module._is_stored(Task("eval", "digits/at", "quick"), tmp_path, data)


def test_radii_certificates_and_checks_are_known_by_what_they_are_on(repo, tmp_path):
    data = FigureData(Registry.default(), repo / "results")
    assert is_known(Task("eval", "digits/at", "quick", 899, eps=("0.10", "0.25")), data)
    assert not is_known(Task("eval", "digits/at", "quick", 899, eps=("0.1", "0.3")), data)
    assert not is_known(Task("eval", "digits/at", "quick", 900, eps=("0.1",)), data)
    assert is_known(Task("certify", "digits/at", samples=80, sigma=0.3), data)
    assert not is_known(Task("certify", "digits/at", samples=80, sigma=0.5), data)
    assert not is_known(Task("certify", "digits/trades", samples=1, sigma=0.3), data)
    assert is_known(Task("sanity", "digits/at", samples=200), data)
    assert not is_known(Task("sanity", "digits/at", samples=201), data)
    assert not module._is_stored(Task("certify", "digits/at", sigma=0.5), repo / "results", data)
    assert module._is_stored(Task("sanity", "digits/at"), repo / "results", data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[digit]]\nrun = "logits"\nmodels = []', "Unknown data set 'digits'"),
        ('[[digits]]\nrun = "logit"\nmodels = []', "Did you mean logits"),
        ('[[digits]]\nrun = "logits"\nmodels = "at"', "expected: a list"),
        ('[[digits]]\nrun = "logits"\nsuite = "quick"\nmodels = ["at"]', "expected: a name with eval"),
        ('[[digits]]\nrun = "eval"\nmodels = ["at"]', "expected: a name with eval"),
        ('[[digits]]\nrun = "logits"\nmodels = ["at"]\nsamples = 0', "from 1 on"),
        ('[[digits]]\nrun = "logits"\nmodels = ["at"]\nsample = 5', "Unknown key 'sample'"),
        ('[[digits]]\nrun = "logits"\nmodels = ["at"]\neps = ["0.1"]', "with eval"),
        ('[[digits]]\nrun = "eval"\nsuite = "quick"\nmodels = ["at"]\neps = [0.1]', "expected: texts"),
        ('[[digits]]\nrun = "certify"\nmodels = ["at"]', "above 0.0 with certify"),
        ('[[digits]]\nrun = "sanity"\nmodels = ["at"]\nsigma = 0.3', "above 0.0 with certify"),
        (
            '[[digits]]\nrun = "logits"\nmodels = ["at"]\nsamples = 5\n'
            '[[digits]]\nrun = "logits"\nmodels = ["ls03", "at"]',
            "digits/at: logits is declared twice, with other samples",
        ),
        ("[[digits]\n", "not valid TOML"),
    ],
)
def test_an_invalid_program_is_refused(tmp_path, text, message):
    (tmp_path / "measurements.toml").write_text(text)
    with pytest.raises(CardError, match=message):
        read_program(tmp_path, "digits", _KINDS)


@pytest.mark.parametrize("more", [[], ["--dataset", "digits", "-m", "digits/at"], ["--dataset", "digits", "--json"]])
def test_all_takes_a_data_set_and_no_model(more):
    shown = CliRunner().invoke(app, ["measure", "all", *more])
    assert "all takes --dataset" in f"{shown.exception}{shown.output}"
    shown = CliRunner().invoke(app, ["measure", "logits"])
    assert "Give --model" in f"{shown.exception}{shown.output}"
