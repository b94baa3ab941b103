"""The figures of the loss around images: what they show is what `robbench sanity` stored and vouches for."""

import shutil

import numpy as np
import pandas as pd
import pytest

from robbench.models.card import Registry
from robbench.papers.figures.definitions import FIGURES
from robbench.papers.figures.landscapes import PLANES, measure_change
from robbench.papers.figures.write import write_figure
from robbench.report.figures.source import FigureData

NAMES = ("natural", "at", "lsq2_sigma03")


@pytest.fixture
def tree(tmp_path, repo):
    for name in NAMES:
        shutil.copytree(repo / "results/digits" / name / "sanity", tmp_path / "digits" / name / "sanity")
    return tmp_path


def plan(tree, plane):
    return FIGURES[f"landscape-{plane}"].make(FigureData(Registry.default(), tree), "title", "digits")


def read_landscape(tree, name):
    return pd.read_parquet(tree / "digits" / name / "sanity/landscape.parquet")


@pytest.mark.parametrize("plane", PLANES)
def test_figures_are_drawn_twice_the_same_from_the_stored_losses(tree, plane, tmp_path):
    data, figure = FigureData(Registry.default(), tree), FIGURES[f"landscape-{plane}"]
    first, second = (write_figure(data, figure, "digits", tmp_path / folder).paths for folder in "ab")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    rows = pd.read_csv(first[1])
    claim, shown = rows[rows["panel"] == "claim"], rows[rows["panel"] == plane]
    assert (claim["low"] <= claim["value"]).all() and (claim["value"] <= claim["high"]).all()
    assert set(shown["model"]) == {f"digits/{name}" for name in NAMES}
    stored = read_landscape(tree, "at")
    point = stored[(stored["plane"] == plane) & (stored["a"] == 0.5) & (stored["b"] == -1)].iloc[3]
    here = shown[(shown["model"] == "digits/at") & (shown["sample"] == point["sample"]) & (shown["a"] == 0.5)]
    assert here["b-1"].item() == pytest.approx(point["cross_entropy"], rel=6e-3)  # three digits


def test_claims_are_what_the_losses_say(tree):
    stored = read_landscape(tree, "at")
    wide = stored[stored["plane"] == "adversarial"]
    ratios = []
    for _, image in wide.groupby("sample"):
        up, right = image[image["b"] == 0]["cross_entropy"], image[image["a"] == 0]["cross_entropy"]
        ratios.append((up.max() - up.min()) / (right.max() - right.min()))
    claims = plan(tree, "adversarial").numbers.query("panel == 'claim' and model == 'digits/at'")
    assert claims["value"].item() == pytest.approx(np.exp(np.mean(np.log(ratios)))) and claims["n"].item() == 8
    wrong = stored[stored["margin"] > 0].groupby("plane")["sample"].nunique()
    claims = plan(tree, "random").numbers.query("panel == 'claim' and model == 'digits/at'").set_index("what")["value"]
    assert [claims[f"images with a wrong point on the {plane} plane"] for plane in PLANES] == [
        wrong.get(plane, 0) / 8 for plane in PLANES
    ]
    assert measure_change(np.array([1.0, 1.0])) > 0, "an axis without any change has a ratio too"


def test_a_landscape_that_nothing_vouches_for_is_not_drawn(tree):
    path = tree / "digits/at/sanity/landscape.parquet"
    frame = pd.read_parquet(path)
    frame.assign(cross_entropy=0.0).to_parquet(path, index=False)
    data = FigureData(Registry.default(), tree)
    found = plan(tree, "random")
    assert set(found.numbers["model"]) == {"digits/natural", "digits/lsq2_sigma03"}
    assert list(found.missing) == ["robbench sanity digits/at", "robbench sanity digits/ls095_sigma03"]
    assert any("landscape.parquet" in damage.reason for damage in data.damaged)


def test_a_result_of_other_weights_is_not_drawn(tree, tmp_path, repo):
    cards = tmp_path / "models"
    shutil.copytree(repo / "models/digits", cards / "digits")
    shutil.copytree(repo / "models/weights/digits", cards / "weights/digits")
    card = cards / "digits/at.toml"
    text = card.read_text(encoding="utf-8")
    digest = text.partition('sha256 = "')[2].partition('"')[0]
    card.write_text(text.replace(digest, "0" * 64), encoding="utf-8")
    found = FIGURES["landscape-random"].make(FigureData(Registry([cards]), tree), "title", "digits")
    assert "digits/at" not in set(found.numbers["model"])
