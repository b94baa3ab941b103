"""Pages of the papers' tables. The tables come from `papers/`, which is a higher layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from robbench.report.site.overview import make_model_path
from robbench.report.site.page import Html, join, keep_whole, link, list_items, make_document, make_path, tag
from robbench.report.site.tables import Cell, make_table

__all__ = ["PaperPage", "make_paper_page", "make_table_index"]

_MOST_COLUMNS = 12  # of one table
_BEHIND = {"Network", "Iterations", "n", "Strongest suite: its lowest", "Its n", "Overestimation"}


@dataclass(frozen=True)
class PaperPage:
    """A paper's table with our results, as text.

    Attributes:
        name: its id, such as shafahi2019-5.
        title: source, number and title.
        explanation: how to read it.
        rows: heading -> cell. Where a cell of the column `Card` is the full name of a model, it becomes a link.
        notes: sentences below the table.
        missing: per model without results, how to make them.
    """

    name: str
    title: str
    explanation: str
    rows: Sequence[dict[str, str]]
    notes: Sequence[str]
    missing: Sequence[str]


def make_paper_page(page: PaperPage, models: set[str]) -> str:
    """Make the page.

    Args:
        page: the table.
        models: full names of the models that have a page.
    """

    def show(heading: str, text: str) -> Cell:
        if heading != "Card":
            return Cell(keep_whole(text))
        name = join(*[part for piece in text.split("/") for part in (Html("/<wbr>"), piece)][1:])
        return Cell(link(name, f"../{make_model_path(text)}") if text in models else name)

    rows: list[dict[str, Cell | str]] = [{h: show(h, text) for h, text in row.items()} for row in page.rows]
    missing = (
        [tag("h2", "Not measured yet, and how to"), list_items(map(keep_whole, page.missing))] if page.missing else []
    )
    notes = [tag("h2", "Notes"), list_items(map(keep_whole, page.notes))] if page.notes else []
    tables = [make_table(title, part, sortable=True, stacked=True) for title, part in _split_table(page.title, rows)]
    return make_document(page.title, tag("p", keep_whole(page.explanation)), *tables, *notes, *missing, depth=1)


def _split_table(title: str, rows: list[dict[str, Cell | str]]) -> Iterator[tuple[str, list[dict[str, Cell | str]]]]:
    """Yield the table; a table that is wider than a screen as two, its numbers and what is behind them."""
    headings = [*rows[0]]
    if len(headings) <= _MOST_COLUMNS or "Card" not in headings:
        yield title, rows
        return
    keys = headings[: headings.index("Card") + 1]
    behind = [h for h in headings if h in _BEHIND]
    yield title, [{h: cell for h, cell in row.items() if h not in behind} for row in rows]
    yield f"{title}: training, images and suites", [{h: row[h] for h in (*keys, *behind)} for row in rows]


def make_table_index(pages: Sequence[PaperPage]) -> str:
    """Make the page that lists the tables."""
    links = [join(link(keep_whole(page.title), make_path("tables", f"{page.name}.html"))) for page in pages]
    return make_document("Tables of papers, with our results", list_items(links), depth=0)
