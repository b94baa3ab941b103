"""A suite given as a name, a path, or a list of attack objects."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from robbench.attacks import EOT, FGSM, PGD
from robbench.core.errors import ResultError, SuiteError
from robbench.evaluation.run import evaluate
from robbench.recheck.reproduce import reproduce
from robbench.recheck.verify import verify
from robbench.results.run_files import find_runs
from robbench.suite import Suite, load_suite
from support.models import small

TOML = """
version = 1
[[attack]]
name = "FGSM"
kind = "fgsm"
objective = "margin"
[[attack]]
name = "PGD"
kind = "pgd"
steps = 3
step_size = "0.01"
[[attack]]
name = "PGD-2"
kind = "pgd"
steps = 2
random_start = true
"""
ATTACKS = [FGSM(objective="margin"), PGD(steps=3, step_size=0.01), PGD(steps=2, random_start=True)]


@pytest.fixture
def problem():
    model, x = small(), torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return model, {"x": x, "y": model(x).argmax(1), "name": "small", "eps": 0.05, "lanes": 8}


def test_a_list_of_attacks_is_the_suite_that_a_file_would_be(problem, tmp_path):
    model, call = problem
    path = tmp_path / "custom.toml"
    path.write_text(TOML)
    listed = evaluate(model, ATTACKS, **call, results=tmp_path / "list", save_adversarials=True)
    named = evaluate(model, path, **call, results=tmp_path / "file")
    assert listed.identity == named.identity and listed.run_id == named.run_id and listed.suite == "custom"
    assert [a.name for a in listed.attacks] == ["FGSM", "PGD", "PGD-2"]
    (one,), (other,) = ([*(tmp_path / root).glob("*/small/*/outcomes.parquet")] for root in ("list", "file"))
    assert one.read_bytes() == other.read_bytes()
    data = {"x": call["x"], "y": call["y"]}
    assert not verify(one.parent, model, **data).refuted
    with pytest.raises(ResultError, match="Give the list of attacks"):
        reproduce(one.parent, model, **data)
    assert not reproduce(one.parent, model, suite=ATTACKS, **data).verdicts


def test_a_path_is_as_good_as_its_text(problem, tmp_path):
    model, call = problem
    path = tmp_path / "mine.toml"
    path.write_text(TOML)
    assert evaluate(model, path, **call).run_id == evaluate(model, str(path), **call).run_id
    assert load_suite(path) == load_suite(str(path)) and load_suite(load_suite("quick")) == load_suite("quick")


def test_a_stopped_run_with_a_list_is_not_resumed_on_its_description(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("robbench.evaluation.run.EvaluationRun.finish", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate("digits/at", [FGSM()], samples=8, eps=0.1, results=tmp_path)
    (run,) = find_runs(tmp_path)
    assert run.state == "unfinished" and run.resumable is None
    assert "a list of attacks: call evaluate again" in run.note
    (about,) = tmp_path.rglob("run.json")
    assert json.loads(about.read_text())["suite"] == "custom"


@dataclass(frozen=True, kw_only=True)
class Still:
    """An attack of a user's own, with a parameter that no TOML file could say."""

    kind: ClassVar[str] = "still"
    version: ClassVar[int] = 1
    norms: ClassVar[tuple[str, ...]] = ("Linf",)
    needs_grad: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False
    memoryless: ClassVar[bool] = True
    shift: tuple[float, ...] = (0.01,)
    trials: int = 1
    steps: int = 1

    def init(self, p, ball):
        return {"x": p.x}

    def loss(self, logits, p, s):
        return logits.sum(1)

    def step(self, p, ball, s, t, logits, loss, grad):
        return {"x": ball.project(p.x, p.x + self.shift[0])}


def test_attacks_of_ones_own_and_averages_are_taken_as_they_are(problem):
    model, call = problem
    result = evaluate(model, [Still(), EOT(inner=FGSM(), draws=2)], **call)
    assert [a.name for a in result.attacks] == ["Still", "EOT"]
    assert result.identity["attacks"][0] == {
        "name": "Still", "kind": "still", "version": 1, "shift": [0.01], "trials": 1, "steps": 1
    } or result.identity["attacks"][0]["shift"] == (0.01,)  # fmt: skip


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ([], "An empty list of attacks"),
        (["pgd"], "'pgd' given in a list of attacks"),
        ([PGD], "given as an attack; allowed: objects such as PGD"),
        (PGD(), "allowed: a suite's name, the path of a .toml file, or a list of attacks"),
        (3, "suite: 3 given"),
        (Path("whitebox"), "whitebox: a path given; expected: the path of a .toml file"),
        ("whitbox", "Did you mean whitebox"),
    ],
)
def test_what_is_no_suite_is_a_sentence(suite, message):
    with pytest.raises(SuiteError, match=message):
        evaluate("digits/at", suite)


def test_a_list_needs_a_radius():
    with pytest.raises(SuiteError, match=r"no radius of its own for data set 'digits'.*in Python eps="):
        evaluate("digits/at", [FGSM()])
    assert Suite.of([FGSM()]).threats == {}
