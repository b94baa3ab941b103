"""The progress of runs: bars on a terminal, lines elsewhere. Written to stderr."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from robbench.core.words import format_count
from robbench.report.console import TerminalConsole

__all__ = ["TerminalReporter", "TerminalView", "format_duration"]


def format_duration(seconds: float) -> str:
    """Format a time span, such as 45 s, 12 min or 1.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass
class _Stage:
    """What is known of an attack that runs.

    Attributes:
        name: its name.
        todo: number of images to attack.
        known: number of images that an earlier run recorded.
        standing: number of images that count as robust under it, of all images of the run.
        finished: number of images that are attacked.
        task: its bar, if there is one.
        begin: when it started.
    """

    name: str
    todo: int
    known: int
    standing: int
    finished: int = 0
    task: TaskID | None = None
    begin: float = field(default_factory=time.monotonic)


class TerminalReporter:
    """Draws a bar per attack on a terminal, and prints a line per attack elsewhere. It writes to stderr.

    Shares are of all images of the run, as in the table of results.
    """

    def __init__(self, hint_samples: bool) -> None:
        self.console = TerminalConsole(stderr=True)
        self.live = self.console.is_terminal
        self.is_seen = self.live or self.console.is_jupyter  # whether a person looks on
        self.hint_samples = hint_samples  # whether to suggest --samples for long runs
        self.progress_bar: Progress | None = None
        self.running: _Stage | None = None
        self.n = 1

    def plan(self, title: str, stages: Sequence[str], n: int, clean: int, seconds: float, device: str) -> None:
        """Print the size of the run, an upper bound on its time, and how to make it shorter."""
        self.close()
        self.n = n
        text = f"{title}: {format_count(n, 'image')}, {clean} classified correctly ({100 * clean / n:.1f} %), "
        text += format_count(len(stages), "attack")
        if seconds:
            text += f", about {format_duration(max(1.0, seconds))} on a quiet {device} (less where images break early)"
        self.console.print(text, style="bold", soft_wrap=True)
        if seconds > 600 and device == "cpu" and self.hint_samples:
            self.console.print(f"  A shorter run: --samples {max(64, int(n * 300 / seconds) // 64 * 64)}")

    def stage(self, name: str, todo: int, done: int, standing: int) -> None:
        """Start the bar of an attack."""
        self._end_line()
        self.running = stage = _Stage(name, todo, done, standing)
        if not self.live:
            return
        if self.progress_bar is None:
            self.progress_bar = Progress(
                TextColumn("  {task.description:<14}", markup=False),
                BarColumn(bar_width=max(8, min(40, self.console.width - 72))),
                TextColumn("{task.fields[count]}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            self.progress_bar.start()
        full = int(not todo)  # a bar of nothing to do is full
        stage.task = self.progress_bar.add_task(name, total=todo + full, completed=full, count=self._count(stage))

    def progress(self, name: str, finished: int, broken: int) -> None:
        """Update the bar."""
        stage = self.running
        assert stage is not None, "a stage starts before it makes progress"
        stage.finished += finished
        stage.standing -= broken
        if self.progress_bar is not None and stage.task is not None:
            self.progress_bar.update(stage.task, advance=finished, count=self._count(stage))

    def note(self, text: str) -> None:
        """Print a warning."""
        self.console.note(text)

    def _count(self, stage: _Stage) -> str:
        """Say how many images are attacked, and what share of all images is robust under the attack so far."""
        count = f"{stage.finished} of {stage.todo}"
        if not stage.todo:
            count = f"{stage.known} of {stage.known}, already known" if stage.known else "none left to attack"
        elif stage.known:
            count += f", {stage.known} already known"
        return f"{count}; {100 * stage.standing / self.n:.1f} % of {self.n} robust"

    def _end_line(self) -> None:
        """Print a line for the attack that ended, if there is no terminal."""
        stage, self.running = self.running, None
        if stage is not None and not self.live:
            spent = f", {format_duration(time.monotonic() - stage.begin)}" if stage.todo else ""
            self.console.print(f"  {stage.name}: {self._count(stage)}{spent}", soft_wrap=True)

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
            self.console.print(f"  {title}: {format_count(total, 'record')}", soft_wrap=True)

    def update(self, finished: int, asked: int) -> None:
        """Show how many runs are finished."""
        if self.bar is not None:
            self.bar.update(self.task, description=f"{finished} of {format_count(asked, 'run')}")

    def note(self, text: str) -> None:
        """Print a warning."""
        self.console.note(text)

    def close(self) -> None:
        """Stop and remove the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
