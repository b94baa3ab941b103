"""The figures after Seguin et al. 2021: the numbers are those of the stored logits, and captions say what they show."""

import shutil

import numpy as np
import pytest

from robbench.analysis.logits import compute_confidence, compute_gaps, rank_within_class
from robbench.analysis.record import read_logits, read_logits_files
from robbench.core.stats import wilson
from robbench.models.card import Registry
from robbench.papers.figures.definitions import FIGURES
from robbench.papers.figures.logits import _compute_gap_rows, _compute_order_rows
from robbench.papers.figures.write import write_figure
from robbench.report.figures.source import FigureData

NAMES = ("natural", "at", "trades", "ls095_sigma03", "lsq2_sigma03")


@pytest.fixture
def tree(tmp_path, repo):
    for name in NAMES:
        shutil.copytree(repo / "results/digits" / name / "logits", tmp_path / "digits" / name / "logits")
    return tmp_path


def plan(tree, name):
    figure = FIGURES[f"seguin2021-{name}"]
    return figure.make(FigureData(Registry.default(), tree), "title", "digits")


def claims(tree, name):
    rows = plan(tree, name).numbers
    return {row.other: row for row in rows[rows["panel"] == "claim"].itertuples()}


def test_the_claims_of_gaps_are_counts_of_the_stored_logits(tree):
    at, natural = (read_logits(tree / "digits" / name / "logits")[1] for name in ("at", "natural"))
    gaps = compute_gaps(at.clean)
    robust = (at.clean.argmax(1) == at.label) & (at.adversarial.argmax(1) == at.label)
    above = robust[gaps >= np.median(gaps)]
    found = claims(tree, "2")
    row = found["robust, gap at or above the median"]
    assert (row.value, row.low, row.high) == (above.mean(), *wilson(above.sum(), len(above)))
    assert found["gap minus that of natural"].value == pytest.approx((gaps - compute_gaps(natural.clean)).mean())
    numbers = plan(tree, "2").numbers
    shares = numbers[numbers["panel"] == "A"].groupby("model")["value"].sum()
    assert shares.to_numpy() == pytest.approx(np.ones(5)), "every image is in a bin"
    counts = numbers[numbers["panel"] == "B"].groupby("model")["n"].sum()
    assert set(counts) == {899}


def test_the_claims_of_orders_are_counts_of_the_stored_logits(tree):
    stored = {name: read_logits(tree / "digits" / name / "logits")[1] for name in NAMES}
    ranks = {name: rank_within_class(compute_confidence(z.clean), z.label) for name, z in stored.items()}
    rows = plan(tree, "3").numbers
    rows = rows[rows["panel"] == "B"]
    assert len(rows) == 10
    for row in rows.itertuples():
        a, b = (ranks[name.split("/")[1]] for name in (row.model, row.other))
        assert row.value == (np.abs(a - b) > 0.5).mean()
    found = claims(tree, "3")
    difference = found["digits/at: as before, minus that of digits/trades"]
    far = [(np.abs(ranks[name] - ranks["at"]) > 0.5).mean() for name in ("natural", "trades")]
    assert difference.value == pytest.approx(far[0] - far[1])
    assert difference.low < difference.value < difference.high


def test_captions_say_when_the_finding_does_not_show(tree):
    stored = {name: z for name, (_, z) in read_logits_files(tree)[0].items()}
    swapped = {**stored, "digits/natural": stored["digits/at"], "digits/at": stored["digits/natural"]}
    assert _compute_gap_rows(stored, "digits")[1].count("The paper's finding shows here.") == 2
    assert _compute_gap_rows(swapped, "digits")[1].count("does not show") >= 1
    swapped = {**stored, "digits/natural": stored["digits/trades"], "digits/trades": stored["digits/natural"]}
    assert _compute_order_rows(stored, "digits")[1].count("The paper's finding shows here.") == 2
    assert _compute_order_rows(swapped, "digits")[1].count("does not show") == 2


def test_the_figure_of_the_analytic_model_holds_the_formulas(tree):
    numbers = plan(tree, "C").numbers
    assert numbers["value"].notna().all()
    lines = numbers[numbers["panel"] == "C.1"].pivot_table(index="beta_wrong", columns="quantity", values="value")
    least = numbers[numbers["quantity"] == "least beta"]["value"].item()
    assert ((lines["g"] < lines["beta"]) == (lines["beta"] > least)).all()
    loss = numbers[numbers["panel"] == "C.2"].pivot_table(index="beta_wrong", columns="beta_right", values="value")
    assert (np.diff(loss, axis=1) < 0).all(), "surer right images have a lower loss"
    assert (np.diff(loss, axis=0) > 0).all(), "surer wrong images have a higher loss"
    for name in NAMES:
        shutil.rmtree(tree / "digits" / name)
    assert plan(tree, "C").numbers is None


@pytest.mark.parametrize("name", ["2", "3", "4"])
def test_figures_are_drawn_twice_the_same_and_name_what_is_missing(tree, name, tmp_path):
    data, figure = FigureData(Registry.default(), tree), FIGURES[f"seguin2021-{name}"]
    first, second = (write_figure(data, figure, "digits", tmp_path / folder).paths for folder in "ab")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    shutil.rmtree(tree / "digits/at/logits")
    assert list(plan(tree, name).missing) == [f"robbench measure logits -m digits/at --results {tree}"]
    assert plan(tree, name).numbers is None


def test_a_damaged_measurement_is_named_and_not_drawn(tree):
    path = tree / "digits/natural/logits/logits.parquet"
    path.write_bytes(path.read_bytes() + b" ")
    assert plan(tree, "2").numbers is None
    assert list(plan(tree, "2").missing) == [f"robbench measure logits -m digits/natural --results {tree} --overwrite"]
    assert "not as it was written" in str(FigureData(Registry.default(), tree).damaged[0])
