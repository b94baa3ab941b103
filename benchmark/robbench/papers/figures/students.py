"""Accuracies of students that learned the logits of a short training: Figures A.6 and A.7 of Seguin et al. 2021.

The CSV has the columns of `papers/figures/logits.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from robbench.analysis.logits import Booleans, compare_shares, estimate_share
from robbench.papers.figures.logits import Row, describe_finding, draw_band, format_points, make_row
from robbench.papers.figures.training import Tables, plan_studies
from robbench.report.figures.canvas import MARKERS, add_legend_below, make_figure, set_log_axis
from robbench.report.figures.source import FigureData, FigurePlan, ModelStyle

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plan_students"]

_TEACHER = "at"


def plan_students(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan Figures A.6 and A.7: accuracies of students by iteration of their teacher, and by loss."""
    kinds = (("students", _TEACHER), ("training", _TEACHER))
    return plan_studies(data, dataset, partial(_compute_students, dataset), partial(_paint_students, title), kinds)


def _compute_students(dataset: str, tables: Tables) -> tuple[list[Row], str]:
    students, teacher = tables["students"], tables[_TEACHER]
    model = f"{dataset}/{_TEACHER}"
    rows: list[Row] = []
    robust: dict[tuple[str, int], Booleans] = {}
    for loss in students["loss"].unique():
        for i in sorted(students["iteration"].unique()):
            mine = students[(students["loss"] == loss) & (students["iteration"] == i)]
            robust[loss, i] = mine["robust"].to_numpy()
            rows.append(make_row("A", model, f"student, {loss}", i, estimate_share(robust[loss, i])))
            rows.append(make_row("B", model, f"student, {loss}", i, estimate_share(mine["correct"].to_numpy())))
    own = teacher[(teacher["split"] == "test") & (teacher["seed"] == teacher["seed"].min())]
    iterations = sorted({i for _, i in robust})
    for i in iterations:
        mine = own[own["iteration"] == i]
        correct = mine.filter(like="logit_").to_numpy().argmax(1) == mine["label"].to_numpy()
        rows.append(make_row("A", model, "teacher", i, estimate_share(correct & ~mine["broken"].to_numpy())))
        rows.append(make_row("B", model, "teacher", i, estimate_share(correct)))
    middle, last = iterations[-2], iterations[-1]
    better = compare_shares(robust["logits", last], robust["softmax", last])
    later = compare_shares(robust["logits", middle], robust["logits", last])
    rows += [
        make_row("claim", model, "student: robust, logits minus softmax", last, better),
        make_row("claim", model, f"student: robust, teacher of iteration {middle} minus {last}", middle, later),
    ]
    return rows, (
        f"A.6: a teacher of iteration {middle} gives its student {format_points(later)} more robust images than one of "
        f"iteration {last}. {describe_finding(later.low > 0)}\n"
        f"A.7: fitting the logits leaves {format_points(better)} more robust images than fitting the softmax "
        f"(iteration {last}). {describe_finding(better.low > 0)}\n"
        "Robust: what PGD leaves. One student each."
    )


def _paint_students(title: str, numbers: pd.DataFrame, styles: Mapping[str, ModelStyle], caption: str) -> Figure:
    figure = make_figure(9.0, 4.6)
    colours = {"student, logits": "#0072B2", "student, softmax": "#D55E00", "teacher": "#000000"}
    axes = figure.subplots(1, 2)
    for ax, letter, what in zip(axes, "AB", ("% that withstand PGD", "% correct without an attack"), strict=True):
        rows = numbers[numbers["panel"] == letter]
        for i, (name, mine) in enumerate(rows.groupby("other", sort=False)):
            dashes = "--" if name == "teacher" else "-"
            draw_band(ax, mine, colours[str(name)], dashes, str(name), MARKERS[i])
        set_log_axis(ax)
        ax.set(title=letter, xlabel="iteration of the teacher", ylabel=f"{what}, band: Wilson 95 %")
    figure.suptitle(f"{title}, n = {int(numbers['n'].max())} test images")
    add_legend_below(figure, [axes[0]], caption, columns=3)
    return figure
