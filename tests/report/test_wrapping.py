"""Line breaks on terminals: between words, never between a number and its unit, whoever prints."""

import io
import re

import pytest
from rich.text import Text

from robbench.report.console import SafeStream, TerminalConsole, find_width, fit_terminal
from robbench.report.wrapping import break_line, break_text
from support.terminal import run_in_terminal

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SENTENCE = (
    "digits/at: 899 images, 96.8 % clean, 50.6 % [47.3, 53.9] robust at Linf 0.2, 12 s on cpu, 350 MiB, 8 / s, "
    "with ε = 0.2 and a strongest attack of a long name, and some more words that follow …"
)
WHOLE = ("96.8 %", "[47.3, 53.9]", "Linf 0.2", "12 s", "350 MiB", "8 / s", "ε = 0.2", "follow …")
COMMANDS = {
    ("eval", "-m", "digits/at", "-s", "whitebx"): "Did you mean whitebox",
    ("eval", "-m", "digits/at", "--eps", "8"): '"8/255"',
    ("eval", "-m", "digits/at", "--samples", "1e3"): "a whole number, such as 200",
    ("show", "digits/att"): "digits/at",
    ("export", "results/none"): "results/none",
    ("baseline", "-m", "digits/at", "--target", "nxt", "--out", "none.json"): "least-likely",
}
RUN = """
import sys
sys.argv = ["robbench", *{args!r}]
from robbench.__main__ import run_in_process
run_in_process()
"""
PRINT = """
import sys
from robbench.report.console import TerminalConsole, protect_terminal
with protect_terminal():
    print({text!r}, file=sys.stderr)
    TerminalConsole(stderr=True).note({text!r})
    TerminalConsole().print({text!r})
"""


@pytest.mark.parametrize("width", range(14, 130, 3))
def test_numbers_keep_their_units_at_every_width(width):
    parts = break_line(SENTENCE, width)
    assert " ".join(parts) == SENTENCE and max(map(len, parts)) <= width
    for whole in WHOLE:
        assert any(whole in part for part in parts) or len(whole) > width, whole
    styled = break_text(Text.assemble((SENTENCE[:30], "red"), SENTENCE[30:]), width)
    assert styled.plain.split("\n") == parts
    assert any("red" in str(span.style) for span in styled.spans)


def test_lists_break_between_their_numbers():
    numbers = ", ".join(map(str, range(1000, 1100)))
    for width in (20, 60, 80):
        parts = break_line(f"Images: {numbers} [1, 2, 3] [47.3, 53.9]", width)
        assert max(map(len, parts)) <= width and len(parts) < 1000 / width * 1.6 + 2
        assert any("[47.3, 53.9]" in part for part in parts)


def test_a_word_longer_than_the_line_stays_whole():
    assert break_line("see /a/long/path/to/results please", 10) == ["see", "/a/long/path/to/results", "please"]
    assert break_line("", 10) == [""] and break_line("  indented", 4) == ["  indented"]
    assert break_line(" joins", 10, used=8) == ["", "joins"] and break_line("joins", 10, used=8) == ["joins"]


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_streams_and_consoles_break_lines_between_words(columns):
    shown = CODES.sub("", run_in_terminal(PRINT.format(text=SENTENCE), columns))
    lines = shown.splitlines()
    assert max(map(len, lines)) <= columns
    assert " ".join(lines).count(SENTENCE) == 3
    for whole in WHOLE:
        assert sum(line.count(whole) for line in lines) == 3, whole


@pytest.mark.whole
@pytest.mark.parametrize("columns", [60, 80, 160])
@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_errors_of_commands_break_between_words(args, columns, repo):
    whole = CODES.sub("", run_in_terminal(RUN.format(args=args), 5000, repo))
    shown = CODES.sub("", run_in_terminal(RUN.format(args=args), columns, repo))
    assert COMMANDS[args] in " ".join(shown.split()), shown
    assert max(map(len, shown.splitlines())) <= columns
    assert shown.split() == whole.split(), "a word was broken"


def test_a_stream_breaks_no_laid_out_line_and_no_data(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "20")
    out = Terminal()
    stream = SafeStream(out)
    table = "| a cell | another cell | a third |\n"
    layout = "    a line of a listing that is long\n"
    stream.write(table + layout)
    stream.write_whole("a,cell of words,another cell of words\n")
    print("some words", "and more that follow", file=stream)
    print("\r50 % of all the images of the set", file=stream, end="")
    print("\r60 % of all the images of the set", file=stream)
    print("after the bar, lines are broken", file=stream)
    assert out.getvalue() == (
        table + layout + "a,cell of words,another cell of words\n"
        "some words and more\nthat follow\n"
        "\r50 % of all the images of the set\r60 % of all the images of the set\n"
        "after the bar, lines\nare broken\n"
    )
    monkeypatch.setenv("COLUMNS", "0")
    assert SafeStream(out).write("x y\n") == 4, "a terminal without a width gets lines as they are"


def test_text_elsewhere_than_on_a_terminal_stays_on_its_line():
    out = io.StringIO()
    SafeStream(out).write(SENTENCE + "\n")
    TerminalConsole(file=out).print(SENTENCE, soft_wrap=True)
    assert out.getvalue() == 2 * (SENTENCE + "\n")


IN_PYTHON = """
from pathlib import Path
from robbench.masking.record import read_sanity
from robbench.report.result import Result, Results
from robbench.report.sanity import SanityResult
from robbench.results.reader import read_vouched, read_vouched_rows
root = Path("results")
place = root / "digits/ls095_sigma03"
result = Result.of(read_vouched(place / "whitebox"), lambda: read_vouched_rows(place / "whitebox"), root=root)
flagged = result.model_copy(update={{"flags": {{"chance": {text!r}}}}})
for shown in (flagged, Results([flagged]), SanityResult.of(read_sanity(place / "sanity/sanity.json"))):
    print(shown)
"""


@pytest.mark.parametrize("columns", [30, 60, 80])
def test_what_python_prints_fits_the_terminal(columns, repo):
    code = IN_PYTHON.format(text=SENTENCE)
    whole = CODES.sub("", run_in_terminal(code, 5000, repo))
    shown = CODES.sub("", run_in_terminal(code, columns, repo))
    assert max(map(len, shown.splitlines())) <= columns
    table = whole[whole.index("Attack ") : whole.index("chance: ")]
    words = whole.replace(table, "").split()
    left = shown.split()
    for word in words:  # each word is whole, and the words are in the same order
        left = left[left.index(word) + 1 :]
    for cell in re.split(r"  +|\n", table.strip()):
        assert cell == "Attack" or cell in " ".join(shown.split()), cell
    assert max(map(len, whole.splitlines())) > 200, "the test shows long lines"
    head = table.splitlines()[0]
    assert (head in shown) == (len(head) <= columns) and ("\n  Forward passes: " in shown) == (len(head) > columns)


def test_what_python_prints_elsewhere_stays_as_it_is(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert fit_terminal(SENTENCE) == SENTENCE and find_width() is None
    monkeypatch.setattr("sys.stdout", None)  # a program without a console
    assert fit_terminal(SENTENCE) == SENTENCE


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["csv", "markdown"])
def test_a_table_for_a_program_gets_no_line_breaks(kind, repo):
    args = ("table", "seguin2021-2", "--format", kind)
    wide, narrow = (CODES.sub("", run_in_terminal(RUN.format(args=args), columns, repo)) for columns in (5000, 60))
    rows = [line for line in wide.splitlines() if line.count(",") > 4 or line.startswith("|")]
    assert len(rows) > 2 and set(rows) <= set(narrow.splitlines())
