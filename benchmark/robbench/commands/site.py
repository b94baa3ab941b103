"""`robbench report` and `robbench serve`: stored results and running evaluations in a browser."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from robbench.commands.options import Models, Results, check_folder
from robbench.commands.printing import announce, tree

__all__ = ["report", "serve"]

_REFERENCE = Path("results")  # the tree that a clone holds; a report inside it would be no result


def report(
    out: Annotated[
        Path | None,
        typer.Option(
            callback=check_folder,
            help="The folder to write to; by default build/report, and DIR/report with --results DIR.",
        ),
    ] = None,
    models: Models = None,
    results: Results = Path("results"),
) -> None:
    """Write a web site of the stored results into a folder. It opens without a server and without a network."""
    root = tree(results)
    out = out or (Path("build/report") if root == _REFERENCE else root / "report")
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


def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    results: Results = Path("results"),
) -> None:
    """Show the runs of the results tree in a browser of this machine, read from disk again and again, until Ctrl-C."""
    root = tree(results)
    announce(f"Reading {root}")
    from robbench.report.site.live import make_server

    with make_server(root, port) as server:
        print(f"Open http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
