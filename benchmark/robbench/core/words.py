"""Words that many messages share."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

__all__ = ["fold_name", "format_count", "format_goal"]


def fold_name(name: str) -> str:
    """Return the letters and digits of a name in lower case. Names that look alike in a table have equal ones."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", name).casefold()))


def format_count(n: int, noun: str) -> str:
    """Return a number with its noun: `1 image`, `2 images`, `3 passes`."""
    if n == 1:
        return f"1 {noun}"
    return f"{n} {noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}"


def format_goal(identity: Mapping[str, Any]) -> str:
    """Return what stands behind a threat in a title: `, target next` and `, 255 levels`, where a run has them."""
    target, levels = identity.get("target"), identity.get("levels")
    return ("" if target is None else f", target {target}") + ("" if levels is None else f", {levels} levels")
