"""Escapes text from cards and results for other formats, which must not read it as markup."""

from __future__ import annotations

import html
import re

__all__ = ["escape_markdown", "escape_spreadsheet", "escape_tex", "flatten_text", "wrap_markdown_code"]

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "–": "--", "±": r"$\pm$", "·": r"$\cdot$", "α": r"$\alpha$", "β": r"$\beta$", "σ": r"$\sigma$", "ε": r"$\epsilon$",
    "[": "{[}", "]": "{]}", "`": r"\textasciigrave{}",
}  # fmt: skip


def flatten_text(text: str) -> str:
    """Put text on one line, without control characters and without characters that change the reading direction."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def escape_markdown(text: str) -> str:
    """Escape characters that markdown or HTML reads as markup. An underscore inside a word is not markup."""
    text = re.sub(r"([\\`*|~$])", r"\\\1", html.escape(flatten_text(text), quote=False))
    text = re.sub(r"\](?=[(\[])", r"\\]", text)  # brackets are markup only in links
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def wrap_markdown_code(text: str) -> str:
    """Format text as markdown code, between more backticks than the text has in a row."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def escape_tex(text: str) -> str:
    """Escape characters that LaTeX reads as commands. Mathematical symbols become LaTeX math."""
    return "".join(_TEX.get(c, c) for c in flatten_text(text))


def escape_spreadsheet(text: str) -> str:
    """Put an apostrophe before text that a spreadsheet would read as a formula. Numbers stay as they are."""
    formula = text.startswith(("=", "+", "-", "@")) and not re.fullmatch(r"-?\d+(\.\d+)?", text)
    return f"'{text}" if formula else text
