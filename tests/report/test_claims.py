"""The claims of the figures of results: counted here again, from the stored records."""

import shutil
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

from robbench.analysis.logits import Estimate
from robbench.core.stats import paired_difference, wilson
from robbench.data.sets import load
from robbench.linear.record import read_linearization
from robbench.models.card import Registry
from robbench.report.figures import claims
from robbench.report.figures.claims import claim_prediction, claim_steps, format_mean, format_points, format_share
from robbench.report.figures.gallery import _claim, plan_gallery
from robbench.report.figures.robustness import plan_classes_figure, plan_eps_figure, plan_steps_figure
from robbench.report.figures.source import FigureData
from support.papers import put, result

NAMES = ("natural", "at")


@pytest.fixture
def tree(tmp_path, repo):
    """The stored results of two digits models, with their adversarial examples."""
    for name in NAMES:
        stored = repo / "results/digits" / name
        for folder in (stored / "whitebox", stored / "linear", *stored.glob("quick*")):
            if folder.is_dir():
                shutil.copytree(folder, tmp_path / "digits" / name / folder.name)
    return tmp_path


def draw(make, tree):
    """Return the claimed rows of a figure and its footnote."""
    plan = make(FigureData(Registry.default(), tree), "title", "digits")
    figure = plan.paint()
    note = figure.legends[0].get_title().get_text() if figure.legends else figure.get_supxlabel()
    rows = plan.numbers[plan.numbers["panel"] == "claim"]
    assert set(plan.numbers["panel"]) == {"A", "claim"}
    assert (rows["low"] <= rows["value"]).all() and (rows["value"] <= rows["high"]).all()
    return rows, " ".join(note.split())


def read_rows(tree, name, suite="whitebox"):
    return pd.read_parquet(tree / "digits" / name / suite / "outcomes.parquet")


def test_the_claimed_promise_of_equation_4_is_counted_image_by_image(tree):
    rows, note = draw(plan_eps_figure, tree)
    for row in rows.itertuples():
        lost = read_rows(tree, row.model.split("/")[1])
        lost = lost[lost["status"].isin(["misclassified", "broken"])]["sample"].unique()
        measured = read_linearization(tree / row.model / "linear")
        promised = measured.take_at_nearest("radius") > 0.2
        kept = ~np.isin(measured.sample, lost)
        more, less = int((promised & ~kept).sum()), int((kept & ~promised).sum())
        assert row.value == pytest.approx((more - less) / 899) and (row.suite, row.images) == ("whitebox", 899)
        assert (row.low, row.high) == paired_difference(more, less, 899)
    assert rows["model"].tolist() == ["digits/natural", "digits/at"] and not (rows["low"] > 0).any()
    assert "promises more than attacks leave for 0 of 2 models" in note
    largest = rows.loc[rows["value"].idxmax()]
    name, value = largest["model"].split("/")[1], 100 * largest["value"]
    assert f"The largest difference has {name}: {value:.1f} points [" in note


def test_the_claimed_worst_case_counts_breaks_at_smaller_radii(tree, monkeypatch):
    shutil.rmtree(tree / "digits/natural")
    shutil.rmtree(tree / "digits/at/whitebox")
    data = FigureData(Registry.default(), tree)
    plotted = plan_eps_figure(data, "", "digits").numbers.query("panel == 'A'")
    stored = claims.read_robust_table

    def read_broken_below(root, result):
        table = stored(root, result)
        return table.assign(**{"worst case": False}) if result.threat.eps == "0.05" else table

    first, _ = claim_prediction(data, plotted, data.results, Fraction("0.2"))
    monkeypatch.setattr(claims, "read_robust_table", read_broken_below)
    second, note = claim_prediction(data, plotted, data.results, Fraction("0.2"))
    promised = (read_linearization(tree / "digits/at/linear").take_at_nearest("radius") > 0.2).mean()
    assert first[0]["value"] < 0 and second[0]["value"] == pytest.approx(promised)
    assert "for 1 of 1 models" in note
    for eps in (None, Fraction("0.7")):
        rows, note = claim_prediction(data, plotted, data.results, eps)
        assert not rows and "nothing is claimed" in note


