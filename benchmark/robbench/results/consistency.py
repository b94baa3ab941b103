"""Check without the model that the parts of a stored result agree with each other. Imports no torch."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from robbench.core.errors import ResultError
from robbench.core.numbers import parse_eps, parse_threat
from robbench.core.philox import draw_targets
from robbench.core.types import Status
from robbench.core.words import format_count, format_goal
from robbench.models.schema import DATASETS
from robbench.results.differences import list_differences
from robbench.results.grid import Grid
from robbench.results.schema import ResultFile
from robbench.results.selection import find_selection_error
from robbench.results.summary import MEASURED_FLAGS, summarize
from robbench.suite import Suite

__all__ = [
    "Mismatch",
    "Verification",
    "derive_summary",
    "find_mismatches",
    "find_record_mismatches",
    "find_summary_mismatches",
]


@dataclass(frozen=True)
class Mismatch:
    """A contradiction in a stored result. It concerns one record, one sample, or the files as a whole."""

    what: str
    sample: int | None = None
    attack: str | None = None

    def __str__(self) -> str:
        """Print as `sample 907, PGD-10-CW: …`."""
        where = [] if self.sample is None else [f"sample {self.sample}"]
        where += [] if self.attack is None else [self.attack]
        return f"{', '.join(where)}: {self.what}" if where else self.what


@dataclass(frozen=True, eq=False, repr=False)
class Verification:
    """The outcome of `robbench verify` for one result.

    Attributes:
        result: the stored summary.
        breaks: number of recorded breaks.
        confirmed: number of breaks without any mismatch.
        refuted: the mismatches.
        borderline: predictions that differ by no more than rounding. They count neither for nor against the result.
    """

    result: ResultFile
    breaks: int
    confirmed: int
    refuted: list[Mismatch]
    borderline: list[Mismatch]

    def as_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        r = self.result
        about = {"run_id": r.run_id, "dataset": r.dataset, "model": r.model, "suite": r.suite, "n": r.n}
        mismatches = {"refuted": [asdict(f) for f in self.refuted], "borderline": [asdict(f) for f in self.borderline]}
        return {**about, "breaks": self.breaks, "confirmed": self.confirmed, **mismatches}

    def __repr__(self) -> str:
        """Return the verdict in one line."""
        return f"<Verification {self}>"

    def __str__(self) -> str:
        """Print the verdict in one line."""
        r = self.result
        tail = f", {len(self.borderline)} within rounding of the boundary" if self.borderline else ""
        goal = f"{r.threat.norm} {r.threat.eps}{format_goal(r.identity)}"
        return (
            f"{r.dataset}/{r.model} · {r.suite} · {goal}: {self.confirmed} of {self.breaks} "
            f"breaks of {format_count(r.n, 'image')} confirmed, {format_count(len(self.refuted), 'mismatch')}{tail}."
        )


def find_mismatches(stored: ResultFile, rows: pd.DataFrame) -> Iterator[Mismatch]:
    """Yield every contradiction between result.json and outcomes.parquet, and within each, that needs no model or data.

    Args:
        stored: the content of result.json.
        rows: the records of the same run (`records.read_own_rows`).
    """
    yield from find_summary_mismatches(stored, rows)
    yield from find_record_mismatches(rows, [a.name for a in stored.attacks], stored.mode)
    yield from _find_target_mismatches(stored, rows)
    how = stored.identity.get("images")  # of encoded images, how they were decoded
    if isinstance(how, dict) and "resize" in how and stored.dataset in DATASETS:
        yield Mismatch(f"result.json: dataset is {stored.dataset}; its identity is of images of the user's own")
    if error := find_selection_error(
        pd.unique(rows["sample"].to_numpy()),
        selection=stored.selection,
        sample_seed=stored.identity.get("sample_seed"),
        dataset=stored.dataset,
        data=stored.identity.get("data"),
    ):
        yield Mismatch(f"outcomes.parquet: {error}")
    yield from _find_override_mismatches(stored)


def derive_summary(stored: ResultFile, rows: pd.DataFrame) -> ResultFile:
    """Compute result.json again from its identity and the records. The fields of `_KEPT` stay.

    Raises:
        AttributeError, KeyError, TypeError, ValueError, ResultError: the identity or the records cannot be read.
    """
    identity = stored.identity
    suite = identity["suite"]
    return summarize(
        rows,
        attacks={a["name"]: {k: v for k, v in a.items() if k != "name"} for a in identity["attacks"]},
        flags={k: v for k, v in stored.flags.items() if k not in MEASURED_FLAGS},
        identity=identity,
        threat=parse_threat(identity["threat"]["norm"], identity["threat"]["eps"]),
        suite=Suite(suite["name"], 1, "", "", suite["judge"], suite["mode"], {}, ()),
        seed=identity["seed"],
        **{name: getattr(stored, name) for name in _KEPT},
    )


def find_summary_mismatches(stored: ResultFile, rows: pd.DataFrame) -> Iterator[Mismatch]:
    """Yield one mismatch per field of result.json that does not follow from its identity and the records."""
    try:
        expected = derive_summary(stored, rows)
    except (AttributeError, KeyError, TypeError, ValueError, ResultError) as error:
        yield Mismatch(f"result.json: its identity cannot be read ({type(error).__name__}: {error})")
        return
    # Without timings.parquet, on which no verdict depends, only the digest of result.json vouches for wall times.
    is_untimed = stored.is_always_sealed and not rows["seconds"].any()
    for field, given, derived in _differences(stored.model_dump(mode="json"), expected.model_dump(mode="json")):
        if field.endswith("seconds") and is_untimed:
            continue
        yield Mismatch(f"result.json: {field} is {given}; {derived} follows from outcomes.parquet and the identity")


_KEPT = (
    "model", "dataset", "overrides", "selection", "lanes", "hardware", "versions", "environment", "date", "paper",
    "answers", "code",
    "wall_seconds",
)  # fmt: skip
"""Fields that do not follow from other data. They are taken as stored."""


def _find_override_mismatches(stored: ResultFile) -> Iterator[Mismatch]:
    """Yield the overrides that differ from the identity. The name of the folder and the titles of tables show them."""
    identity, given = stored.identity, stored.overrides
    asked = {key: identity.get(key) for key in ("sample_seed", "gradients", "target", "levels")}
    expected = {key: str(value) for key, value in asked.items() if value is not None}
    expected |= {key: str(identity[key]) for key in ("seed", "one_by_one") if identity.get(key)}
    attacks = [a for a in identity.get("attacks", []) if isinstance(a, dict)]
    used = {str(a.get("surrogate")) for a in attacks if a.get("kind") == "transfer"}
    implied = {"norm": stored.threat.norm, "eps": stored.threat.eps, "surrogate": min(used, default=None)}
    expected |= {key: str(value) for key, value in implied.items() if key in given}
    if "eps" in given:
        with contextlib.suppress(ValueError):
            expected["eps"] = given["eps"] if _is_radius(given["eps"], stored) else expected["eps"]
    for field, a, b in list_differences("overrides", given, expected):
        yield Mismatch(f"result.json: {field} is {a}; {b} follows from the identity")


_TARGET = re.compile(r"least-likely|random|next|[0-9]{1,9}|list-[0-9a-f]{16}")


def _count_classes(stored: ResultFile) -> int | None:
    """Return the number of classes: that of a known data set, or of the logits in `answers`; None if it is unknown."""
    if stored.dataset in DATASETS:
        return DATASETS[stored.dataset].num_classes
    return len(stored.answers[0].partition("|")[0].split()) if stored.answers else None


def _find_target_mismatches(stored: ResultFile, rows: pd.DataFrame) -> Iterator[Mismatch]:
    """Yield a rule of targets that is none, and the first break whose prediction is not the target that the rule gives.

    Images of a class that is the target of all get the next class. The class after the last is 0. Random targets are
    drawn again where the number of classes is known. The targets of other rules do not follow from the records, but
    each is another class than the label, and the same one for all attacks.
    """
    target, classes = stored.identity.get("target"), _count_classes(stored)
    if target is None:
        return
    if not isinstance(target, str) or not _TARGET.fullmatch(target):
        yield Mismatch(f"result.json: the target of its identity is {str(target)[:80]!r}, which is no rule of targets")
        return
    broken = rows[rows["status"] == Status.BROKEN]
    label, prediction = broken["label"].to_numpy(), broken["prediction"].to_numpy()
    # Where the number of classes is unknown, the last one that the records hold.
    last = classes - 1 if classes else max(int(rows["label"].max()), int(rows["prediction"].max()))
    follows = (prediction == label + 1) | ((prediction == 0) & (label == last))
    fits = (prediction != label) & (prediction == broken.groupby("sample")["prediction"].transform("first"))
    if target == "next":
        fits = follows
    elif target == "random" and classes:
        fits = prediction == draw_targets(stored.seed, broken["sample"].to_numpy(), label, classes)
    elif target.isdigit():
        fits = np.where(label == int(target), follows, prediction == int(target))
    for i in np.flatnonzero(~fits)[:1]:
        yield Mismatch(
            f"the prediction {prediction[i]} is not the target {target!r}", int(broken["sample"].iloc[i]),
            str(broken["attack"].iloc[i]),
        )  # fmt: skip


def _is_radius(eps: object, stored: ResultFile) -> bool:
    """Return whether a radius is the one of a result. The identity holds it exactly, the summary rounds it."""
    threat = stored.identity.get("threat")
    known = (threat.get("eps") if isinstance(threat, dict) else None, stored.threat.eps)
    return parse_eps(str(eps)) in [parse_eps(str(radius)) for radius in known]


def _differences(given: Any, expected: Any) -> Iterator[tuple[str, Any, Any]]:
    for field, a, b in list_differences("", given, expected):
        # Sums are rounded, and another version may add in another order.
        slack = 2e-3 if field.endswith("seconds") else 1e-9
        if not (isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-9, abs_tol=slack)):
            yield field, a, b


def find_record_mismatches(rows: pd.DataFrame, attacks: list[str], mode: str) -> Iterator[Mismatch]:
    """Yield one mismatch per record that contradicts the suite or other records.

    Args:
        rows: the rows of outcomes.parquet.
        attacks: names of the stages, in order.
        mode: full, cascade or challenge.
    """
    try:
        grid = Grid.of(rows, attacks)
    except ResultError as error:
        yield Mismatch(str(error))
        return
    for sample, attack, status in rows.loc[grid.unknown, ["sample", "attack", "status"]].itertuples(index=False):
        yield Mismatch(f"unknown attack, or unknown status {status!r}; allowed: {', '.join(Status)}", sample, attack)
    for sample, attack in rows.loc[grid.double, ["sample", "attack"]].itertuples(index=False):
        yield Mismatch("is recorded more than once", sample, attack)
    wrong, missing = grid.has(Status.MISCLASSIFIED), grid.row < 0
    for sample in grid.samples[wrong.any(axis=1) & ~wrong.all(axis=1)].tolist():
        yield Mismatch("is recorded as misclassified under some attacks and not under others", sample)
    broken = grid.has(Status.BROKEN)
    if mode == "challenge":  # the other attacks skip only what the first attack broke
        broken[:, 1:] = False
    before = np.cumsum(broken, axis=1) - broken > 0
    skipped = grid.has(Status.SKIPPED)
    cases = (
        (missing, "is not recorded"),
        (skipped & ~before, "is recorded as skipped, though no earlier attack broke the sample"),
        (skipped & before & (mode == "full"), "is recorded as skipped; in full mode no attack is skipped"),
        (~skipped & before & ~missing & (mode != "full"), "is not skipped, though an earlier attack broke it"),
    )
    for cells, what in cases:
        for i, j in np.argwhere(cells):
            yield Mismatch(what, int(grid.samples[i]), attacks[j])
