"""A filled table as text: for a terminal, markdown, LaTeX, CSV or HTML. Imports no torch.

What comes from cards and results is data, not markup: `plain` takes line breaks and control characters out of it, and
every format escapes what is left.
"""

from __future__ import annotations

import html
import io
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tabulate import tabulate

from robbench.core.errors import ResultError, unknown_name
from robbench.papers.tables import Cell, Line, Sheet, Todo, Worst
from robbench.report.escape import escape_markdown, escape_spreadsheet, escape_tex, flatten_text, wrap_markdown_code
from robbench.report.leaderboard import format_percent, format_points, format_with_interval

__all__ = ["FORMATS", "Commands", "check_format", "render"]

_WIDTH = 220  # of a table that no terminal shows
_PREDICTION = (
    " Equation 4 is a prediction, not an attack: the share of the same images with L > ε, where L is the smallest "
    "ratio of logit gap to gradient gap (the 1-norm) over the wrong classes, as `robbench measure linear` finds it."
)
_STYLE = "<style>td, th { padding: 0.2em 0.6em; text-align: left; white-space: nowrap }</style>\n"


@dataclass(frozen=True, slots=True)
class Commands:
    """How the missing results are made, with the folders that this table was asked for.

    Attributes:
        models: further registries, as they were given.
        results: the results tree.
    """

    models: Sequence[Path] = ()
    results: Path = Path("results")

    def of(self, todo: Todo) -> Iterator[str]:
        """List the commands, in order; each can be pasted into a shell."""
        registries = "".join(f" --models {shlex.quote(str(m))}" for m in self.models)
        tree = "" if self.results == Path("results") else f" --results {shlex.quote(str(self.results))}"
        for name in todo.train:
            yield f"robbench train {shlex.quote(name)}{registries}"
        for run in todo.runs:
            again = " --overwrite" if run.overwrite else ""
            command = f"eval -m {shlex.quote(run.model)} --suite {run.suite}"
            if not run.suite:
                command = f"measure linear -m {shlex.quote(run.model)}"
            yield f"robbench {command}{registries}{tree}{again}"


def render(sheet: Sheet, kind: str, commands: Commands, width: int | None = None) -> str:
    """Print a table; the same table gives the same text.

    Args:
        sheet: the table.
        kind: one of `FORMATS`.
        commands: how missing results are asked for.
        width: of the terminal, in characters.

    Raises:
        ResultError: unknown format.
    """
    check_format(kind)
    return _terminal(sheet, commands, width or _WIDTH) if kind == "terminal" else FORMATS[kind](sheet, commands)


def check_format(kind: str) -> None:
    """Refuse a format that `render` does not know.

    Raises:
        ResultError: with the known ones.
    """
    if kind not in FORMATS:
        raise ResultError("--format: " + unknown_name("format", kind, FORMATS))


def _title(sheet: Sheet) -> str:
    return f"{sheet.table.source}, Table {sheet.table.number}: {sheet.table.title}"


def _reading(sheet: Sheet) -> str:
    several = ", mean and standard deviation of three runs," if sheet.table.columns[0].spread else ""
    return (
        f"Percent of the n test images that stay correct: ours with the 95 % Wilson interval / the paper's{several} on "
        f"the full test set (difference in points). Our columns come from the suite {sheet.table.suite}; – was not "
        "measured. Worst case: what withstands every attack of the strongest suite that was run at the same radius "
        "(the one whose interval ends lowest), and the attack that left fewest there. Overestimation: "
        "PGD on cross-entropy from one start minus that worst case. Verdict: of robbench sanity on the same weights."
    ) + (_PREDICTION if sheet.table.predicts else "")


def _row(sheet: Sheet, line: Line) -> str:
    """Name a row of the paper on one line; numbers need their headings."""
    named = zip(sheet.table.labels, line.labels, strict=True)
    return ", ".join(f"{heading} {v}" if v[:1].isdigit() else v for heading, v in named if v)


def _pair(cell: Cell) -> tuple[str, str]:
    """Print our figure, and the paper's with the difference."""
    if cell.ours is None or cell.difference is None:
        return "–", cell.paper.text
    return format_with_interval(cell.ours), f"{cell.paper.text} ({round(cell.difference, 1) + 0.0:+.1f})"  # no -0.0


def _lowest(worst: Worst) -> str:
    return f"{worst.attack.name} {format_percent(worst.attack.robust_accuracy)}"