def test_of_a_model_without_a_card_the_latest_weights_count(tmp_path):
    """A model of one's own is trained again under its name, and the runs of the earlier weights stay in the tree."""
    for weights, eps, left in (("a", "0.05", 0), ("b", "0.05", 4), ("b", "0.2", 3), ("a", "0.2", 0)):
        about = {"identity": {"weights": weights * 64}, "date": "2026-01-02" if weights == "b" else "2026-01-01"}
        attacks = {"FGSM-xent": left}
        put(tmp_path, result("own", "quick", left, attacks, 5, "digits", eps, overrides={"eps": eps}, **about))
    numbers = plan_eps_figure(FigureData(Registry.default(), tmp_path), "", "digits").numbers
    assert numbers.set_index("eps")["value"].to_dict() == {0.0: 1.0, 0.05: 0.8, 0.2: 0.6}
    assert len(numbers) == 3


def test_the_claimed_share_of_early_breaks_is_that_of_the_records(tree):
    rows, note = draw(plan_steps_figure, tree)
    shares = {}
    for row in rows.itertuples():
        records = read_rows(tree, row.model.split("/")[1])
        broken = records[(records["attack"] == "PGD-20-xent") & (records["status"] == "broken")]
        early = int((broken["step"] <= 10).sum())
        assert (row.value, row.low, row.high) == (early / len(broken), *wilson(early, len(broken)))
        assert (row.step, row.images) == (10, len(broken)) and 0 < early < len(broken)
        shares[row.model] = row
    assert len(shares) == 2
    least = min(shares.values(), key=lambda row: row.value)
    assert f"its first 10 of 20 steps break at least {format_share(least)} in each of 2 models" in note
    assert f"The lowest share is that of {least.model.split('/')[1]} (n = {least.images} broken images" in note


def test_no_break_of_the_usual_attack_makes_no_claim(tree):
    data = FigureData(Registry.default(), tree)
    others = [r.model_copy(update={"attacks": [a for a in r.attacks if a.name[:3] != "PGD"]}) for r in data.results]
    rows, note = claim_steps(data, others)
    assert not rows and "nothing is claimed" in note


def test_the_claimed_classes_are_those_with_the_largest_and_the_smallest_share(tree):
    rows, note = draw(plan_classes_figure, tree)
    records = read_rows(tree, "at")
    lost = records["status"].isin(["misclassified", "broken"]).groupby(records["sample"]).any()
    label = records.drop_duplicates("sample").set_index("sample")["label"]
    kept = (~lost).groupby(label).agg(["sum", "size"])
    share = kept["sum"] / kept["size"]
    most, least = rows[rows["model"] == "digits/at"].itertuples()
    assert most[3] == f"most robust: {share.idxmax()}" and least[3] == f"least robust: {share.idxmin()}"
    for row, name in ((most, share.idxmax()), (least, share.idxmin())):
        count, n = kept.loc[name]
        assert (row.value, row.low, row.high, row.images) == (count / n, *wilson(int(count), int(n)), n)
        assert f"class {name} keeps {format_share(row)}" in note
    assert "Of at, the most robust model" in note and most.low > least.high
    natural = rows[rows["model"] == "digits/natural"]
    apart = 1 + int(natural["low"].iloc[0] > natural["high"].iloc[1])
    assert f"are apart for {apart} of 2 models" in note


