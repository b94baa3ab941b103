"""Histograms of the quantities of the linear model of robustness: Figures 1 to 7 of Shafahi et al. 2019."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from robbench.linear.theory import Linearization, Values
from robbench.papers.figures.findings import Finding, compare_models, describe_claims, find_kind, make_claims
from robbench.report.figures.canvas import add_legend_below, make_figure, set_level_axis, set_log_axis
from robbench.report.figures.source import FigureData, FigurePlan, ModelStyle
from robbench.report.linear import find_standard_radius, format_radius

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["GAPS", "GRADIENTS", "LOGITS", "Quantity", "plan_histograms"]

_BINS = 80
_TAIL = 0.0005  # share of all values that may be beyond each end of a logarithmic axis


@dataclass(frozen=True)
class Quantity:
    """The quantity of a panel.

    Attributes:
        key: name of the quantity in the CSV.
        label: label of the axis, with the unit.
        scale: scale of the axis. log: logarithmic, for values above 0. radius: from 0 to more than the usual radius.
            cosine: from -1 to 1.
        pairs: True counts values per image and wrong class. False counts magnitudes per image and class.
    """

    key: str
    label: str
    scale: Literal["log", "radius", "cosine"] = "log"
    pairs: bool = True

    def take_values(self, measured: Linearization) -> Values:
        """Return the values of the quantity for a model."""
        if self.pairs:
            return measured.take_pairs(self.key)
        values: Values = np.abs(getattr(measured, self.key)).ravel()
        return values


GAPS = (
    Quantity("logit_gap", "logit gap  $z_y - z_{\\bar y}$"),
    Quantity("radius", "$L$ of Eq. 4 (Linf, pixel units)", "radius"),
    Quantity("gradient_gap", "gradient gap  $\\Vert\\nabla z_y - \\nabla z_{\\bar y}\\Vert_1$ (logits per pixel unit)"),
    Quantity("cosine", "gradient coherence  $\\cos(\\nabla z_y, \\nabla z_{\\bar y})$", "cosine"),
)
LOGITS = (Quantity("logits", "logit magnitude  $|z_k|$", pairs=False),)
GRADIENTS = (
    Quantity("gradient", "gradient magnitude  $\\Vert\\nabla z_k\\Vert_1$ (logits per pixel unit)", pairs=False),
)


def plan_histograms(
    data: FigureData, title: str, dataset: str, names: Sequence[str], panels: Sequence[Quantity], finding: Finding
) -> FigurePlan:
    """Plan a figure with histograms of some models.

    Args:
        data: the data of figures.
        title: title of the figure.
        dataset: data set, for the usual radius.
        names: full names of the models.
        panels: the quantity of each panel.
        finding: what the paper says.
    """
    by_model = {name: measured for name in names if (measured := data.read_linear(name)) is not None}
    if not by_model:
        return FigurePlan.empty()
    frames = []
    radius = find_standard_radius(dataset)
    for quantity in panels:
        values = {name: quantity.take_values(m) for name, m in by_model.items()}
        edges = _choose_edges(quantity, np.concatenate(list(values.values())), float(radius or 0))
        frames += [_count_values(quantity.key, name, v, edges, len(by_model[name])) for name, v in values.items()]
    kinds = {name: find_kind(data.find_entry(name)) for name in by_model}
    claims = compare_models(by_model, kinds, [quantity.key for quantity in panels if quantity.key != "cosine"])
    numbers = pd.concat([*frames, make_claims(claims)], ignore_index=True)
    styles = data.choose_styles(list(by_model))
    line = None if radius is None else (float(radius), format_radius(radius))
    note = describe_claims(claims, finding, kinds)
    return FigurePlan(numbers, partial(_paint, numbers, title, panels, styles, line, note))


def _choose_edges(quantity: Quantity, values: Values, radius: float) -> Values:
    """Choose the edges of bins for all models. The first and last bin extend to infinity."""
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = np.quantile(positive, [_TAIL, 1 - _TAIL]) if len(positive) else (0.1, 1.0)
    if quantity.scale == "cosine":
        inner = np.linspace(-1.0, 1.0, _BINS + 1)
    elif quantity.scale == "radius":
        top = min(max(high, 1.25 * radius), 1.0)  # no perturbation in [0, 1] is larger than 1
        inner = np.linspace(-0.1 * top, top, _BINS + 1)
    else:
        inner = np.geomspace(low, max(high, low * 1.01), _BINS + 1)
    # The CSV holds edges with six digits. Count with these rounded edges, so that the CSV is exact.
    inner = np.array([float(f"{e:.6g}") for e in inner])
    return np.concatenate([[-np.inf], inner, [np.inf]])


def _count_values(panel: str, model: str, values: Values, edges: Values, n: int) -> pd.DataFrame:
    known = values[~np.isnan(values)]
    # A value on an edge counts in the bin to the right. Infinity counts in the last bin.
    bins = np.searchsorted(edges[1:-1], known, side="right")
    counts = np.bincount(bins, minlength=len(edges) - 1)
    return pd.DataFrame(
        {
            "panel": panel,
            "model": model,
            "low": edges[:-1],
            "high": edges[1:],
            "count": counts,
            "total": len(values),
            "images": n,
        }
    )


def _paint(
    numbers: pd.DataFrame,
    title: str,
    panels: Sequence[Quantity],
    styles: Mapping[str, ModelStyle],
    radius: tuple[float, str] | None,
    note: str,
) -> Figure:
    single = len(panels) == 1
    figure = make_figure(9.6, (4.0 if single else 6.7) + 0.2 * -(-len(styles) // 2) + 0.15 * (note.count("\n") + 1))
    # As in the paper, the numerator of L is above its denominator at the left, and L is above the cosine at the right.
    axes = [figure.subplots()] if single else figure.subplots(2, 2).flatten().tolist()
    for quantity, ax in zip(panels, axes, strict=True):
        _paint_panel(ax, numbers[numbers["panel"] == quantity.key], quantity, styles)
        if quantity.key == "radius" and radius is not None:
            if "/255" in radius[1]:
                set_level_axis(ax, ax.get_xlim()[1])
            ax.axvline(radius[0], color="#444444", lw=1, ls=":")
            ax.text(radius[0], 0.97, f" ε = {radius[1]}", transform=ax.get_xaxis_transform(), va="top", fontsize=8.5)
    images = sorted({int(n) for n in numbers[numbers["panel"] != "claim"]["images"]})
    figure.suptitle(f"{title}, n = {' / '.join(map(str, images))} test images")
    for ax in axes[::2]:
        ax.set_ylabel("% of the pairs, per bin" if panels[0].pairs else "% of images × classes, per bin")
    pairs = "Pairs: every image with each of its wrong classes. " if panels[0].pairs else ""
    beyond = "Values beyond an axis (logarithmic: also 0 and less) are not drawn; see the CSV."
    add_legend_below(figure, axes[:1], f"{note}\n{pairs}{beyond}")
    return figure


def _paint_panel(ax: Axes, rows: pd.DataFrame, quantity: Quantity, styles: Mapping[str, ModelStyle]) -> None:
    for name, style in styles.items():
        mine = rows[(rows["model"] == name) & np.isfinite(rows["low"]) & np.isfinite(rows["high"])]
        edges = [*mine["low"], mine["high"].iloc[-1]]
        share = 100 * mine["count"] / mine["total"]
        ax.stairs(share, edges, color=style.colour, linestyle=style.dashes, linewidth=1.6, label=style.label)
        ax.stairs(share, edges, color=style.colour, fill=True, alpha=0.10)
    finite = rows[np.isfinite(rows["low"]) & np.isfinite(rows["high"])]
    low, high = float(finite["low"].min()), float(finite["high"].max())
    if quantity.scale == "log":
        set_log_axis(ax)
        low, high = low / 1.1, high * 1.1
    ax.set_xlim(low, high)
    ax.set_ylim(bottom=0)
    ax.set_xlabel(quantity.label, parse_math=True)
