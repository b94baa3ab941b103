"""`robbench sanity` on a terminal: the colour is about the number, a narrow one is short, and chance is named."""

import io
import re

import pytest

from robbench.masking.checks import CHECKS
from robbench.masking.record import read_sanity
from robbench.report import sanity, terminal
from robbench.report.console import TerminalConsole
from robbench.report.sanity import print_sanity
from robbench.report.terminal import describe_surrogate
from robbench.report.verdict import describe_status
from robbench.results.reader import read_result


@pytest.fixture
def stored(repo):
    return lambda name: read_sanity(repo / "results" / name / "sanity/sanity.json")


def show(monkeypatch, file, width, **options):
    out = io.StringIO()
    made = TerminalConsole(file=out, width=width, force_terminal=True, color_system="standard")
    monkeypatch.setattr(sanity, "make_console", lambda: made)
    print_sanity(file, "Again.", **options)
    return out.getvalue()


def test_only_the_words_about_the_number_are_green(stored, monkeypatch):
    for name, word in (("digits/natural", "trusted"), ("digits/ls095_sigma03", "look closer")):
        head = show(monkeypatch, stored(name), 200, every=False).split("Verdict on it")[0]
        coloured = re.findall(r"\x1b\[(?:1;)?3[123]m([^\x1b]*)\x1b", head)
        assert len(coloured) == 1 and word in coloured[0]


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_every_check_is_shown_and_a_narrow_terminal_gets_few_lines(stored, monkeypatch, width):
    file = stored("digits/ls095_sigma03")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", show(monkeypatch, file, width)).splitlines()
    assert max(map(len, lines)) <= width
    flowing = " ".join(" ".join(lines).replace("│", " ").split())
    assert all(c.name in flowing for c in file.checks)
    for c in file.checks:
        if c.status in ("warn", "fail") and width < 140:
            assert f"{c.name}: {c.reason}" in flowing
    assert len(lines) < (3 * len(file.checks) if width > 60 else 200)


def test_a_value_out_of_range_that_passes_says_why(stored):
    check = next(c for c in stored("digits/at").checks if c.name == "loss_disagreement")
    assert check.threshold.startswith("below 6") and describe_status(check) == "pass"
    assert describe_status(check.model_copy(update={"value": 7.5})) == "pass: can be chance (p ≥ 0.05)"
    assert describe_status(check.model_copy(update={"value": 7.5, "status": "warn"})) == "warn"
    assert describe_status(check.model_copy(update={"value": None, "status": "not applicable"})) == "not applicable"
    assert describe_status(check.model_copy(update={"name": "of_a_later_version"})) == "pass"


def test_a_surrogate_of_the_users_is_named_beside_the_names_of_the_suite(repo, monkeypatch):
    r = read_result(repo / "results/digits/at/sanity/result.json")
    assert describe_surrogate(r) == ""
    mine = r.model_copy(update={"overrides": {"surrogate": "mine:net"}})
    told = "at: BB-natural, BB-at take their points from the surrogate mine:net (--surrogate)."
    assert describe_surrogate(mine) == told
    out = io.StringIO()
    monkeypatch.setattr(terminal, "make_console", lambda: TerminalConsole(file=out, width=200))
    terminal.print_results([mine], repo / "results")
    assert told in out.getvalue()
    without = [a for a in r.attacks if a.config["kind"] != "transfer"]
    assert describe_surrogate(mine.model_copy(update={"attacks": without})) == ""


def test_the_pages_count_the_checks_right(repo):
    for page in ("README.md", "docs/commands.md"):
        assert f"{len(CHECKS)} checks" in (repo / page).read_text(), page
