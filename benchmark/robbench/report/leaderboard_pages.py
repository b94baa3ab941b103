"""Makes the pages of the leaderboard from a results tree. The same results give the same bytes. Imports no torch.

The first page has one row for each model and threat. Each data set has a page of its own with one table per suite.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from urllib.parse import quote

from robbench.certify.interval import CertificateIndex, find_contradictions
from robbench.core.words import format_count
from robbench.masking.stored import VerdictIndex
from robbench.report.escape import Markdown, escape_markdown, make_markdown_table, make_narrow_table
from robbench.report.leaderboard import (
    Score,
    build_group_table,
    format_damage,
    format_group_title,
    format_percent,
    format_with_interval,
    group_by_images,
    group_results,
    link_result,
    rank_scores,
)
from robbench.report.site.standing import Standing, list_standings
from robbench.results.reader import read_results
from robbench.results.schema import ResultFile

__all__ = ["PAGE", "render_leaderboard"]

PAGE = "leaderboard.md"
_INTRO = """\
# Leaderboard

Generated from `{tree}/` by `robbench leaderboard`; do not edit. Each row is one model under one
threat. Accuracies are percentages of the n test images, with 95 % Wilson intervals.

- **Clean** is the accuracy without an attack.
- **Worst case** counts an image as robust only if no stored attack of any suite breaks it. It is an
  upper bound, because stronger attacks can lower it.
- **From** names the suite whose images count. `+4` says that attacks of other suites break 4 more
  of these images. The line below the table names the other suites.
- **Verdict** is that of `robbench sanity` on the same weights, data and threat: trustworthy,
  suspicious, masked, randomized or undecided. It is unchecked if `robbench sanity` has not run. A
  line below the table names the verdicts that are of another number of images than n.
- **Certified**, if a table has this column, is the interval that holds the true robust accuracy:
  `robbench certify` has proven images against the same threat.
- **#** is the rank by worst case. A model is tied (=) with the best model of its rank if McNemar's
  exact paired test on the images that both have gives p of 5 % or more, not corrected for the
  number of models. If one has other images too, their intervals must overlap as well. A model at
  chance has no rank.
