"""The tables of results on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from robbench.certify.interval import CertificateIndex, find_contradictions
from robbench.core.numbers import parse_threat
from robbench.core.words import format_goal
from robbench.masking.stored import VerdictIndex
from robbench.report.console import TerminalConsole, leave_out_python, make_console
from robbench.report.distance import print_distances, read_distances
from robbench.report.leaderboard import (
    compute_overestimation,
    format_attacks,
    format_percent,
    format_points,
    format_with_interval,
    group_results,
    rank_results,
)
from robbench.report.progress import format_duration
from robbench.report.tables import fits, name_columns, print_rows, print_turned
from robbench.results.schema import ResultFile

__all__ = ["describe_surrogate", "print_results", "summarize_result"]


_FIRST = ("Model", "Clean", "Worst case [95 %]", "Verdict")
_WORDS = ("Rank", "Model", "Verdict")
_COLUMNS = (*_FIRST, "Rank", "Over", "n", "Time")


_ABOUT_OVER = "Over: points by which the usual attack (PGD on cross-entropy, one start) overstates the worst case."


def print_results(results: Sequence[ResultFile], root: Path) -> None:
    """Print results as tables, one for each group of comparable results, and a sentence for each model.

    A result of distances has a table of its own.

    A table that is wider than the terminal is turned: a line for each attack, below what matters most. The column Time
    is what a person waited for the last computation, or the time of all attacks if that is longer. The column Over is
    `leaderboard.compute_overestimation`. The column Verdict is `VerdictIndex.describe`.

    Args:
        results: the results.
        root: the results tree that holds their records.
    """
    console = make_console()
    verdicts, certificates = VerdictIndex(root), CertificateIndex(root)
    for r in results:
        if not r.has_radius:
            print_distances(console, r, read_distances(root, r))
            _print_flags(console, r)
    for group_title, group in group_results(r for r in results if r.has_radius):
        title = f"{group_title}: robust accuracy, %"
        attacks = name_columns(dict.fromkeys(a.name for r in group for a in r.attacks), _COLUMNS)
        ranked = list(rank_results(group, root))
        intervals = {r.run_id: found.format(r.n) for r in group if (found := certificates.find(r)) is not None}
        rows = [_make_row(rank, r, attacks, verdicts, intervals) for rank, r in ranked]
        numbers = [column for column in rows[0] if column not in _WORDS]
        if fits(console, rows, numbers):
            print_rows(console, rows, title=title, right=numbers)
        else:
            turned = [{column: row[column] for column in (*_FIRST, *attacks.values())} | row for row in rows]
            print_turned(console, turned, title=title, first=len(_FIRST) - 1)
        for name in {f"{r.dataset}/{r.model}": None for r in group if intervals}:
            for error in find_contradictions(root, name):
                console.print(Text(error, "bold red"), soft_wrap=True)
        for r in group:
            _print_flags(console, r)
        for _, r in ranked:
            console.print(summarize_result(r, verdicts.describe(r)), soft_wrap=True)
        if any(compute_overestimation(r) is not None for r in group):
            console.print(_ABOUT_OVER, style="dim", soft_wrap=True)


def _print_flags(console: TerminalConsole, r: ResultFile) -> None:
    for name, text in r.flags.items():
        flag = (f"{r.model}: {name}:", "yellow")
        console.print(Text.assemble(flag, " ", leave_out_python(text)), soft_wrap=True)
    if told := describe_surrogate(r):
        console.print(told, soft_wrap=True)


def describe_surrogate(r: ResultFile) -> str:
    """Say which surrogate of the user's the transfer attacks took; empty where there is none.

    The names of these attacks, such as BB-natural, name the surrogates of the suite.
    """
    names = [a.name for a in r.attacks if a.config.get("kind") == "transfer"]
    if "surrogate" not in r.overrides or not names:
        return ""
    verb = "takes its points" if len(names) == 1 else "take their points"
    return f"{r.model}: {', '.join(names)} {verb} from the surrogate {r.overrides['surrogate']} (--surrogate)."


def summarize_result(r: ResultFile, verdict: str) -> str:
    """Say a result in one sentence, such as `at: 96.8 % clean, 50.6 % [47.3, 53.9] robust at Linf 0.2, …`."""
    threat = parse_threat(r.threat.norm, r.threat.eps)
    low, high = 100 * r.robust_accuracy.low, 100 * r.robust_accuracy.high
    text = (
        f"{r.model}: {format_percent(r.clean_accuracy)} % clean, {format_percent(r.robust_accuracy)} % "
        f"[{low:.1f}, {high:.1f}] robust at {threat}{format_goal(r.identity)}, {verdict}"
    )
    if r.mode == "full" and len(r.attacks) > 1:  # elsewhere, later attacks got fewer images
        text += f", {_name_strongest(r)}"
    return f"{text}, {_format_time(r)}"


def _name_strongest(r: ResultFile) -> str:
    """Name the attack that left the fewest images robust, or all of them where several left equally few."""
    least = min(a.robust_accuracy.value for a in r.attacks)
    names = [a.name for a in r.attacks if a.robust_accuracy.value == least]
    if len(names) == len(r.attacks) and least == r.clean_accuracy.value:
        return "no attack broke an image"
    return f"strongest attack{'s (tied)' if len(names) > 1 else ''} {', '.join(names)}"


def _make_row(
    rank: str, r: ResultFile, attacks: dict[str, str], verdicts: VerdictIndex, intervals: dict[str, str]
) -> dict[str, str]:
    accuracies = format_attacks(r)
    return {
        "Rank": rank,
        "Model": r.model,
        "Clean": format_percent(r.clean_accuracy),
        **{column: accuracies.get(a, "–") for a, column in attacks.items()},
        "Worst case [95 %]": format_with_interval(r.robust_accuracy),
        **({"[certified, attacked]": intervals.get(r.run_id, "–")} if intervals else {}),
        "Over": format_points(compute_overestimation(r)),
        "Verdict": verdicts.describe(r),
        "n": str(r.n),
        "Time": _format_time(r),
    }


def _format_time(r: ResultFile) -> str:
    return format_duration(max(r.seconds, r.wall_seconds or 0.0))
