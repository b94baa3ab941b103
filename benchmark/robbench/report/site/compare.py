"""The page that compares two models image by image. Imports no torch.

Every number of the page is computed here. The script only shows the chosen pair, and lists images.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from robbench.core.stats import mcnemar, paired_difference
from robbench.report.site.overview import make_model_path
from robbench.report.site.page import Html, make_document, tag
from robbench.report.site.standing import Standing

__all__ = ["collect_pairs", "make_comparison"]

_READ = """\
Two models under the same threat, on the images that both were attacked on. An image is lost if the model misclassifies
it or a stored attack breaks it. The interval is that of the difference of two paired shares (Bonett and Price 2012,
95 %). p is that of McNemar's exact test on two sides, not corrected for the number of pairs."""


def collect_pairs(standings: Sequence[Standing]) -> list[dict[str, Any]]:
    """Collect what the script shows: groups of models with the same images and threat, and the numbers of each pair.

    Returns:
        Per group `title`, `models` and `pairs`. A model has `key`, `name`, `page`, `samples` (its images) and `robust`
        (one character per image: 1 robust, 0 lost). `pairs` has a list for each two models, in the order of
        `itertools.combinations`: n, images that only the second, only the first, or both lose, the difference first
        minus second with its interval in points, and p. Groups of one model, and pairs without common images, are
        left out (None for a pair).
    """
    groups: dict[str, list[Standing]] = {}
    for s in standings:
        groups.setdefault(f"{s.base.dataset}, {s.threat}\n{s.base.identity.get('data')}", []).append(s)
    titles = [name.split("\n")[0] for name in groups]
    return [
        {
            "title": title if titles.count(title) == 1 else f"{title}, images {members[0].base.identity['data'][:8]}",
            "models": [_describe(s) for s in members],
            "pairs": [_compare(first, second) for first, second in combinations(members, 2)],
        }
        for title, members in zip(titles, groups.values(), strict=True)
        if len(members) > 1
    ]


def _describe(standing: Standing) -> dict[str, Any]:
    return {
        "key": standing.key,
        "name": ", ".join(filter(None, [standing.base.model, standing.apart])),
        "page": make_model_path(standing.full_name),
        "samples": [int(sample) for sample in standing.robust.index],
        "robust": "".join("01"[int(robust)] for robust in standing.robust),
    }


def _compare(first: Standing, second: Standing) -> list[float] | None:
    common = first.robust.index.intersection(second.robust.index)
    if common.empty:
        return None
    a, b = first.robust.loc[common], second.robust.loc[common]
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())  # robust in one model only
    low, high = paired_difference(only_first, only_second, len(common))
    difference = 100 * (only_first - only_second) / len(common)
    points = [round(value, 2) + 0.0 for value in (difference, 100 * low, 100 * high)]
    return [len(common), only_first, only_second, int((~a & ~b).sum()), *points, mcnemar(only_first, only_second)]


def make_comparison(standings: Sequence[Standing]) -> str:
    """Make the page."""
    groups = collect_pairs(standings)
    if not groups:
        return make_document("Compare two models", tag("p", "No two models have the same images and threat."), depth=0)
    chosen = [("Images and threat", "group"), ("Model A", "first"), ("Model B", "second")]
    form = tag("div", *[_choose(label, name) for label, name in chosen], class_="filters", id="choice", hidden=True)
    return make_document(
        "Compare two models",
        tag("p", _READ),
        tag("noscript", tag("p", "This page needs JavaScript to show a pair.")),
        form,
        tag("div", id="pair", aria_live="polite"),
        depth=0,
        data=groups,
    )


def _choose(label: str, name: str) -> Html:
    return tag("span", tag("label", label, for_=f"choose-{name}"), tag("select", id=f"choose-{name}"))
