"""Writes leaderboard.md from a results tree. The same results give the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from robbench.certify.interval import CertificateIndex, find_contradictions
from robbench.core.stats import mcnemar
from robbench.masking.stored import VerdictIndex
from robbench.report.escape import Markdown, escape_markdown, make_markdown_table
from robbench.results.places import drop_repeats, locate_result
from robbench.results.reader import Damage, read_results, read_vouched_robust
from robbench.results.schema import Accuracy, ResultFile

__all__ = [
    "build_group_table",
    "compute_overestimation",
    "format_damage",
    "format_group_title",
    "format_points",
    "group_results",
    "rank_results",
    "render_leaderboard",
]

_LEVEL = 0.05  # significance level of the paired test
_INTRO = """\
# Leaderboard

Generated from `results/` by `robbench leaderboard`; do not edit. Accuracies are percentages of the n test images
with 95 % Wilson intervals. **Worst case** counts an image as robust only if no attack of the suite broke it. The tables
are ranked by it. A model is tied (marked =) with the best model of its rank if the difference is not significant on the
same images: McNemar's exact paired test on the per-image records gives p of 5 % or more, not corrected for the number
of models. Results on different images are tied if their intervals overlap. **Overestimation** is the accuracy under PGD
on cross-entropy with a single start, the usual evaluation, minus the worst case, in points. **Verdict** is that of
`robbench sanity` on the same weights, data and threat: trustworthy, suspicious, masked or randomized. It is unchecked
if `robbench sanity` has not run. A robust accuracy is an upper bound, because stronger attacks can lower it.
**[certified, attacked]** is the interval that holds the true robust accuracy, where `robbench certify` has proven
images against the same threat: the share that is proven, and the share that neither attack nor certifier broke.
"""


def format_percent(accuracy: Accuracy) -> str:
    """Format an accuracy as a percentage with one decimal."""
    return f"{100 * accuracy.value:.1f}"


def format_with_interval(accuracy: Accuracy) -> str:
    """Format an accuracy and its 95 % interval as percentages."""
    return f"{format_percent(accuracy)} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"


def rank_results(results: Sequence[ResultFile], root: Path | None = None) -> Iterator[tuple[str, ResultFile]]:
    """Sort results by worst-case robust accuracy and yield each with its rank. Ties share a rank.

    A result with the flag `chance` comes last and has no rank: a dash.

    A result is tied if it does not differ significantly from the best result of the rank. It is not compared with the
    result before it, because then many small differences could add up within one rank.

    Args:
        results: results of one group.
        root: the results tree, for the paired test on per-image records; None compares intervals.
    """
    order = sorted(results, key=lambda r: (-r.robust_accuracy.value, -r.clean_accuracy.value, r.model))
    at_chance = [r for r in order if "chance" in r.flags]
    order = [r for r in order if "chance" not in r.flags]
    ranks: list[int] = []
    for i, result in enumerate(order):
        tied = bool(ranks) and _is_tied(order[ranks[-1] - 1], result, root)
        ranks.append(ranks[-1] if tied else i + 1)
    for rank, result in zip(ranks, order, strict=True):
        yield f"{rank}{'=' if ranks.count(rank) > 1 else ''}", result
    yield from (("–", result) for result in at_chance)


def _is_tied(better: ResultFile, worse: ResultFile, root: Path | None) -> bool:
    """Return whether two results do not differ significantly.

    On the same images, the test is McNemar's exact test. On different images, overlapping intervals are a tie.
    """
    same_data = better.identity.get("data") == worse.identity.get("data")  # equal indices then mean equal images
    if root is not None and same_data:
        first, second = _read_robust(better, root), _read_robust(worse, root)
        if first is not None and second is not None and set(first.index) == set(second.index):
            second = second.reindex(first.index)
            return mcnemar(int((first & ~second).sum()), int((second & ~first).sum())) >= _LEVEL
    return worse.robust_accuracy.high >= better.robust_accuracy.low


def _read_robust(result: ResultFile, root: Path) -> pd.Series[bool] | None:
    """Read which images no attack broke. Return None if the records are missing or hold more images than the result."""
    folder = locate_result(root, result)
    if not (folder / "outcomes.parquet").exists():
        return None
    robust = read_vouched_robust(folder)
    return robust if len(robust) == result.n else None


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


def build_group_table(
    results: list[ResultFile],
    root: Path | None = None,
    verdicts: VerdictIndex | None = None,
    certificates: CertificateIndex | None = None,
) -> list[dict[str, str]]:
    """Make the rows of the table of one group, one per model. With `root`, the model's name links to its result."""
    verdicts, certificates = verdicts or VerdictIndex(root), certificates or CertificateIndex(root)
    intervals = {r.run_id: found.format(r.n) for r in results if (found := certificates.find(r)) is not None}
    attacks = list(dict.fromkeys(a.name for r in results for a in r.attacks))
    rows = []
    for rank, r in rank_results(results, root):
        accuracies = {a.name: format_percent(a.robust_accuracy) for a in r.attacks}
        name = r.model
        if root is not None:
            place = root.name / locate_result(root, r).relative_to(root) / "result.json"
            name = Markdown(f"[{escape_markdown(name)}]({quote(str(place), safe='/@')})")
        rows.append(
            {
                "Rank": rank,
                "Model": name,
                "Clean": format_with_interval(r.clean_accuracy),
                **{a: accuracies.get(a, "–") for a in attacks},
                "Worst case": format_with_interval(r.robust_accuracy),
                **({"[certified, attacked]": intervals.get(r.run_id, "–")} if intervals else {}),
                "Overestimation": format_points(compute_overestimation(r)),
                "Verdict": verdicts.find(r),
                "Fwd + bwd per image": f"{(r.forwards + r.backwards) / r.n:.0f}",
                "n": str(r.n),
                "Flags": ", ".join(r.flags) or "none",
                "Date": r.date[:10],
            }
        )
    return rows


