"""How a check's value is judged: thresholds.toml as it is read. Imports no torch."""

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

__all__ = ["Finding", "Threshold", "Thresholds", "parse_thresholds"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check saw; `sure` is false where the difference may be chance, and then nothing is held against it."""

    value: float | None
    reason: str
    sure: bool = True


class Threshold(StrictModel):
    """One table of thresholds.toml."""

    title: str
    sense: Literal["at most", "at least"]
    warn: float | None = None
    fail: float | None = None
    on_warn: Literal["", "suspicious", "masked", "randomized"] = ""
    on_fail: Literal["", "suspicious", "masked", "randomized"] = ""
    source: str
    threshold: str

    def status(self, finding: Finding) -> CheckStatus:
        """Judge a value."""
        if finding.value is None:
            return "not applicable"
        if not finding.sure:
            return "pass"
        if self._misses(finding.value, self.fail):
            return "fail"
        return "warn" if self._misses(finding.value, self.warn) else "pass"

    def _misses(self, value: float, limit: float | None) -> bool:
        if limit is None:
            return False
        return value >= limit if self.sense == "at most" else value < limit

    @property
    def wanted(self) -> str:
        """Say what passes: `below 5 (fails from 10)`."""
        limit = self.fail if self.warn is None else self.warn
        side, end = ("below", "from") if self.sense == "at most" else ("at least", "below")
        return f"{side} {limit:g}" + (f" (fails {end} {self.fail:g})" if self.fail not in (None, limit) else "")


class Thresholds(StrictModel):
    """thresholds.toml."""

    version: int
    check: dict[str, Threshold]


def parse_thresholds(names: Collection[str], text: str | None = None) -> Thresholds:
    """Read the thresholds that come with the package, or others.

    Args:
        names: of the checks.
        text: the TOML, if it is not the package's.

    Raises:
        ResultError: not valid, or not one table for every check.
    """
    if text is None:
        text = (resources.files("robbench") / "masking" / "thresholds.toml").read_text(encoding="utf-8")
    try:
        found = Thresholds.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise ResultError(f"thresholds.toml: {error}") from None
    if odd := set(found.check) ^ set(names):
        raise ResultError(f"thresholds.toml and the checks differ in: {', '.join(sorted(odd))}.")
    return found
