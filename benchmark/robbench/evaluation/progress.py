"""Who hears how a run goes."""

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Reporter", "Silent"]


class Reporter(Protocol):
    """Hears how a run goes; the command line draws bars from it."""

    def plan(self, title: str, stages: Sequence[str], n: int, clean: int, seconds: float, device: str) -> None:
        """Hear of a run before its first attack; `seconds` is what it takes if nothing breaks."""

    def stage(self, name: str, todo: int, done: int) -> None:
        """Hear of an attack's start: samples to attack, and how many are known from an earlier run."""

    def progress(self, name: str, finished: int, broken: int) -> None:
        """Hear of samples that just finished."""

    def note(self, text: str) -> None:
        """Hear of something a user should know at once."""


class Silent:
    """A reporter that says nothing."""

    def plan(self, title: str, stages: Sequence[str], n: int, clean: int, seconds: float, device: str) -> None:
        """Ignore it."""

    def stage(self, name: str, todo: int, done: int) -> None:
        """Ignore it."""

    def progress(self, name: str, finished: int, broken: int) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""
