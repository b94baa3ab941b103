"""Tables of the site: a heading row, cells with values to sort by, and a frame that scrolls alone on narrow screens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from robbench.report.site.page import Html, tag

__all__ = ["Cell", "make_table"]


class Cell(NamedTuple):
    """A cell.

    Attributes:
        content: text or `Html`.
        value: what the column is sorted by; None means the text.
        kind: "number" is aligned to the right, "short" stays on one line.
    """

    content: str
    value: float | None = None
    kind: str | None = None


def make_table(
    caption: str, rows: Sequence[dict[str, Cell | str]], *, sortable: bool = False, stacked: bool = False
) -> Html:
    """Make a table. The first cell of each row is its heading.

    Args:
        caption: what the table shows; also the name of its frame.
        rows: heading -> cell; every row has the same headings.
        sortable: whether the headings are buttons that sort.
        stacked: whether the cells of a row are below each other on narrow screens, with their headings.
    """
    # The roles are those of the elements. Browsers drop them where the style changes how the elements are displayed.
    cells = [{heading: _as_cell(cell) for heading, cell in row.items()} for row in rows]
    heads = [
        tag(
            "th",
            tag("button", heading, type="button") if sortable else heading,
            scope="col",
            role="columnheader",
            class_=cell.kind,
        )
        for heading, cell in cells[0].items()
    ]
    body = [
        tag("tr", *[_make_cell(heading, cell, i == 0) for i, (heading, cell) in enumerate(row.items())], role="row")
        for row in cells
    ]
    classes = [name for name, is_on in {"sortable": sortable, "stacked": stacked}.items() if is_on]
    table = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *heads, role="row"), role="rowgroup"),
        tag("tbody", *body, role="rowgroup"),
        class_=" ".join(classes) or None,
        role="table",
    )
    return tag("div", table, class_="frame", role="region", aria_label=caption, tabindex="0")


def _as_cell(cell: Cell | str) -> Cell:
    return cell if isinstance(cell, Cell) else Cell(cell)


def _make_cell(heading: str, cell: Cell, is_head: bool) -> Html:
    value = None if cell.value is None else repr(cell.value)
    name, scope, role = ("th", "row", "rowheader") if is_head else ("td", None, "cell")
    content = tag("span", cell.content)  # one child, so that the heading and the content are two columns when stacked
    return tag(name, content, scope=scope, role=role, class_=cell.kind, data_label=heading, data_value=value)
