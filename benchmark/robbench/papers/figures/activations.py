"""How active each neuron of the last two layers is: Figures 8 and 9 of Shafahi et al. 2019."""

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

__all__ = ["activations"]

_FEW = 20  # neurons up to which each has a marker


def activations(data: FigureData, title: str, names: Sequence[str], layer: str) -> FigurePlan:
    """Order the neurons of a layer by the magnitude of their activations, summed over the images.

    Args:
        data: where from.
        title: of the figure.
        names: the measured models.
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
    looks = data.choose_styles(list(dict.fromkeys(numbers["model"])))
    return FigurePlan(numbers, partial(_paint, numbers, title, looks, layer))


def _paint(numbers: pd.DataFrame, title: str, looks: Mapping[str, ModelStyle], layer: str) -> Figure:
    figure = make_figure(9.6, 4.5 + 0.2 * -(-len(looks) // 2))
    ax = figure.subplots()
    for i, (name, look) in enumerate(looks.items()):
        rows = numbers[numbers["model"] == name]
        dead = int((rows["active"] == 0).sum())
        label = look.label if layer == "logits" else f"{look.label} ({dead} of {len(rows)} never active)"
        marker = MARKERS[i % len(MARKERS)] if len(rows) <= _FEW else None
        ax.plot(rows["rank"], rows["mean"], color=look.colour, ls=look.dashes, marker=marker, ms=4, label=label)
    last = int(numbers["rank"].max())
    ax.set_xlim(0 if last > _FEW else 0.7, last + (0 if last > _FEW else 0.3))
    if layer == "logits" and numbers["mean"].min() > 0:  # squeezed ones are a hundredth of natural ones
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
