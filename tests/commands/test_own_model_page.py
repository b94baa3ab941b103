"""docs/own-model.md, followed word for word in an empty folder: its files, its commands, and what they print.

`python tests/commands/test_own_model_page.py` writes the outputs into the page.
"""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from robbench.commands.app import app

pytestmark = pytest.mark.whole

REPO = Path(__file__).resolve().parents[2]
PAGE = REPO / "docs" / "own-model.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def execute(command, folder):
    """Run a line of the page, robbench's own in this process; returns what it prints to stdout."""
    words = shlex.split(command)
    if words[0] == "robbench":
        with contextlib.chdir(folder):
            done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, (command, done.output, done.exception)
        return done.stdout
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )
    assert ran.returncode == 0, (command, ran.stdout, ran.stderr)
    return ran.stdout


def follow(page, folder):
    """Do what the page says; yields what it shows as output, what came out, and where it shows it."""
    said = ""
    for match in BLOCK.finditer(page):
        language, text = match.groups()
        if language == "console":
            for command in text.splitlines():
                said = execute(command, folder)
                written = re.search(r"^\S+ written\. Check against it: (.*)$", said, flags=re.MULTILINE)
                assert written is None or written[1] in page, "the page gives the command that is printed"
        elif language == "text":
            yield text, said, match.span(2)
        else:
            before = page[: match.start()].rstrip().rsplit("\n\n", 1)[-1]
            name = re.search(r"to\s+`([\w.]+)`:$", before)
            assert name, f"a block of {language} that goes into no file: {text[:60]}"
            (folder / name[1]).write_text(text)


def shape(text):
    """Text without what another processor, or a busier one, changes: numbers, units of time, and widths of columns."""
    return [re.sub(r"[\d.,+-]+|\b(s|min)\b|[─━┏┓┳┡┩╇└┘┴ ]+", " ", line).split() for line in text.splitlines()]


def test_the_page_holds_word_for_word(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    shown = list(follow(PAGE.read_text(encoding="utf-8"), tmp_path))
    assert len(shown) == 3
    for text, said, _ in shown:
        assert shape(text) == shape(said)
    first, queries, gate = (said for _, said, _ in shown)
    clean, robust = map(float, re.search(r"my_net-load: ([\d.]+) % clean, ([\d.]+) %", first).groups())
    assert clean > 90 and 0 < robust < clean
    assert "transfer_left_out" in queries and "Gate passed" in gate


if __name__ == "__main__":
    os.environ["COLUMNS"] = "120"
    page = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        for _, said, (begin, end) in reversed(list(follow(page, Path(folder)))):
            lines = "".join(f"{line.rstrip()}\n" for line in said.splitlines())
            page = page[:begin] + lines + page[end:]
    PAGE.write_text(page, encoding="utf-8")
