"""Compares stored JSON values field by field, and words the differences. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["describe_other_run", "list_differences", "list_lines"]


def describe_other_run(folder: Path, stored: dict[str, Any], here: dict[str, Any]) -> str:
    """Return the message for a folder that holds a different run: the differences, and what to do."""
    return (
        f"{folder} holds the result of a different run. What differs:\n"
        + "\n".join(list_lines(stored, here))
        + "\nNothing was computed or overwritten. Use --overwrite to replace it, or --results DIR for another tree."
    )


def list_lines(stored: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Return a line of text for each field in which two identities differ."""
    return [
        f"  {field}: stored {_shorten(a)}, this run {_shorten(b)}" for field, a, b in list_differences("", stored, here)
    ]


def list_differences(field: str, given: Any, expected: Any) -> Iterator[tuple[str, Any, Any]]:
    """Compare two JSON values. Yield the path of every field that differs, and both of its values."""
    if isinstance(given, dict) and isinstance(expected, dict):
        for key in dict.fromkeys([*given, *expected]):
            yield from list_differences(f"{field}.{key}".lstrip("."), given.get(key), expected.get(key))
    elif isinstance(given, list) and isinstance(expected, list) and len(given) == len(expected):
        for i, pair in enumerate(zip(given, expected, strict=True)):
            yield from list_differences(f"{field}[{i}]", *pair)
    elif given != expected:
        yield field, given, expected


def _shorten(value: object) -> str:
    if isinstance(value, list) and value and all(isinstance(part, dict) and "name" in part for part in value):
        return ", ".join(str(part["name"]) for part in value)  # attacks: their settings are too long for a line
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
