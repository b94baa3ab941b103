"""The progress of runs: bars on a terminal, lines elsewhere. Written to stderr."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from robbench.report.console import TerminalConsole

__all__ = ["TerminalReporter", "TerminalView", "format_duration"]


def format_duration(seconds: float) -> str:
    """Format a time span, such as 45 s, 12 min or 1.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class TerminalReporter:
    """Draws a bar per attack on a terminal, and prints a line per attack elsewhere. It writes to stderr."""

    def __init__(self, hint_samples: bool) -> None:
        self.console = TerminalConsole(stderr=True)
        self.live = self.console.is_terminal
        self.hint_samples = hint_samples  # whether to suggest --samples for long runs
        self.progress_bar: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.counts: dict[str, list[int]] = {}
        self.clean = self.n = 0
        self.begin = time.monotonic()

    def plan(self, title: str, stages: Sequence[str], n: int, clean: int, seconds: float, device: str) -> None:
        """Print the size of the run, an upper bound on its time, and how to make it shorter."""
        self.close()
        self.clean, self.n, self.counts, self.tasks = clean, n, {}, {}
        text = f"{title}: {n} images, {clean} classified correctly ({100 * clean / n:.1f} %), {len(stages)} attacks"
        if seconds:
            text += f", at most {format_duration(seconds)} on {device} (less where images break early)"
        self.console.print(text, style="bold", soft_wrap=True)
        if seconds > 600 and device == "cpu" and self.hint_samples:
            self.console.print(f"  A shorter run: --samples {max(64, int(n * 300 / seconds) // 64 * 64)}")

    def stage(self, name: str, todo: int, done: int) -> None:
        """Start the bar of an attack."""
        self._end_line()
        self.counts[name] = [0, 0, todo]
        self.begin = time.monotonic()
        if self.live:
            if self.progress_bar is None:
                self.progress_bar = Progress(
                    TextColumn("  {task.description:<14}", markup=False),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[robust]}"),
                    TimeRemainingColumn(compact=True),
                    console=self.console,
                )
                self.progress_bar.start()
            self.tasks[name] = self.progress_bar.add_task(name, total=todo, robust="")
        elif done:
            self.console.print(f"  {name}: {done} known from an earlier run, {todo} to attack")

    def progress(self, name: str, finished: int, broken: int) -> None:
        """Update the bar."""
        count = self.counts[name]
        count[0] += finished
        count[1] += broken
        if self.progress_bar is not None:
            # Broken images finish first. The share is therefore of all images, not of the finished ones.
            robust = f"{100 * (1 - count[1] / max(count[2], 1)):5.1f} % not broken"
            self.progress_bar.update(self.tasks[name], advance=finished, robust=robust)

    def note(self, text: str) -> None:
        """Print a warning."""
        self.console.note(text)

    def _end_line(self) -> None:
        """Print a line for the attack that ended, if there is no terminal."""
        if self.live or not self.counts:
            return
        name = list(self.counts)[-1]
        finished, broken, todo = self.counts[name]
        if todo:
            spent = format_duration(time.monotonic() - self.begin)
            self.console.print(f"  {name}: {finished - broken} of {finished} robust, {spent}")
        self.counts = {}

    def close(self) -> None:
        """Stop and remove the bars."""
        self._end_line()
        if self.progress_bar is not None:
            self.progress_bar.stop()
            self.progress_bar = None


class TerminalView:
    """Draws one bar for all records of many runs on a terminal; elsewhere it prints a line per run. Uses stderr."""

    def __init__(self) -> None:
        self.console = TerminalConsole(stderr=True)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.counts: dict[str, tuple[int, int]] = {}

    def progress(self, title: str, done: int, total: int) -> None:
        """Update the bar."""
        ended = done == total and self.counts.get(title) != (done, total)
        self.counts[title] = (done, total)
        if self.console.is_terminal:
            if self.bar is None:
                columns = (BarColumn(), MofNCompleteColumn(), TextColumn("records"), TimeRemainingColumn(compact=True))
                self.bar = Progress(TextColumn("  {task.description}"), *columns, console=self.console)
                self.bar.start()
                self.task = self.bar.add_task("")
            sums = [sum(counts) for counts in zip(*self.counts.values(), strict=True)]
            self.bar.update(self.task, completed=sums[0], total=sums[1])
        elif ended:
            self.console.print(f"  {title}: {total} records", soft_wrap=True)

    def update(self, finished: int, asked: int) -> None:
        """Show how many runs are finished."""
        if self.bar is not None:
            self.bar.update(self.task, description=f"{finished} of {asked} runs")

    def note(self, text: str) -> None:
        """Print a warning."""
        self.console.note(text)

    def close(self) -> None:
        """Stop and remove the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