def test_the_claims_of_the_gallery_are_measured_again_on_the_shown_points(tree):
    plan = plan_gallery(FigureData(Registry.default(), tree), "title", "digits")
    rows, note = draw(plan_gallery, tree)
    data = load("digits")
    known = data.x.reshape(len(data), -1) / 16
    pixels = [f"x{i}" for i in range(8)]
    far, near = [], []
    shown = plan.numbers[plan.numbers["image"] == "adversarial"]
    for (_, _, sample, label), image in shown.groupby(["model", "example", "sample", "label"]):
        x = image[pixels].to_numpy(float).ravel()
        others = data.index != sample
        far.append(np.abs(x - known[~others][0]).max())
        near.append(str(data.y[others][np.linalg.norm(known[others] - x, axis=1).argmin()]) == label)
    assert len(far) == 16
    found = rows.set_index("image")
    for what, yes in (
        ("within the radius", np.array(far) < 0.2001),
        ("nearest other test image has the true class", near),
    ):
        row = found.loc[what]
        assert (row["value"], row["low"], row["high"]) == (np.mean(yes), *wilson(int(np.sum(yes)), 16))
        assert row["images"] == 16
    assert f"Of the 16 examples shown, {format_share(found.loc['within the radius'])} lie within" in note


@pytest.mark.parametrize(("beyond", "inside"), [(5e-7, 8), (2e-6, 7)])
def test_a_shown_point_may_leave_the_radius_by_rounding_alone(tree, beyond, inside):
    shown = plan_gallery(FigureData(Registry.default(), tree), "title", "digits").numbers.query("model == 'digits/at'")
    first = shown["example"] == 0
    clean, moved = (shown.index[first & (shown["image"] == kind)][0] for kind in ("clean", "adversarial"))
    shown.loc[moved, "x0"] = shown.loc[clean, "x0"] + 0.2 + beyond
    assert _claim(shown, load("digits"))[0][0]["value"] == inside / 8


def test_the_nearest_image_of_an_example_is_not_its_own(tree):
    shown = plan_gallery(FigureData(Registry.default(), tree), "title", "digits").numbers.query("model == 'digits/at'")
    data = load("digits")
    own = np.isin(data.index, shown["sample"])
    (_, true, _), _ = _claim(shown, replace(data, y=np.where(own, data.y, 9)))
    assert own.sum() == true["images"] == 8 and "9" not in set(shown["label"])
    assert true["value"] == 0, "each shown image is the only one of its class"


def test_the_gallery_finds_the_examples_of_a_run_that_is_stored_twice(tree, repo):
    folders = [p.parent.name for p in sorted((tree / "digits/natural").glob("quick*/result.json"))]
    assert "quick" in folders and "quick@ccebf9a9" in folders
    assert not (tree / "digits/natural/quick@ccebf9a9/adversarials.safetensors").exists()

    def list_models():
        numbers = plan_gallery(FigureData(Registry.default(), tree), "title", "digits").numbers
        return set(numbers["model"].dropna())

    assert list_models() == {"digits/natural", "digits/at"}
    path = tree / "digits/natural/quick/outcomes.parquet"
    path.write_bytes(path.read_bytes() + b" ")
    assert list_models() == {"digits/at"}, "a damaged result is not shown, and stops no other"
    data = FigureData(Registry.default(), tree)
    data.results = [r for r in data.results if r.threat.eps == "0.1"]  # as if the card had other weights than the rest
    assert plan_gallery(data, "title", "digits").numbers is None, "the examples in `quick` are of another run"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (format_points(Estimate(-0.02, -0.05, -0.0001, 9)), "-2.0 points [-5.0, 0.0]"),
        (format_points(Estimate(-0.02, -0.05, -0.0001, 9), "+"), "-2.0 points [-5.0, 0.0]"),
        (format_points(Estimate(0.02, -0.0001, 0.05, 9), "+"), "+2.0 points [0.0, +5.0]"),
        (format_share(Estimate(-0.0004, -0.0004, -0.0004, 9)), "0.0 % [0.0, 0.0]"),
        (format_mean(Estimate(-0.0, -0.0004, 1.25, 9)), "0 [-0.0004, 1.25]"),
    ],
)
def test_no_zero_has_a_minus(text, shown):
    assert text == shown
