"""Accuracy over the radius: the results of one suite at several radii beside each other, as a table, CSV and a curve.

A break at a smaller radius is one at every larger radius too. The worst case here counts it so; what the attacks of the
larger radius missed of it is told beside.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pandas as pd

from robbench.core.errors import ResultError
from robbench.core.files import write_atomically
from robbench.core.stats import mcnemar
from robbench.report.figures.canvas import MARKERS, OKABE_ITO
from robbench.report.leaderboard import percent, with_interval
from robbench.results.schema import Accuracy, ResultFile
from robbench.results.store import locate_result, read_rows
from robbench.results.summary import find_robust_samples, make_accuracy

__all__ = ["Point", "Sweep", "draw_sweep", "print_sweep", "standing", "sweep", "write_sweep"]

_P = 0.05  # a rise that chance explains no better than this is told
_COLOURS = [colour for name, colour in OKABE_ITO.items() if name != "black"]  # which is the worst case's


@dataclass(frozen=True)
class Point:
    """One radius.

    Attributes:
        eps: the radius, as people write it.
        attacks: robust accuracy by attack, as measured at this radius.
        worst_case: broken by no attack at this radius or a smaller one of the sweep.
        measured: broken by no attack at this radius.
        missed: images broken at a smaller radius that no attack broke at this one.
        run_id: of the result; none for radius 0, where nothing is attacked.
    """

    eps: str
    attacks: dict[str, Accuracy]
    worst_case: Accuracy
    measured: Accuracy
    missed: int
    run_id: str | None


@dataclass(frozen=True)
class Sweep:
    """One model and suite over several radii.

    Attributes:
        title: of the table and the curve.
        n: number of images.
        stem: path of the CSV and the PNG without their suffix, below the results tree.
        points: by increasing radius.
        notes: what a reader must know.
    """

    title: str
    n: int
    stem: str
    points: list[Point]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Say it for machines."""
        points = []
        for p in self.points:
            figures = {"worst_case": p.worst_case.model_dump(), "measured": p.measured.model_dump()}
            attacks = {name: a.model_dump() for name, a in p.attacks.items()}
            points.append({"eps": p.eps, "attacks": attacks, **figures, "missed": p.missed, "run_id": p.run_id})
        return {**asdict(replace(self, points=[])), "points": points}


def sweep(root: Path, results: Sequence[ResultFile], clean: bool = False) -> Sweep:
    """Put the results of a sweep beside each other.

    Args:
        root: the results tree that holds their records.
        results: of one model, suite and norm, on the same images, at different radii.
        clean: begin with radius 0: the clean accuracy, for which nothing is attacked.

    Raises:
        ResultError: the records of a result are damaged, or the results are not on the same images.
    """
    results = sorted(results, key=_radius)
    first = results[0]
    columns = [standing(root, r) for r in results]
    samples = columns[0].index
    if any(not c.index.equals(samples) for c in columns):
        raise ResultError(f"The results of the sweep over {first.model} are not on the same images; run it again.")
    right, n = columns[0]["clean"], len(samples)
    points = []
    if clean:
        all_clean = make_accuracy(int(right.sum()), n)
        points.append(Point("0", {a.name: all_clean for a in first.attacks}, all_clean, all_clean, 0, None))
    left = right
    for r, c in zip(results, columns, strict=True):
        missed = int((c["worst case"] & ~left).sum())
        left = left & c["worst case"]
        attacks = {a.name: make_accuracy(int(c[a.name].sum()), n) for a in r.attacks}
        measured = make_accuracy(int(c["worst case"].sum()), n)
        points.append(Point(r.threat.eps, attacks, make_accuracy(int(left.sum()), n), measured, missed, r.run_id))
    other = "".join(f"-{k}-{v}" for k, v in sorted(first.overrides.items()) if k not in ("eps", "norm"))
    title = f"{first.dataset}/{first.model} · {first.suite} · {first.threat.norm}"
    stem = f"{first.dataset}/{first.model}/{first.suite}@sweep-{first.threat.norm}{other}"
    norm = first.threat.norm
    return Sweep(title, n, stem, points, [*_misses(points, norm), *_rises(points, columns, norm)])


def _radius(result: ResultFile) -> Fraction:
    return Fraction(result.identity["threat"]["eps"])


