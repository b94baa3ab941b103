"""Pages of the papers' tables. The tables come from `papers/`, which is a higher layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from robbench.report.site.overview import make_model_path
from robbench.report.site.page import join, link, list_items, make_document, make_path, tag
from robbench.report.site.tables import Cell, make_table

__all__ = ["PaperPage", "make_paper_page", "make_table_index"]


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
        if heading == "Card" and text in models:
            return Cell(link(text, f"../{make_model_path(text)}"))
        return Cell(text)

    rows: list[dict[str, Cell | str]] = [{h: show(h, text) for h, text in row.items()} for row in page.rows]
    missing = [tag("h2", "Not measured yet, and how to"), list_items(page.missing)] if page.missing else []
    notes = [tag("h2", "Notes"), list_items(page.notes)] if page.notes else []
    body = [tag("p", page.explanation), make_table(page.title, rows, sortable=True, stacked=True), *notes, *missing]
    return make_document(page.title, *body, depth=1)


def make_table_index(pages: Sequence[PaperPage]) -> str:
    """Make the page that lists the tables."""
    links = [join(link(page.title, make_path("tables", f"{page.name}.html"))) for page in pages]
    return make_document("Tables of papers, with our results", list_items(links), depth=0)
