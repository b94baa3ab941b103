"""Charts of the site, drawn as SVG. Positions are percentages, so a chart is as wide as its place.

Every number of a chart is also text beside it. So the SVG is hidden from screen readers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from robbench.core.numbers import parse_threat
from robbench.report.leaderboard import format_percent
from robbench.report.site.page import Html, join, link, tag
from robbench.report.site.standing import Standing

__all__ = ["draw_claims", "draw_curve"]

_MARKS = {  # class of the style sheet -> outline around (0, 0); each mark has a shape of its own
    "usual": "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0-12 0z",
    "autoattack": "M0-7L7 0 0 7-7 0z",
    "worst": "M-5-5H5V5H-5z",
}
_TOP, _BOTTOM = 6.0, 88.0  # where 100 % and 0 % are in a curve, in percent of its height


def _mark(kind: str, x: float, y: float) -> Html:
    path = tag("path", d=_MARKS[kind], class_=kind)
    return tag("svg", path, x=f"{x:.2f}%", y=f"{y:.2f}%", overflow="visible")


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return tag("line", class_=kind, **{end: f"{value:.2f}%" for end, value in ends.items()})


def _svg(*content: str, kind: str) -> Html:
    return tag("svg", *content, class_=kind, aria_hidden="true", focusable="false")


def draw_claims(standings: Sequence[tuple[Standing, str]]) -> Html:
    """Draw a line per model from the usual number down to the best known worst case, those that fall most first.

    Args:
        standings: with the address of the model's page. Those without a usual number are left out.
    """
    pairs = [(s.usual, s, address) for s, address in standings if s.usual is not None]
    pairs.sort(key=lambda pair: (100 * pair[1].worst.value - pair[0], pair[1].key))
    rows = []
    for usual, standing, address in pairs:
        worst, autoattack = standing.worst, standing.autoattack
        numbers = [_describe("usual PGD", usual, standing.usual_n, standing.n)]
        # The marks have heights of their own, because equal numbers would lie on each other.
        marks = [_line(usual, 20, 100 * worst.value, 80, "fall"), _mark("usual", usual, 20)]
        if autoattack is not None:
            numbers.append(_describe("AutoAttack", 100 * autoattack.robust_accuracy.value, autoattack.n, standing.n))
            marks.append(_mark("autoattack", 100 * autoattack.robust_accuracy.value, 50))
        numbers.append(f"worst case {format_percent(worst)}")
        marks += [_line(100 * worst.low, 80, 100 * worst.high, 80, "interval"), _mark("worst", 100 * worst.value, 80)]
        grid = [_line(x, 0, x, 100, "grid") for x in (0, 25, 50, 75, 100)]
        name = join(link(standing.full_name, address), f", {standing.title}")
        text = tag("p", name, " ", tag("span", *_join_numbers(numbers), class_="numbers"))
        rows.append(tag("li", text, _svg(*grid, *marks, kind="claim")))
    if not rows:
        return tag("p", "No model has a usual number.")
    axis = [tag("text", f"{x} %", x=f"{x}%", y="75%", class_="middle") for x in (0, 25, 50, 75, 100)]
    return join(_svg(*axis, kind="claim"), tag("ol", *rows, class_="claims"))


def _join_numbers(numbers: list[str]) -> Iterator[str]:
    """Yield numbers with their names, each on one line, with arrows between them."""
    for i, number in enumerate(numbers):
        yield " → " if i else ""
        yield tag("span", number, class_="whole")


def _describe(name: str, percent: float, n: int, whole: int) -> str:
    return f"{name} {percent:.1f}" + ("" if n == whole else f" (n {n})")


def draw_curve(standings: Sequence[Standing]) -> Html:
    """Draw the best known worst case of one model in one norm over the radius, with 95 % intervals."""
    radii = [float(parse_threat(s.base.threat.norm, s.base.threat.eps).eps) for s in standings]
    span = max(radii) * 1.06
    xs = [11 + 87 * radius / span for radius in radii]  # "100" needs a tenth of a narrow screen

    def height(share: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * share

    marks = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        marks.append(_line(11, height(share), 98, height(share), "grid"))
        marks.append(tag("text", f"{100 * share:.0f}", x="9.5%", y=f"{height(share) + 1.5:.2f}%", class_="end"))
    points = list(zip(xs, standings, strict=True))
    for (x, s), (x2, s2) in itertools.pairwise(points):
        marks.append(_line(x, height(s.worst.value), x2, height(s2.worst.value), "fall"))
    for x, s in points:
        marks.append(_line(x, height(s.worst.low), x, height(s.worst.high), "interval"))
        marks.append(_mark("worst", x, height(s.worst.value)))
        marks.append(tag("text", s.base.threat.eps, x=f"{x:.2f}%", y="98%", class_="middle"))
    return _svg(*marks, kind="curve")
