"""Stored verdicts: how they follow from measurements, and the only way to read one for a table. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from robbench.core.errors import ResultError
from robbench.core.files import digest
from robbench.core.types import Status
from robbench.masking.checks import run_checks
from robbench.masking.compare import compare_attacks, compute_zero_share
from robbench.masking.landscape_record import read_landscape
from robbench.masking.measurements import Measurements
from robbench.masking.record import (
    FILE,
    LANDSCAPE,
    PROBE_VERSION,
    SanityFile,
    digest_landscape,
    extract_subject,
    read_sanity,
)
from robbench.masking.verdict import advise_next_suite, decide_verdict, is_too_little
from robbench.results.differences import list_differences
from robbench.results.grid import Grid
from robbench.results.reader import Damage, read_vouched, read_vouched_rows
from robbench.results.schema import ResultFile
from robbench.results.summary import make_accuracy

__all__ = [
    "UNCHECKED",
    "VerdictIndex",
    "describe_subject",
    "find_foreign_facts",
    "judge_measurements",
    "name_verdict",
    "read_verdict",
]

UNCHECKED = "unchecked"  # the verdict on a model without a sanity run on these weights and this threat
_PATTERN = f"sanity*/{FILE}"
_DAMAGED = "damaged"  # the verdict on a model whose only sanity.json is damaged


def judge_measurements(described: dict[str, Any], measurements: Measurements) -> SanityFile:
    """Add what follows from the measurements: checks, verdict and advice.

    Args:
        described: the other fields of `SanityFile`.
        measurements: the measurements.
    """
    checks = run_checks(measurements)
    verdict, decided_by = decide_verdict(checks, too_little=is_too_little(measurements, described["threat"]))
    return SanityFile(
        schema_version=1,
        **described,
        measurements=measurements,
        checks=checks,
        verdict=verdict,
        decided_by=decided_by,
        overestimation=round(100 * (measurements.pgd.value - measurements.best.value), 6),
        advice=advise_next_suite(verdict, decided_by, measurements),
    )


def describe_subject(result: ResultFile, n: int, folder: str, probes: int = PROBE_VERSION) -> dict[str, Any]:
    """Return the fields of `SanityFile` that follow from the suite's result, its folder and the number of images."""
    identity = {"suite": result.run_id, "n": n, "probes": probes}
    return {
        "identity": identity,
        "run_id": digest(identity),
        "folder": folder,
        "measured": extract_subject(result.identity),
        "model": result.model,
        "dataset": result.dataset,
        "threat": result.threat,
        "n": n,
        "seed": result.seed,
    }


def read_verdict(path: Path) -> SanityFile:
    """Read a sanity.json whose verdict follows from its measurements, which agree with the records of the suite.

    Args:
        path: the sanity.json. The result of the suite is in the same folder.

    Raises:
        ResultError: the file or the result is missing or damaged.
    """
    file = read_sanity(path)
    if foreign := find_foreign_facts(file, path.parent):
        raise ResultError(f"{path}: {foreign}. Measure again: the same `robbench sanity` command.")
    derived = {"checks", "verdict", "decided_by", "overestimation", "advice", "schema_version", "measurements"}
    rest = {name: getattr(file, name) for name in SanityFile.model_fields if name not in derived}
    judged = judge_measurements(rest, file.measurements)
    for field, given, expected in list_differences("", file.model_dump(mode="json"), judged.model_dump(mode="json")):
        raise ResultError(
            f"{path}: {field} is {given!r}; {expected!r} follows from the measurements. Judge again: the same "
            "`robbench sanity` command."
        )
    return file


def find_foreign_facts(file: SanityFile, folder: Path) -> str:
    """Explain what in a sanity.json does not follow from the other files of its folder; empty if all of it does.

    Args:
        file: the content of sanity.json.
        folder: the folder of the suite's result.

    Raises:
        ResultError: the result is missing or damaged, or landscape.parquet cannot be read.
    """
    result, rows = read_vouched(folder), read_vouched_rows(folder)
    probes = file.identity.get("probes", 0)  # measurements of older versions stay what they are
    expected = describe_subject(result, file.n, folder.name, probes) | {
        "measurements": _collect_facts(result, rows, file.n)
    }
    expected["threat"] = result.threat.model_dump()
    stored = file.model_dump(mode="json", include=set(expected))
    stored["measurements"] = {name: stored["measurements"][name] for name in expected["measurements"]}
    for field, given, derived in list_differences("", stored, expected):
        return f"{field} is {given!r}; {derived!r} follows from the result of the suite"
    if file.landscape and digest_landscape(folder) not in ("", file.landscape):
        return f"{LANDSCAPE} is not as it was written (SHA-256)"
    return ""


