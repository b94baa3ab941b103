"""What the footnotes of the linear figures say follows from the stored measurements."""

import math
import re

import numpy as np
import pandas as pd
import pytest

from robbench.analysis.logits import Estimate, estimate_median
from robbench.linear.record import read_linearization
from robbench.models.card import Registry
from robbench.papers.figures.definitions import FIGURES
from robbench.papers.figures.findings import FINDINGS, find_kind
from robbench.report.figures.source import FigureData


@pytest.fixture
def data(repo):
    return FigureData(Registry.default(), repo / "results")


def claims(data, number, dataset="digits"):
    numbers = FIGURES[f"shafahi2019-{number}"].plan(data, dataset).numbers
    kind = "panel" if "panel" in numbers else "layer"
    return numbers[numbers[kind] == "claim"].set_index(["model", "what"])


@pytest.mark.parametrize("n", [6, 8, 20, 101, 899])
def test_the_interval_of_a_median_is_the_narrowest_of_order_statistics(n):
    found = estimate_median(np.arange(1.0, n + 1)[::-1])
    outside = sum(math.comb(n, i) for i in range(int(found.low)))  # at most low − 1 values below the median
    assert found.low + found.high == n + 1 and found.value == (n + 1) / 2 and found.n == n
    assert 2 * outside <= 0.05 * 2**n < 2 * (outside + math.comb(n, int(found.low)))


def test_few_values_have_no_interval():
    assert estimate_median(np.array([3.0, 1, 2, 5, 4])) == Estimate(3.0, -math.inf, math.inf, 5)
    with pytest.raises(ValueError, match="no value given"):
        estimate_median(np.array([]))


def test_ratios_are_those_of_the_nearest_class_of_images_that_both_get_right(repo, data):
    natural, at = (read_linearization(repo / f"results/digits/{name}/linear") for name in ("natural", "at"))

    def take(measured, quantity):
        radius = np.where(np.arange(10) == measured.label[:, None], np.inf, measured.radius)
        return getattr(measured, quantity)[np.arange(len(measured)), radius.argmin(1)]

    right = (take(natural, "logit_gap") > 0) & (take(at, "logit_gap") > 0)
    found = claims(data, 1)
    for quantity in ("logit_gap", "gradient_gap", "radius"):
        row = found.loc[("digits/at", quantity)]
        ratio = (take(at, quantity) / take(natural, quantity))[right]
        assert row["value"] == pytest.approx(np.median(ratio)) and row["images"] == right.sum()
        assert row["low"] <= row["value"] <= row["high"]
    sizes = [np.abs(measured.logits).mean(1) for measured in (natural, at)]
    assert claims(data, 2).loc[("digits/at", "logits")]["value"] == pytest.approx(np.median(sizes[1] / sizes[0]))


def test_shares_of_inactive_neurons_are_those_of_the_records(repo, data):
    found = claims(data, 8)
    for name in ("natural", "at"):
        rows = pd.read_parquet(repo / f"results/digits/{name}/linear/activations.parquet").query(
            "layer == 'penultimate'"
        )
        row = found.loc[(f"digits/{name}", "inactive")]
        assert (row["value"], row["neurons"]) == ((rows["active"] == 0).mean(), len(rows))


def read_note(data, number, dataset):
    figure = FIGURES[f"shafahi2019-{number}"].plan(data, dataset).paint()
    (legend,) = figure.legends
    return legend.get_title().get_text()


@pytest.mark.parametrize(
    ("number", "dataset", "said"),
    [
        (1, "digits", "so that L grows.\nThe paper's finding shows here.\n"),
        (4, "mnist", "does not show here. It fails for: logit gap of lsq2_sigma05."),
        (8, "mnist", "does not show here. It fails for: lsq2_sigma05."),
        (9, "digits", "The paper states no finding for this layer."),
    ],
)
def test_each_footnote_says_whether_the_finding_shows(data, number, dataset, said):
    assert said in read_note(data, number, dataset)


def test_each_linear_figure_has_a_number_with_an_interval(data):
    for number in (1, 2, 3, 4, 6, 7, 8, 9):
        assert re.search(r"\d \[[\d.]+, [\d.]+\]|% \[", read_note(data, number, "digits")), number


def test_a_finding_fails_where_the_interval_reaches_the_other_side():
    finding = FINDINGS["training"]
    kinds = {"d/natural": "natural", "d/at": "at", "d/ls": "ls"}
    grown = [("d/at", "radius", Estimate(2.0, 1.5, 3.0, 9)), ("d/ls", "radius", Estimate(0.5, 0.4, 0.6, 9))]
    assert finding.describe(finding.check_ratios(kinds, grown)).endswith("The paper's finding shows here.")
    unclear = [("d/at", "radius", Estimate(2.0, 0.9, 3.0, 9)), ("d/at", "logit_gap", Estimate(0.9, 0.5, 1.1, 9))]
    said = finding.describe(finding.check_ratios(kinds, unclear))
    assert said.endswith("does not show here. It fails for: L of at, logit gap of at.")
    assert finding.describe([]).endswith("No model of such a training is measured.")


def test_kinds_follow_from_the_recipes():
    registry = Registry.default()
    kinds = {
        name: find_kind(registry.find(f"mnist/{name}"))
        for name in ("natural", "at", "ls02", "ls095_sigma03", "lsq2", "lsq2_sigma05", "sigma05")
    }
    assert list(kinds.values()) == ["natural", "at", "ls", "ls_noise", "lsq", "lsq_noise", "noise"]
    assert find_kind(None) == "other"
