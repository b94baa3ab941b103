"""The methods `exact` and `bounds`: which ball, and how long an image may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from robbench.core.errors import RobbenchError
from robbench.core.types import Threat

__all__ = ["Balls"]


@dataclass(frozen=True)
class Balls:
    """The methods `exact` and `bounds`: verdicts for a ball around every image.

    Attributes:
        method: `exact` or `bounds`.
        threat: the ball.
        seconds: time limit of an image. It is no part of the identity, because a proof holds however long it took.

    Raises:
        RobbenchError: a value is not allowed.
    """

    method: str
    threat: Threat
    seconds: float

    def __post_init__(self) -> None:
        """Check the values."""
        allowed = {"exact": ("Linf",), "bounds": ("Linf", "L2", "L1")}.get(self.method)
        if allowed is None:
            raise RobbenchError(f"method {self.method!r} given; allowed: exact, bounds.")
        if self.threat.norm not in allowed:
            more = " Use the method bounds." if self.threat.norm in ("L2", "L1") else ""
            raise RobbenchError(
                f"norm {self.threat.norm} given for the method {self.method}; allowed: {', '.join(allowed)}.{more}"
            )
        if not 0 <= self.seconds < float("inf"):
            raise RobbenchError(f"seconds {self.seconds} given; allowed: a finite number, at least 0.")

    def describe(self) -> dict[str, Any]:
        """Return the method's part of the identity."""
        threat = {"norm": self.threat.norm, "eps": self.threat.exact_eps}
        return {"method": self.method, "threat": threat, "settings": {"search": "pgd-margin-50"}}
