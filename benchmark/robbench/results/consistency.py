"""What can be checked of a stored result without its model: that its parts say the same. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from robbench.core.numbers import parse_threat
from robbench.core.types import Status
from robbench.results.schema import ResultFile
from robbench.results.store import list_differences
from robbench.results.summary import MEASURED_FLAGS, summarize
from robbench.suite import Suite

__all__ = ["Mismatch", "Verification", "find_record_mismatches", "find_summary_mismatches"]


@dataclass(frozen=True)
class Mismatch:
    """Something that does not hold: about one record, about one sample, or about the files as a whole."""

    what: str
    sample: int | None = None
    attack: str | None = None

    def __str__(self) -> str:
        """Print as `sample 907, PGD-10-CW: …`."""
        where = [] if self.sample is None else [f"sample {self.sample}"]
        where += [] if self.attack is None else [self.attack]
        return f"{', '.join(where)}: {self.what}" if where else self.what


@dataclass(frozen=True, eq=False)
class Verification:
    """What became of a result that was verified.

    Attributes:
        result: the stored summary.
        breaks: how many breaks are recorded.
        confirmed: how many of them hold in every respect.
        refuted: what does not hold.
        borderline: predictions that differ by no more than rounding can do; they count neither way.
    """

    result: ResultFile
    breaks: int
    confirmed: int
    refuted: list[Mismatch]
    borderline: list[Mismatch]

    def as_json(self) -> dict[str, Any]:
        """Say it for machines."""
        r = self.result
        about = {"run_id": r.run_id, "dataset": r.dataset, "model": r.model, "suite": r.suite, "n": r.n}
        findings = {"refuted": [asdict(f) for f in self.refuted], "borderline": [asdict(f) for f in self.borderline]}
        return {**about, "breaks": self.breaks, "confirmed": self.confirmed, **findings}

    def __str__(self) -> str:
        """Print the verdict in one line."""
        r = self.result
        tail = f", {len(self.borderline)} within rounding of the boundary" if self.borderline else ""
        return (
            f"{r.dataset}/{r.model} · {r.suite} · {r.threat.norm} {r.threat.eps}: {self.confirmed} of {self.breaks} "
            f"breaks of {r.n} images confirmed, {len(self.refuted)} findings against it{tail}."
        )


def find_summary_mismatches(stored: ResultFile, rows: pd.DataFrame) -> Iterator[Mismatch]:
    """Make result.json again from its identity and the records, and name every field that differs."""
    identity = stored.identity
    try:
        said = identity["suite"]
        made = summarize(
            rows,
            attacks={a["name"]: {k: v for k, v in a.items() if k != "name"} for a in identity["attacks"]},
            flags={k: v for k, v in stored.flags.items() if k not in MEASURED_FLAGS},
            identity=identity,
            threat=parse_threat(identity["threat"]["norm"], identity["threat"]["eps"]),
            suite=Suite(said["name"], 1, "", "", said["judge"], said["mode"], {}, ()),
            seed=identity["seed"],
            **{name: getattr(stored, name) for name in _TAKEN},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        yield Mismatch(f"result.json: its identity cannot be read ({type(error).__name__}: {error})")
        return
    for field, given, expected in _differences(stored.model_dump(mode="json"), made.model_dump(mode="json")):
        yield Mismatch(f"result.json: {field} is {given}; {expected} follows from outcomes.parquet and the identity")


_TAKEN = ("model", "dataset", "overrides", "selection", "lanes", "hardware", "versions", "environment", "date", "paper")
"""Fields that nothing else tells."""


def _differences(given: Any, expected: Any) -> Iterator[tuple[str, Any, Any]]:
    for field, a, b in list_differences("", given, expected):
        # Sums are rounded, and another version may add up in another order.
        slack = 2e-3 if field.endswith("seconds") else 1e-9
        if not (isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-9, abs_tol=slack)):
            yield field, a, b


def find_record_mismatches(rows: pd.DataFrame, attacks: list[str], mode: str) -> Iterator[Mismatch]:
    """Tell which records cannot stand beside each other.

    Args:
        rows: of outcomes.parquet.
        attacks: names of the stages, in order.
        mode: full, cascade or challenge.
    """
    known = rows["attack"].isin(attacks) & rows["status"].isin(list(Status))
    for sample, attack, status in rows.loc[~known, ["sample", "attack", "status"]].itertuples(index=False):
        yield Mismatch(
            f"status {status!r}, of an attack of this run or not; allowed: {', '.join(Status)}", sample, attack
        )
    rows = rows[known]
    double = rows.duplicated(["sample", "attack"])
    for sample, attack in rows.loc[double, ["sample", "attack"]].itertuples(index=False):
        yield Mismatch("is recorded more than once", sample, attack)
    wide = rows[~double].pivot(index="sample", columns="attack", values="status").reindex(columns=attacks)
    wrong = wide == Status.MISCLASSIFIED
    partly = wrong.any(axis=1) & ~wrong.all(axis=1)
    for sample in wide.index[partly]:
        yield Mismatch("is recorded as misclassified under some attacks and not under others", sample)
    broken = wide == Status.BROKEN
    if mode == "challenge":  # only what the first attack broke is spared from the others
        broken.iloc[:, 1:] = False
    before = broken.cumsum(axis=1).shift(1, axis=1, fill_value=0) > 0
    skipped = wide == Status.SKIPPED
    cases = (
        (wide.isna(), "is not recorded"),
        (skipped & ~before, "is recorded as skipped, though no earlier attack broke the sample"),
        (skipped & before & (mode == "full"), "is recorded as skipped; in full mode no attack is"),
        (~skipped & before & wide.notna() & (mode != "full"), "is not skipped, though an earlier attack broke it"),
    )
    for cells, what in cases:
        for i, j in np.argwhere(cells.to_numpy()):
            yield Mismatch(what, int(wide.index[i]), attacks[j])
