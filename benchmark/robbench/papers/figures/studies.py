"""Families of small trainings: Figures 1, 5, 6 and 7 of Tsipras et al. 2019.

The CSV of each figure has one row per plotted number: panel, kind (what the number is), eps (radius of training), x,
value, the 95 % interval low to high, and n. x is the pixel, how many pixels, the number of training images, or the
radius. For a linear classifier, n is the number of bootstrap samples. For networks, it is the number of seeds. The rows
of the panel "claim" are the numbers of the caption.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from robbench.analysis.logits import Estimate
from robbench.linear.theory import Values
from robbench.papers.figures.logits import describe_finding, format_points
from robbench.report.figures.canvas import (
    DASHES,
    MARKERS,
    OKABE_ITO,
    add_legend_below,
    make_figure,
    set_log_axis,
)
from robbench.report.figures.source import FigureData, FigurePlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plan_accuracy_by_radius", "plan_accuracy_by_size", "plan_pair"]

_COLUMNS = ["panel", "kind", "eps", "x", "value", "low", "high", "n"]
_COLOURS = tuple(OKABE_ITO[name] for name in ("black", "blue", "vermillion", "green", "purple"))
_STUDY = "tsipras2019"

_Row = tuple[str, str, float, float, float, float, float, int]
_points = partial(format_points, sign="+")


def _row(panel: str, kind: str, eps: float, x: float, found: Estimate) -> _Row:
    return panel, kind, eps, x, found.value, found.low, found.high, found.n


def _split(rows: pd.DataFrame, column: str) -> dict[float, pd.DataFrame]:
    """Return the rows of each value of a column of numbers, in increasing order."""
    return {float(value): rows[rows[column] == value] for value in sorted(rows[column].unique())}


def _sort_draws(rows: pd.DataFrame) -> Values:
    """Return the values in the order of the seeds or draws."""
    values: Values = rows.sort_values("draw")["value"].to_numpy()
    return values


def _clip(found: Estimate) -> Estimate:
    """Cut the interval of a share at 0 and 1."""
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def _say(shows: bool) -> str:
    return "shows" if shows else "does not show"


def estimate_over_seeds(values: Values) -> Estimate:
    """Return the mean of at least two seeds with its interval by Student's t."""
    from scipy.special import stdtrit  # listing the figures needs no SciPy

    n = len(values)
    half = float(stdtrit(n - 1, 0.975)) * float(values.std(ddof=1)) / math.sqrt(n)
    mean = float(values.mean())
    return Estimate(mean, mean - half, mean + half, n)


def estimate_by_bootstrap(values: Values) -> Estimate:
    """Return the first value, of the images as they are, with its normal interval from the others, of the draws."""
    half = 1.96 * float(values[1:].std(ddof=1))
    return Estimate(float(values[0]), float(values[0]) - half, float(values[0]) + half, len(values) - 1)


