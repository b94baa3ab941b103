"""Perturbations made on a surrogate: the surrogate's own final points, judged on the target."""

from pathlib import Path

import numpy as np
import pytest
import torch

from robbench.attacks import PGD, Square
from robbench.core import rng
from robbench.core.errors import ModelError, RobbenchError, SuiteError
from robbench.core.threat import Ball
from robbench.core.types import Problem
from robbench.data.sets import load
from robbench.engine import engine
from robbench.evaluation.run import evaluate
from robbench.models.card import Registry
from robbench.models.load import load_model
from robbench.results.reader import read_results
from robbench.results.store import RunStore
from support.stored import TRANSFER, write_transfer_suite

pytestmark = pytest.mark.whole

WHITE = TRANSFER.replace('"transfer"', '"pgd"').replace('surrogate = "SURROGATE"\nattack = "pgd"\n', "")


def rows(tmp_path, result):
    store = RunStore(tmp_path / "results", result.dataset, result.model, result.suite, result.identity, standard=True)
    return store.open().sort_values("sample")


def test_the_points_are_those_of_the_surrogate(tmp_path):
    result = evaluate("digits/at", write_transfer_suite(tmp_path), samples=70, lanes=32, results=tmp_path / "results")
    data = load("digits", "test")
    x, y = torch.from_numpy(data.x[:70]).float() / data.scale, torch.from_numpy(data.y[:70])
    natural, target = (load_model(Registry.default().find(f"digits/{n}")).module for n in ("natural", "at"))
    sample = torch.from_numpy(data.index[:70])
    p = Problem(x=x, y=y, sample=sample, trial=torch.zeros_like(sample), key=rng.make_key(0, "BB"))
    x_adv = engine.perturb(natural, PGD(objective="margin", steps=7), p, Ball("Linf", 0.2))
    with torch.no_grad():
        stands = (target(x).argmax(1) == y) & (target(x_adv).argmax(1) == y)
    found = rows(tmp_path, result)
    assert (found["status"] == "robust").to_numpy().tolist() == stands.tolist()
    attacked = found[found["status"] != "misclassified"]
    assert set(attacked["forwards"]) == {1} and set(attacked["backwards"]) == {0}, "the target sees one query"
    assert result.attacks[0].config["surrogate"] == "digits/natural"
    assert result.attacks[0].config["attack"]["steps"] == 7


@pytest.mark.parametrize(
    "attack", [PGD(objective="margin", steps=7, restarts=3), PGD(objective="margin_targeted", steps=7, targets=3)]
)
def test_the_points_of_all_restarts_and_targets_are_tried(tmp_path, attack):
    more = f'objective = "{attack.objective}"\nrestarts = {attack.restarts}\ntargets = {attack.targets}'
    suite = write_transfer_suite(tmp_path, TRANSFER.replace('objective = "margin"', more))
    result = evaluate("digits/at", suite, samples=70, lanes=32, results=tmp_path / "results")
    data = load("digits", "test")
    x, y = torch.from_numpy(data.x[:70]).float() / data.scale, torch.from_numpy(data.y[:70])
    natural, target = (load_model(Registry.default().find(f"digits/{n}")).module for n in ("natural", "at"))
    sample = torch.from_numpy(data.index[:70])
    stands = [target(x).argmax(1) == y]
    for trial in range(3):
        p = Problem(x=x, y=y, sample=sample, trial=torch.full_like(sample, trial), key=rng.make_key(0, "BB"))
        stands.append(target(engine.perturb(natural, attack, p, Ball("Linf", 0.2))).argmax(1) == y)
    robust = torch.stack(stands).all(0)
    assert robust.sum() < torch.stack(stands[:2]).all(0).sum(), "the first point is not all there is"
    found = rows(tmp_path, result)
    assert (found["status"] == "robust").to_numpy().tolist() == robust.tolist()
    assert set(found.loc[found["status"] == "robust", "forwards"]) == {3}
    assert result.attacks[0].config["trials"] == 3


