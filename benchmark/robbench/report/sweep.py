"""Accuracy over the radius: the results of one suite at several radii, as a table, a CSV file and a curve.

An image that is broken at a smaller radius is broken at every larger radius. The worst case of a sweep counts it so.
The table also shows how many such images the attacks at the larger radius missed.
"""

from __future__ import annotations

import csv
import glob
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pandas as pd

from robbench.core.errors import ResultError
from robbench.core.files import digest, read_bounded, set_aside, write_atomically
from robbench.core.stats import mcnemar
from robbench.core.words import format_count, format_goal
from robbench.report.console import make_console
from robbench.report.escape import format_csv
from robbench.report.figures.canvas import MARKERS, OKABE_ITO, add_caption, plain_text, shift_marks, shrink_png
from robbench.report.figures.captions import SWEEP_CAPTION
from robbench.report.leaderboard import format_percent, format_with_interval
from robbench.report.tables import fits, name_columns, print_rows, print_turned
from robbench.results.places import locate_result
from robbench.results.reader import read_results, read_vouched_rows
from robbench.results.schema import Accuracy, ResultFile
from robbench.results.summary import find_robust_samples, make_accuracy

__all__ = [
    "Point",
    "Sweep",
    "build_sweep",
    "draw_sweep",
    "extend_sweep",
    "print_sweep",
    "read_robust_table",
    "read_sweep",
    "write_sweep",
]

_MOST_BYTES = 2**22  # of the CSV file
_LEVEL = 0.05  # significance level of a rise
_COLOURS = [colour for name, colour in OKABE_ITO.items() if name != "black"]  # black is the worst case


@dataclass(frozen=True)
class Point:
    """The accuracies at one radius.

    Attributes:
        eps: the radius in its usual notation, such as 8/255.
        attacks: robust accuracy under each attack at this radius.
        worst_case: share of images that no attack breaks at this radius or at a smaller one.
        measured: share of images that no attack breaks at this radius.
        missed: number of images that are broken at a smaller radius but not at this one.
        run_id: run_id of the result; None for radius 0, where nothing is attacked.
    """

    eps: str
    attacks: dict[str, Accuracy]
    worst_case: Accuracy
    measured: Accuracy
    missed: int
    run_id: str | None


