"""Follow a page of docs/ word for word in an empty folder: its files, its commands, and what they print.

In a page, a block of Python or TOML goes into the file that the words before it name, a block `console` holds commands,
and a block `text` is what the last command prints.
"""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from typer.testing import CliRunner

from robbench.commands.app import app

REPO = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def blocks(page):
    """Yield (language, text, the file it goes into, where the text is in the page)."""
    for match in BLOCK.finditer(page):
        before = page[: match.start()].rstrip().rsplit("\n\n", 1)[-1]
        name = re.search(r"(?:into|to)\s+`([\w./-]+)`:$", before)
        yield match[1], match[2], name[1] if name else None, match.span(2)


def execute(command, folder):
    """Run a line of a page, robbench's own in this process; returns what it prints to stdout."""
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
                written = re.search(r"^\S+ written\. Check against it: (.*)$", said, flags=re.MULTILINE)
                assert written is None or written[1] in page, f"the page does not give the command {written[1]}"
        elif language == "text":
            yield text, said, span
        else:
            assert name, f"a block of {language} that goes into no file: {text[:60]}"
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def write_outputs(path, tidy):
    """Follow a page in an empty folder, and put what its commands print into the page."""
    page = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as made:
        empty = Path(made) / "empty"
        empty.mkdir()
        found = list(follow(page, empty))
    for _, said, (start, end) in reversed(found):
        page = page[:start] + tidy(said) + page[end:]
    path.write_text(page, encoding="utf-8")
