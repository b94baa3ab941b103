"""The loss around images: Figures 5 and 9 of Shafahi et al. 2019 (arXiv:1910.11585), from `robbench sanity`.

The CSV has one row per line of a plane: panel (the plane), model, sample, a (place on the vertical axis, in eps), and
the cross-entropy at each place on the horizontal axis, b-1 to b1. The rows of the panel "claim" are the numbers of the
caption: model, what, value, the 95 % interval low to high, and n.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from robbench.analysis.logits import estimate_median, estimate_share
from robbench.linear.theory import Values
from robbench.papers.figures.findings import Claim, make_claims
from robbench.papers.figures.logits import describe_finding
from robbench.report.figures.canvas import add_footnote, make_figure
from robbench.report.figures.claims import format_mean, format_share, shorten
from robbench.report.figures.source import FigureData, FigurePlan
from robbench.report.linear import find_standard_radius, format_radius

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Plane", "plan_landscapes"]

Plane = Literal["random", "adversarial"]
_KINDS = (  # a model of each kind, the first that was measured. The paper shows one that squeezes and has noise.
    ("natural", "natural_resnet18"),
    ("at",),
    ("ls095_sigma03", "ls095_sigma05", "ls095_sigma30"),
    ("lsq2_sigma03", "lsq2_sigma05", "lsq10_sigma30"),
)
_LABELS = {"random": "random ↑", "adversarial": "adversarial ↑"}
_SMALLEST = 1e-12  # a change of the loss below this is rounding
_MUCH = 2.0  # the loss changes "a lot" if it changes at least so many times as much as along a random direction
_PER_LINE = 2  # models in a line of the footnote


def plan_landscapes(plane: Plane, data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan the cross-entropy on one plane through each image, a row of panels for each model."""
    stored = {name: frame for name, (_, frame) in data.read_landscapes(dataset).items()}
    kinds = [[name] for name in data.chosen] or [[f"{dataset}/{short}" for short in kind] for kind in _KINDS]
    names, missing = [], []
    for kind in kinds:
        measured = [name for name in kind if name in stored]
        names += measured[:1]
        if not measured:
            known = [name for name in kind if data.find_entry(name)]
            missing.append(data.make_command((known or kind)[0], "sanity {}"))
    if not names:
        return FigurePlan.empty(*missing)
    rows = [row for name in names for row in _CLAIMS[plane](name, stored[name])]
    frames = [_make_rows(stored[name], name, plane) for name in names]
    numbers = pd.concat([*frames, make_claims(rows).rename(columns={"images": "n"})], ignore_index=True)
    radius = find_standard_radius(dataset)
    heading = f"{title}\ncross-entropy from −ε to ε" + (f" (Linf {format_radius(radius)})" if radius else "")
    paint = partial(_paint, heading, plane, numbers, _SENTENCES[plane](rows))
    return FigurePlan(numbers, paint, missing, decimals=3)


def _make_surfaces(frame: pd.DataFrame, plane: str, column: str) -> dict[int, pd.DataFrame]:
    """Return for each image the values on a plane: index a, columns b."""
    here = frame[frame["plane"] == plane]
    samples = here["sample"].unique().tolist()
    return {s: here[here["sample"] == s].pivot(index="a", columns="b", values=column) for s in samples}


def _make_rows(frame: pd.DataFrame, name: str, plane: str) -> pd.DataFrame:
    """Make the rows of the CSV of a model."""
    frames = []
    for sample, surface in _make_surfaces(frame, plane, "cross_entropy").items():
        lines = surface.rename(columns="b{:g}".format).rename_axis(columns=None).reset_index()
        lines.insert(0, "panel", plane)
        lines.insert(1, "model", name)
        lines.insert(2, "sample", sample)
        frames.append(lines)
    return pd.concat(frames, ignore_index=True)


def _measure_change(values: Values) -> float:
    """Return the largest minus the smallest value, at least what rounding may change."""
    return max(float(values.max() - values.min()), _SMALLEST)


def _compare_axes(name: str, frame: pd.DataFrame) -> list[Claim]:
    """Compare how much the loss changes along the adversarial and along the random axis, both through the image."""
    surfaces = _make_surfaces(frame, "adversarial", "cross_entropy").values()
    ratios = [_measure_change(s.loc[:, 0.0].to_numpy()) / _measure_change(s.loc[0.0].to_numpy()) for s in surfaces]
    return [(name, "change along adversarial / change along random", estimate_median(np.array(ratios)))]