@dataclass(frozen=True)
class Sweep:
    """The results of one suite on one model at several radii.

    Attributes:
        title: title of the table and the curve.
        n: number of images.
        stem: path of the CSV and the PNG file without suffix, relative to the results tree.
        points: the radii, increasing.
        notes: warnings about the results.
    """

    title: str
    n: int
    stem: str
    points: list[Point]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return the data for JSON."""
        points = []
        for p in self.points:
            worst = {"worst_case": p.worst_case.model_dump(), "measured": p.measured.model_dump()}
            attacks = {name: a.model_dump() for name, a in p.attacks.items()}
            points.append({"eps": p.eps, "attacks": attacks, **worst, "missed": p.missed, "run_id": p.run_id})
        return {**asdict(replace(self, points=[])), "points": points}


def build_sweep(root: Path, results: Sequence[ResultFile], clean: bool = False) -> Sweep:
    """Combine the results of several radii.

    Args:
        root: the results tree that holds the records.
        results: results of one model, suite and norm, on the same images, at different radii.
        clean: add radius 0, with the clean accuracy.

    Raises:
        ResultError: the records of a result are damaged, or the results are not on the same images.
    """
    results = sorted(results, key=_radius)
    first = results[0]
    columns = [read_robust_table(root, r) for r in results]
    samples = columns[0].index
    if any(not c.index.equals(samples) for c in columns):
        raise ResultError(f"The results of the sweep of {first.model} are not on the same images. Run the sweep again.")
    correct, n = columns[0]["clean"], len(samples)
    points = []
    if clean:
        all_clean = make_accuracy(int(correct.sum()), n)
        points.append(Point("0", {a.name: all_clean for a in first.attacks}, all_clean, all_clean, 0, None))
    robust = correct  # at all radii so far
    for r, c in zip(results, columns, strict=True):
        missed = int((c["worst case"] & ~robust).sum())
        robust = robust & c["worst case"]
        attacks = {a.name: make_accuracy(int(c[a.name].sum()), n) for a in r.attacks}
        measured = make_accuracy(int(c["worst case"].sum()), n)
        points.append(Point(r.threat.eps, attacks, make_accuracy(int(robust.sum()), n), measured, missed, r.run_id))
    other = "".join(f"-{k}-{v}" for k, v in sorted(first.overrides.items()) if k not in ("eps", "norm"))
    title = f"{first.dataset}/{first.model} · {first.suite} · {first.threat.norm}{format_goal(first.identity)}"
    stem = f"{first.dataset}/{first.model}/{first.suite}@sweep-{first.threat.norm}{other}"
    norm = first.threat.norm
    return Sweep(title, n, stem, points, [*_note_missed(points, norm), *_note_rises(points, columns, norm)])


def extend_sweep(root: Path, results: Sequence[ResultFile], clean: bool = False) -> Sweep:
    """Combine the results of several radii with the sweep that is stored already.

    A stored point is taken if its result is of the same run at another radius, on at least as many images. The stored
    sweep is replaced only by one that has all of its points, on at least as many images. Otherwise the new sweep gets
    a name of its own.

    Args and errors are those of `build_sweep`.
    """
    new = build_sweep(root, results, clean)
    if (merged := _merge_stored(root, results, new)) is not None:
        return merged
    kept, own = new.stem, f"{new.stem}-{digest({'run': _describe_run(results[0]), 'n': new.n})[:8]}"
    new = replace(new, stem=own)
    note = f"{kept}.csv holds a sweep of another run or of other images. It stays as it is; this sweep is {own}.csv."
    merged = _merge_stored(root, results, new) or new
    return replace(merged, notes=[*merged.notes, note])


def _merge_stored(root: Path, results: Sequence[ResultFile], new: Sweep) -> Sweep | None:
    """Add the points of the sweep that is stored under the same name. None if a stored point would be lost."""
    path = root / f"{new.stem}.csv"
    try:
        stored = _read_points(path)
    except ResultError:
        set_aside(path, path.parent)
        return new
    if not stored:
        return new
    run, clean = _describe_run(results[0]), "" in stored or new.points[0].run_id is None
    try:
        known = read_results(root, f"{glob.escape(results[0].dataset)}/{glob.escape(results[0].model)}").results
        found = [r for r in known if r.run_id in stored and _describe_run(r) == run]
        earlier = {r.run_id: r.model_copy(update={"n": new.n}) for r in found if r.n >= new.n}
        merged = build_sweep(root, [*(earlier | {r.run_id: r for r in results}).values()], clean)
    except ResultError:  # the records of a stored point are damaged
        return None
    if not stored.keys() <= {p.run_id or "" for p in merged.points} or max(stored.values()) > new.n:
        return None
    return replace(merged, stem=new.stem)


def _describe_run(result: ResultFile) -> dict[str, Any]:
    """Return what the runs of a sweep have in common: the identity without the radius."""
    return {**result.identity, "threat": result.threat.norm}


def read_sweep(root: Path, path: Path, results: Sequence[ResultFile]) -> Sweep:
    """Combine the results that a stored sweep names. No number of its file is taken.

    Args:
        root: the results tree.
        path: the CSV file.
        results: results of the model that `read_results` vouched for.

    Raises:
        ResultError: the file is damaged, a result that it names is missing, or the results do not belong together.
    """
    stored = _read_points(path)
    named = [r for r in results if r.run_id in stored]
    if {r.run_id for r in named} != {*stored} - {""} or not named:
        raise ResultError(f"{path} names results that are damaged or not here. Run the sweep again.")
    if any(_describe_run(r) != _describe_run(named[0]) for r in named):
        raise ResultError(f"{path} names results of different runs. Run the sweep again.")
    n = min(r.n for r in named)
    return build_sweep(root, [r.model_copy(update={"n": n}) for r in named], clean="" in stored)


def _read_points(path: Path) -> dict[str, int]:
    """Read the points of a stored sweep: run_id ("" for radius 0) -> number of images. No file: {}.

    Raises:
        ResultError: the file is damaged.
    """
    try:
        rows = csv.reader(io.StringIO(read_bounded(path, _MOST_BYTES).decode()))
        run, n = map(next(rows, []).index, ("run_id", "n"))
        return {row[run]: int(row[n]) for row in rows}  # row by row: a hostile file is refused at its first bad one
    except FileNotFoundError:
        return {}
    except (OSError, IndexError, ValueError, csv.Error):
        raise ResultError(f"{path} is no sweep of robbench. Run the sweep again.") from None


def _radius(result: ResultFile) -> Fraction:
    return Fraction(result.threat.eps)


def read_robust_table(root: Path, result: ResultFile) -> pd.DataFrame:
    """Read which images are robust: one row per image, with columns `clean`, each attack, and `worst case`.

    In a cascade, an attack's column counts this attack and all attacks before it. In a challenge, it counts this attack
    and the first one.
    """
    rows = read_vouched_rows(locate_result(root, result))
    # The records are in the order of selection. An earlier run may have stored more images than this result has.
    rows = rows[rows["sample"].isin(rows["sample"].unique()[: result.n])]
    names = [a.name for a in result.attacks]
    columns = {"clean": ~(rows["status"] == "misclassified").groupby(rows["sample"]).any()}
    for i, name in enumerate(names):
        counted = {"cascade": names[: i + 1], "challenge": [names[0], name]}.get(result.mode, [name])
        columns[name] = find_robust_samples(rows[rows["attack"].isin(counted)])
    columns["worst case"] = find_robust_samples(rows)
    return pd.DataFrame(columns)


def _note_missed(points: list[Point], norm: str) -> list[str]:
    return [
        f"{norm} {p.eps}: the attacks missed {format_count(p.missed, 'image')} broken at a smaller radius, counted "
        f"as broken: worst case {format_percent(p.worst_case)} instead of the measured {format_percent(p.measured)}."
        for p in points
        if p.missed
    ]


def _note_rises(points: list[Point], columns: list[pd.DataFrame], norm: str) -> list[str]:
    """Note every attack whose robust accuracy rises significantly from one radius to the next."""
    attacked = [p for p in points if p.run_id is not None]
    notes = []
    for i in range(1, len(columns)):
        for name in [c for c in columns[i] if c != "clean"]:
            small, large = columns[i - 1][name], columns[i][name]
            gained, lost = int((large & ~small).sum()), int((small & ~large).sum())
            p = mcnemar(lost, gained)
            if gained > lost and p < _LEVEL:
                notes.append(
                    f"{name}: robust accuracy RISES from {100 * small.mean():.1f} at {norm} {attacked[i - 1].eps} to "
                    f"{100 * large.mean():.1f} at {attacked[i].eps} (robust only at the larger radius: "
                    f"{format_count(gained, 'image')}, {lost} only at the smaller; p = {p:.2g}). True robustness "
                    "cannot rise, so the attack fails at the larger radius. Suspect masked gradients, too few steps or "
                    "too large steps."
                )
    return notes


def write_sweep(sweep: Sweep, root: Path) -> tuple[Path, Path]:
    """Write the CSV and the PNG file into the results tree and return their paths."""
    rows = [
        {
            "eps": p.eps,
            **{name: a.value for name, a in p.attacks.items()},
            "worst_case": p.worst_case.value,
            "worst_case_low": p.worst_case.low,
            "worst_case_high": p.worst_case.high,
            "measured": p.measured.value,
            "missed": p.missed,
            "n": sweep.n,
            "run_id": p.run_id or "",
        }
        for p in sweep.points
    ]
    table, curve = (root / f"{sweep.stem}.{suffix}" for suffix in ("csv", "png"))
    write_atomically(table, format_csv(pd.DataFrame(rows)).encode())
    write_atomically(curve, draw_sweep(sweep))
    return table, curve


def print_sweep(sweep: Sweep) -> None:
    """Print the table and the notes."""
    console = make_console()
    title = f"{sweep.title}: accuracy, %, n = {sweep.n}"
    columns = name_columns(sweep.points[0].attacks, ("ε", "Worst case [95 %]", "Missed"))
    rows = [
        {"ε": p.eps}
        | {columns[name]: format_percent(accuracy) for name, accuracy in p.attacks.items()}
        | {"Worst case [95 %]": format_with_interval(p.worst_case), "Missed": str(p.missed)}
        for p in sweep.points
    ]
    if fits(console, rows, rows[0]):
        print_rows(console, rows, title=title, right=rows[0])
    else:
        print_turned(console, rows, title=title, first=len(sweep.points[0].attacks))
    for note in sweep.notes:
        console.note(note)


@plain_text()
def draw_sweep(sweep: Sweep) -> bytes:
    """Draw accuracy over the radius and return the bytes of a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    at = [float(Fraction(p.eps)) for p in sweep.points]
    figure = Figure(figsize=(7.5, 4.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    low, high = ([100 * getattr(p.worst_case, end) for p in sweep.points] for end in ("low", "high"))
    axes.fill_between(at, low, high, color="black", alpha=0.15, lw=0)
    worst = [100 * p.worst_case.value for p in sweep.points]
    # It is wide and below the others, because it often has the numbers of one attack.
    axes.plot(at, worst, color="#b0b0b0", lw=6, label="worst case, 95 % interval", zorder=1)
    names = list(sweep.points[0].attacks)
    for i, name in enumerate(names):
        values = [100 * p.attacks[name].value for p in sweep.points]
        # Colours repeat if there are many attacks. Attacks of the same colour have different markers and dashes.
        look: dict[str, Any] = {
            "color": _COLOURS[i % len(_COLOURS)],
            "marker": MARKERS[(i + i // len(_COLOURS)) % len(MARKERS)],
            "ms": 5,
        }
        axes.plot(at, values, ls="-" if i < len(_COLOURS) else "--", lw=1.2, markevery=[], label=name, **look)
        axes.plot(at, values, ls="", transform=shift_marks(axes, i, len(names)), zorder=3, **look)
    axes.set_xticks(at, [p.eps for p in sweep.points], rotation=45 if len(at) > 8 else 0)
    axes.margins(x=0.04)
    axes.set_ylim(-4, 104)
    axes.set_xlabel(f"radius ε ({sweep.title.rsplit(' · ', 1)[1]})")
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"{sweep.title}, n = {sweep.n}")
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    add_caption(figure, f"{SWEEP_CAPTION} Marks of one radius are beside each other.")
    content = io.BytesIO()  # it does not hold matplotlib's version, so the same figure gives the same bytes
    figure.savefig(content, dpi=130, metadata={"Software": None})
    return shrink_png(content.getvalue())