- **Date** is the month of the latest result.
"""
_DETAILS = """\
Generated from `{tree}/` by `robbench leaderboard`; do not edit. Accuracies are percentages of the n test images with
95 % Wilson intervals. **Worst case** counts an image as robust only if no attack of the suite broke it. The tables
are ranked by it. A model is tied (marked =) with the best model of its rank if the difference is not significant on
the images that both have: McNemar's exact paired test on the per-image records gives p of 5 % or more, not corrected
for the number of models. If one has other images too, their intervals must overlap as well. **Overestimation** is the
accuracy under PGD on cross-entropy with a single start, the usual evaluation, minus the worst case, in points.
**Verdict** is that of `robbench sanity` on the same weights, data and threat: trustworthy, suspicious, masked,
randomized or undecided. It is unchecked if `robbench sanity` has not run. `(n 200)` is the number of images of the
verdict, where that is not n. A robust accuracy is an upper bound, because stronger attacks can lower it.
**[certified, attacked]** is the interval that holds the true robust accuracy, where `robbench certify` has proven
images against the same threat: the share that is proven, and the share that neither attack nor certifier broke.
"""


def render_leaderboard(root: Path, page: Path, beside: bool = False) -> dict[Path, str]:
    """Make the first page, and a page of details for each data set.

    Args:
        root: the results tree.
        page: where the first page will lie. Links are relative to it.
        beside: whether the details lie beside the first page, as `<page>-<data set>.md`. If not, they lie in the
            results tree, as `<data set>/leaderboard.md`.

    Returns:
        Place -> markdown, the first page first. Damaged results, verdicts and certificates are listed at the end of
        the first page. They are in no table.
    """
    verdicts, certificates, stored = VerdictIndex(root), CertificateIndex(root), read_results(root)
    damaged = [*stored.damaged, *verdicts.list_damaged(), *certificates.list_damaged()]
    datasets = sorted({r.dataset for r in stored.results} | {Path(d.name).parts[0] for d in damaged})
    places = {d: page.with_name(f"{page.stem}-{d}.md") if beside else root / d / PAGE for d in datasets}
    tree = escape_markdown(root.resolve().name)
    parts = [_INTRO.replace("{tree}", tree)]
    if places:
        links = [f"- [{escape_markdown(d)}]({_link(place, page)})\n" for d, place in places.items()]
        parts.append(f"Details by suite:\n\n{''.join(links)}")
    else:
        parts.append(f"No results in `{tree}/` yet. Make one: `robbench eval --model digits/natural`.\n")
    if wrong := find_contradictions(root):
        parts.append("## Errors of robbench\n\n" + "".join(f"- {escape_markdown(text)}\n" for text in wrong))
    standings = list_standings(root, stored.results, verdicts, certificates)
    parts += [*_make_tables(standings, root, page.parent), *format_damage(damaged)]
    pages = {page: "\n".join(parts)}
    results = sorted(stored.results, key=lambda r: (format_group_title(r), bool(r.overrides), r.model))
    for dataset, place in places.items():
        own = [r for r in results if r.dataset == dataset]  # what looks for near breaks has no radius to rank at
        parts = [f"# {escape_markdown(dataset)}: details by suite\n", _DETAILS.replace("{tree}", tree)]
        parts.append(f"Best known worst cases over all suites: [leaderboard]({_link(page, place)}).\n")
        if not own:
            parts.append("All results are damaged. The first page names them.\n")
        for title, group in group_results(r for r in own if r.has_radius):
            text = make_markdown_table(build_group_table(group, root, verdicts, certificates, place.parent))
            parts.append(f"## {escape_markdown(title)}\n\n{text}\n{_list_flags(group)}")
        pages[place] = "\n".join(parts)
    return pages


def _make_tables(standings: Sequence[Standing], root: Path, folder: Path) -> list[str]:
    """Make the sections of the first page: one per data set, threat and set of images."""
    shown = [s for s in standings if not _is_minor(s)]
    number, parts = count(1), []
    for title, group in group_by_images((_format_title(s), s.base.identity.get("data"), s) for s in shown):
        addresses: list[str] = []

        def link(standing: Standing, addresses: list[str] = addresses) -> Markdown:
            label = next(number)
            addresses.append(f"[{label}]: {link_result(root, standing.base, folder)}\n")
            name = ", ".join(filter(None, [standing.base.model, standing.apart]))
            return Markdown(f"[{escape_markdown(name)}][{label}]")

        table = make_narrow_table(_make_rows(group, link))
        notes = [escape_markdown(note) for note in _make_notes(group)]
        lists = ["".join(f"- {note}\n" for note in notes), "".join(addresses)]
        parts.append("\n".join([f"## {escape_markdown(title)}\n", table, *filter(None, lists)]))
    if minor := list(dict.fromkeys(_format_title(s) for s in standings if _is_minor(s))):
        lines = "".join(f"- {escape_markdown(title)}\n" for title in minor)
        text = "A model has no row above under one of these if only the suites `quick` and `sanity` ran on it."
        parts.append(f"## Other threats\n\n{text}\n\n{lines}")
    return parts


def _make_notes(group: Sequence[Standing]) -> list[str]:
    """Say which suites broke more images than that of the base, and which verdicts are of another number of images.

    In the table, the n of a verdict would make the lines longer than a screen.
    """
    others: dict[int, list[str]] = {}
    for s in group:
        if s.sanity is not None and s.sanity.n != s.n:
            others.setdefault(s.sanity.n, []).append(s.base.model)
    broken = [f"{s.base.model}: {s.source}." for s in group if s.extra]
    return broken + [f"Verdict on {format_count(n, 'image')}: {', '.join(others[n])}." for n in sorted(others)]


def _make_rows(group: Sequence[Standing], link: Callable[[Standing], Markdown]) -> list[dict[str, str]]:
    is_certified = any(s.certified for s in group)
    return [
        {
            "#": rank,
            "Model": link(s),
            "Clean": format_percent(s.clean),
            "Worst case": format_with_interval(s.worst),
            "From": s.base.suite + (f" +{sum(s.extra.values())}" if s.extra else ""),
            "Verdict": s.verdict,
            **({"Certified": s.certified.format(s.n) if s.certified else "–"} if is_certified else {}),
            "n": str(s.n),
            "Date": s.date[:7],
        }
        for rank, s in rank_scores([(s, _score(s)) for s in group])
    ]


def _score(standing: Standing) -> Score:
    base = standing.base
    return Score(
        model=base.model,
        clean=standing.clean,
        worst=standing.worst,
        at_chance="chance" in base.flags,
        data=base.identity.get("data"),
        robust=standing.robust,
    )


def _is_minor(standing: Standing) -> bool:
    """Return whether only quick suites were run, under another threat than theirs: a point of a curve over radii."""
    return standing.is_quick and not standing.base.overrides.keys().isdisjoint({"eps", "norm"})


def _format_title(standing: Standing) -> str:
    return f"{standing.base.dataset}, {standing.threat}"


def _link(target: Path, page: Path) -> str:
    """Return the address of a page, relative to another page."""
    return quote(Path(os.path.relpath(target, page.parent)).as_posix())


def _list_flags(group: list[ResultFile]) -> str:
    flags = [f"{r.model}, {name}: {text}" for r in group for name, text in sorted(r.flags.items())]
    lines = [f"- {escape_markdown(flag)}" for flag in flags]
    return "\n" + "\n".join(lines) + "\n" if lines else ""
