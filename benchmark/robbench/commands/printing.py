"""Printing of tables and JSON, and the check for a results tree."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

from robbench.core.errors import ResultError

__all__ = [
    "announce",
    "print_json",
    "print_objects",
    "print_table",
    "print_text",
    "print_whole",
    "reserve_stdout",
    "tree",
]


_reserved: ContextVar[TextIO | None] = ContextVar("_reserved", default=None)


@contextlib.contextmanager
def reserve_stdout() -> Iterator[None]:
    """Keep stdout for `print_json`: what anything else prints, such as a model in its forward, goes to stderr."""
    token = _reserved.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _reserved.reset(token)


def announce(text: str) -> None:
    """Print a first line at once, before imports and loading that take seconds: on stderr, if it is a terminal."""
    if sys.stderr.isatty():
        from robbench.report.console import TerminalConsole

        TerminalConsole(stderr=True).print(f"{text} …", style="dim", soft_wrap=True)


def print_json(value: object) -> None:
    """Print a value as JSON on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False), file=_reserved.get())


def print_table(rows: list[dict[str, Any]], as_json: bool, heads: Sequence[str] | None = None) -> None:
    """Print rows as a table, or as JSON.

    Args:
        rows: cells by column.
        as_json: print JSON.
        heads: columns that make groups of rows where a row does not fit on a line (`print_grouped`). None: cells are no
            numbers.
    """
    if as_json:
        print_json(rows)
        return
    from robbench.report.console import make_console
    from robbench.report.tables import print_grouped, print_rows

    console, texts = make_console(), [{column: str(cell) for column, cell in row.items()} for row in rows]
    if heads is not None:
        print_grouped(console, texts, heads)
    else:
        print_rows(console, texts)


def print_text(text: str) -> None:
    """Print a text: a terminal gets line breaks between words, and elsewhere each line stays whole."""
    from robbench.report.console import make_console

    make_console().print(text, soft_wrap=True)


def print_whole(text: str) -> None:
    """Print text that a program may read, such as CSV: no line break is added on a terminal."""
    getattr(sys.stdout, "write_whole", sys.stdout.write)(text)


def print_objects(objects: list[dict[str, Any]]) -> None:
    """Print a list of objects as JSON. A single object is printed without a list."""
    print_json(objects[0] if len(objects) == 1 else objects)


def tree(results: Path) -> Path:
    """Return the path of the results tree if it exists.

    Raises:
        ResultError: it does not exist.
    """
    if not results.is_dir():
        raise ResultError(f"No results tree at {results}; give another with --results DIR.")
    return results
