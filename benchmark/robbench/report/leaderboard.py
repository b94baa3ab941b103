"""Ranks results and puts them into tables. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import pandas as pd

from robbench.certify.interval import CertificateIndex
from robbench.core.files import digest
from robbench.core.stats import mcnemar
from robbench.masking.stored import VerdictIndex
from robbench.report.escape import Markdown, escape_markdown
from robbench.results.places import drop_repeats, locate_result
from robbench.results.reader import Damage, read_vouched_robust
from robbench.results.schema import Accuracy, ResultFile

__all__ = [
    "NO_IMAGE_LEFT",
    "Score",
    "build_group_table",
    "compute_overestimation",
    "format_attacks",
    "format_damage",
    "format_group_title",
    "format_points",
    "group_by_images",
    "group_results",
    "is_about_every_break",
    "link_result",
    "rank_results",
    "rank_scores",
]

_T = TypeVar("_T")
NO_IMAGE_LEFT = "no image left"
"""Stands for the robust accuracy under an attack that was given no image, because earlier attacks broke all."""
_LEVEL = 0.05  # significance level of the paired test


def format_percent(accuracy: Accuracy) -> str:
    """Format an accuracy as a percentage with one decimal."""
    return f"{100 * accuracy.value:.1f}"


def format_with_interval(accuracy: Accuracy) -> str:
    """Format an accuracy and its 95 % interval as percentages."""
    return f"{format_percent(accuracy)} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"


@dataclass(frozen=True)
class Score:
    """What a rank follows from.

    Attributes:
        model: name of the model.
        clean: accuracy without an attack.
        worst: worst-case robust accuracy.
        at_chance: whether the clean accuracy is that of guessing.
        data: digest of the images.
        robust: per image, whether no attack breaks it; indexed by sample. None if the records are missing.
    """

    model: str
    clean: Accuracy
    worst: Accuracy
    at_chance: bool
    data: object
    robust: pd.Series[bool] | None


def rank_results(results: Sequence[ResultFile], root: Path | None = None) -> Iterator[tuple[str, ResultFile]]:
    """Rank results as `rank_scores` does.

    Args:
        results: results of one group.
        root: the results tree, for the paired test on per-image records; None compares intervals.
    """
    return rank_scores([(r, _score(r, root)) for r in results])


def rank_scores(scored: Iterable[tuple[_T, Score]]) -> Iterator[tuple[str, _T]]:
    """Sort items by worst-case robust accuracy and yield each with its rank. Ties share a rank.

    An item at chance comes last and has no rank: a dash.

    An item is tied if it does not differ significantly from the best item of the rank. It is not compared with the
    item before it, because then many small differences could add up within one rank.
    """
    order = sorted(scored, key=lambda pair: (-pair[1].worst.value, -pair[1].clean.value, pair[1].model))
    at_chance = [item for item, score in order if score.at_chance]
    order = [pair for pair in order if not pair[1].at_chance]
    ranks: list[int] = []
    for i, (_, score) in enumerate(order):
        tied = bool(ranks) and _is_tied(order[ranks[-1] - 1][1], score)
        ranks.append(ranks[-1] if tied else i + 1)
    for rank, (item, _) in zip(ranks, order, strict=True):
        yield f"{rank}{'=' if ranks.count(rank) > 1 else ''}", item
    yield from (("–", item) for item in at_chance)


def _is_tied(better: Score, worse: Score) -> bool:
    """Return whether two scores do not differ significantly.

    The test is McNemar's exact test on the images that both have. If one has others too, the intervals must overlap
    as well: few common images tell little.
    """
    first, second = better.robust, worse.robust
    if better.data == worse.data and first is not None and second is not None:  # equal indices mean equal images
        common = first.index.intersection(second.index)
        a, b = first[common], second[common]
        only_better, only_worse = int((a & ~b).sum()), int((b & ~a).sum())
        if only_better > only_worse and mcnemar(only_better, only_worse) < _LEVEL:
            return False
        if len(common) == len(first) == len(second):
            return True
    return worse.worst.high >= better.worst.low


def _score(result: ResultFile, root: Path | None) -> Score:
    return Score(
        model=result.model,
        clean=result.clean_accuracy,
        worst=result.robust_accuracy,
        at_chance="chance" in result.flags,
        data=result.identity.get("data"),
        robust=None if root is None else _read_robust(result, root),
    )


def _read_robust(result: ResultFile, root: Path) -> pd.Series[bool] | None:
    """Read which images no attack broke. Return None if the records are missing or hold more images than the result."""
    folder = locate_result(root, result)
    if not (folder / "outcomes.parquet").exists():
        return None
    robust = read_vouched_robust(folder)
    return robust if len(robust) == result.n else None


def is_about_every_break(result: ResultFile) -> bool:
    """Return whether every wrong class and every value of a pixel counted as a break.

    With a target or levels, an image that breaks otherwise counts as robust. That is another question.
    """
    return result.identity.keys().isdisjoint({"target", "levels"})


def compute_overestimation(result: ResultFile) -> float | None:
    """Return by how many points PGD on cross-entropy from a single start overestimates the worst case.

    In a challenge (the suite `sanity`), that is the first attack. Its cross-entropy may be the rescaled one.

    Return None if the suite has no such attack, or the attack got only images that earlier attacks did not break.
    """
    for i, attack in enumerate(result.attacks):
        config = attack.config
        usual = (config.get("kind"), config.get("objective"), config.get("restarts")) == ("pgd", "ce", 1)
        if usual or result.mode == "challenge":
            alone = result.mode == "full" or i == 0
            return 100 * (attack.robust_accuracy.value - result.robust_accuracy.value) if alone else None
    return None


def format_points(points: float | None) -> str:
    """Print points, or a dash where there are none; never −0.0."""
    return "–" if points is None else f"{round(points, 1) + 0.0:.1f}"


def format_attacks(result: ResultFile) -> dict[str, str]:
    """Return the robust accuracy under each attack as a percentage: name -> text, `no image left` where none was given.

    In a cascade, an attack is given only the images that no earlier attack broke.
    """
    return {
        a.name: format_percent(a.robust_accuracy) if i == 0 or _is_given_images(result, i) else NO_IMAGE_LEFT
        for i, a in enumerate(result.attacks)
    }


def _is_given_images(result: ResultFile, position: int) -> bool:
    """Return whether an attack was given an image: in a cascade, whether one stood before it."""
    return result.mode != "cascade" or result.attacks[position - 1].robust_accuracy.value > 0


def build_group_table(
    results: list[ResultFile],
    root: Path | None = None,
    verdicts: VerdictIndex | None = None,
    certificates: CertificateIndex | None = None,
    folder: Path | None = None,
) -> list[dict[str, str]]:
    """Make the rows of the table of one group, one per model.

    Args:
        results: results of one group.
        root: the results tree; None compares intervals and knows no verdicts.
        verdicts: the verdicts of the tree.
        certificates: the certificates of the tree.
        folder: folder of the page with the table, where the model's name links to its result; None links nothing.
    """
    verdicts, certificates = verdicts or VerdictIndex(root), certificates or CertificateIndex(root)
    intervals = {r.run_id: found.format(r.n) for r in results if (found := certificates.find(r)) is not None}
    attacks = list(dict.fromkeys(a.name for r in results for a in r.attacks))
    rows = []
    for rank, r in rank_results(results, root):
        accuracies = format_attacks(r)
        name = _tell_apart(r, results)
        if root is not None and folder is not None:
            name = Markdown(f"[{escape_markdown(name)}]({link_result(root, r, folder)})")
        rows.append(
            {
                "Rank": rank,
                "Model": name,
                "Clean": format_with_interval(r.clean_accuracy),
                **{a: accuracies.get(a, "–") for a in attacks},
                "Worst case": format_with_interval(r.robust_accuracy),
                **({"[certified, attacked]": intervals.get(r.run_id, "–")} if intervals else {}),
                "Overestimation": format_points(compute_overestimation(r)),
                "Verdict": verdicts.describe(r),
                "Fwd + bwd per image": f"{(r.forwards + r.backwards) / r.n:.0f}",
                "n": str(r.n),
                "Flags": ", ".join(r.flags) or "none",
                "Date": r.date[:10],
            }
        )
    return rows


def _tell_apart(result: ResultFile, results: Sequence[ResultFile]) -> str:
    """Name a result of a group: by its model and, if the model has several there, by its weights or its run."""
    weights = [r.identity.get("weights") for r in results if r.model == result.model]
    if len(weights) == 1:
        return result.model
    own = result.identity.get("weights")
    return f"{result.model}, " + (f"weights {str(own)[:8]}" if weights.count(own) == 1 else f"run {result.run_id[:8]}")


def link_result(root: Path, result: ResultFile, folder: Path) -> str:
    """Return the address of a result.json, relative to the folder of a page."""
    return quote(Path(os.path.relpath(locate_result(root, result) / "result.json", folder)).as_posix(), safe="/@")


def format_group_title(result: ResultFile) -> str:
    """Format the title of a group: data set, threat, suite and overrides. Results are ranked within a group."""
    changed = ", ".join(f"{k} {v}" for k, v in sorted(result.overrides.items()) if k not in ("eps", "norm"))
    threat = f"{result.threat.norm} {result.threat.eps}"
    return f"{result.dataset}, {threat}, suite {result.suite}" + (f" ({changed})" if changed else "")


def group_results(results: Iterable[ResultFile]) -> list[tuple[str, list[ResultFile]]]:
    """Group results that may be ranked against each other: one title, the same images, and the same attacks.

    Where one title has several sets of images or of attacks, the title ends with the first digits of their digest.
    """
    groups = []
    named = ((format_group_title(r), r.identity.get("data"), r) for r in drop_repeats(results))
    for title, members in group_by_images(named):
        by_attacks: dict[str, list[ResultFile]] = {}
        for r in members:
            by_attacks.setdefault(digest([r.identity.get(key) for key in ("suite", "attacks")]), []).append(r)
        apart = len(by_attacks) > 1
        groups += [(f"{title}, attacks {key[:8]}" if apart else title, found) for key, found in by_attacks.items()]
    return groups


def group_by_images(items: Iterable[tuple[str, object, _T]]) -> list[tuple[str, list[_T]]]:
    """Group items with one title and the same images.

    Args:
        items: title, digest of the images, and item.

    Returns:
        Titles and members, in the order of the items. Where one title has several sets of images ("custom"), the
        title ends with the first digits of the digest of the images.
    """
    groups: dict[str, dict[str, list[_T]]] = {}
    for title, data, item in items:
        groups.setdefault(title, {}).setdefault(str(data), []).append(item)
    return [
        (title if len(by_data) == 1 else f"{title}, images {data[:8]}", members)
        for title, by_data in groups.items()
        for data, members in by_data.items()
    ]


def format_damage(damaged: Sequence[Damage]) -> list[str]:
    """Return the section of a markdown page that lists damaged files; nothing if there are none."""
    lines = "".join(f"- {escape_markdown(str(d))}\n" for d in damaged)
    return [f"## Damaged\n\nNo number is taken from these files.\n\n{lines}"] if lines else []
