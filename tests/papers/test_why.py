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
    assert len(pictures) == 10
    assert all((repo / picture).is_file() for picture in pictures)
