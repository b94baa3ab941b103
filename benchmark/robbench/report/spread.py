"""Compares the results of one suite on one model with several seeds of the attacks.

Every seed has its own stored result. In the worst case over seeds, an image is broken if it is broken with any seed.
The mean and range over seeds show how much of a robust accuracy is chance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from robbench.core.errors import ResultError
from robbench.core.files import digest, parse_json, read_json, set_aside, write_atomically
from robbench.core.words import format_goal
from robbench.report.console import make_console
from robbench.report.leaderboard import format_percent, format_with_interval
from robbench.report.sweep import read_robust_table
from robbench.report.tables import print_rows
from robbench.results.schema import Accuracy, ResultFile
from robbench.results.summary import make_accuracy

__all__ = ["AttackSpread", "Spread", "build_spread", "print_spreads", "write_spread"]

_MOST_BYTES = 2**22  # of the JSON file


@dataclass(frozen=True)
class AttackSpread:
    """The robust accuracies of one attack with several seeds.

    Attributes:
        name: name of the attack, or `worst case` for all attacks of the suite together.
        values: robust accuracy with each seed, in [0, 1].
        worst: robust accuracy over all seeds. An image is broken if it is broken with any seed.
    """

    name: str
    values: list[float]
    worst: Accuracy

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return fmean(self.values)

    def as_json(self) -> dict[str, Any]:
        """Return the data for JSON."""
        low, high = min(self.values), max(self.values)
        numbers = {"values": self.values, "mean": self.mean, "low": low, "high": high}
        return {"name": self.name, **numbers, "worst_over_seeds": self.worst.model_dump()}


@dataclass(frozen=True)
class Spread:
    """The results of one suite on one model with several seeds.

    Attributes:
        title: title of the table.
        model: full name of the model, such as `digits/at`.
        n: number of images.
        seeds: seeds of the attacks' random numbers.
        run_ids: run_id of the result with each seed.
        clean: clean accuracy.
        attacks: the attacks, then the worst case.
        stem: path of the JSON file without its suffix, relative to the results tree.
    """

    title: str
    model: str
    n: int
    seeds: list[int]
    run_ids: list[str]
    clean: Accuracy
    attacks: list[AttackSpread]
    stem: str

    def as_json(self) -> dict[str, Any]:
        """Return the data for JSON."""
        clean, attacks = self.clean.model_dump(), [a.as_json() for a in self.attacks]
        return {"schema_version": 1, **asdict(self), "clean": clean, "attacks": attacks}


def build_spread(root: Path, results: Sequence[ResultFile]) -> Spread:
    """Combine the results of several seeds.

    Args:
        root: the results tree that holds the records.
        results: results of one model, suite and threat, on the same images, with different seeds.

    Raises:
        ResultError: the records of a result are damaged, or the results are not on the same images.
    """
    first, seeds = results[0], [r.seed for r in results]
    columns = [read_robust_table(root, r) for r in results]
    if any(not c.index.equals(columns[0].index) for c in columns):
        raise ResultError(f"The results over seeds of {first.model} are not on the same images. Run the seeds again.")
    n = len(columns[0])
    attacks = []
    for name in [*(a.name for a in first.attacks), "worst case"]:
        robust = pd.concat([c[name] for c in columns], axis=1)
        values = [int(v) / n for v in robust.sum()]
        attacks.append(AttackSpread(name, values, make_accuracy(int(robust.all(axis=1).sum()), n)))
    other = "".join(f"-{k}-{v.replace('/', 'of')}" for k, v in sorted(first.overrides.items()) if k != "seed")
    threat = f"{first.threat.norm} {first.threat.eps}{format_goal(first.identity)}"
    stem = f"{first.dataset}/{first.model}/{first.suite}@seeds-{min(seeds)}-{max(seeds)}{other}"
    run_ids = [r.run_id for r in results]
    return Spread(
        title=f"{first.dataset}/{first.model} · {first.suite} · {threat}",
        model=f"{first.dataset}/{first.model}",
        n=n,
        seeds=seeds,
        run_ids=run_ids,
        clean=first.clean_accuracy,
        attacks=attacks,
        stem=_choose_stem(root, stem, run_ids, n),
    )


def _choose_stem(root: Path, stem: str, run_ids: list[str], n: int) -> str:
    """Return the name of the file. A stored file of other runs or of more images is kept under its own name."""
    path = root / f"{stem}.json"
    try:
        stored = parse_json(read_json(path, _MOST_BYTES))
        is_kept = set(stored["run_ids"]) != set(run_ids) or stored["n"] > n
    except FileNotFoundError:
        return stem
    except (OSError, KeyError, RecursionError, TypeError, ValueError):
        set_aside(path, path.parent)
        return stem
    return f"{stem}-{digest({'runs': run_ids, 'n': n})[:8]}" if is_kept else stem


def write_spread(spread: Spread, root: Path) -> Path:
    """Write the JSON file into the results tree and return its path."""
    path = root / f"{spread.stem}.json"
    write_atomically(path, (json.dumps(spread.as_json(), indent=2, ensure_ascii=False) + "\n").encode())
    return path


def print_spreads(spreads: Sequence[Spread]) -> None:
    """Print one table for each spread."""
    console = make_console()
    for s in spreads:
        seeds = ", ".join(map(str, s.seeds))
        title = f"{s.title}: robust accuracy, %, n = {s.n}, seeds {seeds}; clean {format_percent(s.clean)}"
        numbers = ("Mean", "Range", "Worst over seeds [95 %]")
        rows = []
        for a in s.attacks:
            low, high = 100 * min(a.values), 100 * max(a.values)
            cells = (f"{100 * a.mean:.1f}", f"{low:.1f} to {high:.1f}", format_with_interval(a.worst))
            rows.append({"Attack": a.name, **dict(zip(numbers, cells, strict=True))})
        print_rows(console, rows, title=title, right=numbers)