def test_a_gradient_of_nan_in_the_surrogate_stops_no_attack(tmp_path, monkeypatch):
    (tmp_path / "rooted.py").write_text(
        "import torch\n"
        "from robbench.models.card import Registry\n"
        "from robbench.models.load import load_model\n"
        "class Rooted(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = load_model(Registry.default().find('digits/natural')).module\n"
        "    def forward(self, x):\n"
        "        return self.inner(x) + 0 * torch.sqrt(x[:, 0, 0, :1] ** 2)\n"
        "def make(): return Rooted().eval()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    suite = write_transfer_suite(tmp_path, TRANSFER.replace("steps = 7", "steps = 7\nrandom_start = false"))
    options = {"samples": 30, "norm": "L2", "eps": 1}
    plain, rooted = (
        evaluate("digits/natural", suite, surrogate=s, **options) for s in ("digits/natural", "rooted:make")
    )
    assert plain.robust_accuracy.value < 0.1 and not rooted.flags
    assert rooted.robust_accuracy.value == pytest.approx(plain.robust_accuracy.value, abs=0.04)


def test_from_itself_it_is_the_white_box_attack(tmp_path):
    transfer = evaluate("digits/natural", write_transfer_suite(tmp_path), samples=60, results=tmp_path / "results")
    ours = rows(tmp_path, transfer)
    white = evaluate("digits/natural", write_transfer_suite(tmp_path, WHITE), samples=60, results=tmp_path / "white")
    assert transfer.robust_accuracy == white.robust_accuracy
    assert transfer.robust_accuracy.value < 0.2 < ours["distance"].max() + 0.1


@pytest.mark.parametrize("lanes", [8, 64])
def test_it_goes_on_where_it_stopped_at_any_width(tmp_path, lanes):
    name = write_transfer_suite(tmp_path)
    whole = evaluate("digits/at", name, samples=50, results=tmp_path / "whole")
    evaluate("digits/at", name, samples=13, lanes=lanes, results=tmp_path / "parts")
    parts = evaluate("digits/at", name, samples=50, lanes=lanes, results=tmp_path / "parts")
    assert whole.run_id == parts.run_id
    assert np.isclose(whole.robust_accuracy.value, parts.robust_accuracy.value, atol=0.021)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("SURROGATE", "naturl"), Exception, "natural"),
        (("SURROGATE", "cifar10/natural_resnet18"), ModelError, "expected: a model of data set 'digits'"),
        (('surrogate = "SURROGATE"\n', ""), SuiteError, "no 'surrogate' given"),
        (('attack = "pgd"', 'attack = "pgdd"'), SuiteError, "pgdd"),
        (("steps = 7", "stepz = 7"), SuiteError, "stepz"),
    ],
)
def test_mistakes_in_a_transfer_stage_are_named(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        evaluate("digits/at", write_transfer_suite(tmp_path, TRANSFER.replace(*change)), samples=5)


@pytest.mark.parametrize(("name", "columns"), [("paper-mnist", 4), ("paper-cifar10", 10)])
def test_the_papers_suites_have_the_papers_columns(name, columns):
    from robbench.suite import load_suite

    loaded = load_suite(name)
    (dataset,) = loaded.threats
    stages = loaded.stages(dataset)
    assert len(stages) == columns and loaded.judge == "final"
    assert all(Registry.default().find(f"{dataset}/{s.params['surrogate']}") for s in stages if s.kind == "transfer")


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [
        ("cifar10/at", "expected: a model of data set 'digits'"),
        ("two_logits:make", "has 2 classes; the model that is attacked has 10"),
        ("two_logits:wide", "cannot be run on images of shape"),
        ("digits/none", "Unknown model"),
    ],
)
def test_an_error_of_the_surrogate_names_the_surrogate(tmp_path, monkeypatch, surrogate, message):
    (tmp_path / "two_logits.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()\n"
        "def wide(): return nn.Sequential(nn.Flatten(), nn.Linear(100, 10)).eval()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RobbenchError, match=f"^--surrogate {surrogate}: .*{message}"):
        evaluate("digits/natural", "blackbox", samples=2, surrogate=surrogate)


def test_a_result_with_a_surrogate_of_the_users_is_sound(tmp_path):
    path = tmp_path / "transfer.toml"
    path.write_text(TRANSFER.replace("SURROGATE", "digits/at"))
    result = evaluate("digits/natural", path, samples=4, surrogate="digits/at", results=tmp_path / "r")
    assert result.overrides["surrogate"] == "digits/at"
    (stored,), damaged = read_results(tmp_path / "r")
    assert stored.overrides == result.overrides and not damaged


@pytest.mark.parametrize("surrogate", ["digits/at", "digits/none", "no_module:make"])
@pytest.mark.parametrize("suite", ["quick", "queries", [PGD(steps=2)], "near"])
def test_a_surrogate_that_no_attack_uses_is_refused(tmp_path, monkeypatch, suite, surrogate):
    """A wrong one too: nothing would load it."""
    radius = {} if suite == "near" else {"eps": "0.1"}
    if suite == "near":
        suite = str(tmp_path / "near.toml")
        Path(suite).write_text('version = 1\njudge = "nearest"\n[[attack]]\nname = "FAB"\nkind = "fab"\n')
    monkeypatch.setattr("robbench.evaluation.run.Worker", None)
    with pytest.raises(SuiteError, match=f"^surrogate: {surrogate} given, but no transfer attack runs in suite"):
        evaluate("digits/natural", suite, samples=4, surrogate=surrogate, **radius)


@pytest.mark.parametrize("suite", ["queries", [Square(steps=2)]])
def test_a_precision_of_gradients_that_no_attack_takes_is_refused(monkeypatch, suite):
    monkeypatch.setattr("robbench.evaluation.run.Worker", None)
    monkeypatch.setattr("robbench.evaluation.run.explain_bfloat16_cost", lambda *args: None)  # as on a fast machine
    with pytest.raises(SuiteError, match=r"^gradients: bfloat16 given, but no attack of suite .* takes a gradient"):
        evaluate("digits/natural", suite, samples=4, eps="0.1", gradients="bfloat16")


def test_a_surrogate_whose_transfers_are_left_out_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "transfer.toml"
    inner = 'attack = "pgd"\nobjective = "margin"\nsteps = 7\n'
    optional = TRANSFER.replace(inner, 'attack = "deepfool"\noptional = true\n')  # which is not made for L1
    path.write_text(optional + '[[attack]]\nname = "P"\nkind = "pgd"\n')
    monkeypatch.setattr("robbench.evaluation.run.Worker", None)
    with pytest.raises(SuiteError, match="no transfer attack runs"):
        evaluate("digits/natural", path, samples=4, surrogate="digits/at", norm="L1", eps="1")