def standing(root: Path, result: ResultFile) -> pd.DataFrame:
    """Tell per image and attack whether it stands: after all attacks so far (cascade), or the first too (challenge)."""
    path = locate_result(root, result) / "outcomes.parquet"
    rows = read_rows(path)
    # Records lie in the order in which samples are selected, and there may be more than were asked for this time.
    rows = rows[rows["sample"].isin(rows["sample"].unique()[: result.n])]
    names = [a.name for a in result.attacks]
    columns = {"clean": ~(rows["status"] == "misclassified").groupby(rows["sample"]).any()}
    for i, name in enumerate(names):
        seen = {"cascade": names[: i + 1], "challenge": [names[0], name]}.get(result.mode, [name])
        columns[name] = find_robust_samples(rows[rows["attack"].isin(seen)])
    columns["worst case"] = find_robust_samples(rows)
    return pd.DataFrame(columns)


def _misses(points: list[Point], norm: str) -> list[str]:
    return [
        f"{norm} {p.eps}: the attacks missed {p.missed} images that are broken at a smaller radius. They count as "
        f"broken: worst case {percent(p.worst_case)} instead of the measured {percent(p.measured)}."
        for p in points
        if p.missed
    ]


def _rises(points: list[Point], columns: list[pd.DataFrame], norm: str) -> list[str]:
    """Name every attack under which more images stand at a radius than at the one before."""
    attacked = [p for p in points if p.run_id is not None]
    notes = []
    for i in range(1, len(columns)):
        for name in [c for c in columns[i] if c != "clean"]:
            small, large = columns[i - 1][name], columns[i][name]
            gained, lost = int((large & ~small).sum()), int((small & ~large).sum())
            p = mcnemar(lost, gained)
            if gained > lost and p < _P:
                notes.append(
                    f"{name}: robust accuracy RISES from {100 * small.mean():.1f} at {norm} {attacked[i - 1].eps} to "
                    f"{100 * large.mean():.1f} at {attacked[i].eps} ({gained} images stand only at the larger radius, "
                    f"{lost} only at the smaller; p = {p:.2g}). True robustness cannot: the attack fails there. "
                    "Suspect masked gradients, too few steps or too large ones."
                )
    return notes


def write_sweep(found: Sweep, root: Path) -> tuple[Path, Path]:
    """Write the CSV and the PNG; returns their paths."""
    rows = [
        {
            "eps": p.eps,
            **{name: a.value for name, a in p.attacks.items()},
            "worst_case": p.worst_case.value,
            "worst_case_low": p.worst_case.low,
            "worst_case_high": p.worst_case.high,
            "measured": p.measured.value,
            "missed": p.missed,
            "n": found.n,
            "run_id": p.run_id or "",
        }
        for p in found.points
    ]
    table, curve = (root / f"{found.stem}.{suffix}" for suffix in ("csv", "png"))
    write_atomically(table, pd.DataFrame(rows).to_csv(index=False).encode())
    write_atomically(curve, draw_sweep(found))
    return table, curve


def print_sweep(found: Sweep) -> None:
    """Print the table and the notes."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    view = Table(title=f"{found.title}: accuracy, %, n = {found.n}", title_justify="left", pad_edge=False)
    for column in ("ε", *found.points[0].attacks, "Worst case [95 %]", "Missed"):
        view.add_column(column, justify="right")
    for p in found.points:
        view.add_row(p.eps, *map(percent, p.attacks.values()), with_interval(p.worst_case), str(p.missed))
    console.print(view)
    for note in found.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}", soft_wrap=True)


def draw_sweep(found: Sweep) -> bytes:
    """Draw accuracy over the radius, as the bytes of a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    at = [float(Fraction(p.eps)) for p in found.points]
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, name in enumerate(found.points[0].attacks):
        values = [100 * p.attacks[name].value for p in found.points]
        # Two attacks of one colour, should there be so many, differ in their marker and dashes.
        marker = MARKERS[(i + i // len(_COLOURS)) % len(MARKERS)]
        dashes = "-" if i < len(_COLOURS) else "--"
        axes.plot(
            at, values, color=_COLOURS[i % len(_COLOURS)], marker=marker, linestyle=dashes, lw=1.2, ms=5, label=name
        )
    low, high = ([100 * getattr(p.worst_case, end) for p in found.points] for end in ("low", "high"))
    axes.fill_between(at, low, high, color="black", alpha=0.15, lw=0)
    worst = [100 * p.worst_case.value for p in found.points]
    axes.plot(at, worst, color="black", lw=2.5, label="worst case, 95 % interval", zorder=5)
    axes.set_xticks(at, [p.eps for p in found.points], rotation=45 if len(at) > 8 else 0)
    axes.set_xlim(min(at), max(at))
    axes.set_ylim(0, 100)
    axes.set_xlabel(f"radius ε ({found.title.rsplit(' · ', 1)[1]})")
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"{found.title}, n = {found.n}")
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    content = io.BytesIO()
    # Without the version in it, the same figure gives the same bytes.
    figure.savefig(content, dpi=130, metadata={"Software": None})
    return content.getvalue()
