"""Figures 5 and A.8 after Seguin et al. 2021: the numbers are those of the store, and captions follow them."""

import shutil

import numpy as np
import pytest

from robbench.analysis.manifold_record import read_manifolds, read_manifolds_files
from robbench.models.card import Registry
from robbench.papers.figures.definitions import FIGURES
from robbench.papers.figures.manifolds import _compare_models, _estimate_correlation, _estimate_ratio
from robbench.papers.figures.write import write_figure
from robbench.report.figures.source import FigureData

NAMES = ("natural", "at", "trades", "ls095_sigma03", "lsq2_sigma03")


@pytest.fixture
def tree(tmp_path, repo):
    for name in NAMES:
        shutil.copytree(repo / "results/digits" / name / "manifolds", tmp_path / "digits" / name / "manifolds")
    return tmp_path


def plan(tree, name):
    return FIGURES[f"seguin2021-{name}"].make(FigureData(Registry.default(), tree), "title", "digits")


def test_the_numbers_are_those_of_the_stored_manifolds(tree):
    numbers = plan(tree, "5").numbers
    file, table = read_manifolds(tree / "digits/at/manifolds")
    for i, geometry in enumerate(file.layers):
        mine = numbers[
            (numbers["model"] == "digits/at") & (numbers["kind"] == geometry.kind) & (numbers["x"] == i // 2)
        ]
        value = mine.set_index("panel")["value"]
        assert value["capacity"] == pytest.approx(1 / geometry.cost)
        assert (value["radius"], value["correlation"]) == pytest.approx((geometry.radius, geometry.correlation))
        low, high = mine.set_index("panel").loc["capacity", ["low", "high"]]
        assert low < value["capacity"] < high
    points = plan(tree, "A.8").numbers
    assert set(points[points["model"] == "digits/at"]["x"]) <= {g.simulated for g in file.layers}
    natural = read_manifolds(tree / "digits/natural/manifolds")[1]
    radius = [
        t[(t["kind"] == "adversarial") & t["layer"].between(1, 3)].groupby("sample")["radius"].mean()
        for t in (natural, table)
    ]
    claim = numbers[(numbers["panel"] == "claim") & numbers["kind"].str.startswith("radius")]
    assert claim["value"].item() == pytest.approx((radius[0] - radius[1]).mean())


def test_captions_say_when_the_finding_shows(tree):
    stored = read_manifolds_files(tree)[0]
    swapped = {**stored, "digits/natural": stored["digits/at"], "digits/at": stored["digits/natural"]}
    assert _compare_models(stored, "digits")[1].count("does not show") == 2
    assert _compare_models(swapped, "digits")[1].count("The paper's finding shows here.") == 2


def test_ratio_and_correlation_have_closed_forms():
    x = np.linspace(0, 1, 30)
    ratio = _estimate_ratio(np.c_[x, x + np.log(2)])
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2))
    pairs = np.c_[[0, 1, 2, 3, 4], [0, 2, 1, 4, 3]].astype(float)  # r = 8 / 10
    found = _estimate_correlation(pairs)
    half = 1.959964 / 2**0.5
    expected = (0.8, np.tanh(np.arctanh(0.8) - half), np.tanh(np.arctanh(0.8) + half))
    assert (found.value, found.low, found.high) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["5", "A.8"])
def test_figures_are_drawn_twice_the_same_and_name_what_is_missing(tree, name, tmp_path):
    data, figure = FigureData(Registry.default(), tree), FIGURES[f"seguin2021-{name}"]
    first, second = (write_figure(data, figure, "digits", tmp_path / folder).paths for folder in "ab")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    table = tree / "digits/at/manifolds/manifolds.parquet"
    table.write_bytes(table.read_bytes() + b" ")
    assert list(plan(tree, name).missing) == [f"robbench measure manifolds -m digits/at --results {tree} --overwrite"]
    assert plan(tree, name).numbers is None
    assert "not as it was written" in str(FigureData(Registry.default(), tree).damaged[0])
