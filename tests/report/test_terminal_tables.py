"""Tables and progress on terminals of any width: every number, name and word is whole, and shares are of all images."""

import io
import re

import pytest
import torch
from rich.text import Text

import robbench as rb
from robbench.evaluation.run import evaluate
from robbench.models.card import Registry
from robbench.papers.layout import Commands, render_table
from robbench.papers.published import find_table
from robbench.papers.tables import fill_table
from robbench.report.console import TerminalConsole
from robbench.report.leaderboard import build_group_table, format_percent, format_with_interval
from robbench.report.progress import TerminalReporter
from robbench.report.tables import fits, name_columns, print_grouped, print_numbers, print_rows, print_turned
from robbench.report.terminal import print_results, summarize_result
from robbench.results.reader import read_results
from support.models import small
from support.terminal import run_in_terminal

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SUITE = """
version = 1
title = "Three attacks"
mode = "{mode}"
[[attack]]
name = "FGSM"
kind = "fgsm"
[[attack]]
name = "PGD"
kind = "pgd"
steps = 4
[[attack]]
name = "PGD-CW"
kind = "pgd"
objective = "margin"
steps = 4
"""


def console(width):
    return TerminalConsole(file=io.StringIO(), width=width)


def printed(of):
    return of.file.getvalue()


@pytest.mark.whole
@pytest.mark.parametrize("columns", [80, 100, 160])
def test_every_number_of_the_stored_results_is_whole(repo, columns):
    code = (
        "from pathlib import Path; from robbench.report.terminal import print_results\n"
        "from robbench.results.reader import read_results; root = Path('results')\n"
        "print_results(read_results(root, 'digits/*').results, root)"
    )
    text = CODES.sub("", run_in_terminal(code, columns, repo))
    lines = text.splitlines()
    assert max(map(len, lines)) <= columns
    cells = [[cell.strip() for cell in re.split("[│┃]", line)] for line in lines]
    shown = {cell for row in cells for cell in row}
    flowing = " ".join(text.split())
    stored = read_results(repo / "results", "digits/*").results
    assert len(stored) > 20
    for r in stored:
        assert {r.model, *(a.name for a in r.attacks), format_with_interval(r.robust_accuracy)} <= shown
        assert {format_percent(a.robust_accuracy) for a in (r.attacks)} <= shown
        assert f"{r.model}: {format_percent(r.clean_accuracy)} % clean" in flowing


@pytest.mark.parametrize("width", [44, 60, 80, 120])
def test_numbers_stand_in_a_table_at_every_width(width):
    """One row wide enough for a line is a table as it is; else the rows become columns, and no cell is broken."""
    rows = [
        {"Attack": name, "L > ε, %": "20.0 [5.7, 51.0] at 0.2", "Median": "0.1452", "Flags": flags}
        for name, flags in (("PGD-bisection", "none"), ("nearest of all", "chance, probabilities, bounded_outputs"))
    ]
    out = console(width)
    print_numbers(out, rows, title="A title")
    text = printed(out)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width and lines[0] == "A title" and text.count("━") > 10
    cells = {cell.strip() for line in lines for cell in re.split("[│┃]", line)}
    assert {"PGD-bisection", "nearest of all", "20.0 [5.7, 51.0] at 0.2", "0.1452", "none"} <= cells
    assert "bounded_outputs" in " ".join(sorted(cells)) and any(cell.startswith("chance, ") for cell in cells)
    assert any(cell.startswith("L > ε, %") for cell in cells)
    out = console(29)
    print_numbers(out, rows)
    assert "[5.7, 51.0] " in printed(out), "an interval is one word"


@pytest.mark.whole
@pytest.mark.parametrize(
    "args", [("eval", "-m", "digits/at", "-s", "distance"), ("measure", "linear", "-m", "digits/at")]
)
def test_distances_and_linear_measurements_fit(tmp_path, args):
    code = (
        f"import sys; sys.argv = ['robbench', *{args!r}, '--samples', '8', '--results', {str(tmp_path)!r}]\n"
        "from robbench.__main__ import run_in_process; run_in_process()"
    )
    text = CODES.sub("", run_in_terminal(code, 60, tmp_path))
    lines = [line.rpartition("\r")[2] for line in text.splitlines()]
    table = [line for line in lines if line.startswith(("┏", "┃", "│"))]
    assert table and max(map(len, table)) <= 60, text
    name = "nearest of all" if "eval" in args else "digits/at"
    assert any(name in line for line in table), "a table, no blocks of lines"


