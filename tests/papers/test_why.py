"""The numbers of docs/why.md are those of the stored measurements, and its figures are there."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from robbench.core.stats import wilson
from robbench.linear.record import read_linearization


@pytest.fixture
def page(repo):
    return " ".join((repo / "docs/why.md").read_text(encoding="utf-8").split())


def interval(value, low, high):
    return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def test_claims_of_figures_are_quoted_as_they_are(repo, page):
    for name in ("2", "3"):
        rows = pd.read_csv(repo / f"results/figures/digits/seguin2021-{name}.csv")
        rows = rows[(rows["panel"] == "claim") & rows["other"].str.contains("robust, gap|half apart")]
        assert len(rows) == 2
        for row in rows.itertuples():
            assert interval(row.value, row.low, row.high) in page


@pytest.mark.parametrize("name", ["at", "ls095_sigma03", "lsq2_sigma03"])
def test_predictions_and_worst_cases_are_those_of_the_results(repo, page, name):
    folder = repo / "results/digits" / name
    measured = read_linearization(folder / "linear")
    count = int(measured.predict_robust(0.2).sum())
    assert interval(count / len(measured), *wilson(count, len(measured))) in page
    worst = json.loads((folder / "whitebox/result.json").read_text())["robust_accuracy"]
    assert interval(worst["value"], worst["low"], worst["high"]) in page


def test_gradient_gaps_are_the_medians(repo, page):
    medians = [
        np.median(read_linearization(repo / "results/digits" / name / "linear").take_at_nearest("gradient_gap"))
        for name in ("natural", "at", "ls095_sigma03")
    ]
    assert "{:.0f} for `natural`, {:.0f} for `at` and {:.1f} for `ls095_sigma03`".format(*medians) in page


def test_changes_of_the_loss_are_those_of_the_figure(repo, page):
    rows = pd.read_csv(repo / "results/figures/digits/landscape-adversarial.csv").query("panel == 'claim'")
    for name in ("at", "ls095_sigma03"):
        (row,) = rows[rows["model"] == f"digits/{name}"].itertuples()
        assert f"{row.value:.3g} times [{row.low:.3g}, {row.high:.3g}]" in page and row.n == 8


def test_what_noise_buys_is_quoted_as_it_is(repo, page):
    figures = repo / "results/figures"
    digits, mnist = (pd.read_csv(figures / name / "noise-accuracy.csv") for name in ("digits", "mnist"))

    def quoted(rows, panel, model):
        row = rows[(rows["panel"] == panel) & (rows["model"] == model)].iloc[0]
        return interval(row.value, row.low, row.high) in page

    for panel, name in (("B", "natural"), ("B", "lsq2_sigma03"), ("B", "clp05_sigma03"), ("A", "ls095_sigma03")):
        assert quoted(digits, panel, f"digits/{name}"), name
    assert quoted(mnist, "A", "mnist/lsq2_sigma05") and quoted(mnist, "B", "mnist/at")
    gain, loss = digits[digits["panel"] == "claim"].itertuples()
    assert (
        f"{100 * gain.value:.1f} points [{100 * gain.low:.1f}, {100 * gain.high:.1f}] more than for `natural`" in page
    )
    assert f"{-100 * loss.value:.1f} points [{-100 * loss.high:.1f}, {-100 * loss.low:.1f}] more than `lsq2" in page
    smoothed = digits[
        (digits["panel"] == "B") & digits["model"].isin([f"digits/{n}ls03" for n in ("", "a", "sb", "b")])
    ]
    assert len(smoothed) == 4 and (smoothed["value"] * smoothed["n"] < 1.5).all()
    noisy = mnist[(mnist["panel"] == "B") & (mnist["x"] > 0)]
    assert f"leaves at most {(noisy['value'] * noisy['n']).max():.0f} of 500, with any σ" in page
    certified = pd.read_csv(figures / "digits/noise-certified.csv")
    at_half = certified[np.isclose(certified["x"], 0.5)]
    assert quoted(at_half, "A", "digits/lsq2_sigma03") and quoted(at_half, "A", "digits/natural")


def test_claims_about_pixels_and_gradients_are_quoted_as_they_are(repo, page):
    def claims(number):
        rows = pd.read_csv(repo / f"results/figures/digits/tsipras2019-{number}.csv")
        return rows[rows["panel"] == "claim"]

    for row in (*claims("5").itertuples(), *claims("6").itertuples()):
        assert f"{100 * row.value:+.1f} points [{100 * row.low:+.1f}, {100 * row.high:+.1f}]" in page
    distances = claims("9")
    for row in (*claims("2").itertuples(), *distances[distances["kind"].str.startswith("distance")].itertuples()):
        assert any(f"{row.value:{s}.3f} [{row.low:{s}.3f}, {row.high:{s}.3f}]" in page for s in ("", "+"))


def test_every_figure_is_in_the_repository(repo, page):
    pictures = re.findall(r"\]\(\.\./(results/[^)]+)\)", page)
    assert len(pictures) == 14
    assert all((repo / picture).is_file() for picture in pictures)
