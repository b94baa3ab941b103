"""A verdict that was measured on other images than the result beside it says on how many, wherever the two stand."""

from __future__ import annotations

import csv
import io
import shutil

import pytest

from robbench.commands.show import as_object
from robbench.masking.stored import VerdictIndex, name_verdict
from robbench.models.card import Registry
from robbench.papers.audit import audit_claims, read_references
from robbench.papers.audit_page import render_audit_page
from robbench.papers.layout import FORMATS, Commands, render_table
from robbench.papers.published import TABLES
from robbench.papers.tables import fill_table
from robbench.papers.trained import render_trained_page
from robbench.report.terminal import print_results
from robbench.results.reader import read_results
from support.leaderboard import read_leaderboard
from support.site import make_site


@pytest.fixture
def root(tmp_path, repo):
    """A results tree with digits/natural: a suite on 899 images, and a verdict on 200 (trustworthy)."""
    for name in ("fast", "sanity"):
        place = f"digits/natural/{name}"
        shutil.copytree(repo / "results" / place, tmp_path / "results" / place)
    return tmp_path / "results"


@pytest.mark.parametrize(
    ("verdict", "verdict_n", "n", "text"),
    [
        ("masked", 20, 500, "masked (n 20)"), ("masked", 500, 20, "masked (n 500)"), ("masked", 20, 20, "masked"),
        ("unchecked", None, 20, "unchecked"), ("damaged", None, 20, "damaged"),
    ],
)  # fmt: skip
def test_the_n_stands_beside_a_verdict_only_where_it_differs(verdict, verdict_n, n, text):
    assert name_verdict(verdict, verdict_n, n) == text


def test_a_verdict_is_found_with_its_n(root):
    results, verdicts = {r.suite: r for r in read_results(root).results}, VerdictIndex(root)
    assert {suite: (r.n, verdicts.describe(r)) for suite, r in results.items()} == {
        "fast": (899, "trustworthy (n 200)"),
        "sanity": (200, "trustworthy"),
    }
    assert {(o["verdict"], o["verdict_n"]) for o in (as_object(r, root) for r in results.values())} == {
        ("trustworthy", 200)
    }
    for change in ({"target": "next"}, {"data": "other"}):
        other = results["fast"].model_copy(update={"identity": results["fast"].identity | change})
        assert (verdicts.describe(other), verdicts.find_n(other)) == ("unchecked", None)


def test_the_terminal_and_the_leaderboard_say_the_n(root, capsys):
    print_results(sorted(read_results(root).results, key=lambda r: r.suite), root)
    fast, sanity = capsys.readouterr().out.split("suite sanity")
    assert fast.count("trustworthy (n 200)") == 2 and sanity.count("trustworthy") == 2 and "(n 200)" not in sanity
    text = read_leaderboard(root)
    rows = [line for line in text.splitlines() if line.startswith("| 1")]
    assert ["(n 200)" in row for row in rows] == [False, True, False]  # all suites together, fast, sanity
    assert "\n- Verdict on 200 images: natural.\n" in text
    shutil.rmtree(root / "digits/natural/fast")
    assert "Verdict on" not in read_leaderboard(root)


def test_pages_of_the_report_say_the_n_outside_the_verdict(root, tmp_path):
    pages, _ = make_site(root, tmp_path / "out")
    for name in ("index.html", "models/digits/natural.html"):
        page = pages[name]
        assert ("span", {"class": "verdict trustworthy"}) in page.elements
        assert "trustworthy" in page.inside("span") and " (n 200)" in page.inside("span")  # the filter reads the word
    assert "trustworthy (n 200)" not in pages["index.html"].inside("option")


@pytest.mark.parametrize("kind", FORMATS)
def test_tables_of_the_papers_say_the_n(root, kind):
    text = render_table(fill_table(TABLES["goibert2019"], Registry.default(), root), kind, Commands())
    if kind == "csv":
        (row, *_) = csv.DictReader(io.StringIO(text))
        assert (row["verdict"], row["verdict n"], row["worst case n"]) == ("trustworthy", "200", "899")
    else:
        assert "(n 200)" in text


def test_the_trained_models_and_the_audit_say_the_n(root, repo):
    shutil.copytree(repo / "results/digits/natural/whitebox", root / "digits/natural/whitebox")
    assert "trustworthy (n 200)" in render_trained_page([Registry.default().find("digits/natural")], root)
    place = "mnist/lsq2_sigma05"  # a row of Table 5, on 500 images
    for name in ("paper-mnist", "sanity"):
        shutil.copytree(repo / "results" / place / name, root / place / name)
    page = render_audit_page(audit_claims(Registry.default(), root), read_references(), "audit.png")
    assert "| masked (n 200)" in page