def _describe_axes(rows: Sequence[Claim]) -> str:
    parts = [f"{shorten(name)} {format_mean(found)}, n = {found.n}" for name, _, found in rows]
    shows = all(found.low >= _MUCH for _, _, found in rows)
    return (
        "From −ε to ε, how many times as much the loss changes towards the end of PGD-20 as along the random direction "
        f"(median of the images, 95 % interval):\n{_join(parts)}.\n"
        "The paper says that it changes a lot along the adversarial direction, and not much along the random one. "
        f"Here, a lot means at least {_MUCH:g} times. {describe_finding(shows)}"
    )


def _count_wrong(name: str, frame: pd.DataFrame) -> list[Claim]:
    """Count the images with a wrong point inside the ball, on each plane. The image itself must be right."""
    # A point of the plane is inside the ball if |a| + |b| ≤ 1, because both directions have length eps.
    inside = frame[frame["a"].abs() + frame["b"].abs() <= 1]
    centre = frame[(frame["a"] == 0) & (frame["b"] == 0) & (frame["margin"] < 0)]
    rows = []
    for plane in ("random", "adversarial"):
        here = inside[(inside["plane"] == plane) & inside["sample"].isin(centre["sample"])]
        wrong = here.groupby("sample")["margin"].max().to_numpy() >= 0
        rows.append((name, f"images with a wrong point on the {plane} plane", estimate_share(wrong)))
    return rows


def _describe_wrong(rows: Sequence[Claim]) -> str:
    parts = [
        f"{shorten(name)} {format_share(random)} and {format_share(adversarial)}, n = {random.n}"
        if random.n
        else f"{shorten(name)}: no image is classified correctly"
        for (name, _, random), (_, _, adversarial) in zip(rows[::2], rows[1::2], strict=True)
    ]
    return (
        "Of the images that are classified correctly, those with a wrong point inside the ball on this plane, and on "
        f"the plane with an adversarial direction:\n{_join(parts)}.\nThe paper states no finding for its picture."
    )


_CLAIMS = {"random": _count_wrong, "adversarial": _compare_axes}
_SENTENCES = {"random": _describe_wrong, "adversarial": _describe_axes}


def _join(parts: Sequence[str]) -> str:
    """Join the parts of a footnote, with a few in a line."""
    return ";\n".join("; ".join(parts[i : i + _PER_LINE]) for i in range(0, len(parts), _PER_LINE))


def _paint(heading: str, plane: str, numbers: pd.DataFrame, footnote: str) -> Figure:
    rows = numbers[numbers["panel"] == plane]
    names = list(dict.fromkeys(rows["model"]))
    columns = [c for c in rows.columns if c[0] == "b"]
    shown = max(rows[rows["model"] == name]["sample"].nunique() for name in names)
    figure = make_figure(1.05 * shown + 2.0, 1.25 * len(names) + 1.6)
    axes = figure.subplots(len(names), shown, squeeze=False)
    for line, name in zip(axes, names, strict=True):
        mine = rows[rows["model"] == name]
        values = mine[columns].to_numpy(np.float64)
        for ax in line:
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
        for ax, sample in zip(line, dict.fromkeys(mine["sample"]), strict=False):
            surface = mine[mine["sample"] == sample][columns].to_numpy(np.float64)
            drawn = ax.imshow(
                surface, origin="lower", extent=(-1, 1, -1, 1), cmap="viridis", vmin=values.min(), vmax=values.max()
            )
            ax.plot(0, 0, "+", color="white", markersize=5)
            ax.set_title(f"image {int(sample)}", fontsize=7.5, pad=2)
        line[0].set_ylabel(f"{shorten(name)}\n{_LABELS[plane]}", fontsize=8)
        bar = figure.colorbar(drawn, ax=list(line), fraction=0.02, pad=0.01)
        bar.ax.tick_params(labelsize=7)
    figure.suptitle(f"{heading}; to the right: a random direction; a scale for each model")
    add_footnote(figure, footnote)
    return figure
