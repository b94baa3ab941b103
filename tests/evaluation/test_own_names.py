"""A model of one's own cannot have the name of a registered one: tables would show it in its place."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

import robbench as rb
from robbench.core.errors import ModelError
from robbench.evaluation.options import Options
from robbench.evaluation.run import evaluate
from robbench.gate.baseline import write_baseline
from robbench.gate.measure import measure_entry
from robbench.models.card import Registry
from robbench.models.load import load_model
from robbench.models.spec import ModelSpec
from robbench.results.reader import read_results, read_vouched
from robbench.results.schema import dump_sealed
from support.leaderboard import read_leaderboard

SMALL = {"dataset": "digits", "samples": 4}


@pytest.fixture(scope="module")
def net():
    return load_model(Registry.default([]).find("digits/natural")).module


@pytest.mark.parametrize("name", ["at", "AT", "a-t", "ａｔ", "natural", "ls095-sigma03"])
def test_a_name_that_is_or_resembles_that_of_a_card_is_refused(net, name, tmp_path):
    with pytest.raises(ModelError, match=rf"The name {name} for a model of your own; digits/\w+ is a registered model"):
        evaluate(net, "quick", name=name, results=tmp_path, **SMALL)
    assert not list(tmp_path.rglob("*.parquet"))


def test_names_that_follow_from_code_are_refused_too(net, tmp_path, monkeypatch):
    class Natural(torch.nn.Sequential):
        pass

    def at(x):
        return net(torch.from_numpy(x)).detach().numpy()

    for model in (Natural(net).eval(), at):
        with pytest.raises(ModelError, match=r"Give another name, such as name='my-"):
            evaluate(model, "quick", results=tmp_path, **SMALL)
    (tmp_path / "my_models.py").write_text("def net():\n    raise SystemExit('not loaded')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="digits/at is a registered model"):  # before it is loaded
        evaluate("my_models:net", "quick", name="at", **SMALL)
    assert "my_models" not in sys.modules


def test_a_card_of_a_registry_of_ones_own_counts_and_other_names_do_not(net, repo, tmp_path):
    cards = tmp_path / "cards/digits"
    cards.mkdir(parents=True)
    shutil.copy(repo / "models/digits/natural.toml", cards / "house.toml")
    with pytest.raises(ModelError, match="digits/house is a registered model"):
        evaluate(net, "quick", name="House", models=[tmp_path / "cards"], **SMALL)
    for name in ("my-at", "at2", "House"):
        assert evaluate(net, "quick", name=name, **SMALL).model == name
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    assert evaluate(net, "quick", name="at", x=x, y=y, norm="Linf", eps=0.1).n == 4  # custom/at is no card


def test_a_stored_result_under_the_name_of_a_card_is_damaged(net, repo, tmp_path):
    root = tmp_path / "results"
    evaluate(net, "quick", name="mine", results=root, **SMALL)
    shutil.copytree(root / "digits/mine", root / "digits/at")
    (path,) = (root / "digits/at").rglob("result.json")
    path.write_bytes(dump_sealed(read_vouched(path).model_copy(update={"model": "at"})))
    found = read_results(root)
    assert [r.model for r in found.results] == ["mine"]
    assert "has the name of the registered model digits/at; its identity is of a model of the user's own" in str(
        found.damaged[0]
    )
    assert "digits/at/quick: damaged" in read_leaderboard(root)

    shutil.rmtree(root)
    shutil.copytree(repo / "results/digits/at/fast", root / "digits/at/fast")
    stored = read_vouched(root / "digits/at/fast")
    assert set(stored.identity["model"]) == {"dataset", "architecture", "preprocess"}
    assert len(read_results(root).results) == 1


def test_a_module_is_compared_with_the_baseline_of_a_registered_model(net, tmp_path):
    options = Options(results=tmp_path / "results", device="cpu", samples=40)
    write_baseline(tmp_path / "base.json", [measure_entry(ModelSpec("digits/natural"), "quick", options)])
    decision = rb.check(net, tmp_path / "base.json", name="digits/natural", dataset="digits")
    assert not decision.failed and json.loads((tmp_path / "base.json").read_text())["runs"][0]["model"] == "natural"