def _frame(sheet: Sheet) -> pd.DataFrame:
    """Lay the table out, a row per line; every value is one line of text."""
    rows = [
        {
            **dict(zip(sheet.table.labels, line.labels, strict=True)),
            "Card": line.model or "–",
            "Network": line.network or "–",
            "Iterations": line.trained or "–",
            "n": "–" if line.n is None else str(line.n),
            **{c.heading: " / ".join(_pair(value)) for c, value in zip(sheet.table.columns, line.cells, strict=True)},
            "Worst case": "–" if line.worst is None else format_with_interval(line.worst.accuracy),
            "Strongest suite: its lowest": f"{line.worst.suite}: {_lowest(line.worst)}" if line.worst else "–",
            "Its n": "–" if line.worst is None else str(line.worst.n),
            "Overestimation": "–" if line.worst is None else format_points(line.worst.overestimation),
            "Verdict": "–" if line.worst is None else line.worst.verdict,
        }
        for line in sheet.lines
    ]
    return pd.DataFrame(rows).map(flatten_text)


def _missing(sheet: Sheet, commands: Commands) -> list[tuple[str, list[str], str]]:
    """List what lacks results: name, commands, and the reason where no command helps; names once."""
    found = {}
    for line in sheet.lines:
        if line.todo.runs or line.todo.reason:
            found[flatten_text(line.model or _row(sheet, line))] = (
                [flatten_text(c) for c in commands.of(line.todo)],
                line.todo.reason,
            )
    return [(name, listed, reason) for name, (listed, reason) in found.items()]


