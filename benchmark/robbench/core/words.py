"""Words that many messages share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["format_count", "format_target"]


def format_count(n: int, noun: str) -> str:
    """Return a number with its noun: `1 image`, `2 images`, `3 passes`."""
    if n == 1:
        return f"1 {noun}"
    return f"{n} {noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}"


def format_target(identity: Mapping[str, Any]) -> str:
    """Return `, target next`, to stand behind a threat, for a run with a target; nothing for other runs."""
    target = identity.get("target")
    return "" if target is None else f", target {target}"
