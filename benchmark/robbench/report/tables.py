"""Tables that fit a terminal: no number and no word is broken, whatever the width."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from robbench.report.console import TerminalConsole
from robbench.report.escape import escape_control
from robbench.report.wrapping import break_text

__all__ = ["fits", "name_columns", "print_grouped", "print_numbers", "print_rows", "print_turned"]

Row = Mapping[str, str | Text]
_BETWEEN = 3  # characters between two columns: a line, and a space on each side


def print_rows(
    console: TerminalConsole,
    rows: Sequence[Row],
    *,
    title: str | None = None,
    right: Collection[str] = (),
    ruled: bool = False,
) -> None:
    """Print rows as a table; as blocks with a line per column where the table would break a word or a number.

    Args:
        console: where to print.
        rows: cells by column; all rows have the same columns.
        title: printed above.
        right: the columns of numbers, which are aligned on the right. Their cells stay on one line.
        ruled: draw a line between rows.
    """
    if not rows:
        console.print("(none)")
    elif fits(console, rows, right):
        widths = _share_width(console, rows, right)
        view = Table(title=title, title_justify="left", pad_edge=False, show_lines=ruled)
        for column, width in widths.items():
            view.add_column(column, width=width, overflow="fold", justify="right" if column in right else "left")
        for row in rows:
            view.add_row(*(_break_cell(console, cell, widths[column]) for column, cell in row.items()))
        console.print(view)
    else:
        if title:
            console.print(title, style="italic")
        rest = max(1, console.width - 2 - max(map(cell_len, rows[0])))
        for row in rows:
            block = Table.grid(padding=(0, 2))
            block.add_column(no_wrap=True)
            block.add_column(overflow="fold")
            for column, cell in row.items():
                if str(cell):
                    block.add_row(column, _break_cell(console, cell, rest))
            console.print(block)
            console.print()


def print_grouped(console: TerminalConsole, rows: Sequence[Row], heads: Sequence[str]) -> None:
    """Print rows of numbers as one table if each row fits on a line, else as a table for each group of rows.

    The rows of a group have the same cells in the columns `heads`. These cells become the title of the group's table.

    Args:
        console: where to print.
        rows: cells by column. The first column that is no head names the row, and the others hold numbers.
        heads: the columns that make groups; () makes one group. The first cell stands in the title without the name of
            its column.
    """
    numbers = [column for column in rows[0] if column not in heads][1:] if rows else []
    if not rows or fits(console, rows, list(rows[0])):
        print_rows(console, rows, right=numbers)
        return
    groups: dict[str, list[Row]] = {}
    for row in rows:
        title = " · ".join(f"{column} {row[column]}" if i else str(row[column]) for i, column in enumerate(heads))
        groups.setdefault(title, []).append({c: cell for c, cell in row.items() if c not in heads})
    for title, group in groups.items():
        print_numbers(console, group, title=title)


def print_numbers(console: TerminalConsole, rows: Sequence[Row], *, title: str = "") -> None:
    """Print rows of numbers as a table if each row fits on a line, else turned (`print_turned`).

    Args:
        console: where to print.
        rows: cells by column. The first column names the row, and the others hold numbers.
        title: printed above.
    """
    if rows and not fits(console, rows, list(rows[0])):
        print_turned(console, rows, title=title, first=0)
        return
    if title:
        console.print(title, style="italic")
    print_rows(console, rows, right=list(rows[0])[1:] if rows else ())


def print_turned(console: TerminalConsole, rows: Sequence[Row], *, title: str, first: int) -> None:
    """Print rows of numbers as columns: a line per column, and several tables where one is too wide.

    Args:
        console: where to print.
        rows: cells by column; the first cell is the head of the printed column.
        title: printed above.
        first: the number of lines, after the head, that a rule separates from the others.
    """
    if title:
        console.print(title, style="italic")
    left = list(rows)
    while left:
        count = 1
        while count < len(left) and fits(console, turned := _turn(left[: count + 1]), right=turned[0]):
            count += 1
        view = Table(pad_edge=False)
        head, *lines = _turn(left[:count])
        for i, cell in enumerate(head.values()):
            view.add_column(cell, justify="right" if i else "left", overflow="fold")
        rest = max(1, console.width - max(map(cell_len, left[0])) - 2 * _BETWEEN) if count == 1 else console.width
        for i, line in enumerate(lines):
            name, *cells = line.values()
            view.add_row(name, *(_break_cell(console, cell, rest) for cell in cells), end_section=i + 1 == first)
        console.print(view)
        left = left[count:]


def name_columns(attacks: Iterable[str], taken: Collection[str]) -> dict[str, str]:
    """Give each attack a column of its own: its name, or `attack NAME` where other columns of the table have it."""
    used = {*taken, *(names := list(attacks))}
    columns = {}
    for name in names:
        columns[name] = name
        while name in taken and columns[name] in used:
            columns[name] = f"attack {columns[name]}"
        used.add(columns[name])
    return columns


def fits(console: TerminalConsole, rows: Sequence[Row], right: Collection[str] = ()) -> bool:
    """Return whether a table fits the console. Cells of the columns `right` stay on one line, and no word is broken."""
    needed = sum(_measure(rows, column, words=column not in right) for column in rows[0])
    return needed + _BETWEEN * len(rows[0]) - 1 <= console.width


def _share_width(console: TerminalConsole, rows: Sequence[Row], right: Collection[str]) -> dict[str, int]:
    """Choose widths: the longest word of each column, and the rest for the narrowest that want more."""
    full = {c: _measure(rows, c, words=False) for c in rows[0]}
    widths = {c: _measure(rows, c, words=c not in right) for c in full}
    spare = console.width - (sum(widths.values()) + _BETWEEN * len(widths) - 1)
    while spare > 0 and (wanting := [c for c in full if widths[c] < full[c]]):
        widths[min(wanting, key=widths.__getitem__)] += 1
        spare -= 1
    return widths


def _measure(rows: Sequence[Row], column: str, *, words: bool) -> int:
    """Return the width of the longest word, or line, of a column and its head."""
    texts = [column, *(escape_control(str(row[column])) for row in rows)]
    parts = [part for text in texts for part in (text.split() if words else text.splitlines())]
    return max(map(cell_len, parts), default=0)


def _break_cell(console: TerminalConsole, cell: str | Text, width: int) -> Text:
    return break_text(cell if isinstance(cell, Text) else console.render_str(cell), width)


def _turn(rows: Sequence[Row]) -> list[dict[str, str | Text]]:
    """Make columns of rows. The first row of what is returned is the head."""
    return [{"": name, **{str(i): row[name] for i, row in enumerate(rows)}} for name in rows[0]]
