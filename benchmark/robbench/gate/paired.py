"""Two runs beside each other, image by image. Pure; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from robbench.core.errors import ResultError
from robbench.core.stats import mcnemar, paired_difference
from robbench.gate.baseline import STATUS, Run
from robbench.gate.changes import Change, changes, check_comparable

__all__ = ["CLEAN", "WORST", "Comparison", "Flip", "Question", "compare"]

CLEAN, WORST = "clean accuracy", "worst case"
_ATTACKED, _LOST = ("b", "r"), ("m", "b")  # letters of a baseline's verdicts

Marks = NDArray[np.bool_]
"""Whether each image stands, [n]."""

Verdicts = dict[str, NDArray[np.str_]]
"""Attack -> a letter per image, [n]."""


@dataclass(frozen=True)
class Question:
    """One paired comparison.

    Attributes:
        model: `digits/at`.
        what: clean accuracy, worst case, or an attack's name.
        kind: whether a drop or a rise is looked for.
        n: images compared.
        before: how many of them stood in the baseline.
        now: how many stand now.
        lost: images that stood in the baseline only, by official index.
        gained: images that stand now only.
        counted: whether the answer decides; a rise under new weights does not.
    """

    model: str
    what: str
    kind: Literal["drop", "rise"]
    n: int
    before: int
    now: int
    lost: tuple[int, ...]
    gained: tuple[int, ...]
    counted: bool = True

    @property
    def p(self) -> float:
        """P-value of the exact one-sided test, not adjusted."""
        return mcnemar(len(self.bad), len(self.lost) + len(self.gained) - len(self.bad), "greater")

    @property
    def bad(self) -> tuple[int, ...]:
        """Images that changed in the direction that is looked for."""
        return self.lost if self.kind == "drop" else self.gained

    @property
    def points(self) -> float:
        """Change in points: negative for a drop."""
        return 100 * (len(self.gained) - len(self.lost)) / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the change in points (Bonett & Price 2012)."""
        low, high = paired_difference(len(self.gained), len(self.lost), self.n)
        return 100 * low, 100 * high


@dataclass(frozen=True)
class Flip:
    """An image on which some verdict changed.

    Attributes:
        sample: official index.
        worst_case: lost, gained, or unchanged.
        attacks: attack -> (status in the baseline, status now), where they differ.
    """

    sample: int
    worst_case: Literal["lost", "gained", "unchanged"]
    attacks: dict[str, tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Comparison:
    """A model beside its baseline.

    Attributes:
        before: the run of the baseline.
        now: the run that is checked.
        questions: what was compared.
        changes: what differs besides the verdicts.
        flips: images with a changed verdict, in the order of the run.
        removed: attacks of the baseline that did not run.
        n: images compared.
    """

    before: Run
    now: Run
    questions: list[Question]
    changes: list[Change]
    flips: list[Flip]
    removed: list[str]
    n: int


def compare(before: Run, now: Run, partial: bool = False) -> Comparison:
    """Compare two runs image by image.

    Args:
        before: from the baseline.
        now: what is checked; further images are left out.
        partial: whether `now` may have measured only some of the baseline's images yet.

    Raises:
        ResultError: the runs are not about the same images, labels and threat.
    """
    check_comparable(before, now)
    index, place = before.index(), {sample: i for i, sample in enumerate(now.index().tolist())}
    measured = np.array([sample in place for sample in index.tolist()], dtype=bool)
    if not partial and not measured.all():
        raise ResultError(
            f"{before.name}: {int((~measured).sum())} of the {before.n} images of the baseline were not measured. "
            f"Measure the same ones (baseline: {before.selection})."
        )
    index = index[measured]
    at = np.array([place[sample] for sample in index.tolist()], dtype=np.int64)
    old = {name: letters[measured] for name, letters in before.letters().items()}
    new = {name: letters[at] for name, letters in now.letters().items()}
    found = changes(before, now)
    questions = list(_questions(before.name, index, old, new, found))
    removed = [name for name in old if name not in new]
    return Comparison(before, now, questions, found, list(_flips(index, old, new)), removed, len(index))


def _questions(
    model: str, index: NDArray[np.int64], old: Verdicts, new: Verdicts, found: list[Change]
) -> Iterator[Question]:
    yield _question(model, CLEAN, "drop", index, _right(old), _right(new))
    yield _question(model, WORST, "drop", index, _standing(old), _standing(new))
    other_model = any(c.field in ("weights", "model") for c in found)
    other_judge = any(c.field == "suite" for c in found)
    for name in [a for a in old if a in new]:
        both = np.isin(old[name], _ATTACKED) & np.isin(new[name], _ATTACKED)
        changed = other_judge or any(c.attack == name for c in found)
        stood, stands = old[name][both] == "r", new[name][both] == "r"
        yield _question(model, name, "rise", index[both], stood, stands, counted=changed or not other_model)


def _right(verdicts: Verdicts) -> Marks:
    return np.asarray(np.all([letters != "m" for letters in verdicts.values()], axis=0), dtype=bool)


def _standing(verdicts: Verdicts) -> Marks:
    return np.asarray(~np.any([np.isin(letters, _LOST) for letters in verdicts.values()], axis=0), dtype=bool)


def _question(
    model: str,
    what: str,
    kind: Literal["drop", "rise"],
    index: NDArray[np.int64],
    old: Marks,
    new: Marks,
    counted: bool = True,
) -> Question:
    lost, gained = (tuple(index[which].tolist()) for which in (old & ~new, new & ~old))
    return Question(model, what, kind, len(old), int(old.sum()), int(new.sum()), lost, gained, counted)


def _flips(index: NDArray[np.int64], old: Verdicts, new: Verdicts) -> Iterator[Flip]:
    names = [a for a in old if a in new]
    stood, stands = _standing(old), _standing(new)
    changed = np.any([stood != stands, *(old[name] != new[name] for name in names)], axis=0)
    for i in np.flatnonzero(changed).tolist():
        worst: Literal["lost", "gained", "unchanged"] = "unchanged"
        if stood[i] != stands[i]:
            worst = "lost" if stood[i] else "gained"
        pairs = {name: (STATUS[old[name][i]].value, STATUS[new[name][i]].value) for name in names}
        yield Flip(int(index[i]), worst, {name: pair for name, pair in pairs.items() if pair[0] != pair[1]})
