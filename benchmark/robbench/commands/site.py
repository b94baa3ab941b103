"""`robbench report`: a web site of stored results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robbench.commands.options import Models, Results
from robbench.commands.printing import announce, tree

__all__ = ["report"]


def report(
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("build/report"),
    models: Models = None,
    results: Results = Path("results"),
) -> None:
    """Write a web site of the stored results into a folder. It opens without a server and without a network."""
    root = tree(results)
    announce(f"Reading {root}")
    from robbench.models.card import Registry
    from robbench.papers.layout import Commands, lay_out_page
    from robbench.papers.published import TABLES
    from robbench.papers.tables import fill_table
    from robbench.report.console import TerminalConsole
    from robbench.report.site.build import write_site

    registry, commands = Registry.default(models or []), Commands(models or [], results)
    papers = [lay_out_page(fill_table(table, registry, root), commands) for table in TABLES.values()]
    console = TerminalConsole(stderr=True)
    pages = write_site(root, out, registry, papers, lambda text: console.print(text, soft_wrap=True))
    print(f"{pages} pages. Open {out / 'index.html'}")
