"""What a verdict says of the number of the usual PGD, in words. Imports no torch."""

from __future__ import annotations

__all__ = ["describe_verdict"]

_STATEMENTS = {
    "trustworthy": "this number can be trusted",
    "suspicious": "look closer before you trust this number",
    "masked": "do not trust this number",
    "randomized": "do not trust this number, because the model answers at random",
    "undecided": "too little is known to trust this number",
    "unchecked": "nobody has checked whether this number can be trusted",
}


def describe_verdict(verdict: str) -> str:
    """Say whether the number can be trusted. The words are about the number: a model of 0 % can have a right number."""
    return _STATEMENTS.get(verdict, "the evidence about this number cannot be read")