def plan_pair(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan Figure 5: weights, correlations and accuracies of a linear classifier of two classes."""
    found = data.read_study(f"{dataset}/{_STUDY}-pair")
    if found is None:
        return FigurePlan.empty(data.make_study_command(f"{dataset}/{_STUDY}-pair"))
    file, rows = found
    spec = file.identity["spec"]
    numbers, caption = compute_pair_rows(rows, spec["strong"])
    first, second = spec["classes"]
    what = f"{title}\n{first} against {second}, {file.n} test images, Linf {float(Fraction(spec['eps'])):g}"
    return FigurePlan(numbers, partial(_paint_pair, numbers, what, caption, spec["strong"]))


def compute_pair_rows(rows: pd.DataFrame, strong: float) -> tuple[pd.DataFrame, str]:
    """Return the numbers and the caption of Figure 5.

    Args:
        rows: the table of a study `pair`.
        strong: the least |correlation| of a strong pixel.
    """
    by_kind = {str(kind): own for kind, own in rows.groupby("kind")}
    correlation = by_kind["correlation"]["value"].to_numpy()
    plotted: list[_Row] = []
    for eps, own in _split(by_kind["weight"], "eps").items():
        for j, w in zip(own["at"], own["value"], strict=True):
            value = Estimate(float(w), math.nan, math.nan, 1)
            plotted += [_row("a", "weight", eps, j, value)]
            plotted += [_row("b", "weight", eps, abs(correlation[j]), value)]
    for kind in ("clean", "robust"):
        for eps, curve in _split(by_kind[kind], "eps").items():
            for count, own in _split(curve, "at").items():
                plotted.append(_row("c", kind, eps, count, _clip(estimate_by_bootstrap(_sort_draws(own)))))
    weak = {eps: _sort_draws(own) for eps, own in _split(by_kind["weak"], "eps").items()}
    standard, adversarial = (weak[eps] for eps in sorted(weak))
    fewer = estimate_by_bootstrap(adversarial - standard)
    gains = {}
    for kind in ("clean", "robust"):
        own = by_kind[kind][by_kind[kind]["eps"] == 0]
        everything = _sort_draws(own[own["at"] == own["at"].max()])
        gains[kind] = estimate_by_bootstrap(everything - _sort_draws(by_kind[f"{kind} strong"]))
    plotted += [
        _row("claim", "share of |w| on weak pixels, with minus without adversary", 0, strong, fewer),
        _row("claim", "clean, all pixels minus the strong ones", 0, strong, gains["clean"]),
        _row("claim", "robust, all pixels minus the strong ones", 0, strong, gains["robust"]),
    ]
    caption = (
        f"b: of the sum of |w|, {100 * standard[0]:.1f} % lies on weak pixels (|correlation| < {strong}) without an "
        f"adversary, {100 * adversarial[0]:.1f} % with one.\n"
        f"The difference is {_points(fewer)}. {describe_finding(fewer.high < 0)}\n"
        f"c: all pixels instead of the strong ones change the accuracy by {_points(gains['clean'])} and the robust "
        f"accuracy by {_points(gains['robust'])}.\n"
        f"The gain in accuracy {_say(gains['clean'].low > 0)} here. The cost in robustness "
        f"{_say(gains['robust'].high < 0)}. Intervals: {fewer.n} bootstrap samples."
    )
    return pd.DataFrame(plotted, columns=_COLUMNS), caption


def _paint_pair(numbers: pd.DataFrame, title: str, caption: str, strong: float) -> Figure:
    figure = make_figure(11.0, 5.6)
    grid = figure.add_gridspec(2, 3, width_ratios=(1, 1.7, 1.7))
    weights = numbers[numbers["panel"] == "a"]
    radii = sorted(weights["eps"].unique())
    names = ("standard training", "adversarial training")
    for i, (eps, name) in enumerate(zip(radii, names, strict=True)):
        ax = figure.add_subplot(grid[i, 0])
        values = weights[weights["eps"] == eps].sort_values("x")["value"].to_numpy()
        side, most = math.isqrt(len(values)), float(np.abs(values).max())
        shown = ax.imshow(values.reshape(side, side), cmap="RdBu", vmin=-most, vmax=most)
        figure.colorbar(shown, ax=ax)
        ax.set(title=f"a: weights, {name}", xticks=[], yticks=[])
        ax.grid(visible=False)
    scatter, curves = figure.add_subplot(grid[:, 1]), figure.add_subplot(grid[:, 2])
    for i, (eps, name) in enumerate(zip(radii, names, strict=True)):
        own = numbers[(numbers["panel"] == "b") & (numbers["eps"] == eps)]
        height = own["value"].abs() / own["value"].abs().max()
        scatter.plot(own["x"], height, MARKERS[i], ms=4, mfc="none", color=_COLOURS[i], label=name)
    scatter.axvline(strong, color="#7F7F7F", lw=1, ls=":")
    scatter.set(title="b: every pixel", xlabel="|correlation| with the label", ylabel="|weight| / largest |weight|")
    own = numbers[numbers["panel"] == "c"]
    for colour, dashes, kind, text in (
        (_COLOURS[3], "-", "clean", "accuracy"),
        (_COLOURS[4], "--", "robust", "robust accuracy (exact)"),
    ):
        lines = own[(own["kind"] == kind) & (own["eps"] == 0)]
        curves.plot(lines["x"], 100 * lines["value"], color=colour, ls=dashes, label=f"{text}, standard training")
        curves.fill_between(lines["x"], 100 * lines["low"], 100 * lines["high"], color=colour, alpha=0.15, lw=0)
        single = own[(own["kind"] == kind) & (own["eps"] > 0)]
        spread = 100 * np.array([single["value"] - single["low"], single["high"] - single["value"]])
        curves.errorbar(
            1.12 * single["x"],
            100 * single["value"],
            yerr=spread,
            fmt="s",
            ms=5,
            color=colour,
            label=f"{text}, adversarial training",
        )
    set_log_axis(curves)
    curves.set(title="c: the most correlated pixels alone", xlabel="number of pixels", ylabel="% of the test images")
    figure.suptitle(title)
    add_legend_below(figure, [scatter, curves], caption, columns=3)
    return figure


def plan_accuracy_by_size(norm: str, data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan Figure 1 (L2) or 6 (Linf): accuracy over the number of training images for each radius of training."""
    found = data.read_study(f"{dataset}/{_STUDY}-networks")
    if found is None:
        return FigurePlan.empty(data.make_study_command(f"{dataset}/{_STUDY}-networks"))
    numbers, caption = compute_size_rows(found[1][found[1]["kind"] == norm])
    return FigurePlan(numbers, partial(_paint_sizes, numbers, f"{title}, {found[0].n} test images", norm, caption))


def compute_size_rows(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the numbers and the caption of Figure 1 or 6 from the rows of one norm. Radii of one size are left out."""
    few, many = int(rows["at"].min()), int(rows["at"].max())
    curves = {eps: own for eps, own in _split(rows, "eps").items() if own["at"].nunique() > 1}
    plotted = [
        _row("accuracy", "clean", eps, size, _clip(estimate_over_seeds(_sort_draws(own))))
        for eps, curve in curves.items()
        for size, own in _split(curve, "at").items()
    ]
    lines = ["Changes of the accuracy from ε = 0 (whether the paper's finding shows here):"]
    for eps in (eps for eps in curves if eps > 0):
        helps, costs = (
            estimate_over_seeds(
                _sort_draws(_split(curves[eps], "at")[size]) - _sort_draws(_split(curves[0.0], "at")[size])
            )
            for size in (few, many)
        )
        plotted += [_row("claim", "clean, minus that of eps 0", eps, few, helps)]
        plotted += [_row("claim", "clean, minus that of eps 0", eps, many, costs)]
        lines.append(
            f"ε = {eps:g}: {_points(helps)} with {few} images ({'yes' if helps.low > 0 else 'no'}), {_points(costs)} "
            f"with {many} ({'yes' if costs.high < 0 else 'no'})."
        )
    seeds = rows["draw"].nunique()
    lines.append(f"Bands and intervals: Student's t over {seeds} seeds, each with images of its own.")
    return pd.DataFrame(plotted, columns=_COLUMNS), "\n".join(lines)


def _paint_sizes(numbers: pd.DataFrame, title: str, norm: str, caption: str) -> Figure:
    figure = make_figure(7.6, 5.4)
    ax = figure.subplots()
    own = numbers[numbers["panel"] == "accuracy"]
    for i, (eps, curve) in enumerate(_split(own, "eps").items()):
        _draw_curve(ax, curve, i, f"ε_train = {eps:g} ({norm})")
    set_log_axis(ax)
    sizes = sorted(own["x"].unique())
    ax.set_xticks(sizes, [f"{int(size):,}" for size in sizes])
    ax.minorticks_off()
    ax.set(xlabel="number of training images", ylabel="% of the test images classified correctly")
    figure.suptitle(title)
    add_legend_below(figure, [ax], caption, columns=3)
    return figure


def _draw_curve(ax: Axes, curve: pd.DataFrame, i: int, label: str) -> None:
    ax.plot(curve["x"], 100 * curve["value"], color=_COLOURS[i], ls=DASHES[i], marker=MARKERS[i], ms=4, label=label)
    ax.fill_between(curve["x"], 100 * curve["low"], 100 * curve["high"], color=_COLOURS[i], alpha=0.15, lw=0)


def plan_accuracy_by_radius(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan Figure 7: accuracy over the radius of training, with all training images."""
    found = data.read_study(f"{dataset}/{_STUDY}-networks")
    if found is None:
        return FigurePlan.empty(data.make_study_command(f"{dataset}/{_STUDY}-networks"))
    numbers, caption = compute_radius_rows(found[1])
    return FigurePlan(numbers, partial(_paint_radii, numbers, f"{title}, {found[0].n} test images", caption))


def compute_radius_rows(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the numbers and the caption of Figure 7 from the table of a study `networks`."""
    many = int(rows["at"].max())
    plotted, claims, lines = [], [], []
    for norm in sorted(rows["kind"].unique()):
        curve = rows[(rows["kind"] == norm) & (rows["at"] == many)]
        values = {eps: _sort_draws(own) for eps, own in _split(curve, "eps").items()}
        plotted += [_row(norm, "clean", eps, eps, _clip(estimate_over_seeds(found))) for eps, found in values.items()]
        strongest = max(values)
        change = estimate_over_seeds(values[strongest] - values[0.0])
        means = [float(found.mean()) for found in values.values()]
        falls = int((np.diff(means) < 0).sum())
        claims.append(_row("claim", f"clean, minus that of eps 0, {norm}", strongest, strongest, change))
        lines.append(
            f"{norm}: from ε = 0 to {strongest:g} the accuracy changes by {_points(change)}. It falls in {falls} of "
            f"{len(means) - 1} steps. {describe_finding(change.high < 0 and falls == len(means) - 1)}"
        )
    seeds = rows["draw"].nunique()
    lines.append(f"Bands and intervals: Student's t over {seeds} seeds. {many} training images.")
    return pd.DataFrame([*plotted, *claims], columns=_COLUMNS), "\n".join(lines)


def _paint_radii(numbers: pd.DataFrame, title: str, caption: str) -> Figure:
    figure = make_figure(9.6, 4.6)
    own = numbers[numbers["panel"] != "claim"]
    panels = figure.subplots(1, own["panel"].nunique(), sharey=True, squeeze=False)[0]
    for i, (ax, (norm, curve)) in enumerate(zip(panels, own.groupby("panel"), strict=True)):
        _draw_curve(ax, curve, i + 1, f"{norm}-trained")
        ax.set(title=str(norm), xlabel="ε_train", ylabel="" if i else "% of the test images classified correctly")
    figure.suptitle(title)
    add_legend_below(figure, list(panels), caption)
    return figure
