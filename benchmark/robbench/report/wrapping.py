"""Line breaks of text on a terminal: between words, and never between a number and its unit."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.cells import cell_len
from rich.text import Text

__all__ = ["break_line", "break_text"]

# Spaces at which no line ends: 96.8 %, 8 / s, ε = 0.2, Linf 0.2. An interval [47.3, 53.9] is one word.
_JOIN = "|".join(
    (
        r"(?<=[\d.]) (?=(?:%|[kKMGT]?i?B|ms|s|min|h|points?|/)(?!\w))",
        r"(?<=/) (?=\w)",
        r" (?=[=…])|(?<==) |(?<=Linf) (?=\d)|(?<=L[012]) (?=\d)",
    )
)
_WORD = r"(?:\[[^\[\]\s]+, [^\[\]\s]+\]|\S)+"
_UNIT = re.compile(rf"{_WORD}(?:(?:{_JOIN}){_WORD})*")


def break_line(line: str, width: int, used: int = 0) -> list[str]:
    """Break a line between words into parts that fit a width. A longer word stays whole.

    Args:
        line: text without line breaks.
        width: characters of the terminal.
        used: characters that stand on the terminal's line already. The first word then moves to a new line only if
            the text begins with a space.

    Returns:
        The parts. The spaces at a break are left out.
    """
    begin, parts = 0, []
    for first, last in _choose_breaks(line, width, used):
        parts.append(line[begin:first])
        begin = last
    return [*parts, line[begin:]]


def break_text(text: Text, width: int) -> Text:
    """Break each line of a text with styles as `break_line` does."""
    lines: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        begin = 0
        for first, last in _choose_breaks(line.plain, width, 0):
            lines.append(line[begin:first])
            begin = last
        lines.append(line[begin:])
    return Text("\n", end=text.end).join(lines)


def _choose_breaks(line: str, width: int, used: int) -> Iterator[tuple[int, int]]:
    """Yield where a part ends and where the next begins."""
    length, end = used, 0
    for unit in _UNIT.finditer(line):
        gap, size = unit.start() - end, cell_len(unit[0])
        if gap and length + gap + size > width and (end or used):
            yield end, unit.start()
            length = size
        else:
            length += gap + size
        end = unit.end()
