"""Figures 1, 5, 6 and 7 after Tsipras et al. 2019: captions follow from the numbers, and what is stale is not drawn."""

import json
import math
import shutil

import pandas as pd
import pytest

from robbench.analysis.study_record import COLUMNS, read_study, write_study
from robbench.analysis.study_spec import load_studies
from robbench.models.card import Registry
from robbench.papers.figures.definitions import FIGURES
from robbench.papers.figures.studies import compute_pair_rows, compute_radius_rows, compute_size_rows
from robbench.papers.figures.write import write_figure
from robbench.report.figures.source import FigureData

PARTS = {"5": "pair", "1": "networks", "6": "networks", "7": "networks"}


def make_networks(few, many, radii=(0.0, 0.1)):
    """Make a table of two seeds. `few` and `many` are the accuracies at each radius, and the seeds differ by 0.02."""
    values = [(eps, size, v) for size, vs in ((10, few), (99, many)) for eps, v in zip(radii, vs, strict=True)]
    rows = [
        ("Linf", eps, size, seed, value + 0.02 * seed + 0.001 * seed * (eps > 0))
        for eps, size, value in values
        for seed in (0, 1)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def make_pair(weak, clean, robust):
    """Make a table of two pixels and two draws. `weak`, `clean` and `robust` are two numbers each."""
    rows = [("correlation", 0.0, j, 0, value) for j, value in enumerate((0.9, 0.1))]
    for eps, share in zip((0.0, 0.2), weak, strict=True):
        rows += [("weight", eps, j, 0, value) for j, value in enumerate((1 - share, share))]
        rows += [("weak", eps, 2, draw, share + 0.001 * draw * eps) for draw in range(3)]
    for kind, (strong, everything) in (("clean", clean), ("robust", robust)):
        for draw in range(3):
            rows += [(kind, 0.0, 1, draw, strong), (kind, 0.0, 2, draw, everything + 0.001 * draw)]
            rows += [(kind, 0.2, 2, draw, strong), (f"{kind} strong", 0.0, 1, draw, strong)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def test_intervals_over_seeds_are_students():
    numbers, _ = compute_size_rows(make_networks((0.5, 0.6), (0.9, 0.8)))
    row = numbers[(numbers["panel"] == "accuracy") & (numbers["eps"] == 0) & (numbers["x"] == 10)].iloc[0]
    half = 12.7062 * 0.02 / math.sqrt(2) / math.sqrt(2)  # t of one degree of freedom, times the standard error
    assert (row.value, row.low, row.high) == pytest.approx((0.51, 0.51 - half, 0.51 + half), abs=1e-5)
    claim = numbers[numbers["panel"] == "claim"].set_index("x")["value"]
    assert (claim[10], claim[99]) == pytest.approx((0.1005, -0.0995))


def test_captions_of_networks_follow_the_numbers():
    found = "The paper's finding shows here."
    assert compute_size_rows(make_networks((0.5, 0.6), (0.9, 0.8)))[1].count("(yes)") == 2
    assert compute_size_rows(make_networks((0.5, 0.5), (0.9, 0.9)))[1].count("(no)") == 2
    three = compute_size_rows(make_networks((0.5, 0.6, 0.4), (0.9, 0.9, 0.8), (0.0, 0.1, 0.2)))[1]
    assert (three.count("(yes)"), three.count("(no)")) == (2, 2)
    falling = make_networks((0.9, 0.8, 0.7), (0.9, 0.8, 0.7), (0.0, 0.1, 0.2))
    assert compute_radius_rows(falling)[1].count(f"falls in 2 of 2 steps. {found}") == 1
    rising = make_networks((0.9, 0.6, 0.7), (0.9, 0.6, 0.7), (0.0, 0.1, 0.2))
    assert "falls in 1 of 2 steps. The paper's finding does not show here." in compute_radius_rows(rising)[1]


def test_captions_of_the_pair_follow_the_numbers():
    numbers, caption = compute_pair_rows(make_pair((0.6, 0.1), (0.9, 0.95), (0.7, 0.2)), 0.5)
    assert "The difference is -50.0 points" in caption
    assert "The paper's finding shows here." in caption
    assert "The gain in accuracy shows here. The cost in robustness shows." in caption
    claims = numbers[numbers["panel"] == "claim"]["value"].tolist()
    assert claims == pytest.approx([-0.5, 0.05, -0.5])
    caption = compute_pair_rows(make_pair((0.1, 0.1), (0.9, 0.9), (0.7, 0.7)), 0.5)[1]
    assert caption.count("does not show") == 3


@pytest.fixture
def tree(tmp_path, repo):
    for part in sorted(set(PARTS.values())):
        shutil.copytree(repo / f"results/digits/tsipras2019-{part}", tmp_path / f"digits/tsipras2019-{part}")
    return tmp_path


@pytest.mark.parametrize("number", PARTS)
def test_figures_are_drawn_twice_the_same_and_not_of_another_declaration(tree, number, tmp_path):
    data, figure = FigureData(Registry.default(), tree), FIGURES[f"tsipras2019-{number}"]
    first, second = (write_figure(data, figure, "digits", tmp_path / folder).paths for folder in "ab")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    folder = tree / f"digits/tsipras2019-{PARTS[number]}/study"
    file, rows = read_study(folder)
    spec = load_studies()["tsipras2019-digits"]
    assert file.identity["spec"] == getattr(spec, PARTS[number]).model_dump(mode="json")
    other = json.loads(json.dumps(file.identity))
    other["spec"]["later"] = 1
    about = {k: getattr(file, k) for k in ("model", "dataset", "n", "seconds", "hardware", "versions", "date")}
    write_study(folder, rows, other, about)
    plan = figure.plan(FigureData(Registry.default(), tree), "digits")
    assert plan.numbers is None
    assert list(plan.missing) == [f"robbench train --family tsipras2019-digits --restart --results {tree}"]
    shutil.rmtree(folder)
    assert list(figure.plan(FigureData(Registry.default(), tree), "digits").missing) == [
        f"robbench train --family tsipras2019-digits --results {tree}"
    ]
