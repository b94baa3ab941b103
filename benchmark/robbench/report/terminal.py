"""The tables of results on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from robbench.certify.interval import CertificateIndex, find_contradictions
from robbench.masking.stored import VerdictIndex
from robbench.report.console import make_console
from robbench.report.leaderboard import (
    compute_overestimation,
    format_percent,
    format_points,
    format_with_interval,
    group_results,
    rank_results,
)
from robbench.report.progress import format_duration
from robbench.results.schema import ResultFile

__all__ = ["print_results"]


def print_results(results: Sequence[ResultFile], root: Path) -> None:
    """Print results as tables, one for each group of comparable results.

    The column Time is what a person waited for the last computation, or the time of all attacks if that is longer. The
    column Over is `leaderboard.compute_overestimation`. The column Verdict comes from `robbench sanity`.

    Args:
        results: the results.
        root: the results tree that holds their records.
    """
    console = make_console()
    verdicts, certificates = VerdictIndex(root), CertificateIndex(root)
    for title, group in group_results(results):
        attacks = list(dict.fromkeys(a.name for r in group for a in r.attacks))
        view = Table(title=f"{title}: robust accuracy, %", title_justify="left", pad_edge=False)
        intervals = {r.run_id: found.format(r.n) for r in group if (found := certificates.find(r)) is not None}
        certified = ["[certified, attacked]"] if intervals else []
        for column in (
            "Rank", "Model", "Clean", *attacks, "Worst case [95 %]", *certified, "Over", "Verdict", "n", "Time"
        ):  # fmt: skip
            is_text = column in ("Rank", "Model", "Verdict")
            width = 11 if column == "Verdict" else None
            view.add_column(column, justify="left" if is_text else "right", min_width=width)
        for rank, r in rank_results(group, root):
            accuracies = {a.name: format_percent(a.robust_accuracy) for a in r.attacks}
            view.add_row(
                rank,
                r.model,
                format_percent(r.clean_accuracy),
                *[accuracies.get(a, "–") for a in attacks],
                format_with_interval(r.robust_accuracy),
                *[intervals.get(r.run_id, "–") for _ in certified],
                format_points(compute_overestimation(r)),
                verdicts.find(r),
                str(r.n),
                format_duration(max(r.seconds, r.wall_seconds or 0.0)),
            )
        console.print(view)
        for name in {f"{r.dataset}/{r.model}": None for r in group if intervals}:
            for error in find_contradictions(root, name):
                console.print(Text(error, "bold red"), soft_wrap=True)
        for r in group:
            for name, text in r.flags.items():
                console.print(Text.assemble((f"{r.model}: {name}:", "yellow"), " ", text), soft_wrap=True)
