"""Differences between two entries in everything but their verdicts. They are possible causes. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from robbench.core.errors import ResultError
from robbench.gate.baseline import BaselineEntry

__all__ = ["Change", "check_comparable", "list_changes"]

_MAX_FILES = 8  # named in a message; after an upgrade nearly all files differ


@dataclass(frozen=True)
class Change:
    """One difference between two entries.

    Attributes:
        field: `weights`, `model`, `attack`, `suite`, `seed`, `engine`, `code`, `versions` or `hardware`.
        text: the old and the new value.
        attack: the attack's name; None if the difference is not about one attack.
    """

    field: str
    text: str
    attack: str | None = None

    def __str__(self) -> str:
        """Print as `attack PGD-20-xent: steps 20 → 5`."""
        where = f"attack {self.attack}" if self.attack else self.field
        return f"{where}: {self.text}"


def check_comparable(before: BaselineEntry, now: BaselineEntry) -> None:
    """Refuse two entries with different images, labels, threats, targets or levels.

    Raises:
        ResultError: data set, images, labels, threat, target or levels differ.
    """
    wrong = [
        f"{what}: {old} in the baseline, {new} now"
        for what, old, new in (
            ("data set", before.dataset, now.dataset),
            ("images and labels", _short(before.identity.get("data")), _short(now.identity.get("data"))),
            ("threat", _threat(before), _threat(now)),
            ("target", _target(before), _target(now)),
            ("levels", _levels(before), _levels(now)),
        )
        if old != new
    ]
    if wrong:
        raise ResultError(
            f"{before.name} cannot be compared image by image with its baseline. {'; '.join(wrong)}. "
            "Measure with the values of the baseline, or write a new baseline."
        )


def list_changes(before: BaselineEntry, now: BaselineEntry) -> list[Change]:
    """List all differences. Differences of the model come first, differences of the machine last."""
    return [*_model_changes(before, now), *_attack_changes(before, now), *_other_changes(before, now)]


def _model_changes(before: BaselineEntry, now: BaselineEntry) -> Iterator[Change]:
    if before.identity["weights"] != now.identity["weights"]:
        yield Change("weights", f"{_short(before.identity['weights'])} → {_short(now.identity['weights'])}")
    old, new = (_model_identity(entry) for entry in (before, now))
    if old != new:
        yield Change("model", ", ".join(_list_differences(old, new)))


def _model_identity(entry: BaselineEntry) -> dict[str, Any]:
    # The source says where the model was found. It does not change what the model computes.
    return {key: value for key, value in entry.identity["model"].items() if key != "source"}


def _attack_changes(before: BaselineEntry, now: BaselineEntry) -> Iterator[Change]:
    old, new = ({a["name"]: a for a in entry.identity["attacks"]} for entry in (before, now))
    for name in old:
        if name not in new:
            yield Change("attack", "is gone from the suite", name)
        elif differences := list(_list_differences(old[name], new[name])):
            yield Change("attack", ", ".join(differences), name)
    for name in new:
        if name not in old:
            yield Change("attack", "is new in the suite", name)
    for key in ("judge", "mode"):
        old_value, new_value = (entry.identity["suite"][key] for entry in (before, now))
        if old_value != new_value:
            yield Change("suite", f"{key} {old_value} → {new_value}")


def _other_changes(before: BaselineEntry, now: BaselineEntry) -> Iterator[Change]:
    for key in ("seed", "engine", "dtype"):
        old_value, new_value = before.identity.get(key), now.identity.get(key)
        if old_value != new_value:
            yield Change("engine" if key == "dtype" else key, f"{old_value} → {new_value}")
    if before.code and now.code:  # an entry made from a stored result has no digests of the code
        files = [f for f in dict.fromkeys([*before.code, *now.code]) if before.code.get(f) != now.code.get(f)]
        if files:
            shown = ", ".join(files) if len(files) <= _MAX_FILES else f"{', '.join(files[:_MAX_FILES])} and more"
            yield Change("code", f"robbench's own {shown}")
    if differences := list(_list_differences(before.versions, now.versions)):
        yield Change("versions", ", ".join(differences))
    if before.hardware != now.hardware:
        yield Change("hardware", f"{before.hardware} → {now.hardware}")


def _list_differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            yield f"{key} {_short(old.get(key))} → {_short(new.get(key))}"


def _short(value: object) -> str:
    if isinstance(value, dict) and "name" in value:  # an architecture
        value = " ".join([str(value["name"]), *(f"{key}={v}" for key, v in value.get("args", {}).items())])
    text = "none" if value is None else " ".join(str(value).split())
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:12]
    return text if len(text) <= 60 else text[:57] + "..."


def _target(entry: BaselineEntry) -> str:
    return str(entry.identity.get("target") or "every other class")


def _levels(entry: BaselineEntry) -> str:
    return str(entry.identity.get("levels") or "any value of a pixel")


def _threat(entry: BaselineEntry) -> str:
    return f"{entry.threat['norm']} {entry.threat['eps']}"