def _collect_facts(result: ResultFile, rows: pd.DataFrame, n: int) -> dict[str, Any]:
    """Return the measurements that follow from the records of the first n samples."""
    rows = rows[rows["sample"].isin(pd.unique(rows["sample"])[:n])]
    grid = Grid.of(rows, [a.name for a in result.attacks])
    n = len(grid.samples)
    standing, best = (n - int(lost.sum()) for lost in (grid.lost[:, 0], grid.lost.any(axis=1)))
    return {
        "n": n,
        "correct": n - int(grid.has(Status.MISCLASSIFIED)[:, 0].sum()),
        "pgd": make_accuracy(standing, n).model_dump(),
        "best": make_accuracy(best, n).model_dump(),
        "zero_gradients": compute_zero_share(result, rows),
        "nonfinite_gradients": "nonfinite_gradients" in result.flags,
        "challenges": [c.model_dump() for c in compare_attacks(result, rows)],
    }


def name_verdict(verdict: str, verdict_n: int | None, n: int) -> str:
    """Write a verdict beside a result, such as `masked (n 20)`: with its number of images where the result's differs.

    Args:
        verdict: the verdict.
        verdict_n: on how many images the verdict was measured; None if it was not measured.
        n: number of images of the result.
    """
    return verdict if verdict_n in (None, n) else f"{verdict} (n {verdict_n})"


class VerdictIndex:
    """The verdicts of a results tree, to be found by model, weights, data and threat. Files are read when asked for."""

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self._by_model: dict[str, list[SanityFile | Damage]] = {}

    def find(self, result: ResultFile) -> str:
        """Return the verdict on the same weights, data and threat as a result, "unchecked", or "damaged".

        If there are several (with other seeds), the one on the most images counts.
        """
        if file := self.find_file(result):
            return file.verdict
        if result.identity.get("target") is not None:
            return UNCHECKED
        stored = self._read(f"{result.dataset}/{result.model}")
        return _DAMAGED if any(isinstance(f, Damage) for f in stored) else UNCHECKED

    def describe(self, result: ResultFile) -> str:
        """Return the verdict of `find` as `name_verdict` writes it beside the result."""
        return name_verdict(self.find(result), self.find_n(result), result.n)

    def find_n(self, result: ResultFile) -> int | None:
        """Return on how many images the verdict of `find` was measured; None if there is none."""
        file = self.find_file(result)
        return None if file is None else file.n

    def find_file(self, result: ResultFile) -> SanityFile | None:
        """Return the sanity.json that `find` takes the verdict from; None if there is none."""
        if result.identity.get("target") is not None:
            return None  # the checks ask for any wrong class
        subject, stored = extract_subject(result.identity), self._read(f"{result.dataset}/{result.model}")
        files = [f for f in stored if isinstance(f, SanityFile) and f.measured == subject]
        return max(files, key=lambda f: (f.n, f.run_id), default=None)

    def list_damaged(self, model: str = "*/*") -> list[Damage]:
        """List the files whose verdict does not follow from their measurements and records.

        Args:
            model: full name of a model, such as `digits/at`; by default all models.
        """
        found = sorted(self.root.glob(f"{model}/{_PATTERN}")) if self.root is not None else []
        names = dict.fromkeys(f"{path.parts[-4]}/{path.parts[-3]}" for path in found)
        return [f for name in names for f in self._read(name) if isinstance(f, Damage)]

    def read_landscapes(self) -> tuple[list[tuple[SanityFile, pd.DataFrame]], list[Damage]]:
        """Read each landscape.parquet that a valid sanity.json vouches for, those on the most images last."""
        if self.root is None:
            return [], []
        found: list[tuple[SanityFile, pd.DataFrame]] = []
        damaged: list[Damage] = []
        paths = sorted(self.root.glob(f"*/*/{_PATTERN}"))
        for name in dict.fromkeys(f"{path.parts[-4]}/{path.parts[-3]}" for path in paths):
            files = [file for file in self._read(name) if isinstance(file, SanityFile) and file.landscape]
            for file in sorted(files, key=lambda f: (f.n, f.run_id)):
                path = self.root / name / file.folder / LANDSCAPE
                try:
                    found.append((file, read_landscape(path)))
                except ResultError as error:
                    damaged.append(Damage.of(self.root, path, error))
        return found, damaged

    def _read(self, model: str) -> list[SanityFile | Damage]:
        if self.root is None:
            return []
        if model not in self._by_model:
            paths = sorted((self.root / model).glob(_PATTERN))
            self._by_model[model] = [_read_in_tree(self.root, path) for path in paths]
        return self._by_model[model]


def _read_in_tree(root: Path, path: Path) -> SanityFile | Damage:
    name = path.relative_to(root)
    try:
        file = read_verdict(path)
        if (file.dataset, file.model, file.folder) != name.parts[:3]:
            raise ResultError(f"{path} is of {file.dataset}/{file.model}/{file.folder}.")
    except ResultError as error:
        return Damage.of(root, path, error)
    return file
