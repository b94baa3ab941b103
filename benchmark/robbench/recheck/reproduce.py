"""Runs a stored result again, and compares the new records with the stored ones."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pandas as pd
from torch import nn

from robbench.classifier.answers import describe_other_answers
from robbench.core.errors import ResultError
from robbench.core.types import format_ids
from robbench.evaluation.inputs import make_probe
from robbench.evaluation.options import Options, check_names
from robbench.evaluation.progress import Reporter
from robbench.evaluation.request import RunRequest
from robbench.evaluation.run import make_run, run_here
from robbench.recheck.recall import ReproduceFields, recall_spec
from robbench.results.reader import read_vouched, read_vouched_rows
from robbench.results.schema import ResultFile
from robbench.results.store import COLUMNS, list_differences, locate_result, read_rows
from robbench.suite import CUSTOM, SuiteSource

__all__ = ["Difference", "Reproduction", "reproduce"]

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


@dataclass(frozen=True, eq=False)
class Reproduction:
    """The comparison of a stored result with a new run.

    Attributes:
        stored: the stored result.
        again: the result of the new run.
        n: number of compared images.
        verdicts: the differences in status.
        details: the differences in another column, for records with the same status. Wall time is not compared.
        circumstances: the differences in hardware, versions and environment: field, stored value, new value.
    """

    stored: ResultFile
    again: ResultFile
    n: int
    verdicts: list[Difference]
    details: list[Difference]
    circumstances: list[tuple[str, Any, Any]]

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
            "equal": not self.verdicts and not self.details,
            "verdicts": [vars(d) for d in self.verdicts],
            "details": [vars(d) for d in self.details],
            "circumstances": [{"field": f, "stored": a, "now": b} for f, a, b in self.circumstances],
        }

    def lines(self, most: int = 50) -> list[str]:
        """Return the lines that `robbench reproduce` prints, with at most `most` differences of each kind."""
        found = []
        for kind, records in (("verdict", self.verdicts), ("record", self.details)):
            found += [f"{kind} differs: {d}" for d in records[:most]]
            if len(records) > most:
                found.append(f"{kind} differs: {len(records) - most} more (--json lists all)")
        found += [f"circumstances: {f} was {a}, is {b}" for f, a, b in self.circumstances]
        r = self.stored
        about = f"{r.dataset}/{r.model} · {r.suite} · {r.threat.norm} {r.threat.eps}, {self.n} images"
        if self.verdicts:
            flipped = sorted({d.sample for d in self.verdicts})
            return [*found, f"{about}: {len(self.verdicts)} verdicts differ, of {format_ids(flipped)}."]
        if self.details:
            return [*found, f"{about}: all verdicts equal; {len(self.details)} differences in other columns."]
        return [*found, f"{about}: equal, record by record."]


def reproduce(
    result: str | Path,
    model: str | nn.Module | None = None,
    *,
    suite: SuiteSource | None = None,
    samples: int | None = None,
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
        reporter: gets messages about the progress.
        **fields: x and y are the images and labels of the result, if the user gave them in Python. architecture,
            mean, std, device, data_dir and models are those of `evaluate`.

    Raises:
        ResultError: the result does not exist, or the identity of the new run differs (weights, data, attacks ...), or
            the model answers differently since. The message says what differs.
        RobbenchError: the model, the data or the suite cannot be loaded.
    """
    check_names(fields, ReproduceFields)
    options = replace(Options.take(fields), samples=samples)
    path = Path(result)
    path = path / "result.json" if path.is_dir() else path
    stored, rows = read_vouched(path), read_vouched_rows(path)
    if stored.suite == CUSTOM and suite is None:
        raise ResultError(
            f"{path}: the result has a suite {CUSTOM!r}, and a result does not hold such a suite. Give the list of "
            "attacks (in Python: suite=) or the suite file (--suite)."
        )
    with tempfile.TemporaryDirectory(prefix="robbench-") as folder:
        options = replace(
            options,
            norm=stored.overrides.get("norm"),
            eps=stored.overrides.get("eps"),
            gradients=stored.overrides.get("gradients"),
            one_by_one="one_by_one" in stored.overrides,
            samples=min(options.samples or stored.n, stored.n),
            seed=stored.seed,
            sample_seed=stored.identity.get("sample_seed"),
            lanes=stored.lanes,
            results=folder,
        )
        spec = recall_spec(stored, model, fields)
        run = make_run(RunRequest(spec, suite or stored.suite, options), reporter)
        assert run.store is not None, "the options name a folder"
        run.store.require_identity(stored.identity, run.title())
        if change := make_probe(run.target, run.images, run.lanes).describe_change(stored.answers):
            raise ResultError(describe_other_answers(path, change))
        again = run_here(run)
        now = read_rows(locate_result(Path(folder), again) / "outcomes.parquet")
    verdicts, details = _compare_records(rows[rows["sample"].isin(now["sample"])], now)
    circumstances = [
        (f"{name}.{field}".rstrip("."), a, b)
        for name in _CIRCUMSTANCES
        if getattr(stored, name)  # results of older versions have no environment
        for field, a, b in list_differences("", getattr(stored, name), getattr(again, name))
    ]
    return Reproduction(stored, again, again.n, verdicts, details, circumstances)


def _compare_records(stored: pd.DataFrame, again: pd.DataFrame) -> tuple[list[Difference], list[Difference]]:
    """Return the differences in status, and the other differences of records with the same status."""
    keys = ["sample", "attack"]
    both = stored.merge(again, on=keys, how="outer", suffixes=("", " now"))
    both["status"], both["status now"] = (both[c].fillna("nothing") for c in ("status", "status now"))
    verdicts = _find_differences(both, "status")
    same = both[both["status"] == both["status now"]]
    rest = [c for c in COLUMNS if c not in (*keys, "status", "seconds")]
    return verdicts, [d for column in rest for d in _find_differences(same, column)]


def _find_differences(both: pd.DataFrame, column: str) -> list[Difference]:
    was, now = both[column], both[f"{column} now"]
    differs = np.asarray((was != now) & ~(was.isna() & now.isna()))
    found = both.loc[differs, ["sample", "attack", column, f"{column} now"]]
    return [
        Difference(int(s), str(a), column, _to_python(b), _to_python(c)) for s, a, b, c in found.itertuples(index=False)
    ]


def _to_python(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