@pytest.mark.parametrize("width", range(40, 200, 7))
def test_no_word_is_broken(width):
    rows = [
        {"model": "digits/ls095_sigma03", "what": "a sentence of several long_and_short words", "n": f"{n} of 10000"}
        for n in (1, 10, 10000)
    ]
    out = console(width)
    print_rows(out, rows, title="A title", right=("n",))
    text = printed(out)
    assert max(map(len, text.splitlines())) <= width
    words = {w for row in rows for cell in (row["model"], row["what"]) for w in cell.split()}
    assert words <= set(text.replace("│", " ").split())
    for row in rows:
        assert row["n"] in text, "a number and its unit stay on one line"
    assert ("│" in text) == fits(out, rows, ("n",))


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_turned_table_shows_every_row_once(width):
    rows = [{"Model": f"model_{i}", "Clean": f"{90 + i}.5", "PGD-20": f"{i}.0 [1.0, 2.0]"} for i in range(9)]
    out = console(width)
    print_turned(out, rows, title="The title", first=1)
    text = printed(out)
    assert max(map(len, text.splitlines())) <= width and text.count("The title") == 1
    for row in rows:
        assert all(text.count(cell) == 1 for cell in row.values())


@pytest.mark.parametrize("width", [45, 60, 80, 100, 160])
def test_a_table_of_groups_shows_each_number_once_in_few_lines(width):
    heads = ("model", "n", "under")
    cells = [(m, i, u) for m in range(2) for i in range(9) for u in ("clean", "adversarial")]
    rows = [
        {"model": f"digits/model_{m}", "n": "30", "layer": f"{i} layer", "under": u, "cost": f"{m}{i}{len(u)}.5"}
        for m, i, u in cells
    ]
    out = console(width)
    print_grouped(out, rows, heads)
    lines = printed(out).splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert all(text.count(row["cost"]) == 1 for row in rows)
    groups = text.count("digits/model_1 · n 30 · under ")
    assert groups == (0 if width >= 60 else 2)
    assert len(lines) <= (len(rows) + 4 if width >= 60 else 4 * (9 + 5)), "as many lines as rows, and a few"


def test_a_cell_keeps_a_number_and_its_unit_on_one_line():
    rows = [{"a": "between 48.5 % and 12 s of the time", "b": "word"}]
    for width in range(24, 60):
        out = console(width)
        print_rows(out, rows)
        assert "48.5 %" in printed(out) and "12 s" in printed(out)


def test_styled_cells_and_control_characters_count_as_they_are_shown():
    rows = [{"a": Text("pass", "green"), "b": "\x1b[31m" * 4}]
    out = console(60)
    print_rows(out, rows)
    assert "\\u001b[31m" * 4 in printed(out) and fits(out, rows)
    assert not fits(console(40), rows)
    out = console(20)
    print_rows(out, [])
    assert printed(out) == "(none)\n"


def test_an_attack_with_the_name_of_another_column_gets_its_own():
    names = name_columns(["PGD", "Clean", "attack Clean", "n"], ("Clean", "n"))
    assert list(names) == ["PGD", "Clean", "attack Clean", "n"] and names["PGD"] == "PGD"
    assert len({*names.values(), "Clean", "n"}) == 6


@pytest.mark.parametrize("mode", ["full", "cascade", "challenge"])
@pytest.mark.parametrize("before", [0, 15, 40])
def test_progress_ends_with_the_shares_of_the_table(tmp_path, capsys, mode, before):
    suite = tmp_path / "three.toml"
    suite.write_text(SUITE.format(mode=mode))
    model = small()
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    y = model(x).argmax(1)
    y[::9] = (y[::9] + 1) % 10
    call = {"x": x, "y": y, "name": "small", "eps": 0.03, "results": tmp_path}
    if before:
        evaluate(model, suite, **call, samples=before)
    capsys.readouterr()
    reporter = TerminalReporter(hint_samples=False)
    result = evaluate(model, suite, **call, reporter=reporter)
    reporter.close()
    lines = capsys.readouterr().err.splitlines()
    if before == 40:
        assert "known since" in lines[0] and "--results DIR" in lines[0]
        return
    assert 0 < result.robust_accuracy.value < result.clean_accuracy.value
    for a in result.attacks:
        (line,) = [line for line in lines if line.startswith(f"  {a.name}:")]
        assert f"; {format_percent(a.robust_accuracy)} % of 40 robust" in line
        assert (f"{before} already known" in line) == bool(before)


def test_a_stage_with_nothing_to_do_says_that_it_is_known(capsys):
    reporter = TerminalReporter(hint_samples=False)
    reporter.plan("digits/at · two", ["PGD", "FGSM", "APGD"], 100, 97, 0.0, "cpu")
    reporter.stage("PGD", 0, 100, 55)
    reporter.stage("FGSM", 30, 70, 60)
    reporter.progress("FGSM", 30, 10)
    reporter.stage("APGD", 0, 0, 50)
    reporter.close()
    _, first, second, third = capsys.readouterr().err.splitlines()
    assert first == "  PGD: 100 of 100, already known; 55.0 % of 100 robust"
    assert second.startswith("  FGSM: 30 of 30, 70 already known; 50.0 % of 100 robust, ")
    assert third == "  APGD: none left to attack; 50.0 % of 100 robust"


