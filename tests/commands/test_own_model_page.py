"""docs/own-model.md, followed word for word in an empty folder: its files, its commands, and what they print.

`PYTHONPATH=tests python tests/commands/test_own_model_page.py` writes the outputs into the page.
"""

import re

import pytest

from support.pages import REPO, follow, write_outputs

pytestmark = pytest.mark.whole

PAGE = REPO / "docs" / "own-model.md"


def tidy(text):
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


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
    write_outputs(PAGE, tidy)
