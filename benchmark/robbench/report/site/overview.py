"""The first page of the site: one table of all models, the chart of claims, and what is damaged. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from robbench.report.leaderboard import format_with_interval
from robbench.report.site.chart import draw_claims
from robbench.report.site.page import Html, join, link, list_items, make_document, make_path, tag
from robbench.report.site.standing import Standing
from robbench.report.site.tables import Cell, make_table
from robbench.results.schema import Accuracy

__all__ = ["format_verdict", "list_damage", "make_model_path", "make_overview", "show_accuracy"]

_READ = """\
Each row is one model under one threat. Clean is the share of the n test images that the model classifies correctly.
Worst case counts an image as robust only if no stored attack of any suite breaks it. Both are percentages with 95 %
Wilson intervals. From names the suite whose images count, and the suites that broke further ones. Certified is the
interval that holds the true robust accuracy. Verdict is that of robbench sanity on the number of the usual PGD. A
trustworthy number can still be 0: then the model is not robust, and that is certain."""
_CHART = """\
○ is the accuracy under the usual evaluation, PGD on cross-entropy from one start. ◇ is that under AutoAttack. ■ is the
best known worst case with its interval. A long line means that the usual evaluation claims too much. The axis goes from
0 to 100 %."""


def make_model_path(full_name: str) -> str:
    """Return the address of a model's page, relative to the site's folder."""
    dataset, model = full_name.split("/", 1)
    return make_path("models", dataset, f"{model}.html")


def show_accuracy(accuracy: Accuracy) -> Cell:
    """Make the cell of an accuracy with its interval."""
    number, interval = format_with_interval(accuracy).split(" ", 1)
    return Cell(join(tag("b", number), " ", tag("span", interval, class_="muted")), accuracy.value, "number")


def format_verdict(standing: Standing) -> Html:
    """Mark the verdict by words, and by a frame. The number of its images stands outside the frame."""
    known = {"trustworthy", "suspicious", "masked", "randomized", "damaged"}
    style = standing.verdict if standing.verdict in known else "open"
    n = standing.named_verdict.removeprefix(standing.verdict)
    return join(tag("span", standing.verdict, class_=f"verdict {style}"), tag("span", n, class_="muted") if n else "")


def list_damage(damaged: Sequence[str], wrong: Sequence[str] = ()) -> Html:
    """Make the section that names damaged files and errors of robbench; nothing if there are none."""
    if not damaged and not wrong:
        return Html("")
    return tag(
        "section",
        tag("h2", "Damaged"),
        tag("p", "No number is taken from these files."),
        list_items([*wrong, *damaged]),
        class_="damage",
    )


def make_overview(standings: Sequence[Standing], damaged: Sequence[str], wrong: Sequence[str]) -> str:
    """Make the page.

    Args:
        standings: all standings.
        damaged: damaged files, one sentence each.
        wrong: images that are proven and broken, one sentence each.
    """
    if not standings:
        empty = tag("p", "There are no results yet. Make one: ", tag("code", "robbench eval --model digits/natural"))
        return make_document("Robustness of all models", list_damage(damaged, wrong), empty, depth=0)
    main = [(s, make_model_path(s.full_name)) for s in standings if not s.is_quick]
    return make_document(
        "Robustness of all models",
        list_damage(damaged, wrong),
        tag("p", _READ),
        _make_filters(standings),
        make_table("All models", [_make_row(s) for s in standings], sortable=True, stacked=True),
        tag("section", tag("h2", "Claimed and audited"), tag("p", _CHART), draw_claims(main)),
        depth=0,
    )


def _make_row(standing: Standing) -> dict[str, Cell | str]:
    certified, proven = standing.certified, Cell("–", -1.0)  # -1: what is unknown comes last
    if certified is not None:
        proven = Cell(certified.format(standing.n), certified.low.value, "short")
    flags = tag("span", f" flags: {', '.join(standing.base.flags)}", class_="muted") if standing.base.flags else ""
    quick = tag("span", " quick only", class_="muted quick") if standing.is_quick else ""
    apart = tag("span", f" {standing.apart}", class_="muted") if standing.apart else ""
    return {
        "Model": Cell(join(link(standing.base.model, make_model_path(standing.full_name)), apart, flags, quick)),
        "Data set": standing.base.dataset,
        "Threat": Cell(standing.threat, None, "short"),
        "Clean": show_accuracy(standing.clean),
        "Worst case": show_accuracy(standing.worst),
        "From": standing.source,
        "Verdict": Cell(format_verdict(standing)),
        "Certified": proven,
        "n": Cell(str(standing.n), standing.n, "number"),
        "Date": Cell(standing.date, None, "short"),
    }


def _make_filters(standings: Sequence[Standing]) -> Html:
    """Make the filters of the table. They are hidden where no script runs."""

    def choose(name: str, column: str, values: set[str]) -> Html:
        options = [tag("option", "all", value=""), *[tag("option", v, value=v) for v in sorted(values)]]
        box = tag("select", *options, id=f"filter-{column}", data_column=name)
        return tag("span", tag("label", name, for_=f"filter-{column}"), box)

    text = tag("input", id="filter-text", type="search", autocomplete="off")
    quick = tag("input", id="filter-quick", type="checkbox")
    return tag(
        "div",
        tag("span", tag("label", "Text in any cell", for_="filter-text"), text),
        choose("Data set", "dataset", {s.base.dataset for s in standings}),
        choose("Threat", "threat", {s.threat for s in standings}),
        choose("Verdict", "verdict", {s.verdict for s in standings}),
        tag(
            "span", quick, tag("label", "Also threats with quick or sanity alone", for_="filter-quick"), class_="check"
        ),
        tag("p", f"{len(standings)} rows", id="count", role="status"),
        class_="filters",
        id="filters",
        hidden=True,
    )
