"""The errors that a user can cause. A message says what was given, what is allowed and what to do."""

import difflib
from collections.abc import Iterable

__all__ = [
    "BusyError",
    "CardError",
    "DataError",
    "ModelError",
    "ResultError",
    "RobbenchError",
    "StorageError",
    "SuiteError",
    "UnshippedError",
    "suggest_names",
    "unknown_name",
]


class RobbenchError(Exception):
    """Base of all errors that the command line prints without a traceback. The exit code is 2."""


class CardError(RobbenchError):
    """A model card is invalid, or no card has the given name."""


class SuiteError(RobbenchError):
    """A suite, an attack or a budget is invalid or unknown."""


class DataError(RobbenchError):
    """A data set is missing, damaged or unknown."""


class ModelError(RobbenchError):
    """A model cannot be loaded, or a robust accuracy cannot be computed from its answers."""


class UnshippedError(ModelError):
    """The weights of a model are not in the repository and were not made here."""


class ResultError(RobbenchError):
    """A stored result is damaged, or it belongs to another run."""


class BusyError(ResultError):
    """Another process is working on the same result."""


class StorageError(RobbenchError):
    """A file cannot be written."""


def suggest_names(given: str, known: Iterable[str]) -> str:
    """Return ` Did you mean A or B?` with the closest known names; empty if none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(given[:100], names, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def unknown_name(kind: str, given: str, known: Iterable[str]) -> str:
    """Return the message for an unknown name. It lists the closest known names, then all known names."""
    names = sorted(known)
    listed = ", ".join(names) if names else "none"
    return f"Unknown {kind} {given[:100]!r}.{suggest_names(given, names)} Known: {listed}."
