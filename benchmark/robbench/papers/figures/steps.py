"""Accuracy by step size and number of steps of PGD, as in Mosbach et al. 2018, from `robbench measure steps`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from robbench.analysis.logits import estimate_mean, estimate_share
from robbench.papers.figures.logits import COLUMNS, Row, describe_finding, format_points, make_row
from robbench.report.figures.canvas import add_footnote, make_figure
from robbench.report.figures.source import FigureData, FigurePlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plan_step_sizes"]

_STEPS = (1, 2, 5, 10, 20, 50, 100)
_SQUEEZED = ("lsq05_sigma03", "lsq2_sigma03", "lsq05_sigma05")  # the first that was measured stands for the paper's LSQ
_FIRST = ("natural", "at")
_BASELINE = 0.03, 50  # step size as a share of eps, and steps; the paper's baseline on MNIST has 0.033 and 40
_COLUMNS_OF_PANELS = 4


def plan_step_sizes(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan the picture of step sizes and numbers of steps, a panel for each model."""
    tables = data.read_series("steps", dataset)
    missing = [
        data.make_command(name, "measure steps -m {}")
        for short in _FIRST
        if (name := f"{dataset}/{short}") not in tables and data.find_entry(name)
    ]
    squeezed = next((name for short in _SQUEEZED if (name := f"{dataset}/{short}") in tables), None)
    if missing or squeezed is None:
        return FigurePlan.empty(
            *missing, *[data.make_command(f"{dataset}/lsq2_sigma03", "measure steps -m {}")] * (not squeezed)
        )
    n = min(len(rows) // rows["step_size"].nunique() for rows in tables.values())
    rows: list[Row] = []
    overstated = {}
    for name, table in tables.items():
        grid = {}
        for size in sorted(table["step_size"].unique()):
            mine = table[table["step_size"] == size]
            kept, step = mine["correct"].to_numpy()[:n], mine["step"].to_numpy()[:n]
            for t in _STEPS:
                grid[float(size), t] = kept & ~((step >= 0) & (step <= t))
                rows.append(make_row("A", name, f"step size {size:g} eps", t, estimate_share(grid[float(size), t])))
        best = min(grid, key=lambda key: (grid[key].mean(), key))
        overstated[name] = grid[_BASELINE].astype(float) - grid[best]
        found = estimate_mean(overstated[name])
        rows.append(make_row("claim", name, f"baseline minus {best[0]:g} eps, {best[1]} steps", best[1], found))
    more = estimate_mean(overstated[squeezed] - overstated[f"{dataset}/at"])
    rows.append(make_row("claim", squeezed, "overstated by the baseline, minus that of at", _BASELINE[1], more))
    numbers = pd.DataFrame(rows, columns=COLUMNS)
    alone = estimate_mean(overstated[squeezed])
    short = squeezed.split("/")[1]
    caption = (
        f"{_BASELINE[1]} steps of {_BASELINE[0]:g} ε, as in the paper's baseline, leave {format_points(alone)} more of "
        f"the images of {short} than the strongest cell.\n"
        f"That is {format_points(more)} more than for at. The paper says that squeezing hides much from a weak attack. "
        f"{describe_finding(more.low > 0)}"
    )
    return FigurePlan(numbers, partial(_paint, title, numbers, caption))


def _paint(title: str, numbers: pd.DataFrame, caption: str) -> Figure:
    rows = numbers[numbers["panel"] == "A"]
    models = list(dict.fromkeys(rows["model"]))
    columns = min(_COLUMNS_OF_PANELS, len(models))
    lines = -(-len(models) // columns)
    figure = make_figure(2.3 * columns + 0.6, 2.0 * lines + 1.2)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax, name in zip(axes, models, strict=False):
        mine = rows[rows["model"] == name]
        sizes = list(dict.fromkeys(mine["other"]))
        grid = np.array([100 * mine[mine["other"] == size]["value"].to_numpy() for size in sizes])
        ax.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto", origin="lower")
        for i, j in np.ndindex(grid.shape):
            colour = "white" if grid[i, j] < 55 else "black"
            ax.text(j, i, f"{grid[i, j]:.0f}", ha="center", va="center", fontsize=6.5, color=colour)
        ax.set_title(name.split("/")[1])
        ax.set_xticks(range(len(_STEPS)), [str(t) for t in _STEPS], fontsize=7)
        ax.set_yticks(
            range(len(sizes)), [size.removeprefix("step size ").removesuffix(" eps") for size in sizes], fontsize=7
        )
        ax.grid(False)
    for unused in axes[len(models) :]:
        unused.set_visible(False)
    figure.supylabel("step size, as a share of ε", fontsize=9)
    figure.suptitle(
        f"{title}, n = {int(rows['n'].max())} test images\n% that withstand PGD, by number of steps (below)"
    )
    add_footnote(figure, caption)
    return figure
