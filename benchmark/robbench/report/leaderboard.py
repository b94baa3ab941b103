"""leaderboard.md, a pure function of a results tree: the same results give the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from robbench.core.stats import mcnemar
from robbench.masking.record import VerdictIndex
from robbench.report.escape import markdown_text
from robbench.results.schema import Accuracy, ResultFile
from robbench.results.store import load_results, read_rows, result_folder
from robbench.results.summary import robust_samples

__all__ = ["group_title", "leaderboard", "overestimation", "ranked", "shown_points", "table"]

_LEVEL = 0.05  # of the paired test
_INTRO = """\
# Leaderboard

Generated from `results/` by `robbench leaderboard`; do not edit. Accuracies are percentages of the n test images
with 95 % Wilson intervals. **Worst case** counts an image as robust only if no attack of the suite broke it, and
ranks the table. Models that the same images do not tell from the best of their rank are tied (marked =): McNemar's
exact paired test on the per-image records gives p of 5 % or more, not corrected for the number of models. Results on
different images are tied when their intervals overlap. **Overestimation** is the first column of PGD on cross-entropy
with a single start, the usual evaluation, minus the worst case, in points. **Verdict** is that of `robbench sanity` on
the same weights, data and threat: trustworthy, suspicious, masked or randomized; unchecked without a run. A robust
accuracy is an upper bound: it says what these attacks could not do.
"""


def percent(accuracy: Accuracy) -> str:
    """Print an accuracy as a percentage with one decimal."""
    return f"{100 * accuracy.value:.1f}"


def with_interval(accuracy: Accuracy) -> str:
    """Print an accuracy with its interval."""
    return f"{percent(accuracy)} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"


def ranked(results: Sequence[ResultFile], root: Path | None = None) -> Iterator[tuple[str, ResultFile]]:
    """Order results by worst-case robust accuracy and give each its rank; what cannot be told apart shares one.

    A tie is taken against the best of the rank, so that a chain of small steps cannot join far ends.

    Args:
        results: of one group.
        root: the results tree, for the paired test on per-image records; without it, intervals are compared.
    """
    order = sorted(results, key=lambda r: (-r.robust_accuracy.value, -r.clean_accuracy.value, r.model))
    ranks: list[int] = []
    for i, result in enumerate(order):
        tied = bool(ranks) and _tied(order[ranks[-1] - 1], result, root)
        ranks.append(ranks[-1] if tied else i + 1)
    for rank, result in zip(ranks, order, strict=True):
        yield f"{rank}{'=' if ranks.count(rank) > 1 else ''}", result


def _tied(better: ResultFile, worse: ResultFile, root: Path | None) -> bool:
    """Compare two results: by McNemar's exact test on the same images, else by whether their intervals overlap."""
    same_data = better.identity.get("data") == worse.identity.get("data")  # else equal indices may be other images
    if root is not None and same_data:
        first, second = _robust(better, root), _robust(worse, root)
        if first is not None and second is not None and set(first.index) == set(second.index):
            second = second.reindex(first.index)
            return mcnemar(int((first & ~second).sum()), int((second & ~first).sum())) >= _LEVEL
    return worse.robust_accuracy.high >= better.robust_accuracy.low


def _robust(result: ResultFile, root: Path) -> pd.Series[bool] | None:
    """Read which images withstood every attack; None unless the records are those of just this result's images."""
    path = result_folder(root, result) / "outcomes.parquet"
    if not path.exists():
        return None
    robust = robust_samples(read_rows(path))
    return robust if len(robust) == result.n else None


def overestimation(result: ResultFile) -> float | None:
    """Return by how many points PGD on cross-entropy from a single start overestimates the worst case.

    None where the suite has no such attack, or gave it only what earlier attacks had left.
    """
    for i, attack in enumerate(result.attacks):
        config = attack.config
        if (config.get("kind"), config.get("objective"), config.get("restarts")) == ("pgd", "ce", 1):
            alone = result.mode == "full" or i == 0
            return 100 * (attack.robust_accuracy.value - result.robust_accuracy.value) if alone else None
    return None


def shown_points(points: float | None) -> str:
    """Print points, or a dash where there are none; never −0.0."""
    return "–" if points is None else f"{round(points, 1) + 0.0:.1f}"


def table(results: list[ResultFile], root: Path | None = None, verdicts: VerdictIndex | None = None) -> pd.DataFrame:
    """Lay out one group: a row per model; with `root`, the model's name links to its result."""
    verdicts = verdicts or VerdictIndex(root)
    attacks = list(dict.fromkeys(a.name for r in results for a in r.attacks))
    rows = []
    for rank, r in ranked(results, root):
        figures = {a.name: percent(a.robust_accuracy) for a in r.attacks}
        name = markdown_text(r.model)
        if root is not None:
            name = f"[{name}]({quote(str(result_folder(Path(root.name), r) / 'result.json'), safe='/@')})"
        rows.append(
            {
                "Rank": rank,
                "Model": name,
                "Clean": with_interval(r.clean_accuracy),
                **{markdown_text(a): figures.get(a, "–") for a in attacks},
                "Worst case": with_interval(r.robust_accuracy),
                "Overestimation": shown_points(overestimation(r)),
                "Verdict": verdicts.find(r),
                "Fwd + bwd per image": f"{(r.forwards + r.backwards) / r.n:.0f}",
                "n": str(r.n),
                "Flags": markdown_text(", ".join(r.flags)) or "none",
                "Date": r.date[:10],
            }
        )
    return pd.DataFrame(rows)


def group_title(result: ResultFile) -> str:
    """Describe what results must share to be ranked against each other."""
    changed = ", ".join(f"{k} {v}" for k, v in sorted(result.overrides.items()) if k not in ("eps", "norm"))
    threat = f"{result.threat.norm} {result.threat.eps}"
    return f"{result.dataset}, {threat}, suite {result.suite}" + (f" ({changed})" if changed else "")


def leaderboard(root: Path) -> str:
    """Write the leaderboard of a results tree as markdown.

    Raises:
        ResultError: a result.json is damaged.
    """
    parts = [_INTRO]
    verdicts = VerdictIndex(root)
    results = sorted(load_results(root), key=lambda r: (group_title(r), bool(r.overrides), r.model))
    if not results:
        parts.append(f"No results in `{root.name}/` yet. Make one: `robbench eval --model digits/natural`.\n")
    for title, members in groupby(results, key=group_title):
        group = list(members)
        text = table(group, root, verdicts).to_markdown(index=False, disable_numparse=True)
        parts.append(f"## {markdown_text(title)}\n\n{text}\n" + _footnotes(group))
    return "\n".join(parts)


def _footnotes(group: list[ResultFile]) -> str:
    said = [f"{r.model}, {name}: {text}" for r in group for name, text in sorted(r.flags.items())]
    lines = [f"- {markdown_text(line)}" for line in said]
    return "\n" + "\n".join(lines) + "\n" if lines else ""
