"""The errors that a user can cause. A message says what was given, what is allowed and what to do."""

import difflib
import re
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

_CLOSE = 0.5  # the least similarity of a name that is suggested


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
    """Return ` Did you mean A or B?` with the closest known names; empty if none is close.

    Where a name has as many words as the given one, each word must be close: `most-likely` is not `least-likely`.
    """
    names = sorted(name for name in known if _has_close_words(given[:100], name))
    close = difflib.get_close_matches(given[:100], names, n=3, cutoff=_CLOSE)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _has_close_words(given: str, name: str) -> bool:
    pairs = [re.split("[-_/ ]", text) for text in (given, name)]
    if len(pairs[0]) != len(pairs[1]):
        return True
    return all(difflib.SequenceMatcher(None, b, a).ratio() >= _CLOSE for a, b in zip(*pairs, strict=True))


def unknown_name(kind: str, given: str, known: Iterable[str]) -> str:
    """Return the message for an unknown name. It lists the closest known names, then all known names."""
    names = sorted(known)
    listed = ", ".join(names) if names else "none"
    return f"Unknown {kind} {given[:100]!r}.{suggest_names(given, names)} Known: {listed}."
