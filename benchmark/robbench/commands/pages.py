"""Commands that read stored results: leaderboard, tables, figures and exports."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robbench.commands.options import (
    DataDir,
    Device,
    Models,
    Results,
    check_file,
    check_folder,
    check_positive,
    explain_interrupt,
)
from robbench.commands.printing import announce, print_whole, tree
from robbench.core.errors import ResultError, RobbenchError
from robbench.core.files import read_bounded, refuse_links, write_atomically
from robbench.core.words import format_count, name_tree

if TYPE_CHECKING:
    from robbench.models.card import Registry
    from robbench.papers.tables import FilledTable

__all__ = ["export", "figure", "leaderboard", "table_", "trained"]


def leaderboard(
    results: Results = Path("results"),
    output: Annotated[
        Path | None,
        typer.Option(callback=check_file, help="The first page; the details lie beside it. By default leaderboard.md."),
    ] = None,
    check: Annotated[bool, typer.Option(help="Write nothing; fail (exit 1) when a file is stale.")] = False,
) -> None:
    """Write leaderboard.md, and RESULTS/DATASET/leaderboard.md with the details by suite, from the results tree."""
    root = tree(results)
    announce(f"Reading {root}")
    from robbench.report.leaderboard_pages import PAGE, render_leaderboard

    pages = render_leaderboard(root, output or Path(PAGE), beside=output is not None)
    if output is None:
        for page in list(pages)[1:]:
            refuse_links(root, page)
    for page, text in pages.items():
        _write_page(text, page, check, _repeat("leaderboard", results, output))


def trained(
    results: Results = Path("results"),
    output: Annotated[Path, typer.Option(callback=check_file, help="The file to write.")] = Path("docs/trained.md"),
    check: Annotated[bool, typer.Option(help="Write nothing; fail (exit 1) when the file is stale.")] = False,
) -> None:
    """Write docs/trained.md, which compares the models trained here with the papers."""
    root = tree(results)
    announce(f"Reading {root}")
    from robbench.models.card import Registry, locate_builtin_cards
    from robbench.papers.trained import render_trained_page

    text = render_trained_page(Registry([locate_builtin_cards()]).entries(), root)
    again = _repeat("trained", results, None if output == Path("docs/trained.md") else output)
    _write_page(text, output, check, again)


def table_(
    name: Annotated[str, typer.Argument(metavar="ID", help="A table: shafahi2019-5 (or just 5), ..., audit, or all.")],
    run: Annotated[
        bool, typer.Option("--run", help="First make the results that are missing for cards with weights.")
    ] = False,
    kind: Annotated[str, typer.Option("--format", help="terminal, markdown, latex, csv or html.")] = "terminal",
    output: Annotated[
        Path | None, typer.Option(callback=check_file, help="The file to write instead of printing.")
    ] = None,
    check: Annotated[
        bool, typer.Option(help="With all or audit: write nothing; fail (exit 1) when a file is stale.")
    ] = False,
    samples: Annotated[
        int | None, typer.Option(callback=check_positive, help="With --run: the first N test images instead of all.")
    ] = None,
    device: Device = "auto",
    models: Models = None,
    data_dir: DataDir = None,
    results: Results = Path("results"),
) -> None:
    """Print a table of a paper with our results.

    "all" writes every table to RESULTS/tables/. "audit" writes docs/audit.md: the paper's attack beside stronger ones.
    """
    announce(f"Table {name}: reading {results}")
    from robbench.models.card import Registry
    from robbench.papers.layout import Commands, check_format, render_table
    from robbench.papers.published import TABLES, find_table
    from robbench.papers.tables import fill_table

    if name == "audit":
        if run or kind != "terminal":
            raise RobbenchError("audit takes --output, --check, --models and --results only.")
        _write_audit(Registry.default(models or []), tree(results), output or Path("docs/audit.md"), check)
        return
    tables = list(TABLES.values()) if name == "all" else [find_table(name)]
    if name == "all" and (kind != "terminal" or output):
        raise RobbenchError(
            "--format and --output go with one table; all writes .md and .csv files to RESULTS/tables/."
        )
    if check and (name != "all" or run):
        raise RobbenchError("--check goes with all or audit, and without --run.")
    check_format(kind)
    registry = Registry.default(models or [])
    if run:
        options = {"samples": samples, "device": device, "models": models or [], "data_dir": data_dir}
        for table in tables:
            _run_missing(fill_table(table, registry, results), registry, results, options)
    tree(results)
    commands = Commands(models or [], results)
    for table in tables:
        filled = fill_table(table, registry, results)
        if name == "all":
            for ending, page_format in (("md", "markdown"), ("csv", "csv")):
                page = results / "tables" / f"{table.id}.{ending}"
                refuse_links(results, page)
                _write_page(
                    render_table(filled, page_format, commands), page, check, _repeat("table all", results, None)
                )
        elif output:
            _write_page(render_table(filled, kind, commands), output, False, "")
        else:
            from rich.console import Console

            console = Console()
            print_whole(render_table(filled, kind, commands, console.width if console.is_terminal else None))


def figure(
    name: Annotated[str, typer.Argument(metavar="ID", help="A figure (`robbench list figures`), or all.")],
    dataset: Annotated[str | None, typer.Option(help="Draw it for this data set; by default the paper's.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Show these stored models, in a figure for any model (repeatable)."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(callback=check_folder, help="The folder to write to; RESULTS/figures if left out.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Write nothing; fail (exit 1) when a figure is stale.")] = False,
    models: Models = None,
    data_dir: DataDir = None,
    results: Results = Path("results"),
) -> None:
    """Draw a figure from stored results: a PNG and the plotted numbers as CSV; "all" draws every one."""
    announce(f"Figure {name}: reading {results}")
    from robbench.models.card import Registry
    from robbench.papers.figures.definitions import find_figure
    from robbench.papers.figures.write import write_figure, write_figures
    from robbench.report.figures.source import FigureData

    if name == "all" and dataset:
        raise RobbenchError("--dataset goes with one figure; all draws every data set.")
    chosen = _choose_models(name, dataset, model or [], output) if model else []
    dataset = chosen[0].partition("/")[0] if chosen else dataset
    data = FigureData(Registry.default(models or []), tree(results), data_dir, chosen)
    folder = output or results / "figures"
    if output is None:
        refuse_links(results, folder)
    if name == "all":
        outcomes = write_figures(data, folder, check)
    else:
        definition = find_figure(name)
        outcomes = iter([write_figure(data, definition, dataset or definition.datasets[0], folder, check)])
    any_stale = False
    for damage in data.damaged:
        print(damage, file=sys.stderr)
    for written in outcomes:
        for command in written.missing if written.paths or name == "all" else ():
            print(f"{written.name}: not measured: {command}", file=sys.stderr)
        if not written.paths and name != "all":
            raise ResultError(f"Nothing to draw for {written.name}. " + " Or: ".join(written.missing))
        if written.stale:
            chosen_set = f" --dataset {dataset}" if dataset else ""
            shown = "".join(f" --model {shlex.quote(full_name)}" for full_name in chosen)
            again = _repeat(f"figure {name}{chosen_set}{shown}", results, output)
            print(f"{written.stale}: run `{again}`.", file=sys.stderr)
            any_stale = True
        elif written.paths:
            print(f"{written.paths[0]} {'is up to date' if check else 'written'}.")
    if any_stale:
        raise typer.Exit(1)


def _choose_models(figure: str, dataset: str | None, names: Sequence[str], output: Path | None) -> list[str]:
    """Return the full names of the models to show.

    Raises:
        RobbenchError: the figure takes no models, they are of several data sets, or no folder is given.
    """
    from robbench.papers.figures.definitions import FIGURES, find_figure

    if figure == "all" or not find_figure(figure).is_for_any:
        raise RobbenchError(
            f"--model given, but {figure} chooses its models itself. Figures for any model: "
            f"{', '.join(f.id for f in FIGURES.values() if f.is_for_any)}."
        )
    if output is None:
        raise RobbenchError("--model given without --output: the figure must not replace that of the usual models.")
    chosen = [name if "/" in name or dataset is None else f"{dataset}/{name}" for name in names]
    datasets = {name.partition("/")[0] for name in chosen} | ({dataset} if dataset else set())
    if len(datasets) > 1 or any("/" not in name for name in chosen):
        raise RobbenchError(f"--model {', '.join(names)} given; expected models of one data set, such as digits/at.")
    return chosen


def export(
    result: Annotated[Path, typer.Argument(help="A result.json, or the folder that holds it.")],
    kind: Annotated[str, typer.Option("--format", help="robustbench: an entry of its leaderboard.")] = "robustbench",
    output: Annotated[
        Path | None, typer.Option(callback=check_file, help="The file to write instead of printing.")
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(callback=check_folder, help="Instead: a folder for the adversarial examples as PNG files."),
    ] = None,
    models: Models = None,
) -> None:
    """Print a result as an entry of another leaderboard, or write its adversarial examples as pictures."""
    if pictures is not None and output is not None:
        raise RobbenchError("--pictures and --output given; allowed: one of them. Pictures are no entry to write.")
    announce(f"Reading {result}")
    if pictures is not None:
        from robbench.report.pictures import SHEET, write_pictures

        count, rounded = write_pictures(result, pictures)
        written = format_count(count, "adversarial example")
        print(f"{written} and {SHEET} written to {pictures}; 8 bits round {rounded} of them.")
        return
    from robbench.models.card import Registry
    from robbench.report.export import export_result

    text, notes = export_result(result, kind, Registry.default(models or []))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if output:
        _write_page(text, output, False, "")
    else:
        print_whole(text)


def _run_missing(table: FilledTable, registry: Registry, results: Path, options: dict[str, Any]) -> None:
    """Make the missing results of a table that need no training first."""
    from robbench.report.progress import TerminalReporter

    runs = table.list_possible_runs(registry)
    waiting = sum(not {*row.missing.runs} <= {*runs} for row in table.rows)
    print(
        f"{table.paper_table.id}: {format_count(len(runs), 'run')} to make; {waiting} of "
        f"{format_count(len(table.rows), 'row')} wait for training.",
        file=sys.stderr,
    )
    if not runs:
        return
    from robbench.evaluation.run import evaluate
    from robbench.linear.measure import measure_linear

    reporter = TerminalReporter(hint_samples=options["samples"] is None)
    with explain_interrupt("Every image that was finished is kept."), contextlib.closing(reporter):
        for run in runs:
            common = {"results": results, "overwrite": run.overwrite, **options}
            if run.suite:
                evaluate(run.model, run.suite, reporter=reporter, **common)
            else:
                measure_linear(run.model, note=reporter.note, **common)


def _write_audit(registry: Registry, results: Path, page: Path, check: bool) -> None:
    """Write the page of the audit with its figure and the figure's numbers beside it, or check all three."""
    from robbench.papers.audit import audit_claims, read_references
    from robbench.papers.audit_page import plan_audit_figure, render_audit_page
    from robbench.papers.figures.write import write_plan

    found, references = audit_claims(registry, results), read_references()
    picture, numbers = page.with_suffix(".png"), page.with_suffix(".csv")
    again = _repeat("table audit", results, None if page == Path("docs/audit.md") else page)
    stale = write_plan(plan_audit_figure(found, references), "audit", picture, numbers, check)
    if stale:
        print(f"{stale}: run `{again}`.", file=sys.stderr)
        raise typer.Exit(1)
    _write_page(render_audit_page(found, references, picture.name), page, check, again)


def _repeat(command: str, results: Path, output: Path | None) -> str:
    """Return the shell command that writes what is stale: the same one, without --check."""
    place = "" if output is None else f" --output {shlex.quote(str(output))}"
    return f"robbench {command}{name_tree(results)}{place}"


def _write_page(text: str, output: Path, check: bool, again: str) -> None:
    """Write a generated page, or check whether the page on disk is up to date; `again` is what writes it."""
    if not check:
        write_atomically(output, text.encode())
        print(f"{output} written.")
        return
    try:
        is_stale = read_bounded(output, 2**26) != text.encode()
    except OSError:
        is_stale = True
    if is_stale:
        print(f"{output} is stale: run `{again}`.", file=sys.stderr)
        raise typer.Exit(1)
    print(f"{output} is up to date.")
