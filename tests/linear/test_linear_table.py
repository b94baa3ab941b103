"""Table 1 of Shafahi et al. 2019: attacks of one step beside what the linear model of robustness predicts."""

import numpy as np
import pandas as pd
import pytest

from robbench.core.stats import wilson
from robbench.linear.record import ACTIVATIONS, linear_folder, summarize_linear, write_linear
from robbench.linear.theory import Linearization
from robbench.papers.layout import Commands, render_table
from robbench.papers.published import TABLES
from robbench.papers.tables import fill_table
from support.evidence import TEST_SETS
from support.papers import SHA, line_of, put, result

TABLE = TABLES["shafahi2019-1"]
ONE_STEP = {"FGSM-xent": 60, "FGSM-CW": 50}


def put_linear(root, model, radii, dataset="mnist", weights=None, flat=False):
    """Store a measurement of two classes in which image i has L = radii[i]."""
    n = len(radii)
    zero = np.zeros(n)
    gap = np.stack([zero, zero if flat else zero + 2.0], axis=1)
    found = Linearization(
        np.arange(n), np.zeros(n, np.int64), np.stack([2 * np.array(radii), zero], axis=1), gap, gap, gap
    )
    about = {
        "model": model, "dataset": dataset, "total": 10000, "forwards": n, "backwards": 3 * n, "seconds": 1.0,
        "lanes": 8, "hardware": "", "versions": {}, "date": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip
    identity = {"weights": weights or SHA[model], "data": TEST_SETS["mnist"][0]}
    empty = pd.DataFrame({name: [] for name in ACTIVATIONS})
    write_linear(linear_folder(root, dataset, model), summarize_linear(found, identity, {}, about), found, empty)


def test_the_prediction_is_of_the_images_that_were_attacked(cards, tmp_path):
    """Of the first 100 images 40 have L = 0.31 > 0.3; those after the hundredth would all count."""
    put(tmp_path, result("natural", "whitebox", 10, ONE_STEP, n=100))
    put_linear(tmp_path, "natural", [0.31] * 40 + [0.29] * 60 + [9.0] * 100)
    sheet = fill_table(TABLE, cards("natural"), tmp_path)
    line = line_of(sheet, "mnist/natural")
    xent, cw, predicted = (cell.ours for cell in line.cells)
    assert (xent.value, cw.value) == (0.6, 0.5) and line.n == 100
    assert predicted.value == 0.4 and (predicted.low, predicted.high) == wilson(40, 100)
    assert line.cells[2].paper.value == 0.0 and line.cells[2].difference == pytest.approx(40)
    assert not sheet.notes and not [run for run in line.missing.runs if not run.suite]
    assert "Equation 4 is a prediction" in render_table(sheet, "markdown", Commands())


def test_fewer_measured_images_and_dead_gradients_are_told(cards, tmp_path):
    put(tmp_path, result("natural", "whitebox", 10, ONE_STEP, n=100))
    put_linear(tmp_path, "natural", [0.5] * 30, flat=True)
    notes = "\n".join(fill_table(TABLE, cards("natural"), tmp_path).notes)
    assert "mnist/natural: Equation 4 uses the first 30 images." in notes
    assert "zero_gradients: In 30 of 30 pairs" in notes


def test_what_is_missing_has_its_commands(cards, tmp_path):
    put_linear(tmp_path, "at", [0.5] * 10, weights="e" * 64)  # of other weights than the card has
    sheet = fill_table(TABLE, cards("at"), tmp_path)
    commands = Commands()
    assert list(commands.list_commands(line_of(sheet, "mnist/natural").missing)) == [
        "robbench train mnist/natural",
        "robbench eval -m mnist/natural --suite whitebox",
        "robbench measure linear -m mnist/natural",
    ]
    assert (
        list(commands.list_commands(line_of(sheet, "mnist/at").missing))[1]
        == "robbench measure linear -m mnist/at --overwrite"
    )
    assert line_of(sheet, "mnist/at").cells[2].ours is None, "of other weights"
    assert [line.model for line in sheet.rows] == ["mnist/natural", "mnist/at", "cifar10/natural", "cifar10/at"]


def test_other_networks_are_shown_once_they_have_a_result(cards, tmp_path):
    values = {"dataset": "cifar10", "eps": "8/255", "identity": {"weights": SHA["st_resnet18"]}}
    registry = cards("natural", "st_resnet18")
    assert "cifar10/natural_resnet18" not in [line.model for line in fill_table(TABLE, registry, tmp_path).rows]
    entry = registry.find("cifar10/natural_resnet18")
    values["identity"] = {"weights": entry.card.weights.sha256} if entry.card.weights else values["identity"]
    put(tmp_path, result("natural_wrn28_10", "whitebox", 10, ONE_STEP, n=100, **values))
    path = registry.find("cifar10/natural_wrn28_10").path
    weights = f'\n[weights]\npath = "x"\nsha256 = "{values["identity"]["weights"]}"\n'
    path.write_text(path.read_text(encoding="utf-8") + weights, encoding="utf-8")
    shown = [line.model for line in fill_table(TABLE, type(registry)([path.parents[1]]), tmp_path).rows]
    assert shown[2:4] == ["cifar10/natural", "cifar10/natural_wrn28_10"]
