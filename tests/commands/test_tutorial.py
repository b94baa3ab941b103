"""The tutorial, followed word for word in an empty folder: its files, its commands, and what they print.

`PYTHONPATH=tests python tests/commands/test_tutorial.py` writes the outputs into the page.
"""

import math
import re

import pytest

from support.pages import REPO, blocks, execute, follow, write_outputs

pytestmark = pytest.mark.whole

PAGE = REPO / "docs" / "tutorial.md"


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
    board, details = (folder / "private.md").read_text(), (folder / "private-digits.md").read_text()
    assert "mine-smooth" in board and "mine-plain" in board and "Averaged-20" in details
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


if __name__ == "__main__":
    write_outputs(PAGE, tidy)
