"""Printing of tables and JSON, and the check for a results tree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from robbench.core.errors import ResultError

__all__ = ["print_objects", "print_table", "tree"]


def print_table(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print rows as a table, or as JSON."""
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    view = Table(pad_edge=False)
    for column in rows[0] if rows else ["(none)"]:
        view.add_column(column, overflow="fold")
    for row in rows:
        view.add_row(*[escape("".join(c if c.isprintable() else " " for c in str(v))) for v in row.values()])
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=200)).print(view)


def print_objects(objects: list[dict[str, Any]]) -> None:
    """Print a list of objects as JSON. A single object is printed without a list."""
    print(json.dumps(objects[0] if len(objects) == 1 else objects, indent=2, ensure_ascii=False))


def tree(results: Path) -> Path:
    """Return the path of the results tree if it exists.

    Raises:
        ResultError: it does not exist.
    """
    if not results.is_dir():
        raise ResultError(f"No results tree at {results}; give another with --results DIR.")
    return results
