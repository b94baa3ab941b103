"""Figures of gradients and large perturbations after Tsipras et al. 2019: numbers, captions, and what is missing."""

import shutil

import numpy as np
import pandas as pd
import pytest

from robbench.analysis.gradients_record import KINDS, read_gradients
from robbench.core.stats import paired_difference
from robbench.models.card import Registry
from robbench.papers.figures.definitions import FIGURES
from robbench.papers.figures.gradients import (
    _compute_examples,
    _compute_gradients,
    _compute_interpolation,
    compare_look_alikes,
    look_alike,
)
from robbench.papers.figures.write import write_figure
from robbench.report.figures.source import FigureData

NUMBERS = ("2", "3", "4", "8", "9", "10")
NAMES = ("natural", "at", "at_l2")


@pytest.fixture
def tree(tmp_path, repo):
    for name in NAMES:
        shutil.copytree(repo / "results/digits" / name / "gradients", tmp_path / "digits" / name / "gradients")
    return tmp_path


@pytest.fixture
def stored(tree):
    found = FigureData(Registry.default(), tree).read_gradients("digits")
    return {f"digits/{name}": found[f"digits/{name}"] for name in NAMES}


def test_look_alikes_by_hand():
    rows = pd.DataFrame({"label": [1, 1, 1, 1], "L2": [2, 2, 1, 3], "near_5": [2, 1, 1, 3]})
    found = look_alike(rows, "L2")  # looks like its answer; like another class; is no new class; looks like its answer
    assert found.tolist() == [True, False, False, True]
    change = compare_look_alikes(found, np.array([True, True, True, False]))
    assert change.value == -0.25
    assert (change.low, change.high) == paired_difference(1, 2, 4)


def test_pictures_and_bars_are_those_of_the_store(tree):
    numbers = FIGURES["tsipras2019-10"].plan(FigureData(Registry.default(), tree), "digits").numbers
    file, (rows, pictures) = read_gradients(tree / "digits/at/gradients")
    own = numbers[(numbers["panel"] == "picture") & (numbers["model"] == "digits/at")]
    assert own["kind"].unique().tolist() == ["gradient"]
    assert [bytes.fromhex(text) for text in own["levels"]] == [p[KINDS.index("gradient")].tobytes() for p in pictures]
    bar = numbers[(numbers["panel"] == "bars") & (numbers["model"] == "digits/at")].iloc[0]
    assert (bar["value"], bar["n"]) == pytest.approx((rows["roughness"].mean(), file.n))
    numbers = FIGURES["tsipras2019-9"].plan(FigureData(Registry.default(), tree), "digits").numbers
    own = numbers[(numbers["panel"] == "picture") & (numbers["model"] == "digits/at")]
    assert own["value"].tolist() == [rows.set_index("sample")["L2"][sample] for sample in file.shown]


def swap(stored, change):
    """Return the measurements with another table in the place of that of each trained model."""
    standard = stored["digits/natural"][1][0]
    return {
        name: (file, (standard if name == "digits/natural" else change(standard.copy()), pictures))
        for name, (file, (_, pictures)) in stored.items()
    }


def test_captions_follow_the_numbers(stored):
    def better(rows):
        rows["alignment"] += 0.1
        rows["roughness"] -= 0.1
        rows["L2"], rows["near_5"] = (rows["label"] + 1) % 10, (rows["label"] + 1) % 10
        rows.loc[:, [f"distance_{k}" for k in range(6)]] -= 0.1
        return rows

    found, not_found = "The paper's finding shows here.", "does not show"
    good, same = swap(stored, better), swap(stored, lambda rows: rows)
    for compute, claims in (
        (lambda s: _compute_gradients(3, ("alignment",), s), 1),
        (lambda s: _compute_gradients(3, ("roughness",), s), 1),
        (_compute_interpolation, 2),
    ):
        assert compute(good)[1].count(found) == claims
        assert compute(same)[1].count(not_found) == claims
    for measured, word in ((good, "(yes)"), (same, "(no)")):
        assert _compute_examples(("L2",), 3, measured)[1].count(word) == 4
    assert "sparsity of at minus that of at_l2 is +0.000" in _compute_gradients(3, ("sparsity",), same)[1]


def test_the_way_is_that_of_the_last_image_where_fewer_are_shown(stored):
    few = {name: (file.model_copy(update={"shown": file.shown[:3]}), rest) for name, (file, rest) in stored.items()}
    for measured, shown in ((stored, 8), (few, 2)):
        pictures = [row for row in _compute_interpolation(measured)[0] if row[0] == "picture"]
        assert [row[3] for row in pictures] == [shown] * 4


def test_without_an_l2_trained_model_the_figures_say_so(tree):
    shutil.rmtree(tree / "digits/at_l2")
    for number in ("2", "3", "4"):
        plan = FIGURES[f"tsipras2019-{number}"].plan(FigureData(Registry.default(), tree), "digits")
        assert plan.missing[0].endswith(f"robbench measure gradients -m digits/at_l2 --results {tree}")
        assert plan.numbers is not None
        figure = plan.paint()
        texts = [figure.get_supxlabel(), *(legend.get_title().get_text() for legend in figure.legends)]
        assert any("No L2-trained model is here." in " ".join(text.split()) for text in texts)
    shutil.rmtree(tree / "digits/at")
    plan = FIGURES["tsipras2019-2"].plan(FigureData(Registry.default(), tree), "digits")
    assert plan.numbers is None
    assert f"robbench measure gradients -m digits/at --results {tree}" in plan.missing


@pytest.mark.parametrize("number", NUMBERS)
def test_figures_are_drawn_twice_the_same(tree, number, tmp_path):
    data, figure = FigureData(Registry.default(), tree), FIGURES[f"tsipras2019-{number}"]
    first, second = (write_figure(data, figure, "digits", tmp_path / folder).paths for folder in "ab")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    pictures = tree / "digits/at/gradients/pictures.parquet"
    pictures.write_bytes(pictures.read_bytes() + b" ")
    plan = figure.plan(FigureData(Registry.default(), tree), "digits")
    assert f"robbench measure gradients -m digits/at --results {tree} --overwrite" in plan.missing