def format_group_title(result: ResultFile) -> str:
    """Format the title of a group: data set, threat, suite and overrides. Results are ranked within a group."""
    changed = ", ".join(f"{k} {v}" for k, v in sorted(result.overrides.items()) if k not in ("eps", "norm"))
    threat = f"{result.threat.norm} {result.threat.eps}"
    return f"{result.dataset}, {threat}, suite {result.suite}" + (f" ({changed})" if changed else "")


def group_results(results: Iterable[ResultFile]) -> list[tuple[str, list[ResultFile]]]:
    """Group results that may be ranked against each other: one title, and the same images.

    Returns:
        Titles and members, in the order of the results. Where one title has several sets of images ("custom"), the
        title ends with the first digits of the digest of the images.
    """
    groups: dict[str, dict[str, list[ResultFile]]] = {}
    for r in drop_repeats(results):
        groups.setdefault(format_group_title(r), {}).setdefault(str(r.identity.get("data")), []).append(r)
    return [
        (title if len(by_data) == 1 else f"{title}, images {data[:8]}", members)
        for title, by_data in groups.items()
        for data, members in by_data.items()
    ]


def render_leaderboard(root: Path) -> str:
    """Return the leaderboard of a results tree as markdown.

    Damaged results and verdicts are listed at the end. They are in no table.
    """
    parts = [_INTRO]
    verdicts, certificates, stored = VerdictIndex(root), CertificateIndex(root), read_results(root)
    results = sorted(stored.results, key=lambda r: (format_group_title(r), bool(r.overrides), r.model))
    damaged = [*stored.damaged, *verdicts.list_damaged(), *certificates.list_damaged()]
    if wrong := find_contradictions(root):
        parts.append("## Errors of robbench\n\n" + "".join(f"- {escape_markdown(text)}\n" for text in wrong))
    if not results and not damaged:
        parts.append(f"No results in `{root.name}/` yet. Make one: `robbench eval --model digits/natural`.\n")
    for title, group in group_results(results):
        text = make_markdown_table(build_group_table(group, root, verdicts, certificates))
        parts.append(f"## {escape_markdown(title)}\n\n{text}\n" + _footnotes(group))
    return "\n".join([*parts, *format_damage(damaged)])


def format_damage(damaged: Sequence[Damage]) -> list[str]:
    """Return the section of a markdown page that lists damaged files; nothing if there are none."""
    lines = "".join(f"- {escape_markdown(str(d))}\n" for d in damaged)
    return [f"## Damaged\n\nNo number is taken from these files.\n\n{lines}"] if lines else []


def _footnotes(group: list[ResultFile]) -> str:
    flags = [f"{r.model}, {name}: {text}" for r in group for name, text in sorted(r.flags.items())]
    lines = [f"- {escape_markdown(flag)}" for flag in flags]
    return "\n" + "\n".join(lines) + "\n" if lines else ""
