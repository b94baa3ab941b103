"""The thresholds of the checks, as thresholds.toml stores them. Imports no torch."""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from pydantic import ValidationError

from robbench.core.errors import ResultError
from robbench.masking.record import CheckStatus
from robbench.results.schema import StrictModel

__all__ = ["CheckOutcome", "Threshold", "Thresholds", "parse_thresholds"]


@dataclass(frozen=True, slots=True)
class CheckOutcome:
    """The value of a check.

    Attributes:
        value: the value; None if the check does not apply.
        reason: one sentence that explains the value.
        significant: False if the value can be chance. The check then passes, whatever the value.
    """

    value: float | None
    reason: str
    significant: bool = True


class Threshold(StrictModel):
    """The thresholds of one check: one table of thresholds.toml."""

    title: str
    sense: Literal["at most", "at least"]
    warn: float | None = None
    fail: float | None = None
    on_warn: Literal["", "suspicious", "masked", "randomized"] = ""
    on_fail: Literal["", "suspicious", "masked", "randomized"] = ""
    source: str
    threshold: str

    def judge(self, outcome: CheckOutcome) -> CheckStatus:
        """Return the status of a check from its value."""
        if outcome.value is None:
            return "not applicable"
        if not outcome.significant:
            return "pass"
        if self._is_beyond(outcome.value, self.fail):
            return "fail"
        return "warn" if self._is_beyond(outcome.value, self.warn) else "pass"

    def _is_beyond(self, value: float, limit: float | None) -> bool:
        if limit is None:
            return False
        return value >= limit if self.sense == "at most" else value < limit

    @property
    def passing_range(self) -> str:
        """The values that pass, in words, such as `below 5 (fails from 10)`."""
        limit = self.fail if self.warn is None else self.warn
        side, end = ("below", "from") if self.sense == "at most" else ("at least", "below")
        return f"{side} {limit:g}" + (f" (fails {end} {self.fail:g})" if self.fail not in (None, limit) else "")


class Thresholds(StrictModel):
    """The content of thresholds.toml."""

    version: int
    check: dict[str, Threshold]


def parse_thresholds(names: Collection[str], text: str | None = None) -> Thresholds:
    """Parse thresholds.

    Args:
        names: names of all checks.
        text: TOML text; None means the thresholds.toml of the package.

    Raises:
        ResultError: the text is not valid, or does not have exactly one table for every check.
    """
    if text is None:
        text = (resources.files("robbench") / "masking" / "thresholds.toml").read_text(encoding="utf-8")
    try:
        found = Thresholds.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise ResultError(f"thresholds.toml: {error}") from None
    if names_without_pair := set(found.check) ^ set(names):
        raise ResultError(
            f"thresholds.toml and the checks differ in: {', '.join(sorted(names_without_pair))}. thresholds.toml needs "
            "exactly one table for every check."
        )
    return found
