"""Runs a stored result again, and compares the new records with the stored ones."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pandas as pd
from torch import nn

from robbench.classifier.answers import describe_other_answers
from robbench.core.errors import ResultError
from robbench.core.stats import mcnemar
from robbench.core.types import Status
from robbench.core.words import format_count, format_goal
from robbench.evaluation.inputs import make_probe
from robbench.evaluation.options import Options, check_names
from robbench.evaluation.progress import Reporter
from robbench.evaluation.request import RunRequest
from robbench.evaluation.run import make_run, run_here
from robbench.recheck.recall import ReproduceFields, find_result, recall_spec, recall_target
from robbench.recheck.verify import verify
from robbench.results.adversarials import FILE
from robbench.results.differences import list_differences
from robbench.results.places import locate_result
from robbench.results.reader import read_vouched, read_vouched_rows
from robbench.results.schema import ResultFile
from robbench.results.store import COLUMNS, read_rows
from robbench.suite import CUSTOM, SuiteSource

__all__ = ["Difference", "Reproduction", "reproduce"]

_ATTACKED = {Status.BROKEN, Status.ROBUST, Status.SKIPPED}
_LEVEL = 0.05  # significance level of a shift, shared by the attacks of a suite
_CIRCUMSTANCES = ("hardware", "versions", "environment")


@dataclass(frozen=True)
class Difference:
    """One value that differs between the stored and the new record of a sample and an attack.

    Attributes:
        sample: official index of the sample.
        attack: name of the attack.
        column: name of the column. `status` is the verdict.
        stored: the stored value.
        again: the value of the new run.
    """

    sample: int
    attack: str
    column: str
    stored: Any
    again: Any

    def __str__(self) -> str:
        """Print as `sample 907, PGD-10-CW: status was robust, is broken`."""
        return f"sample {self.sample}, {self.attack}: {self.column} was {self.stored}, is {self.again}"


@dataclass(frozen=True, eq=False, repr=False)
class Reproduction:
    """The comparison of a stored result with a new run.

    A record promises the clean verdict and the worst case of every image, the verdicts of each attack up to chance, and
    its stored adversarial examples. It does not promise the verdict of one attack on one image on another machine. If a
    gradient is zero up to rounding, its signs are those of rounding errors.

    Attributes:
        stored: the stored result.
        again: the result of the new run.
        n: number of compared images.
        records: number of compared records, one an image and attack.
        matters: a sentence for each difference that breaks a promise of the record. If it is empty, the record holds.
        verdicts: the differences in status.
        details: the differences in another column, for records with the same status. Wall time is not compared.
        circumstances: the differences in hardware, versions and environment: field, stored value, new value.
    """

    stored: ResultFile
    again: ResultFile
    n: int
    records: int
    matters: list[str]
    verdicts: list[Difference]
    details: list[Difference]
    circumstances: list[tuple[str, Any, Any]]

    def __repr__(self) -> str:
        """Return the conclusion in one line."""
        return f"<Reproduction {self.lines(0)[-1]}>"

    def __str__(self) -> str:
        """Print what `robbench reproduce` prints."""
        return "\n".join(self.lines())

    def as_json(self) -> dict[str, Any]:
        """Return the content of `robbench reproduce --json`."""
        r = self.stored
        return {
            "run_id": r.run_id,
            "dataset": r.dataset,
            "model": r.model,
            "suite": r.suite,
            "n": self.n,
            "records": self.records,
            "equal": not self.matters and not self.verdicts and not self.details,
            "holds": not self.matters,
            "conclusion": self.conclude(),
            "matters": self.matters,
            "verdicts": [vars(d) for d in self.verdicts],
            "details": [vars(d) for d in self.details],
            "circumstances": [{"field": f, "stored": a, "now": b} for f, a, b in self.circumstances],
        }

    def lines(self, most: int = 3) -> list[str]:
        """Return the lines that `robbench reproduce` prints, with at most `most` differences of each kind."""
        found = [f"circumstances: {f} was {a}, is {b}" for f, a, b in self.circumstances]
        kinds: list[tuple[str, Sequence[object]]] = [
            ("record differs", self.details),
            ("verdict differs", self.verdicts),
            ("matters", self.matters),
        ]
        for kind, differences in kinds:
            found += [f"{kind}: {d}" for d in differences[:most]]
            if len(differences) > most:
                found.append(f"{kind}: {len(differences) - most} more (--json lists all)")
        r = self.stored
        goal = f"{r.threat.norm} {r.threat.eps}{format_goal(r.identity)}"
        about = f"{r.dataset}/{r.model} · {r.suite} · {goal}, {format_count(self.n, 'image')}"
        return [*found, f"{about}: {self.conclude()}"]

    def conclude(self) -> str:
        """Say in one sentence whether the differences matter."""
        verdicts = f"{len(self.verdicts)} of {self.records} verdicts differ"
        if self.matters:
            return f"the record does NOT hold here: {len(self.matters)} differences matter ({verdicts})."
        if self.verdicts:
            return (
                f"the record holds. {verdicts}, of single attacks on images whose worst case is equal. That does not "
                "matter: rounding errors decide such verdicts."
            )
        if self.details:
            return f"the record holds. All verdicts are equal; {len(self.details)} values of other columns differ."
        return "the record holds, equal record by record."


def reproduce(
    result: str | Path,
    model: str | nn.Module | None = None,
    *,
    suite: SuiteSource | None = None,
    samples: int | None = None,
    surrogate: str | None = None,
    reporter: Reporter | None = None,
    **fields: Unpack[ReproduceFields],
) -> Reproduction:
    """Run a stored result again, with its batch width and seeds, and compare the records. Stored files do not change.

    Args:
        result: the folder of a result, or its result.json.
        model: the model, given as for `evaluate`; None means the registered model that the result names. A source is
            loaded only if the user gives it.
        suite: the suite's file or the list of attacks, if the suite is not a built-in one.
        samples: number of images to compare, the first ones of the result; None means all.
        surrogate: the model that transfer attacks used, if the user named it then. A file alone loads no model.
        reporter: gets messages about the progress.
        **fields: x and y are the images and labels of the result, if the user gave them in Python. architecture,
            mean, std, device, data_dir and models are those of `evaluate`.

    Raises:
        ResultError: the result does not exist, or the identity of the new run differs (weights, data, attacks ...), or
            the model answers differently since. The message says what differs.
        RobbenchError: the model, the data or the suite cannot be loaded.
    """
    check_names(fields, ReproduceFields)
    options = replace(Options.take({**fields, "surrogate": surrogate}), samples=samples)
    path = find_result(result)
    stored, rows = read_vouched(path), read_vouched_rows(path)
    if stored.suite == CUSTOM and suite is None:
        raise ResultError(
            f"{path}: the result has a suite {CUSTOM!r}, and a result does not hold such a suite. Give the list of "
            "attacks (in Python: suite=) or the suite file (--suite)."
        )
    if stored.overrides.get("surrogate") and surrogate is None:
        raise ResultError(f"{path}: give the surrogate of the result: --surrogate {stored.overrides['surrogate']}.")
    with tempfile.TemporaryDirectory(prefix="robbench-") as folder:
        options = replace(
            options,
            norm=stored.overrides.get("norm"),
            eps=stored.overrides.get("eps"),
            gradients=stored.overrides.get("gradients"),
            one_by_one="one_by_one" in stored.overrides,
            target=recall_target(stored, options.target),
            levels=stored.identity.get("levels"),
            samples=min(options.samples or stored.n, stored.n),
            seed=stored.seed,
            sample_seed=stored.identity.get("sample_seed"),
            lanes=stored.lanes,
            results=folder,
        )
        spec = recall_spec(stored, model, fields)
        run = make_run(RunRequest(spec, suite or stored.suite, options, stored.identity), reporter)
        assert run.store is not None, "the options name a folder"
        run.store.require_identity(stored.identity, run.title())
        if change := make_probe(run.target, run.images, run.lanes).describe_change(stored.answers):
            raise ResultError(describe_other_answers(path, change))
        again = run_here(run)
        now = read_rows(locate_result(Path(folder), again) / "outcomes.parquet")
    rows = rows[rows["sample"].isin(now["sample"])]
    verdicts, details = _compare_records(rows, now)
    matters = [*_find_broken_promises(rows, now, verdicts, details), *_find_shifts(verdicts, len(again.attacks))]
    if path.with_name(FILE).exists():
        matters += [f"stored result: {m}" for m in verify(path, model, **fields).refuted]
    circumstances = [
        (f"{name}.{field}".rstrip("."), a, b)
        for name in _CIRCUMSTANCES
        if getattr(stored, name)  # results of older versions have no environment
        for field, a, b in list_differences("", getattr(stored, name), getattr(again, name))
    ]
    return Reproduction(stored, again, again.n, len(now), matters, verdicts, details, circumstances)


def _compare_records(stored: pd.DataFrame, again: pd.DataFrame) -> tuple[list[Difference], list[Difference]]:
    """Return the differences in status, and the other differences of records with the same status."""
    keys = ["sample", "attack"]
    both = stored.merge(again, on=keys, how="outer", suffixes=("", " now"))
    both["status"], both["status now"] = (both[c].fillna("nothing") for c in ("status", "status now"))
    verdicts = _find_differences(both, "status")
    same = both[both["status"] == both["status now"]]
    rest = [c for c in COLUMNS if c not in (*keys, "status", "seconds")]
    return verdicts, [d for column in rest for d in _find_differences(same, column)]


def _find_broken_promises(
    rows: pd.DataFrame, again: pd.DataFrame, verdicts: list[Difference], details: list[Difference]
) -> list[str]:
    """Describe the images whose label, clean verdict or worst case differs, and those that lack records."""
    found: dict[int, str] = {}
    for d in [*verdicts, *details]:
        if d.column == "label" or (d.column == "status" and not {d.stored, d.again} <= _ATTACKED):
            found.setdefault(d.sample, str(d))
    was, now = (r["status"].eq(Status.BROKEN).groupby(r["sample"]).any() for r in (rows, again))
    for sample, before, after in pd.concat([was, now], axis=1).itertuples():
        if before != after:
            words = ["broken" if broken else "not broken" for broken in (before, after)]
            found.setdefault(int(sample), f"sample {sample}: the worst case was {words[0]}, is {words[1]}")
    return list(found.values())


def _find_shifts(verdicts: list[Difference], attacks: int) -> Iterator[str]:
    """Describe the attacks whose verdicts differ more often in one direction than chance explains."""
    for name in dict.fromkeys(d.attack for d in verdicts):
        flips = Counter((d.stored, d.again) for d in verdicts if d.attack == name)
        weaker, stronger = flips[Status.BROKEN, Status.ROBUST], flips[Status.ROBUST, Status.BROKEN]
        if (p := mcnemar(weaker, stronger)) < _LEVEL / attacks:
            yield (
                f"{name}: {weaker} verdicts went from broken to robust and {stronger} from robust to broken "
                f"(p = {p:.2g}). Rounding errors flip verdicts both ways."
            )


def _find_differences(both: pd.DataFrame, column: str) -> list[Difference]:
    was, now = both[column], both[f"{column} now"]
    differs = np.asarray((was != now) & ~(was.isna() & now.isna()))
    found = both.loc[differs, ["sample", "attack", column, f"{column} now"]]
    return [
        Difference(int(s), str(a), column, _to_python(b), _to_python(c)) for s, a, b, c in found.itertuples(index=False)
    ]


def _to_python(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
