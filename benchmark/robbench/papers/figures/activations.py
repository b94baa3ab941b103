"""The activity of the neurons of the last two layers: Figures 8 and 9 of Shafahi et al. 2019."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from robbench.linear.record import read_activations
from robbench.report.figures.canvas import MARKERS, add_legend_below, make_figure, set_log_axis
from robbench.report.figures.source import FigureData, FigurePlan, ModelStyle

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plan_activations"]

_FEW = 20  # up to so many neurons, each neuron has a marker


def plan_activations(data: FigureData, title: str, names: Sequence[str], layer: str) -> FigurePlan:
    """Plan a figure of the neurons of a layer, sorted by the mean magnitude of their activations over the images.

    Args:
        data: the data of figures.
        title: title of the figure.
        names: full names of the models.
        layer: penultimate or logits.
    """
    frames = []
    for name in names:
        measured = data.read_linear(name)
        if measured is None:
            continue
        rows = read_activations(data.linear_folder(name))
        rows = rows[rows["layer"] == layer].sort_values(["mean", "neuron"], ascending=[False, True])
        ranked = rows[["neuron", "mean", "active"]].assign(rank=np.arange(1, len(rows) + 1))
        frames.append(ranked.assign(model=name, layer=layer, images=len(measured)))
    if not sum(len(frame) for frame in frames):
        return FigurePlan.empty()
    columns = ["layer", "model", "rank", "neuron", "mean", "active", "images"]
    numbers = pd.concat(frames, ignore_index=True)[columns]
    styles = data.choose_styles(list(dict.fromkeys(numbers["model"])))
    return FigurePlan(numbers, partial(_paint, numbers, title, styles, layer))


def _paint(numbers: pd.DataFrame, title: str, styles: Mapping[str, ModelStyle], layer: str) -> Figure:
    figure = make_figure(9.6, 4.5 + 0.2 * -(-len(styles) // 2))
    ax = figure.subplots()
    for i, (name, style) in enumerate(styles.items()):
        rows = numbers[numbers["model"] == name]
        dead = int((rows["active"] == 0).sum())
        label = style.label if layer == "logits" else f"{style.label} ({dead} of {len(rows)} never active)"
        marker = MARKERS[i % len(MARKERS)] if len(rows) <= _FEW else None
        shown = rows.head(len(rows) - dead + 1)  # the lines of neurons that are never active would lie on each other
        ax.plot(shown["rank"], shown["mean"], color=style.colour, ls=style.dashes, marker=marker, ms=4, label=label)
    last = int(numbers["rank"].max())
    ax.set_xlim(0 if last > _FEW else 0.7, last + (0 if last > _FEW else 0.3))
    if layer == "logits" and numbers["mean"].min() > 0:  # squeezed logits are a hundredth of natural logits
        set_log_axis(ax, vertical=True)
    else:
        ax.set_ylim(bottom=0)
    what = "neurons of the penultimate layer" if layer == "penultimate" else "logits"
    ax.set_xlabel(f"{what}, the most active first")
    ax.set_ylabel("mean over the images of |activation|")
    n = " / ".join(map(str, sorted({int(n) for n in numbers["images"]})))
    figure.suptitle(f"{title}, n = {n} test images")
    note = "Each model orders its own neurons. The paper plots the sum over its test images: n times the mean."
    add_legend_below(figure, [ax], note, columns=1 if layer == "penultimate" else 2)
    return figure
