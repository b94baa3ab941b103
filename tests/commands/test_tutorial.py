"""The tutorial, followed word for word in an empty folder: its files, its commands, and what they print.

`python tests/commands/test_tutorial.py` writes the outputs into the page.
"""

import contextlib
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from robbench.commands.app import app

pytestmark = pytest.mark.whole

REPO = Path(__file__).resolve().parents[2]
PAGE = REPO / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def blocks(page):
    """Yield (language, text, the file it goes into, where the text is in the page)."""
    for match in BLOCK.finditer(page):
        before = page[: match.start()].rstrip().rsplit("\n\n", 1)[-1]
        name = re.search(r"(?:into|to)\s+`([\w./-]+)`:$", before)
        yield match[1], match[2], name[1] if name else None, match.span(2)


def execute(command, folder):
    """Run a line of the tutorial, robbench's own in this process; returns what it prints to stdout."""
    line, _, comment = command.partition("  # exit code ")
    expected, words = int(comment or 0), shlex.split(line)
    if words[0] == "robbench":
        with contextlib.chdir(folder):
            done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == expected, (command, done.output, done.exception)
        return done.stdout
    assert words[0] == "python", command
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO / "benchmark")}
    ran = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )
    assert ran.returncode == expected, (command, ran.stdout, ran.stderr)
    return ran.stdout


def follow(page, folder):
    """Do what the page says; yields what it shows as output, what came out, and where it shows it."""
    said = ""
    for language, text, name, span in blocks(page):
        if language == "console":
            for command in text.splitlines():
                said = execute(command, folder)
        elif language == "text":
            yield text, said, span
        else:
            assert name, f"a block of {language} that goes into no file: {text[:60]}"
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def tidy(text):
    """Strip what varies: spaces at the ends of lines, and times."""
    text = re.sub(r" *\d+ s│", "  1 s│", text)
    text = re.sub(r", \d+ (s|min)$", ", 1 s", text, flags=re.MULTILINE)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def numbers(text):
    return re.findall(r"(?<![\w.])[+-]?\d+(?:\.\d+)?(?:e-\d+)?(?![\w])", text)


def alike(number, other):
    """Another processor rounds otherwise, trains other weights, and so moves a few points, or of 300 images a few."""
    few = 6 if "." in number else 18
    return math.isclose(float(number), float(other), abs_tol=few, rel_tol=0.1)


def words(text):
    text = re.sub(r"\b[0-9a-f]{12}\b", "", text)  # digests
    return re.findall(r"[A-Za-z]{3,}", "\n".join(line for line in text.splitlines() if "Images:" not in line))


def test_the_tutorial_runs_word_for_word(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    shown = 0
    for expected, said, _ in follow(PAGE.read_text(encoding="utf-8"), folder):
        assert words(expected) == words(tidy(said)), said
        for line, other in zip(expected.splitlines(), tidy(said).splitlines(), strict=True):
            if "│" in line:
                pairs = zip(numbers(line), numbers(other), strict=True)
                assert all(alike(a, b) for a, b in pairs), (line, other)
        shown += 1
    assert shown >= 5
    board = (folder / "private.md").read_text()
    assert "mine-smooth" in board and "mine-plain" in board and "Averaged-20" in board
    assert {p.name for p in folder.glob("results/digits/*")} == {"mine-plain", "mine-smooth"}


def test_the_workflow_is_the_one_shown_and_its_commands_are_those_of_the_tutorial():
    """No YAML library here: the file is read as far as it is needed, by its indentation."""
    shown = next(text for language, text, *_ in blocks(PAGE.read_text(encoding="utf-8")) if language == "yaml")
    text = (REPO / "examples/ci/github-robustness.yml").read_text(encoding="utf-8")
    assert shown == text
    keys = [line.split(":")[0] for line in text.splitlines() if re.match(r"\w", line)]
    assert keys == ["name", "on", "jobs"] and "\t" not in text
    assert all((len(line) - len(line.lstrip())) % 2 == 0 for line in text.splitlines())
    steps = text.split("    steps:\n")[1]
    assert all(line.startswith("      ") for line in steps.splitlines())
    commands = re.findall(r"^      - run: (.*)$", steps, flags=re.MULTILINE)
    assert commands[0] == "pip install vendor/robbench-*.whl" and len(commands) == 2


def test_the_commands_of_the_workflow_run(tmp_path):
    text = (REPO / "examples/ci/github-robustness.yml").read_text(encoding="utf-8")
    (command,) = re.findall(r"- run: (robbench .*)$", text, flags=re.MULTILINE)
    folder = tmp_path / "project"
    folder.mkdir()
    execute("robbench baseline --model digits/natural --suite quick --samples 20 --out robustness.json", folder)
    execute(command.replace("$GITHUB_STEP_SUMMARY", "page.md"), folder)
    assert (folder / "page.md").read_text().startswith("## ✅ Gate passed")
    assert "<testsuites" in (folder / "robustness.xml").read_text()


def write_outputs(folder):
    """Run the tutorial and put what its commands print into the page."""
    page = PAGE.read_text(encoding="utf-8")
    found = list(follow(page, folder))
    for _, said, (start, end) in reversed(found):
        page = page[:start] + tidy(said) + page[end:]
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        empty = Path(made) / "empty"
        empty.mkdir()
        write_outputs(empty)
