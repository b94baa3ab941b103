"""leaderboard.md, a pure function of a results tree: the same results give the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pandas as pd

from robbench.store import Accuracy, ResultFile, load_results

__all__ = ["group_title", "leaderboard", "ranked", "table"]

_INTRO = """\
# Leaderboard

Generated from `results/` by `robbench leaderboard`; do not edit. Accuracies are percentages of the n test images
with 95 % Wilson intervals. **Worst case** counts an image as robust only if no attack of the suite broke it, and
ranks the table. Models whose worst-case intervals overlap with that of the best of their rank are tied (marked =):
these numbers do not tell them apart. A robust accuracy is an upper bound: it says what these attacks could not do.
"""


def percent(accuracy: Accuracy) -> str:
    """Print an accuracy as a percentage with one decimal."""
    return f"{100 * accuracy.value:.1f}"


def with_interval(accuracy: Accuracy) -> str:
    """Print an accuracy with its interval."""
    return f"{percent(accuracy)} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"


def ranked(results: list[ResultFile]) -> Iterator[tuple[str, ResultFile]]:
    """Order results by worst-case robust accuracy and give each its rank; overlapping intervals share one.

    A tie is taken against the best of the rank, so that a chain of small steps cannot join far ends.
    """
    order = sorted(results, key=lambda r: (-r.robust_accuracy.value, -r.clean_accuracy.value, r.model))
    ranks: list[int] = []
    for i, result in enumerate(order):
        best = order[ranks[-1] - 1] if ranks else result
        tied = bool(ranks) and result.robust_accuracy.high >= best.robust_accuracy.low
        ranks.append(ranks[-1] if tied else i + 1)
    for rank, result in zip(ranks, order, strict=True):
        yield f"{rank}{'=' if ranks.count(rank) > 1 else ''}", result


def table(results: list[ResultFile], root: Path | None = None) -> pd.DataFrame:
    """Lay out one group: a row per model; with `root`, the model's name links to its result."""
    attacks = list(dict.fromkeys(a.name for r in results for a in r.attacks))
    rows = []
    for rank, r in ranked(results):
        figures = {a.name: percent(a.robust_accuracy) for a in r.attacks}
        name = r.model if root is None else f"[{r.model}]({root.name}/{r.dataset}/{r.model}/{folder(r)}/result.json)"
        rows.append(
            {
                "Rank": rank,
                "Model": name,
                "Clean": with_interval(r.clean_accuracy),
                **{a: figures.get(a, "–") for a in attacks},
                "Worst case": with_interval(r.robust_accuracy),
                "Fwd + bwd per image": f"{(r.forwards + r.backwards) / r.n:.0f}",
                "n": str(r.n),
                "Flags": ", ".join(r.flags) or "none",
                "Date": r.date[:10],
            }
        )
    return pd.DataFrame(rows)


def folder(result: ResultFile) -> str:
    """Name of the folder that holds a result, below its model."""
    return result.suite if not result.overrides else f"{result.suite}@{result.run_id[:8]}"


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
    results = sorted(load_results(root), key=lambda r: (group_title(r), bool(r.overrides), r.model))
    if not results:
        parts.append(f"No results in `{root.name}/` yet. Make one: `robbench eval --model digits/natural`.\n")
    for title, members in groupby(results, key=group_title):
        group = list(members)
        text = table(group, root).to_markdown(index=False, disable_numparse=True)
        parts.append(f"## {title}\n\n{text}\n" + _footnotes(group))
    return "\n".join(parts)


def _footnotes(group: list[ResultFile]) -> str:
    lines = [f"- {r.model}, {name}: {text}" for r in group for name, text in sorted(r.flags.items())]
    return "\n" + "\n".join(lines) + "\n" if lines else ""
