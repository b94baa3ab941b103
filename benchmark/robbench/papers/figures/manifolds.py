"""Geometry of the manifolds around images, layer by layer: Figures 5 and A.8 of Seguin et al. 2021.

The CSV of each figure has one row per plotted number: panel, model, kind of manifolds, x (place of the layer, or the
simulated capacity), layer, value, the 95 % interval low to high, and n images (layers, for the claims of Figure A.8).
The rows of the panel "claim" are the numbers of the caption.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from robbench.analysis.logits import Estimate, estimate_mean
from robbench.analysis.manifold_record import KINDS, ManifoldsFile
from robbench.linear.theory import Values
from robbench.papers.figures.logits import describe_finding
from robbench.report.figures.canvas import MARKERS, add_legend_below, make_figure
from robbench.report.figures.source import FigureData, FigurePlan, ModelStyle

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plan_manifolds", "plan_simulated_capacity"]

_COLUMNS = ["panel", "model", "kind", "x", "layer", "value", "low", "high", "n"]
_STANDARD, _ADVERSARIAL = "natural", "at"
_PANELS = {
    "capacity": "A: capacity (manifolds per feature)",
    "radius": "B: radius (of the centre's length)",
    "dimension": "C: dimension",
    "correlation": "D: mean |cosine| of the centres",
}
_EARLY = 3  # places from the pixels on that Figure 5B calls early

_Stored = Mapping[str, tuple[ManifoldsFile, pd.DataFrame]]
_Row = tuple[str, str, str, float, str, float, float, float, int]


def _row(panel: str, model: str, kind: str, x: float, layer: str, found: Estimate) -> _Row:
    return panel, model, kind, x, layer, found.value, found.low, found.high, found.n


def _invert(cost: Estimate) -> Estimate:
    """Turn the mean of 1 / capacity into the capacity of all manifolds. The interval may reach infinity."""
    low, high = (1 / v if v > 0 else float("inf") for v in (cost.high, cost.low))
    return Estimate(1 / cost.value if cost.value > 0 else float("inf"), low, high, cost.n)


def _number(found: Estimate) -> str:
    return f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}]"


def _read(data: FigureData, dataset: str) -> tuple[_Stored, FigurePlan | None]:
    """Read the manifolds of a data set. The plan names what is missing; None if both compared models are here."""
    stored = data.read_manifolds(dataset)
    missing = [
        data.make_command(name, "measure manifolds -m {}")
        for short in (_STANDARD, _ADVERSARIAL)
        if (name := f"{dataset}/{short}") not in stored and data.find_entry(name)
    ]
    return stored, FigurePlan.empty(*missing) if missing or not stored else None


def _select(rows: pd.DataFrame, layer: int, kind: str, column: str) -> Values:
    values: Values = rows[(rows["layer"] == layer) & (rows["kind"] == kind)][column].to_numpy()
    return values


def plan_manifolds(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan Figure 5: capacity, radius, dimension and centre correlation of the manifolds in each layer."""
    stored, nothing = _read(data, dataset)
    if nothing is not None:
        return nothing
    rows: list[_Row] = []
    for name, (file, table) in stored.items():
        for i, geometry in enumerate(file.layers):
            x, kind, layer = i // len(KINDS), geometry.kind, geometry.layer
            found = {
                "capacity": _invert(estimate_mean(_select(table, x, kind, "cost"))),
                "radius": estimate_mean(_select(table, x, kind, "radius")),
                "dimension": estimate_mean(_select(table, x, kind, "dimension")),
                "correlation": Estimate(geometry.correlation, np.nan, np.nan, file.n),
            }
            rows += [_row(panel, name, kind, x, layer, value) for panel, value in found.items()]
    claims, caption = _compare_models(stored, dataset)
    numbers = pd.DataFrame([*rows, *claims], columns=_COLUMNS)
    return FigurePlan(numbers, partial(_paint, numbers, data.choose_styles(list(stored)), title, caption))


