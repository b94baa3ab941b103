"""Reporters: they get messages about the progress of a run."""

from collections.abc import Sequence
from typing import Protocol

from robbench.core.errors import RobbenchError

__all__ = ["Reporter", "Silent", "check_reporter"]


class Reporter(Protocol):
    """Gets messages about the progress of a run. The command line shows them as bars."""

    def plan(self, title: str, stages: Sequence[str], n: int, clean: int, seconds: float, device: str) -> None:
        """Called before the first attack. `seconds` is the estimated time of the run if nothing breaks."""

    def stage(self, name: str, todo: int, done: int, standing: int) -> None:
        """Called when an attack starts.

        Args:
            name: name of the attack.
            todo: number of samples to attack.
            done: number of samples with a record from an earlier call.
            standing: number of samples that count as robust under the attack so far, among all n.
        """

    def progress(self, name: str, finished: int, broken: int) -> None:
        """Called when samples are finished."""

    def note(self, text: str) -> None:
        """Called with a message that the user should see at once."""


def check_reporter(reporter: object) -> None:
    """Check that an object has the methods of a `Reporter`. None is allowed.

    Raises:
        RobbenchError: a method is missing. The message names it.
    """
    names = [name for name in vars(Reporter) if not name.startswith("_")]
    missing = [name for name in names if not callable(getattr(reporter, name, None))]
    if reporter is not None and (missing or isinstance(reporter, type)):
        what = "a class given; give an object of it" if isinstance(reporter, type) else f"{reporter!r} given"
        raise RobbenchError(f"reporter: {what}; allowed: None, or an object with the methods {', '.join(names)}.")


class Silent:
    """A reporter that says nothing."""

    def plan(self, title: str, stages: Sequence[str], n: int, clean: int, seconds: float, device: str) -> None:
        """Ignore it."""

    def stage(self, name: str, todo: int, done: int, standing: int) -> None:
        """Ignore it."""

    def progress(self, name: str, finished: int, broken: int) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""
