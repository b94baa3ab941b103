"""Comparison of two baseline entries, image by image. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from robbench.core.errors import ResultError
from robbench.core.stats import mcnemar, paired_difference
from robbench.gate.baseline import STATUS_OF_LETTER, BaselineEntry
from robbench.gate.changes import Change, check_comparable, list_changes

__all__ = ["CLEAN", "WORST", "Comparison", "Flip", "PairedTest", "compare_entries"]

CLEAN, WORST = "clean accuracy", "worst case"
_CHANCE = 1e-4  # p-value of a rise that rounding on other hardware does not give
_ATTACKED, _WRONG = ("b", "r"), ("m", "b")  # letters of a baseline's verdicts

BoolRow = NDArray[np.bool_]
"""Whether each image is correct (clean, or under attacks), [n]."""

Letters = dict[str, NDArray[np.str_]]
"""Attack -> one letter per image, [n]."""


@dataclass(frozen=True)
class PairedTest:
    """One paired test of one accuracy of one model.

    Attributes:
        model: full name of the model, such as `digits/at`.
        what: "clean accuracy", "worst case", or the name of an attack.
        kind: whether the test looks for a drop or for a rise.
        n: number of compared images.
        before: number of images that are correct in the baseline.
        now: number of images that are correct now.
        lost: official indices of the images that are correct only in the baseline.
        gained: official indices of the images that are correct only now.
        counted: whether the test can fail the check. A rise with new weights cannot.
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
        """P-value of McNemar's exact one-sided test, not adjusted."""
        return mcnemar(len(self.bad), len(self.lost) + len(self.gained) - len(self.bad), "greater")

    @property
    def bad(self) -> tuple[int, ...]:
        """Images that changed in the direction that the test looks for."""
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
    """An image with a changed verdict.

    Attributes:
        sample: official index of the image.
        worst_case: lost, gained, or unchanged.
        attacks: attack -> (status in the baseline, status now), for the attacks with a changed status.
    """

    sample: int
    worst_case: Literal["lost", "gained", "unchanged"]
    attacks: dict[str, tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Comparison:
    """A new measurement of a model compared with its baseline.

    Attributes:
        before: the entry of the baseline.
        now: the new entry.
        tests: the paired tests.
        changes: differences other than verdicts.
        flips: images with a changed verdict, in the order of the run.
        removed: attacks of the baseline that did not run now.
        n: number of compared images.
    """

    before: BaselineEntry
    now: BaselineEntry
    tests: list[PairedTest]
    changes: list[Change]
    flips: list[Flip]
    removed: list[str]
    n: int


def compare_entries(before: BaselineEntry, now: BaselineEntry, partial: bool = False) -> Comparison:
    """Compare two entries image by image.

    Args:
        before: the entry of the baseline.
        now: the new entry. Images that the baseline does not hold are ignored.
        partial: whether `now` may lack images of the baseline.

    Raises:
        ResultError: the entries differ in images, labels or threat, or `now` lacks images and `partial` is False.
    """
    check_comparable(before, now)
    index = before.index()
    position_now = {sample: i for i, sample in enumerate(now.index().tolist())}
    measured = np.array([sample in position_now for sample in index.tolist()], dtype=bool)
    if not partial and not measured.all():
        raise ResultError(
            f"{before.name}: {int((~measured).sum())} of the {before.n} images of the baseline were not measured. "
            f"Measure the images of the baseline ({before.selection})."
        )
    index = index[measured]
    positions = np.array([position_now[sample] for sample in index.tolist()], dtype=np.int64)
    old = {name: letters[measured] for name, letters in before.letters().items()}
    new = {name: letters[positions] for name, letters in now.letters().items()}
    changes = list_changes(before, now)
    tests = list(_make_tests(before.name, index, old, new, changes))
    _check_clean_rise(before.name, tests[0], changes)
    removed = [name for name in old if name not in new]
    return Comparison(before, now, tests, changes, list(_list_flips(index, old, new)), removed, len(index))


def _check_clean_rise(name: str, clean: PairedTest, changes: list[Change]) -> None:
    """Refuse a baseline in which the same model gets far fewer clean images right. It leaves little to compare.

    Raises:
        ResultError: weights and model are those of the baseline, and the rise is beyond chance.
    """
    if any(c.field in ("weights", "model") for c in changes):
        return
    if mcnemar(len(clean.gained), len(clean.lost), "greater") < _CHANCE:
        raise ResultError(
            f"{name}: the baseline counts {clean.before} of {clean.n} images as classified correctly, and {clean.now} "
            "are now, with the same weights. The baseline is of a model that answers otherwise, or was edited. Write a "
            "new baseline."
        )


def _make_tests(
    model: str, index: NDArray[np.int64], old: Letters, new: Letters, changes: list[Change]
) -> Iterator[PairedTest]:
    yield _make_test(model, CLEAN, "drop", index, _is_clean_correct(old), _is_clean_correct(new))
    yield _make_test(model, WORST, "drop", index, _is_robust(old), _is_robust(new))
    model_changed = any(c.field in ("weights", "model") for c in changes)
    suite_changed = any(c.field == "suite" for c in changes)
    for name in [a for a in old if a in new]:
        both = np.isin(old[name], _ATTACKED) & np.isin(new[name], _ATTACKED)
        attack_changed = suite_changed or any(c.attack == name for c in changes)
        robust_before, robust_now = old[name][both] == "r", new[name][both] == "r"
        counted = attack_changed or not model_changed
        yield _make_test(model, name, "rise", index[both], robust_before, robust_now, counted)


def _is_clean_correct(verdicts: Letters) -> BoolRow:
    return np.asarray(np.all([letters != "m" for letters in verdicts.values()], axis=0), dtype=bool)


def _is_robust(verdicts: Letters) -> BoolRow:
    return np.asarray(~np.any([np.isin(letters, _WRONG) for letters in verdicts.values()], axis=0), dtype=bool)


def _make_test(
    model: str,
    what: str,
    kind: Literal["drop", "rise"],
    index: NDArray[np.int64],
    old: BoolRow,
    new: BoolRow,
    counted: bool = True,
) -> PairedTest:
    lost, gained = (tuple(index[which].tolist()) for which in (old & ~new, new & ~old))
    return PairedTest(model, what, kind, len(old), int(old.sum()), int(new.sum()), lost, gained, counted)


def _list_flips(index: NDArray[np.int64], old: Letters, new: Letters) -> Iterator[Flip]:
    names = [a for a in old if a in new]
    robust_before, robust_now = _is_robust(old), _is_robust(new)
    changed = np.any([robust_before != robust_now, *(old[name] != new[name] for name in names)], axis=0)
    for i in np.flatnonzero(changed).tolist():
        worst: Literal["lost", "gained", "unchanged"] = "unchanged"
        if robust_before[i] != robust_now[i]:
            worst = "lost" if robust_before[i] else "gained"
        pairs = {name: (STATUS_OF_LETTER[old[name][i]].value, STATUS_OF_LETTER[new[name][i]].value) for name in names}
        yield Flip(int(index[i]), worst, {name: pair for name, pair in pairs.items() if pair[0] != pair[1]})