@pytest.mark.whole
@pytest.mark.parametrize("columns", [80])
def test_bars_fit_the_terminal(tmp_path, columns):
    for samples in ("30", "40"):
        code = (
            f"import sys; sys.argv = 'robbench eval -m digits/at -s quick --samples {samples}'.split()\n"
            "from robbench.__main__ import run_in_process; run_in_process()"
        )
        text = CODES.sub("", run_in_terminal(code, columns, tmp_path)).replace("\r", "\n")
        assert max(map(len, text.splitlines())) <= columns
        assert re.search(rf"FGSM-xent .* % of {samples} robust", text)
    assert "10 of 10, 30 already known" in text
    assert "at: 100.0 % clean" in text or re.search(r"at: \d\d\.\d % clean, \d\d\.\d % \[", text)


def test_the_sentence_names_the_strongest_attack_where_attacks_got_the_same_images(repo):
    stored = {r.suite: r for r in read_results(repo / "results", "digits/at").results if not r.overrides}
    said = summarize_result(stored["whitebox"], "trustworthy")
    assert said.startswith("at: 96.8 % clean, 50.6 % [47.3, 53.9] robust at Linf 0.2, trustworthy, strongest attack AP")
    assert said.endswith(" s") and "strongest" not in summarize_result(stored["fast"], "unchecked")


def test_attacks_that_are_tied_are_all_named(repo):
    stored = next(r for r in read_results(repo / "results", "digits/at").results if r.suite == "whitebox")
    first, second = stored.attacks[:2]
    tied = [first, second.model_copy(update={"robust_accuracy": first.robust_accuracy})]
    said = summarize_result(stored.model_copy(update={"attacks": tied}), "unchecked")
    assert f", strongest attacks (tied) {first.name}, {second.name}, " in said
    idle = [a.model_copy(update={"robust_accuracy": stored.clean_accuracy}) for a in tied]
    assert ", no attack broke an image, " in summarize_result(stored.model_copy(update={"attacks": idle}), "unchecked")


def test_an_attack_that_got_no_image_says_so(tmp_path, capsys):
    result = rb.evaluate("digits/natural", "thorough", samples=4, eps=0.5, results=tmp_path)
    assert [a.forwards for a in result.attacks][1:] == [0, 0, 0], "the first attack breaks all"
    print_results([result], tmp_path)
    said = capsys.readouterr().out
    assert said.count("no image left") == str(result).count("no image left") == 3
    assert make_group_cells(result) == ["0.0", *["no image left"] * 3]
    full = rb.evaluate("digits/natural", "whitebox", samples=2, eps=0.5)
    assert "no image left" not in str(full), "in a full suite every attack gets every image"


def make_group_cells(result):
    (row,) = build_group_table([result])
    return [row[a.name] for a in result.attacks]


@pytest.mark.parametrize(("suite", "is_explained"), [("whitebox", True), ("quick", False)])
def test_the_column_over_is_explained_where_it_holds_a_number(repo, capsys, suite, is_explained):
    stored = [r for r in read_results(repo / "results", "digits/at").results if r.suite == suite and not r.overrides]
    print_results(stored, repo / "results")
    assert ("Over: points by which the usual attack" in capsys.readouterr().out) == is_explained


@pytest.mark.whole
@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize(
    "command",
    [
        "show digits/at",
        "list models",
        "list attacks",
        "list suites",
        "list data",
        "runs",
        "table 2",
        "check --baseline baselines/digits.json --result results/digits/at/whitebox",
    ],
)
def test_every_command_fits_the_terminal(command, columns, repo):
    code = (
        f"import sys; sys.argv = {['robbench', *command.split()]!r}\n"
        "from robbench.__main__ import run_in_process; run_in_process()"
    )
    text = CODES.sub("", run_in_terminal(code, columns, repo)).replace("\r", "\n")
    assert len(text.splitlines()) > 5
    assert max(map(len, text.splitlines())) <= columns


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_paper_table_breaks_no_name_and_no_number(repo, width):
    filled = fill_table(find_table("5"), Registry.default([]), repo / "results")
    text = render_table(filled, "terminal", Commands([], repo / "results"), width)
    assert max(map(len, text.splitlines())) <= width
    words = set(re.split(r"[\s│,]+", text))
    numbers = {float(word) for word in words if re.fullmatch(r"[\d.]+", word) and word != "."}
    for row in filled.rows:
        assert row.model is None or row.model in words
        assert {cell.paper.value for cell in row.cells if cell.paper is not None} <= numbers
