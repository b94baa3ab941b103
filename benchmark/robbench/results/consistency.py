"""Check without the model that the parts of a stored result agree with each other. Imports no torch."""

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
    """A contradiction in a stored result. It concerns one record, one sample, or the files as a whole."""

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

    def __str__(self) -> str:
        """Print the verdict in one line."""
        r = self.result
        tail = f", {len(self.borderline)} within rounding of the boundary" if self.borderline else ""
        return (
            f"{r.dataset}/{r.model} · {r.suite} · {r.threat.norm} {r.threat.eps}: {self.confirmed} of {self.breaks} "
            f"breaks of {r.n} images confirmed, {len(self.refuted)} mismatches{tail}."
        )


def find_summary_mismatches(stored: ResultFile, rows: pd.DataFrame) -> Iterator[Mismatch]:
    """Compute result.json again from its identity and the records. Yield one mismatch per field that differs."""
    identity = stored.identity
    try:
        suite = identity["suite"]
        expected = summarize(
            rows,
            attacks={a["name"]: {k: v for k, v in a.items() if k != "name"} for a in identity["attacks"]},
            flags={k: v for k, v in stored.flags.items() if k not in MEASURED_FLAGS},
            identity=identity,
            threat=parse_threat(identity["threat"]["norm"], identity["threat"]["eps"]),
            suite=Suite(suite["name"], 1, "", "", suite["judge"], suite["mode"], {}, ()),
            seed=identity["seed"],
            **{name: getattr(stored, name) for name in _KEPT},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        yield Mismatch(f"result.json: its identity cannot be read ({type(error).__name__}: {error})")
        return
    for field, given, derived in _differences(stored.model_dump(mode="json"), expected.model_dump(mode="json")):
        yield Mismatch(f"result.json: {field} is {given}; {derived} follows from outcomes.parquet and the identity")


_KEPT = (
    "model", "dataset", "overrides", "selection", "lanes", "hardware", "versions", "environment", "date", "paper",
    "wall_seconds",
)  # fmt: skip
"""Fields that do not follow from other data. They are taken as stored."""


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
    known = rows["attack"].isin(attacks) & rows["status"].isin(list(Status))
    for sample, attack, status in rows.loc[~known, ["sample", "attack", "status"]].itertuples(index=False):
        yield Mismatch(f"unknown attack, or unknown status {status!r}; allowed: {', '.join(Status)}", sample, attack)
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
    if mode == "challenge":  # the other attacks skip only what the first attack broke
        broken.iloc[:, 1:] = False
    before = broken.cumsum(axis=1).shift(1, axis=1, fill_value=0) > 0
    skipped = wide == Status.SKIPPED
    cases = (
        (wide.isna(), "is not recorded"),
        (skipped & ~before, "is recorded as skipped, though no earlier attack broke the sample"),
        (skipped & before & (mode == "full"), "is recorded as skipped; in full mode no attack is skipped"),
        (~skipped & before & wide.notna() & (mode != "full"), "is not skipped, though an earlier attack broke it"),
    )
    for cells, what in cases:
        for i, j in np.argwhere(cells.to_numpy()):
            yield Mismatch(what, int(wide.index[i]), attacks[j])