def _compare_models(stored: _Stored, dataset: str) -> tuple[list[_Row], str]:
    """Compare natural and adversarial training under attack: early radius and deep capacity, image by image."""
    (file, standard), (robust_file, robust) = (stored[f"{dataset}/{name}"] for name in (_STANDARD, _ADVERSARIAL))
    n = min(file.n, robust_file.n)  # both have the first images of the test set
    kind = KINDS[1]
    last = [len(f.layers) // len(KINDS) - 2 for f in (file, robust_file)]  # the layer before the logits
    early = [
        np.mean([_select(table, x, kind, "radius")[:n] for x in range(1, _EARLY + 1)], axis=0)
        for table in (standard, robust)
    ]
    radius = estimate_mean(early[0] - early[1])
    costs = [_select(t, x, kind, "cost")[:n] for t, x in zip((standard, robust), last, strict=True)]
    capacities = [_invert(estimate_mean(cost)) for cost in costs]
    cost = estimate_mean(costs[0] - costs[1])
    name, layer = f"{dataset}/{_STANDARD}", file.layers[-len(KINDS) * 2].layer
    rows = [
        _row("claim", name, f"radius minus that of {_ADVERSARIAL}", 1, f"1 to {_EARLY}", radius),
        _row("claim", name, "capacity", last[0], layer, capacities[0]),
        _row("claim", f"{dataset}/{_ADVERSARIAL}", "capacity", last[1], layer, capacities[1]),
        _row("claim", name, f"1 / capacity minus that of {_ADVERSARIAL}", last[0], layer, cost),
    ]
    caption = (
        f"Under attack. A: before the logits the capacity of {_ADVERSARIAL} is {_number(capacities[1])}, that of "
        f"{_STANDARD} {_number(capacities[0])}.\n1 / capacity of {_STANDARD} minus that of {_ADVERSARIAL} is "
        f"{_number(cost)}. "
        f"{describe_finding(cost.low > 0)}\n"
        f"B: the radius of {_STANDARD} minus that of {_ADVERSARIAL}, mean of layers 1 to {_EARLY}, is "
        f"{_number(radius)}. "
        f"{describe_finding(radius.low > 0)}\n"
        "Solid: final points of PGD. Dotted: random points of the same ball. Bands: 95 % over images."
    )
    return rows, caption


def _paint(numbers: pd.DataFrame, styles: Mapping[str, ModelStyle], title: str, caption: str) -> Figure:
    figure = make_figure(10.4, 8.4)
    axes = dict(zip(_PANELS, figure.subplots(2, 2).flat, strict=True))
    for panel, ax in axes.items():
        rows = numbers[numbers["panel"] == panel]
        for i, (name, style) in enumerate(styles.items()):
            for kind, dashes in zip(KINDS, (":", "-"), strict=True):
                mine = rows[(rows["model"] == name) & (rows["kind"] == kind)]
                label = style.label if kind == KINDS[1] else ""
                marker = MARKERS[i] if kind == KINDS[1] else ""
                ax.plot(mine["x"], mine["value"], color=style.colour, ls=dashes, marker=marker, ms=4, label=label)
                if kind == KINDS[1]:
                    ax.fill_between(mine["x"], mine["low"], mine["high"], color=style.colour, alpha=0.15, lw=0)
        ticks = rows.drop_duplicates("x")
        ax.set_xticks(ticks["x"], ticks["layer"], rotation=35, ha="right", fontsize=7.5)
        ax.set(title=_PANELS[panel])
        ax.set_ylim(bottom=0)
    figure.suptitle(f"{title}, {int(numbers['n'].max())} test images")
    add_legend_below(figure, [axes["radius"]], caption)
    return figure


def plan_simulated_capacity(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan Figure A.8: the capacity of the theory over the simulated capacity, for all layers and models."""
    stored, nothing = _read(data, dataset)
    if nothing is not None:
        return nothing
    rows: list[_Row] = []
    for name, (file, _) in stored.items():
        for geometry in file.layers:
            if geometry.simulated is not None and geometry.cost > 0:
                point = Estimate(1 / geometry.cost, np.nan, np.nan, file.n)
                rows.append(_row("points", name, geometry.kind, geometry.simulated, geometry.layer, point))
    kind = KINDS[1]
    pairs = np.log([(row[3], row[5]) for row in rows if row[2] == kind])
    if len(pairs) < 4:  # the interval of a correlation needs four points
        return FigurePlan.empty()
    ratio, fit = _estimate_ratio(pairs), _estimate_correlation(pairs)
    rows += [_row("claim", dataset, f"{kind}: theory over simulation", 0, "all", ratio)]
    rows += [_row("claim", dataset, f"{kind}: correlation of the logarithms", 0, "all", fit)]
    shows = ratio.low > 1 and fit.low > 0.5
    caption = (
        f"Manifolds under attack, {len(pairs)} layers of {len(stored)} models: the capacity of the theory is "
        f"{_number(ratio)} of the simulated one\n(geometric mean), their correlation is {_number(fit)} (logarithms). "
        f"{describe_finding(shows)}\nThe paper has a tight relationship, with mild overestimation. Layers of one model "
        "are not independent, so the intervals are too narrow."
    )
    numbers = pd.DataFrame(rows, columns=_COLUMNS)
    return FigurePlan(numbers, partial(_paint_simulated, numbers, data.choose_styles(list(stored)), title, caption))


def _estimate_ratio(pairs: Values) -> Estimate:
    """Return the geometric mean of theory over simulation from logarithms (simulation, theory), [n, 2]."""
    mean = estimate_mean(pairs[:, 1] - pairs[:, 0])
    return Estimate(float(np.exp(mean.value)), float(np.exp(mean.low)), float(np.exp(mean.high)), mean.n)


def _estimate_correlation(pairs: Values) -> Estimate:
    """Return the correlation of both columns [n, 2], with Fisher's interval."""
    r = float(np.clip(np.corrcoef(pairs[:, 0], pairs[:, 1]).item(1), -1 + 1e-12, 1 - 1e-12))
    half = NormalDist().inv_cdf(0.975) / (len(pairs) - 3) ** 0.5
    return Estimate(r, float(np.tanh(np.arctanh(r) - half)), float(np.tanh(np.arctanh(r) + half)), len(pairs))


def _paint_simulated(numbers: pd.DataFrame, styles: Mapping[str, ModelStyle], title: str, caption: str) -> Figure:
    figure = make_figure(7.6, 6.6)
    ax = figure.subplots()
    rows = numbers[numbers["panel"] == "points"]
    ends = [0.9 * rows[["x", "value"]].min().min(), 1.1 * rows[["x", "value"]].max().max()]
    ax.plot(ends, ends, color="#7F7F7F", lw=1)
    for i, (name, style) in enumerate(styles.items()):
        for kind, fill in zip(KINDS, ("none", style.colour), strict=True):
            mine = rows[(rows["model"] == name) & (rows["kind"] == kind)]
            label = style.label if kind == KINDS[1] else ""
            ax.plot(mine["x"], mine["value"], MARKERS[i], ms=6, mec=style.colour, mfc=fill, label=label)
    ax.set(xlabel="simulated capacity", ylabel="capacity of the theory (MFTMA)", aspect="equal")
    ax.set_title("filled: under attack; open: random points; line: equal")
    figure.suptitle(f"{title}, {int(rows['n'].max())} test images")
    add_legend_below(figure, [ax], caption)
    return figure
