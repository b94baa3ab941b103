"""Formats a filled table for a terminal, or as markdown, LaTeX, CSV or HTML. Imports no torch.

Text from cards and results is data, not markup. `flatten_text` removes line breaks and control characters, and every
format escapes the rest.
"""

from __future__ import annotations

import html
import io
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from robbench.core.errors import ResultError, unknown_name
from robbench.core.words import name_tree
from robbench.masking.stored import name_verdict
from robbench.papers.tables import Cell, FilledRow, FilledTable, Missing, WorstCase
from robbench.report.console import TerminalConsole
from robbench.report.escape import (
    escape_markdown,
    escape_tex,
    flatten_text,
    format_csv,
    make_markdown_table,
    wrap_markdown_code,
)
from robbench.report.leaderboard import format_percent, format_points, format_with_interval
from robbench.report.site.paper_page import PaperPage
from robbench.report.tables import fits, print_rows

__all__ = ["FORMATS", "Commands", "check_format", "lay_out_page", "render_table"]

_WIDTH = 220  # characters, if there is no terminal
_PREDICTION = (
    " Equation 4 is a prediction, not an attack. It is the share of the same images with L > ε. L is the smallest "
    "ratio of logit gap to gradient gap (the 1-norm) over the wrong classes, from `robbench measure linear`."
)
_STYLE = "<style>td, th { padding: 0.2em 0.6em; text-align: left; white-space: nowrap }</style>\n"


@dataclass(frozen=True, slots=True)
class Commands:
    """The folders in the commands that make missing results.

    Attributes:
        models: further model registries.
        results: the results tree.
    """

    models: Sequence[Path] = ()
    results: Path = Path("results")

    def list_commands(self, missing: Missing) -> Iterator[str]:
        """Yield the shell commands that make the missing results, in order."""
        registries = "".join(f" --models {shlex.quote(str(m))}" for m in self.models)
        tree = name_tree(self.results)
        for name in missing.train:
            yield f"robbench train {shlex.quote(name)}{registries}"
        for run in missing.runs:
            overwrite = " --overwrite" if run.overwrite else ""
            command = f"eval -m {shlex.quote(run.model)} --suite {run.suite}"
            if not run.suite:
                command = f"measure linear -m {shlex.quote(run.model)}"
            yield f"robbench {command}{registries}{tree}{overwrite}"


def render_table(table: FilledTable, kind: str, commands: Commands, width: int | None = None) -> str:
    """Format a table. The same table gives the same text.

    Args:
        table: the table.
        kind: one of `FORMATS`.
        commands: the folders in the commands that make missing results.
        width: width of the terminal in characters; None means no terminal.

    Raises:
        ResultError: unknown format.
    """
    check_format(kind)
    return _terminal(table, commands, width) if kind == "terminal" else FORMATS[kind](table, commands)


def lay_out_page(table: FilledTable, commands: Commands) -> PaperPage:
    """Format a table as a page of `robbench report`."""
    missing = [f"{name}: {reason or ', then '.join(listed)}" for name, listed, reason in _list_missing(table, commands)]
    return PaperPage(table.paper_table.id, _title(table), _explain(table), _make_rows(table), table.notes, missing)


def check_format(kind: str) -> None:
    """Refuse an unknown format.

    Raises:
        ResultError: the format is none of `FORMATS`.
    """
    if kind not in FORMATS:
        raise ResultError("--format: " + unknown_name("format", kind, FORMATS))


def _title(table: FilledTable) -> str:
    number = f", Table {table.paper_table.number}" if table.paper_table.number else ""
    return f"{table.paper_table.source}{number}: {table.paper_table.title}"


def _explain(table: FilledTable) -> str:
    several = ", mean and standard deviation of three runs," if table.paper_table.columns[0].deviation else ""
    return (
        "Percent of the n test images that stay correct. A cell holds ours with the 95 % Wilson interval / the "
        f"paper's{several} on the full test set (difference in points). Our columns come from the suite "
        f"{table.paper_table.suite}; – was not measured. Worst case: the robust accuracy under all attacks of the "
        "strongest suite at the same radius (of those on at least n images, the suite whose interval ends lowest), and "
        "the attack of this suite with the lowest accuracy. Overestimation: the usual PGD of that suite "
        "(cross-entropy, one start) minus that worst case; – where the suite has no such attack. Verdict: that of "
        "robbench sanity on the same weights."
    ) + (f" {table.paper_table.remark}" if table.paper_table.remark else _PREDICTION * table.paper_table.predicts)


def _row_name(table: FilledTable, row: FilledRow) -> str:
    """Join the labels of a row. Labels that are numbers get their headings."""
    labels = zip(table.paper_table.labels, row.labels, strict=True)
    return ", ".join(f"{heading} {v}" if v[:1].isdigit() else v for heading, v in labels if v)


