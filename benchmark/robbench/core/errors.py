"""Errors a user can cause, and how they are worded: what was given, what is allowed, what to do."""

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
    "unknown_name",
]


class RobbenchError(Exception):
    """Base of every error that the command line prints without a traceback and answers with exit code 2."""


class CardError(RobbenchError):
    """A model card, or a name that should lead to one, is invalid."""


class SuiteError(RobbenchError):
    """A suite, an attack or a budget is invalid or unknown."""


class DataError(RobbenchError):
    """A data set is missing, damaged or unknown."""


class ModelError(RobbenchError):
    """A model cannot be loaded, or answers in a way that no robust accuracy can be derived from."""


class ResultError(RobbenchError):
    """A stored result does not belong to the run that asks for it, or is damaged."""


class BusyError(ResultError):
    """Another process works on the same result."""


class StorageError(RobbenchError):
    """A file cannot be written."""


def unknown_name(kind: str, given: str, known: Iterable[str]) -> str:
    """Word the answer to an unknown name: the closest known names first, then all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    listed = ", ".join(names) if names else "none"
    return f"Unknown {kind} {given!r}.{hint} Known: {listed}."
