"""What `robbench sanity` shows in a terminal. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from robbench.masking.record import CheckResult, SanityFile
from robbench.report.leaderboard import with_interval
from robbench.report.terminal import duration

__all__ = ["print_sanity", "verdict_line"]

_STYLE = {"pass": "green", "warn": "yellow", "fail": "red", "not applicable": "dim"}
_VERDICT = {"trustworthy": "green", "suspicious": "yellow", "masked": "red", "randomized": "red"}


def verdict_line(found: SanityFile) -> str:
    """Say the verdict in one line: what decided it, and the two numbers it is about."""
    m = found.measurements
    said = f"PGD alone leaves {with_interval(m.pgd)}, everything together {with_interval(m.best)} % of {found.n} images"
    by = f" by {', '.join(found.decided_by)}" if found.decided_by else ""
    return f"{found.dataset}/{found.model}, {found.threat.norm} {found.threat.eps}: {found.verdict}{by}. {said}."


def print_sanity(found: SanityFile, every: bool = True) -> None:
    """Print the verdict, the checks (or those alone that did not pass), and what to do next."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200, file=sys.stdout)
    style = _VERDICT[found.verdict]
    console.print(f"[bold {style}]{escape(verdict_line(found))}[/]", soft_wrap=True)
    shown = [c for c in found.checks if every or c.status in ("warn", "fail")]
    if shown:
        console.print(_table(shown))
    if found.advice.suite:
        name = f"{found.dataset}/{found.model}"
        console.print(
            f"Next: --suite {found.advice.suite}. {escape(found.advice.reason)} The usual PGD overestimates by "
            f"{found.advice.gain:.1f} points already. `robbench sanity {escape(name)} --act` runs it.",
            soft_wrap=True,
        )
    if found.acted is not None:
        accuracy = with_interval(found.acted.robust_accuracy)
        console.print(f"Suite {escape(found.acted.suite)}, on the same images: {accuracy} %.", soft_wrap=True)
    passes = sum(c.pairs + c.forwards / 3 for c in found.measurements.cost.values()) / found.n
    console.print(
        f"{passes:.0f} forward-backward pairs an image (three forward passes count as one), {duration(found.seconds)}."
    )


def _table(checks: Sequence[CheckResult]) -> Table:
    view = Table(pad_edge=False)
    for column in ("Check", "Value", "Passes", "Status", "What was seen"):
        view.add_column(column, justify="right" if column == "Value" else "left", overflow="fold")
    for c in checks:
        status = c.status + (f" → {c.decides}" if c.decides else "")
        value = "–" if c.value is None else f"{c.value:.3g}"
        view.add_row(c.name, value, c.threshold, f"[{_STYLE[c.status]}]{status}[/]", escape(c.reason))
    return view
