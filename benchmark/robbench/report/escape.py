"""Escapes text from files for a terminal and for other formats, which must not read the text as commands or markup.

Every text from a card, a suite, a result or another file is data. `report/console.py` prints it on terminals. Pages and
CSV files are made by `make_markdown_table` and `format_csv`, which escape every cell and every heading.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

if TYPE_CHECKING:
    import pandas as pd  # slow to import, and `--help` prints too

__all__ = [
    "Markdown",
    "escape_control",
    "escape_html",
    "escape_markdown",
    "escape_spreadsheet",
    "escape_tex",
    "flatten_text",
    "format_csv",
    "make_markdown_table",
    "make_narrow_table",
    "wrap_markdown_code",
]

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "–": "--", "±": r"$\pm$", "·": r"$\cdot$", "α": r"$\alpha$", "β": r"$\beta$", "σ": r"$\sigma$", "ε": r"$\epsilon$",
    "[": "{[}", "]": "{]}", "*": "{*}", "`": r"\textasciigrave{}",
}  # fmt: skip
_FORMULA = tuple("=+-@＝＋－＠")  # spreadsheets in some languages read the wide forms too
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")


class Markdown(str):
    """Text that is Markdown already. `escape_markdown` returns it as it is."""

    __slots__ = ()


def escape_control(text: str) -> str:
    r"""Replace characters that a terminal obeys, or shows as nothing, by escapes such as ``\u001b``.

    These are the control characters, those that change the reading direction, those of no width, and lone surrogates.
    A line break stays. In JSON text the escapes mean the same characters.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else _escape(c) for c in text)


def _escape(c: str) -> str:
    units = c.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def flatten_text(text: str) -> str:
    """Put text on one line, without control characters and without characters that change the reading direction."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def escape_html(text: str) -> str:
    """Escape what HTML reads as markup, in content and in quoted attributes. Control characters become spaces."""
    return html.escape("".join(c if c.isprintable() else " " for c in text), quote=True)


def escape_markdown(text: str) -> str:
    """Escape characters that markdown or HTML reads as markup. An underscore inside a word is not markup."""
    if isinstance(text, Markdown):
        return text
    text = re.sub(r"([\\`*|~$])", r"\\\1", html.escape(flatten_text(text), quote=False))
    text = re.sub(r"\](?=[(\[:])", r"\\]", text)  # brackets are markup only in links
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def make_markdown_table(rows: Sequence[dict[str, str]], align: Sequence[str] | None = None) -> str:
    """Format rows as a markdown table. Headings and cells are escaped.

    Args:
        rows: heading -> cell; every row has the same headings.
        align: left or right for each column; None means left.
    """
    headings = [escape_markdown(heading) for heading in rows[0]]
    cells = [[escape_markdown(cell) for cell in row.values()] for row in rows]
    return str(tabulate(cells, headings, tablefmt="pipe", disable_numparse=True, colalign=align))


def make_narrow_table(rows: Sequence[dict[str, str]]) -> str:
    """Format rows as a markdown table that is as narrow as its cells. Headings and cells are escaped.

    Args:
        rows: heading -> cell; every row has the same headings.
    """
    table = [[escape_markdown(text) for text in line] for line in [[*rows[0]], *[[*row.values()] for row in rows]]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["| ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in table]
    lines.insert(1, "| ".join(":" + "-" * max(1, width - 1) for width in widths))
    return "".join(f"| {line}|\n" for line in lines)


def wrap_markdown_code(text: str) -> str:
    """Format text as markdown code, between more backticks than the text has in a row."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def escape_tex(text: str) -> str:
    """Escape characters that LaTeX reads as commands. Mathematical symbols become LaTeX math."""
    return "".join(_TEX.get(c, c) for c in flatten_text(text))


def escape_spreadsheet(text: str) -> str:
    """Put text on one line, with an apostrophe before what a spreadsheet would read as a formula. Numbers stay."""
    text = flatten_text(text)
    return f"'{text}" if text.startswith(_FORMULA) and not _NUMBER.fullmatch(text) else text


def format_csv(table: pd.DataFrame, float_format: str | None = None) -> str:
    """Format a table as CSV. Headings and cells of text are escaped for spreadsheets."""
    escaped = table.map(lambda cell: escape_spreadsheet(cell) if isinstance(cell, str) else cell)
    text = io.StringIO()
    escaped.rename(columns=escape_spreadsheet).to_csv(text, index=False, lineterminator="\n", float_format=float_format)
    return text.getvalue()
