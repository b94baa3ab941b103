"""The activity of the neurons of the last two layers: Figures 8 and 9 of Shafahi et al. 2019."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from robbench.analysis.logits import estimate_median, estimate_share
from robbench.linear.record import read_activations
from robbench.papers.figures.findings import FINDINGS, Claim, Kind, find_kind, make_claims
from robbench.report.figures.canvas import MARKERS, add_legend_below, make_figure, set_log_axis
from robbench.report.figures.claims import format_mean, format_share, shorten
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
    kinds = {name: find_kind(data.find_entry(name)) for name in names}
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
    shown = pd.concat(frames, ignore_index=True)[columns]
    kinds = {name: kinds[name] for name in shown["model"].unique()}
    claims, note = (_compare_sizes if layer == "logits" else _count_inactive)(shown, kinds)
    rows = make_claims(claims).rename(columns={"panel": "layer", "images": "neurons"})
    numbers = pd.concat([shown, rows], ignore_index=True)
    styles = data.choose_styles(list(kinds))
    return FigurePlan(numbers, partial(_paint, shown, title, styles, layer, note))


def _count_inactive(rows: pd.DataFrame, kinds: Mapping[str, Kind]) -> tuple[list[Claim], str]:
    """Count the neurons that no image activates. The neurons of a layer are the sample."""
    shares = {name: estimate_share(rows[rows["model"] == name]["active"].to_numpy() == 0) for name in kinds}
    finding, natural = FINDINGS["penultimate"], next((name for name in kinds if kinds[name] == "natural"), None)
    checked = [
        (shorten(name), share.low > shares[natural].high)
        for name, share in shares.items()
        if natural is not None and kinds[name] in finding.expected
    ]
    parts = [f"{shorten(name)} {format_share(share)}" for name, share in shares.items()]
    note = f"Neurons that no image activates: {'; '.join(parts)}.\n{finding.describe(checked)}"
    return [(name, "inactive", share) for name, share in shares.items()], note


def _compare_sizes(rows: pd.DataFrame, kinds: Mapping[str, Kind]) -> tuple[list[Claim], str]:
    """Compare the mean magnitude of each logit with that of the natural model."""
    sizes = {name: rows[rows["model"] == name].sort_values("neuron")["mean"].to_numpy() for name in kinds}
    natural = next((name for name in kinds if kinds[name] == "natural"), None)
    claims = [
        (name, "logits", estimate_median(size / sizes[natural]))
        for name, size in sizes.items()
        if natural not in (None, name) and len(size) == len(sizes[natural])
    ]
    parts = [f"{shorten(name)} × {format_mean(found)}" for name, _, found in claims]
    start = "Median over the classes of the ratio to the natural model: "
    return claims, (f"{start}{'; '.join(parts)}.\n" if parts else "") + "The paper states no finding for this layer."


def _paint(numbers: pd.DataFrame, title: str, styles: Mapping[str, ModelStyle], layer: str, claims: str) -> Figure:
    figure = make_figure(9.6, 4.5 + 0.2 * -(-len(styles) // 2) + 0.15 * (claims.count("\n") + 1))
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
    note = f"{claims}\nEach model orders its own neurons. The paper plots the sum over its images: n times the mean."
    add_legend_below(figure, [ax], note, columns=1 if layer == "penultimate" else 2)
    return figure
