"""What differs between two runs besides their verdicts: the possible causes of a difference. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from robbench.core.errors import ResultError
from robbench.gate.baseline import Run

__all__ = ["Change", "changes", "check_comparable"]

_MOST_FILES = 8  # that a message names: after an upgrade nearly all files differ


@dataclass(frozen=True)
class Change:
    """One difference between two runs.

    Attributes:
        field: `weights`, `model`, `attack`, `suite`, `seed`, `engine`, `code`, `versions` or `hardware`.
        text: what it was and what it is.
        attack: the attack's name, where one is meant.
    """

    field: str
    text: str
    attack: str | None = None

    def __str__(self) -> str:
        """Print as `attack PGD-20-xent: steps 20 → 5`."""
        where = f"attack {self.attack}" if self.attack else self.field
        return f"{where}: {self.text}"


def check_comparable(before: Run, now: Run) -> None:
    """Refuse two runs that are not about the same question.

    Raises:
        ResultError: other images, labels or another threat; or an image of the baseline is missing.
    """
    wrong = [
        f"{what}: {old} in the baseline, {new} now"
        for what, old, new in (
            ("data set", before.dataset, now.dataset),
            ("images and labels", _short(before.identity.get("data")), _short(now.identity.get("data"))),
            ("threat", _threat(before), _threat(now)),
        )
        if old != new
    ]
    if wrong:
        raise ResultError(
            f"{before.name} cannot be compared image by image with its baseline. {'; '.join(wrong)}. "
            "Measure with the same ones, or write a new baseline."
        )


def changes(before: Run, now: Run) -> list[Change]:
    """List what differs, the model first, the machine last."""
    return [*_model(before, now), *_attacks(before, now), *_rest(before, now)]


def _model(before: Run, now: Run) -> Iterator[Change]:
    if before.identity["weights"] != now.identity["weights"]:
        yield Change("weights", f"{_short(before.identity['weights'])} → {_short(now.identity['weights'])}")
    old, new = (_function(r) for r in (before, now))
    if old != new:
        yield Change("model", ", ".join(_differing(old, new)))


def _function(run: Run) -> dict[str, Any]:
    # The words by which a model was found are no part of what it computes.
    return {key: value for key, value in run.identity["model"].items() if key != "source"}


def _attacks(before: Run, now: Run) -> Iterator[Change]:
    old, new = ({a["name"]: a for a in r.identity["attacks"]} for r in (before, now))
    for name in old:
        if name not in new:
            yield Change("attack", "is gone from the suite", name)
        elif differing := list(_differing(old[name], new[name])):
            yield Change("attack", ", ".join(differing), name)
    for name in new:
        if name not in old:
            yield Change("attack", "is new in the suite", name)
    for key in ("judge", "mode"):
        if (was := before.identity["suite"][key]) != (found := now.identity["suite"][key]):
            yield Change("suite", f"{key} {was} → {found}")


def _rest(before: Run, now: Run) -> Iterator[Change]:
    for key in ("seed", "engine", "dtype"):
        was, found = before.identity.get(key), now.identity.get(key)
        if was != found:
            yield Change("engine" if key == "dtype" else key, f"{was} → {found}")
    if before.code and now.code:  # a stored result does not say which code made it
        files = [f for f in dict.fromkeys([*before.code, *now.code]) if before.code.get(f) != now.code.get(f)]
        if files:
            named = ", ".join(files) if len(files) <= _MOST_FILES else f"{', '.join(files[:_MOST_FILES])} and more"
            yield Change("code", f"robbench's own {named}")
    if differing := list(_differing(before.versions, now.versions)):
        yield Change("versions", ", ".join(differing))
    if before.hardware != now.hardware:
        yield Change("hardware", f"{before.hardware} → {now.hardware}")


def _differing(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            yield f"{key} {_short(old.get(key))} → {_short(new.get(key))}"


def _short(value: object) -> str:
    text = str(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:12]
    return text if len(text) <= 60 else text[:57] + "..."


def _threat(run: Run) -> str:
    return f"{run.threat['norm']} {run.threat['eps']}"
