"""The output of `robbench sanity` on a terminal. Imports no torch."""

from __future__ import annotations

from rich.text import Text

from robbench.masking.record import CheckResult, SanityFile
from robbench.report.console import make_console
from robbench.report.leaderboard import format_with_interval
from robbench.report.progress import format_duration
from robbench.report.tables import print_rows

__all__ = ["format_verdict", "print_sanity"]

_STATUS_STYLE = {"pass": "green", "warn": "yellow", "fail": "red", "not applicable": "dim"}
_VERDICT_STYLE = {
    "undecided": "yellow", "trustworthy": "green", "suspicious": "yellow", "masked": "red", "randomized": "red",
}  # fmt: skip


def format_verdict(file: SanityFile) -> str:
    """Format the verdict in one line, with the checks that gave it and both robust accuracies."""
    m = file.measurements
    by = f" by {', '.join(file.decided_by)}" if file.decided_by else ""
    return (
        f"{file.dataset}/{file.model}, {file.threat.norm} {file.threat.eps}: {file.verdict}{by}. "
        f"PGD alone leaves {format_with_interval(m.pgd)}, everything together {format_with_interval(m.best)} % of "
        f"{file.n} images."
    )


def print_sanity(file: SanityFile, every: bool = True) -> None:
    """Print the verdict, the checks, and the suite to run next.

    Args:
        file: the content of sanity.json.
        every: print all checks; False prints only checks that did not pass.
    """
    console = make_console()
    console.print(format_verdict(file), style=f"bold {_VERDICT_STYLE[file.verdict]}", soft_wrap=True)
    shown = [c for c in file.checks if every or c.status in ("warn", "fail")]
    if shown:
        print_rows(console, [_make_row(c) for c in shown], right=("Value",))
    if file.advice.suite:
        name = f"{file.dataset}/{file.model}"
        console.print(
            f"Next: --suite {file.advice.suite}. {file.advice.reason} The usual PGD overestimates by "
            f"{file.advice.gain:.1f} points already. `robbench sanity {name} --act` runs it.",
            soft_wrap=True,
        )
    if file.verdict == "undecided":
        console.print(file.advice.reason, soft_wrap=True)
    if file.acted is not None:
        accuracy = format_with_interval(file.acted.robust_accuracy)
        console.print(
            f"The lower of this run and suite {file.acted.suite}, on the same images: {accuracy} %.",
            soft_wrap=True,
        )
    passes = sum(c.pairs + c.forwards / 3 for c in file.measurements.cost.values()) / file.n
    console.print(
        f"{passes:.0f} forward-backward pairs an image (three forward passes count as one), "
        f"{format_duration(file.seconds)}."
    )


def _make_row(c: CheckResult) -> dict[str, str | Text]:
    status = c.status + (f" → {c.decides}" if c.decides else "")
    return {
        "Check": c.name,
        "Value": "–" if c.value is None else f"{c.value:.3g}",
        "Passes": c.threshold,
        "Status": Text(status, _STATUS_STYLE[c.status]),
        "What was seen": c.reason,
    }
