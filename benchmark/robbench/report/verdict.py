"""What verdicts and checks say of the number of the usual PGD, in words. Imports no torch."""

from __future__ import annotations

from functools import cache

from robbench.masking.checks import load_thresholds
from robbench.masking.record import CheckResult
from robbench.masking.thresholds import CheckOutcome, Thresholds

__all__ = ["describe_status", "describe_verdict"]

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


def describe_status(check: CheckResult) -> str:
    """Return the status of a check. It says so where a value out of range passes because it can be chance."""
    threshold = _read_thresholds().check.get(check.name)
    if check.status != "pass" or threshold is None:
        return check.status
    by_value = threshold.judge(CheckOutcome(check.value, check.reason))
    return "pass" if by_value == "pass" else "pass: can be chance (p ≥ 0.05)"


@cache
def _read_thresholds() -> Thresholds:
    return load_thresholds()
