"""The page of one model: card, worst cases, what was and was not tested, attacks, verdict, classes, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from urllib.parse import quote

from robbench.report.leaderboard import format_points
from robbench.report.site.chart import draw_curve
from robbench.report.site.coverage import list_tested, list_untested
from robbench.report.site.overview import format_verdict, list_damage, show_accuracy
from robbench.report.site.page import Html, join, keep_whole, link, list_items, make_document, tag
from robbench.report.site.standing import Standing
from robbench.report.site.tables import Cell, make_table
from robbench.report.verdict import describe_status, describe_verdict
from robbench.results.summary import make_accuracy

__all__ = ["Picture", "make_model_page"]


@dataclass(frozen=True)
class Picture:
    """A picture of the site.

    Attributes:
        address: relative to the site's folder.
        caption: what it shows.
    """

    address: str
    caption: str


def make_model_page(
    name: str, standings: Sequence[Standing], card: Sequence[str], pictures: Sequence[Picture], damaged: Sequence[str]
) -> str:
    """Make the page.

    Args:
        name: full name of the model, such as digits/at.
        standings: what is known of it, by norm and radius; may be empty if all its results are damaged.
        card: sentences about it.
        pictures: its pictures.
        damaged: its damaged files, one sentence each.
    """
    main = [s for s in standings if not s.is_quick] or list(standings)
    sections = [section for s in main for section in _make_threat(s, standings)]
    return make_document(
        name,
        list_damage(damaged),
        *[_summarize(s) for s in main],
        tag("h2", "The model"),
        list_items(card),
        *_make_radii(standings),
        *sections,
        *_show_pictures(pictures),
        depth=2,
    )


def _summarize(standing: Standing) -> Html:
    """Say in a few sentences what is known under one threat."""
    usual = ""
    if standing.usual is not None:
        gap = standing.usual - 100 * standing.worst.value
        images = "" if standing.usual_n == standing.n else f", on {standing.usual_n} images"
        points = format_points(gap)
        than = "the same" if points == format_points(0.0) else f"{points} points more"
        usual = f" The usual PGD says {standing.usual:.1f} %{images}; that is {than}."
    return tag(
        "p",
        tag("b", standing.title),
        keep_whole(
            f": of {standing.n} images ({standing.base.selection}), the model classifies "
            f"{100 * standing.clean.value:.1f} % correctly. Stored attacks leave {100 * standing.worst.value:.1f} % "
            f"[{100 * standing.worst.low:.1f}, {100 * standing.worst.high:.1f}] robust.{usual} Verdict on the number "
            "of the usual PGD: "
        ),
        format_verdict(standing),
        f", {describe_verdict(standing.verdict)}. ",
        link("Compare with another model", f"../../compare.html#{quote(standing.key)}"),
        class_="summary",
    )


def _make_radii(standings: Sequence[Standing]) -> Iterator[Html]:
    if not standings:
        yield tag("p", "No result of this model can be read.")
        return
    yield tag("h2", "Worst case by threat")
    rows: list[dict[str, Cell | str]] = [
        {
            "Threat": s.title if s.apart else Cell(s.threat, None, "short"),
            "Clean": show_accuracy(s.clean),
            "Worst case": show_accuracy(s.worst),
            "From": s.source,
            "Certified": "–" if s.certified is None else s.certified.format(s.n),
            "n": Cell(str(s.n), None, "number"),
            "Date": Cell(s.date, None, "short"),
        }
        for s in standings
    ]
    yield make_table("Best known worst case", rows, stacked=True)
    for norm, group in groupby(standings, key=lambda s: s.base.threat.norm):
        members = list(group)
        if len({s.base.threat.eps for s in members}) > 1 and len({_function(s) for s in members}) == 1:
            caption = f"Robust accuracy in percent over the radius in {norm}, with 95 % intervals."
            yield tag("figure", draw_curve(members), tag("figcaption", caption))


def _function(standing: Standing) -> str:
    return repr([standing.base.identity.get(key) for key in ("model", "weights", "data", "dtype")])


def _make_threat(standing: Standing, all_standings: Sequence[Standing]) -> Iterator[Html]:
    """Yield the sections about one threat."""
    same = [s for s in all_standings if s is not standing and _function(s) == _function(standing)]
    yield tag("h2", f"{standing.title}: what was tested")
    yield tag("h3", "Attacked with")
    yield list_items(map(keep_whole, list_tested(standing)))
    yield tag("h3", "Not tested")
    yield list_items(list_untested(standing, list(dict.fromkeys(s.threat for s in same))), class_="untested")
    yield tag("h2", f"{standing.title}: attacks")
    yield make_table(
        f"Robust accuracy under each attack, {standing.title}", list(_list_attacks(standing)), stacked=True
    )
    if flags := {text: name for r in standing.results for name, text in r.flags.items()}:
        yield tag("h3", "Flags")
        yield list_items(f"{name}: {text}" for text, name in flags.items())
    yield from _explain_verdict(standing)
    yield tag("h2", f"{standing.title}: classes")
    yield make_table(f"Each class, {standing.title}", list(_list_classes(standing)), stacked=True)


def _list_attacks(standing: Standing) -> Iterator[dict[str, Cell | str]]:
    modes = {"full": "all images", "cascade": "what earlier attacks left", "challenge": "what the first attack left"}
    for result in standing.results:
        for i, attack in enumerate(result.attacks):
            yield {
                "Attack": Cell(attack.name, None, "short"),
                "Suite": result.suite,
                "Robust": show_accuracy(attack.robust_accuracy),
                "Attacked": modes["full"] if i == 0 else modes[result.mode],
                "n": Cell(str(result.n), None, "number"),
                "Passes per image": Cell(f"{(attack.forwards + attack.backwards) / result.n:.0f}", None, "number"),
            }


def _explain_verdict(standing: Standing) -> Iterator[Html]:
    yield tag("h2", f"{standing.title}: verdict")
    file = standing.sanity
    if file is None:
        rest = ". There is no evidence that can be read."
        if standing.verdict == "unchecked":
            rest = (
                f", {describe_verdict(standing.verdict)}. This command checks it: robbench sanity {standing.full_name}"
            )
        yield tag("p", "Verdict: ", format_verdict(standing), rest)
        return
    decided = f" Decided by: {', '.join(file.decided_by)}." if file.decided_by else ""
    advice = f"{file.advice.suite}: {file.advice.reason}" if file.advice.suite else file.advice.reason
    statement = f", {describe_verdict(file.verdict)}: of {file.n} images, the usual PGD leaves "
    left = f"{100 * file.measurements.pgd.value:.1f} %."
    yield tag("p", "Verdict: ", format_verdict(standing), keep_whole(f"{statement}{left}{decided} Advice: {advice}"))
    rows: list[dict[str, Cell | str]] = [
        {
            "Check": check.title,
            "Result": describe_status(check),
            "Value": Cell("–" if check.value is None else f"{check.value:.4g}", None, "number"),
            "Passes": check.threshold,
            "Reason": keep_whole(check.reason),
        }
        for check in file.checks
    ]
    if rows:
        yield make_table(f"Evidence of the verdict, {standing.title}", rows, stacked=True)


def _list_classes(standing: Standing) -> Iterator[dict[str, Cell | str]]:
    for label in sorted(set(standing.labels)):
        chosen = standing.labels == label
        n = int(chosen.sum())
        yield {
            "Class": str(label),
            "n": Cell(str(n), None, "number"),
            "Clean": show_accuracy(make_accuracy(int((chosen & standing.correct).sum()), n)),
            "Worst case": show_accuracy(make_accuracy(int((chosen & standing.robust).sum()), n)),
        }


def _show_pictures(pictures: Sequence[Picture]) -> Iterator[Html]:
    if pictures:
        yield tag("h2", "Pictures")
    for picture in pictures:
        image = tag("img", src=f"../../{picture.address}", alt=picture.caption)
        whole = tag("a", image, href=f"../../{picture.address}")
        yield tag("figure", whole, tag("figcaption", join(picture.caption)))
