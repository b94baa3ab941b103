"""The analytic model of logits, as it is printed: Figures C.1, C.2 and C.3 of Seguin et al. 2021."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from robbench.analysis.surrogate import (
    change_gap_of_groups,
    cross_entropy,
    find_least_beta,
    make_logits,
    printed_correct,
    printed_wrong,
)
from robbench.papers.figures.logits import describe_finding
from robbench.report.figures.canvas import DASHES, OKABE_ITO, add_legend_below, make_figure
from robbench.report.figures.source import FigureData, FigurePlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plan_surrogate"]

_CLASSES = 10
_ERROR = 0.196  # share of training images that the paper's teacher gets wrong
_OMEGA = 0.1  # the ε of the paper's Figure C.3
_PRINTED = 3.5  # the least β that the paper reads off its Figure C.1
_GRID = np.linspace(3.0, 9.0, 25)


def plan_surrogate(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan the figure: which β the printed solutions allow, and loss and change of the gap over β of both groups.

    It is made of formulas alone. It is drawn only beside the figures of measured logits, which it explains.
    """
    if not data.read_logits(dataset):
        return FigurePlan.empty(data.make_command(f"{dataset}/natural", "measure logits -m {}"))
    least = find_least_beta(_CLASSES)
    rows: list[tuple[str, str, float, float, float]] = []
    for beta in np.linspace(2.3, 8.0, 115):
        g, psi = printed_wrong(beta, _CLASSES)[1]
        values = {"beta": beta, "f": printed_correct(beta, _CLASSES)[0], "g": g, "psi": psi}
        rows += [("C.1", name, beta, beta, value) for name, value in values.items()]
    for right in _GRID:
        for wrong in _GRID:
            loss, change = _evaluate(right, wrong)
            rows += [("C.2", "loss", right, wrong, loss), ("C.3", "change", right, wrong, change)]
    small, large = _evaluate(4.0, 4.0)[1], _evaluate(8.0, 4.0)[1]
    rows += [
        ("claim", "least beta", least, least, least),
        ("claim", "change", 4.0, 4.0, small),
        ("claim", "change", 8.0, 4.0, large),
    ]
    caption = (
        f"C.1: the printed solutions are below β from {least:.3f} on. The paper reads {_PRINTED} off its figure. "
        f"{describe_finding(abs(least - _PRINTED) < 0.05)}\n"
        f"C.3: an attack shrinks the gap of right images by {small:.3f} of it at β = 4, and by {large:.3f} at β = 8 "
        f"(wrong images: β = 4). {describe_finding(large > small)}\n"
        "These numbers are exact. The printed solutions are no stationary points of the printed expansion."
    )
    numbers = pd.DataFrame(rows, columns=["panel", "quantity", "beta_right", "beta_wrong", "value"])
    return FigurePlan(numbers, partial(_paint, numbers, title, caption, least))


def _evaluate(right: float, wrong: float) -> tuple[float, float]:
    """Return the mean cross-entropy, and the shrinkage of the gap of the right images as a share of this gap."""
    f, (g, psi) = printed_correct(right, _CLASSES)[0], printed_wrong(wrong, _CLASSES)[1]
    losses = (
        cross_entropy(make_logits(right, f, None, _CLASSES), 0),
        cross_entropy(make_logits(wrong, psi, g, _CLASSES), 1),
    )
    change = change_gap_of_groups((right, f), (wrong, g, psi), _ERROR, _OMEGA, _CLASSES)
    return (1 - _ERROR) * losses[0] + _ERROR * losses[1], -change / (right - f)


def _paint(numbers: pd.DataFrame, title: str, caption: str, least: float) -> Figure:
    figure = make_figure(11.0, 4.8)
    lines, loss, change = figure.subplots(1, 3)
    labels = {
        "beta": "β",
        "f": "f₊, right images",
        "g": "g₋, wrong images: true class",
        "psi": "ψ₋, wrong images: others",
    }
    colours = [OKABE_ITO[name] for name in ("black", "green", "vermillion", "blue")]
    rows = numbers[numbers["panel"] == "C.1"]
    for (name, label), colour, dashes in zip(labels.items(), colours, DASHES, strict=False):
        mine = rows[rows["quantity"] == name]
        lines.plot(mine["beta_wrong"], mine["value"], color=colour, ls=dashes, label=label)
    for beta, style in ((least, "-"), (_PRINTED, ":")):
        lines.axvline(beta, color="#7F7F7F", lw=1, ls=style)
    lines.set(title=f"C.1: β > {least:.2f} (dotted: the paper's {_PRINTED})", xlabel="β", ylabel="logit", ylim=(-8, 8))
    _draw_surface(figure, loss, numbers[numbers["panel"] == "C.2"], "C.2: mean cross-entropy")
    _draw_surface(figure, change, numbers[numbers["panel"] == "C.3"], "C.3: |change of the gap| / gap")
    figure.suptitle(title)
    add_legend_below(figure, [lines], caption, columns=4)
    return figure


def _draw_surface(figure: Figure, ax: Axes, rows: pd.DataFrame, title: str) -> None:
    grid = rows.pivot_table(index="beta_wrong", columns="beta_right", values="value")
    filled = ax.contourf(grid.columns, grid.index, grid.to_numpy(), levels=14, cmap="viridis")
    figure.colorbar(filled, ax=ax)
    ax.set(title=title, xlabel="β of right images", ylabel="β of wrong images")
