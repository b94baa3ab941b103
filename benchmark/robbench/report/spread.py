"""The spread over seeds: results of one run with several seeds of the attacks beside each other.

Every seed's result is a result of its own. An image that one seed breaks is broken, so the worst case here is the worst
over seeds, image by image; mean and range over seeds say how much of an attack's figure is chance.
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
from robbench.core.files import write_atomically
from robbench.report.leaderboard import percent, with_interval
from robbench.report.sweep import standing
from robbench.results.schema import Accuracy, ResultFile
from robbench.results.summary import make_accuracy

__all__ = ["AttackSpread", "Spread", "print_spreads", "spread", "write_spread"]


@dataclass(frozen=True)
class AttackSpread:
    """One attack over the seeds.

    Attributes:
        name: the attack's, or `worst case` for what all of them leave standing under one seed.
        values: robust accuracy by seed, in [0, 1].
        worst: robust accuracy where an image that any seed breaks is broken.
    """

    name: str
    values: list[float]
    worst: Accuracy

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.values)

    def as_json(self) -> dict[str, Any]:
        """Say it for machines."""
        low, high = min(self.values), max(self.values)
        figures = {"values": self.values, "mean": self.mean, "low": low, "high": high}
        return {"name": self.name, **figures, "worst_over_seeds": self.worst.model_dump()}


@dataclass(frozen=True)
class Spread:
    """One model and suite over several seeds.

    Attributes:
        title: of the table.
        model: `digits/at`.
        n: number of images.
        seeds: of the attacks' random numbers.
        run_ids: of the results, by seed.
        clean: clean accuracy.
        attacks: one per attack, then the worst case.
        stem: path of the file without its suffix, below the results tree.
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
        """Say it for machines."""
        clean, attacks = self.clean.model_dump(), [a.as_json() for a in self.attacks]
        return {"schema_version": 1, **asdict(self), "clean": clean, "attacks": attacks}


def spread(root: Path, results: Sequence[ResultFile]) -> Spread:
    """Put the results of several seeds beside each other.

    Args:
        root: the results tree that holds their records.
        results: of one model, suite and threat, on the same images, with different seeds.

    Raises:
        ResultError: the records of a result are damaged, or the results are not on the same images.
    """
    first, seeds = results[0], [r.seed for r in results]
    columns = [standing(root, r) for r in results]
    if any(not c.index.equals(columns[0].index) for c in columns):
        raise ResultError(f"The results over seeds of {first.model} are not on the same images; run it again.")
    n = len(columns[0])
    attacks = []
    for name in [*(a.name for a in first.attacks), "worst case"]:
        counts = pd.concat([c[name] for c in columns], axis=1)
        values = [int(v) / n for v in counts.sum()]
        attacks.append(AttackSpread(name, values, make_accuracy(int(counts.all(axis=1).sum()), n)))
    other = "".join(f"-{k}-{v.replace('/', 'of')}" for k, v in sorted(first.overrides.items()) if k != "seed")
    threat = f"{first.threat.norm} {first.threat.eps}"
    return Spread(
        title=f"{first.dataset}/{first.model} · {first.suite} · {threat}",
        model=f"{first.dataset}/{first.model}",
        n=n,
        seeds=seeds,
        run_ids=[r.run_id for r in results],
        clean=first.clean_accuracy,
        attacks=attacks,
        stem=f"{first.dataset}/{first.model}/{first.suite}@seeds-{min(seeds)}-{max(seeds)}{other}",
    )


def write_spread(found: Spread, root: Path) -> Path:
    """Write the spread beside the results; returns its path."""
    path = root / f"{found.stem}.json"
    write_atomically(path, (json.dumps(found.as_json(), indent=2, ensure_ascii=False) + "\n").encode())
    return path


def print_spreads(spreads: Sequence[Spread]) -> None:
    """Print a table for each."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    for s in spreads:
        seeds = ", ".join(map(str, s.seeds))
        title = f"{s.title}: robust accuracy, %, n = {s.n}, seeds {seeds}; clean {percent(s.clean)}"
        view = Table(title=escape(title), title_justify="left", pad_edge=False)
        for column in ("Attack", "Mean", "Range", "Worst over seeds [95 %]"):
            view.add_column(column, justify="left" if column == "Attack" else "right")
        for a in s.attacks:
            low, high = 100 * min(a.values), 100 * max(a.values)
            cells = (a.name, f"{100 * a.mean:.1f}", f"{low:.1f} to {high:.1f}", with_interval(a.worst))
            view.add_row(*map(escape, cells), end_section=a is s.attacks[-2])
        console.print(view)
