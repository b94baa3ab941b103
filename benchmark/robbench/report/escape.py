"""Text from cards and results inside other formats: it is data, never markup."""

from __future__ import annotations

import html
import re

__all__ = ["markdown_code", "markdown_text", "plain", "spreadsheet_text", "tex_text"]

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "–": "--", "±": r"$\pm$", "·": r"$\cdot$", "α": r"$\alpha$", "β": r"$\beta$", "σ": r"$\sigma$", "ε": r"$\epsilon$",
    "[": "{[}", "]": "{]}", "`": r"\textasciigrave{}",
}  # fmt: skip


def plain(text: str) -> str:
    """Put text on one line, without control characters or ones that change the order of reading."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def markdown_text(text: str) -> str:
    """Escape what markdown or HTML would read as markup; an underscore inside a word is none."""
    text = re.sub(r"([\\`*|~$])", r"\\\1", html.escape(plain(text), quote=False))
    text = re.sub(r"\](?=[(\[])", r"\\]", text)  # a link; brackets alone are none
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def markdown_code(text: str) -> str:
    """Put text between more backticks than it holds in a row."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def tex_text(text: str) -> str:
    """Escape what LaTeX would read as a command; the symbols used here become math."""
    return "".join(_TEX.get(c, c) for c in plain(text))


def spreadsheet_text(text: str) -> str:
    """Keep a spreadsheet from taking text for a formula; numbers stay as they are."""
    formula = text.startswith(("=", "+", "-", "@")) and not re.fullmatch(r"-?\d+(\.\d+)?", text)
    return f"'{text}" if formula else text