def _markdown(sheet: Sheet, commands: Commands) -> str:
    frame = _frame(sheet).map(escape_markdown).rename(columns=escape_markdown)
    parts = [
        f"# {_title(sheet)}",
        escape_markdown(_reading(sheet)),
        frame.to_markdown(index=False, disable_numparse=True),
    ]
    if sheet.notes:
        parts += ["## Notes", "\n".join(f"- {escape_markdown(note)}" for note in sheet.notes)]
    if missing := _missing(sheet, commands):
        lines = [
            f"- {escape_markdown(name)}: "
            + (escape_markdown(reason) or ", then ".join(map(wrap_markdown_code, listed)))
            for name, listed, reason in missing
        ]
        parts += ["## Not measured yet, and how to", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _html(sheet: Sheet, commands: Commands) -> str:
    def text(value: str) -> str:
        return html.escape(flatten_text(value))

    def items(values: Sequence[str]) -> str:
        return "<ul>\n" + "\n".join(f"<li>{value}</li>" for value in values) + "\n</ul>"

    frame = _frame(sheet)  # tabulate escapes cells and headings
    table = str(tabulate(frame.values.tolist(), list(frame.columns), tablefmt="html", disable_numparse=True))
    parts = [f"<h1>{text(_title(sheet))}</h1>", f"<p>{text(_reading(sheet))}</p>", table]
    if sheet.notes:
        parts += ["<h2>Notes</h2>", items([text(note) for note in sheet.notes])]
    if missing := _missing(sheet, commands):
        how = [
            f"{text(name)}: " + (text(reason) or ", then ".join(f"<code>{text(c)}</code>" for c in listed))
            for name, listed, reason in missing
        ]
        parts += ["<h2>Not measured yet, and how to</h2>", items(how)]
    head = f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{text(_title(sheet))}</title>\n{_STYLE}'
    return head + "\n".join(parts) + "\n</html>\n"


def _latex(sheet: Sheet, commands: Commands) -> str:
    """Print a floating table for the package booktabs, and the notes after it."""
    frame = _frame(sheet).map(escape_tex).rename(columns=escape_tex)
    rows = [" & ".join(row) + r" \\" for row in [list(frame.columns), *frame.values.tolist()]]
    lines = [
        "% needs \\usepackage{booktabs}; wide: set it in a landscape or resizebox environment",
        r"\begin{table}",
        rf"\caption{{{escape_tex(_title(sheet))}. {escape_tex(_reading(sheet))}}}",
        rf"\begin{{tabular}}{{{'l' * len(frame.columns)}}}",
        r"\toprule",
        rows[0],
        r"\midrule",
        *rows[1:],
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    notes = [escape_tex(note) for note in sheet.notes]
    for name, listed, reason in _missing(sheet, commands):
        how = escape_tex(reason) or ", then ".join(rf"\texttt{{{escape_tex(c)}}}" for c in listed)
        notes.append(f"{escape_tex(name)}: not measured; {how}")
    if notes:
        lines += [r"\begin{itemize}", *[rf"\item {note}" for note in notes], r"\end{itemize}"]
    return "\n".join(lines) + "\n"


def _csv(sheet: Sheet, commands: Commands) -> str:
    """Print numbers in columns of their own, in percent; an empty field was not measured."""
    rows = []
    for line in sheet.lines:
        row: dict[str, str] = dict(zip(sheet.table.labels, line.labels, strict=True))
        row |= {"card": line.model, "network": line.network, "iterations": line.trained, "n": str(line.n or "")}
        for column, cell in zip(sheet.table.columns, line.cells, strict=True):
            row |= {f"{column.heading}{end}": value for end, value in _numbers(cell).items()}
        worst = line.worst
        row |= {
            "worst case": f"{100 * worst.accuracy.value:.2f}" if worst else "",
            "worst case low": f"{100 * worst.accuracy.low:.2f}" if worst else "",
            "worst case high": f"{100 * worst.accuracy.high:.2f}" if worst else "",
            "worst case n": str(worst.n) if worst else "",
            "strongest suite": worst.suite if worst else "",
            "lowest attack": worst.attack.name if worst else "",
            "lowest attack alone": f"{100 * worst.attack.robust_accuracy.value:.2f}" if worst else "",
            "overestimation": f"{worst.overestimation:.2f}" if worst and worst.overestimation is not None else "",
            "verdict": worst.verdict if worst else "",
            "missing": line.todo.reason or " && ".join(commands.of(line.todo)),
        }
        rows.append({key: escape_spreadsheet(flatten_text(value)) for key, value in row.items()})
    text = io.StringIO()
    pd.DataFrame(rows).to_csv(text, index=False, lineterminator="\n")
    return text.getvalue()


def _numbers(cell: Cell) -> dict[str, str]:
    ours, difference = cell.ours, cell.difference
    return {
        "": f"{100 * ours.value:.2f}" if ours else "",
        " low": f"{100 * ours.low:.2f}" if ours else "",
        " high": f"{100 * ours.high:.2f}" if ours else "",
        " paper": f"{cell.paper.value:g}",
        " difference": "" if difference is None else f"{round(difference, 2) + 0.0:.2f}",
    }


def _terminal(sheet: Sheet, commands: Commands, width: int = _WIDTH) -> str:
    """Print the table with two lines in a cell: ours over the paper's."""
    view = Table(title=Text(_title(sheet)), title_justify="left", pad_edge=False, show_lines=True)
    for heading in (
        "Row",
        "Card",
        "n",
        *(c.heading for c in sheet.table.columns),
        "Worst case",
        "Strongest suite",
        "Verdict",
    ):
        view.add_column(Text(heading.replace("-xent", "\n-xent").replace("-CW", "\n-CW")), overflow="fold")
    for line in sheet.lines:
        worst, n = line.worst, "–" if line.n is None else str(line.n)
        cells: list[tuple[str, ...]] = [(_row(sheet, line),), (line.model or "–", line.network, line.trained), (n,)]
        cells += [_pair(cell) for cell in line.cells]
        cells += (
            [
                tuple(format_with_interval(worst.accuracy).split(" ", 1)),
                (worst.suite, _lowest(worst), f"n {worst.n}"),
                (worst.verdict,),
            ]
            if worst
            else [("–",), ("–",), ("–",)]
        )
        view.add_row(*[Text("\n".join(flatten_text(part) for part in cell if part)) for cell in cells])
    console = Console(width=width, highlight=False, file=io.StringIO(), force_terminal=False, color_system=None)
    console.print(view)
    for text in (_reading(sheet).replace(" / ", " over "), *sheet.notes):
        console.print(Text(flatten_text(text)))
    for name, listed, reason in _missing(sheet, commands):
        console.print(Text(f"{name}: {reason or 'not measured; ' + ' && '.join(listed)}"), soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


FORMATS: dict[str, Callable[[Sheet, Commands], str]] = {
    "terminal": _terminal,
    "markdown": _markdown,
    "latex": _latex,
    "csv": _csv,
    "html": _html,
}
"""The formats of `robbench table`."""