def _format_pair(cell: Cell) -> tuple[str, str]:
    """Format our accuracy, and the paper's number with the difference."""
    if cell.ours is None or cell.difference is None:
        return "–" if cell.ours is None else format_with_interval(cell.ours), cell.paper.text
    return format_with_interval(cell.ours), f"{cell.paper.text} ({round(cell.difference, 1) + 0.0:+.1f})"  # no -0.0


def _format_lowest(worst: WorstCase) -> str:
    return f"{worst.attack.name} {format_percent(worst.attack.robust_accuracy)}"


def _name_verdict(worst: WorstCase) -> str:
    return name_verdict(worst.verdict, worst.verdict_n, worst.n)


def _make_rows(table: FilledTable) -> list[dict[str, str]]:
    """Make the table as text, one row per filled row: heading -> one line of text."""
    rows = [
        {
            **dict(zip(table.paper_table.labels, row.labels, strict=True)),
            "Card": row.model or "–",
            "Network": row.network or "–",
            "Iterations": row.trained or "–",
            "n": "–" if row.n is None else str(row.n),
            **{
                column.heading: " / ".join(_format_pair(cell))
                for column, cell in zip(table.paper_table.columns, row.cells, strict=True)
            },
            "Worst case": "–" if row.worst is None else format_with_interval(row.worst.accuracy),
            "Strongest suite: its lowest": f"{row.worst.suite}: {_format_lowest(row.worst)}" if row.worst else "–",
            "Its n": "–" if row.worst is None else str(row.worst.n),
            "Overestimation": "–" if row.worst is None else format_points(row.worst.overestimation),
            "Verdict": "–" if row.worst is None else _name_verdict(row.worst),
        }
        for row in table.rows
    ]
    return [{heading: flatten_text(cell) for heading, cell in row.items()} for row in rows]


def _list_missing(table: FilledTable, commands: Commands) -> list[tuple[str, list[str], str]]:
    """List the models without results, each once: name, commands, and the reason if no command helps."""
    by_name = {}
    for row in table.rows:
        if row.missing.runs or row.missing.reason:
            by_name[flatten_text(row.model or _row_name(table, row))] = (
                [flatten_text(c) for c in commands.list_commands(row.missing)],
                row.missing.reason,
            )
    return [(name, listed, reason) for name, (listed, reason) in by_name.items()]


def _markdown(table: FilledTable, commands: Commands) -> str:
    parts = [
        f"# {_title(table)}",
        escape_markdown(_explain(table)),
        make_markdown_table(_make_rows(table)),
    ]
    if table.notes:
        parts += ["## Notes", "\n".join(f"- {escape_markdown(note)}" for note in table.notes)]
    if missing := _list_missing(table, commands):
        lines = [
            f"- {escape_markdown(name)}: "
            + (escape_markdown(reason) or ", then ".join(map(wrap_markdown_code, listed)))
            for name, listed, reason in missing
        ]
        parts += ["## Not measured yet, and how to", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _html(table: FilledTable, commands: Commands) -> str:
    def text(value: str) -> str:
        return html.escape(flatten_text(value))

    def items(values: Sequence[str]) -> str:
        return "<ul>\n" + "\n".join(f"<li>{value}</li>" for value in values) + "\n</ul>"

    # tabulate escapes cells and headings
    body = str(tabulate(_make_rows(table), headers="keys", tablefmt="html", disable_numparse=True))
    parts = [f"<h1>{text(_title(table))}</h1>", f"<p>{text(_explain(table))}</p>", body]
    if table.notes:
        parts += ["<h2>Notes</h2>", items([text(note) for note in table.notes])]
    if missing := _list_missing(table, commands):
        how = [
            f"{text(name)}: " + (text(reason) or ", then ".join(f"<code>{text(c)}</code>" for c in listed))
            for name, listed, reason in missing
        ]
        parts += ["<h2>Not measured yet, and how to</h2>", items(how)]
    head = f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{text(_title(table))}</title>\n{_STYLE}'
    return head + "\n".join(parts) + "\n</html>\n"


def _latex(table: FilledTable, commands: Commands) -> str:
    """Format a floating table for the package booktabs, and the notes after it."""
    cells = _make_rows(table)
    rows = [" & ".join(map(escape_tex, row)) + r" \\" for row in [list(cells[0]), *(row.values() for row in cells)]]
    lines = [
        "% needs \\usepackage{booktabs}; wide: set it in a landscape or resizebox environment",
        r"\begin{table}",
        rf"\caption{{{escape_tex(_title(table))}. {escape_tex(_explain(table))}}}",
        rf"\begin{{tabular}}{{{'l' * len(cells[0])}}}",
        r"\toprule",
        rows[0],
        r"\midrule",
        *rows[1:],
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    notes = [escape_tex(note) for note in table.notes]
    for name, listed, reason in _list_missing(table, commands):
        how = escape_tex(reason) or ", then ".join(rf"\texttt{{{escape_tex(c)}}}" for c in listed)
        notes.append(f"{escape_tex(name)}: not measured; {how}")
    if notes:
        lines += [r"\begin{itemize}", *[rf"\item {note}" for note in notes], r"\end{itemize}"]
    return "\n".join(lines) + "\n"


def _csv(table: FilledTable, commands: Commands) -> str:
    """Format each number in its own column, in percent. An empty field was not measured."""
    rows = []
    for row in table.rows:
        fields: dict[str, str] = dict(zip(table.paper_table.labels, row.labels, strict=True))
        fields |= {"card": row.model, "network": row.network, "iterations": row.trained, "n": str(row.n or "")}
        for column, cell in zip(table.paper_table.columns, row.cells, strict=True):
            fields |= {f"{column.heading}{end}": value for end, value in _cell_fields(cell).items()}
        worst = row.worst
        fields |= {
            "worst case": f"{100 * worst.accuracy.value:.2f}" if worst else "",
            "worst case low": f"{100 * worst.accuracy.low:.2f}" if worst else "",
            "worst case high": f"{100 * worst.accuracy.high:.2f}" if worst else "",
            "worst case n": str(worst.n) if worst else "",
            "strongest suite": worst.suite if worst else "",
            "lowest attack": worst.attack.name if worst else "",
            "lowest attack alone": f"{100 * worst.attack.robust_accuracy.value:.2f}" if worst else "",
            "overestimation": f"{worst.overestimation:.2f}" if worst and worst.overestimation is not None else "",
            "verdict": worst.verdict if worst else "",
            "verdict n": str(worst.verdict_n or "") if worst else "",
            "missing": row.missing.reason or " && ".join(commands.list_commands(row.missing)),
        }
        rows.append(fields)
    return format_csv(pd.DataFrame(rows))


def _cell_fields(cell: Cell) -> dict[str, str]:
    ours, difference = cell.ours, cell.difference
    return {
        "": f"{100 * ours.value:.2f}" if ours else "",
        " low": f"{100 * ours.low:.2f}" if ours else "",
        " high": f"{100 * ours.high:.2f}" if ours else "",
        " paper": "" if isnan(cell.paper.value) else f"{cell.paper.value:g}",
        " difference": "" if difference is None else f"{round(difference, 2) + 0.0:.2f}",
    }


def _terminal(table: FilledTable, commands: Commands, width: int | None = None) -> str:
    """Format the table with two lines in a cell: our accuracy above the paper's number.

    Where the table is wider than the terminal, each row is a block, and each cell one line: our accuracy / the paper's.
    """
    columns = [c.heading.replace("-xent", "\n-xent").replace("-CW", "\n-CW") for c in table.paper_table.columns]
    headings = ["Row", "Card", "n", *columns, "Worst case", "Strongest suite", "Verdict"]
    rows = []
    for row in table.rows:
        worst, n = row.worst, "–" if row.n is None else str(row.n)
        cells: list[tuple[str, ...]] = [(_row_name(table, row),), (row.model or "–", row.network, row.trained), (n,)]
        cells += [_format_pair(cell) for cell in row.cells]
        cells += (
            [
                tuple(format_with_interval(worst.accuracy).split(" ", 1)),
                (worst.suite, _format_lowest(worst), f"n {worst.n}"),
                tuple(_name_verdict(worst).split(" ", 1)),
            ]
            if worst
            else [("–",), ("–",), ("–",)]
        )
        texts = ["\n".join(flatten_text(part) for part in cell if part) for cell in cells]
        rows.append(dict(zip(headings, texts, strict=True)))
    console = TerminalConsole(width=width or _WIDTH, file=io.StringIO(), force_terminal=False, color_system=None)
    between = " over "
    if not fits(console, rows):
        between = " / "
        rows = [
            {k.replace("\n", ""): (between if k in columns else ", ").join(v.split("\n")) for k, v in r.items()}
            for r in rows
        ]
    print_rows(console, rows, title=_title(table), ruled=True)
    for text in (_explain(table).replace(" / ", between), *table.notes):
        console.print(flatten_text(text))
    for name, listed, reason in _list_missing(table, commands):
        text = f"{name}: {reason or 'not measured; ' + ' && '.join(listed)}"
        console.print(text, soft_wrap=width is None)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


FORMATS: dict[str, Callable[[FilledTable, Commands], str]] = {
    "terminal": _terminal,
    "markdown": _markdown,
    "latex": _latex,
    "csv": _csv,
    "html": _html,
}
"""The formats of `robbench table`."""
