"""What noise in training buys: certificates of smoothing, and robust accuracy over the noise.

The CSV has the columns of `papers/figures/logits.py`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from robbench.analysis.logits import Estimate, compare_shares, estimate_share
from robbench.papers.figures.logits import (
    COLUMNS,
    Row,
    describe_likeness,
    draw_band,
    format_points,
    make_row,
)
from robbench.report.figures.canvas import MARKERS, add_legend_below, make_figure
from robbench.report.figures.source import FigureData, FigurePlan, ModelStyle
from robbench.results.reader import read_vouched_robust

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

__all__ = ["plan_noise_accuracy", "plan_smoothed_certificates"]

_STANDARD, _ADVERSARIAL = "natural", "at"
_RADII = np.arange(0, 1.2501, 0.05)
_CLAIMED = 0.5  # L2 radius of the caption
_STRONG = "fast"
_LESS = 0.05  # a model is as robust as another one if its share of robust images is lower by at most so much


def plan_smoothed_certificates(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan the certified accuracy of smoothed models by L2 radius."""
    stored = data.read_smoothed(dataset)
    standard = f"{dataset}/{_STANDARD}"
    if standard not in stored or len(stored) < 2:
        return FigurePlan.empty(data.make_command(standard, "certify {} --method smoothing --sigma 0.3"))
    settings = stored[standard][0].settings
    alike = {name: [c for c in data.list_smoothed(name) if _is_alike(c[0].settings, settings)] for name in stored}
    stored = {name: found[-1] for name, found in alike.items() if found}
    n = min(file.n for file, _ in stored.values())
    rows: list[Row] = []
    certified = {}
    for name, (_, table) in stored.items():
        radius = np.where(table["verdict"] == "proven", table["radius"], -1.0)
        rows += [make_row("A", name, "", r, estimate_share(radius >= r)) for r in _RADII]
        certified[name] = radius >= _CLAIMED
    noisy = [name for name in certified if _read_sigma(data, name) > 0]
    if noisy:
        best = max(noisy, key=lambda name: (certified[name][:n].mean(), name))
        both = min(len(certified[name]) for name in (best, standard))
        more = compare_shares(certified[best][:both], certified[standard][:both])
        rows.append(make_row("claim", best, f"certified at {_CLAIMED:g}, minus {_STANDARD}", _CLAIMED, more))
        claim = (
            f"At L2 radius {_CLAIMED:g}, {format_points(more)} more images of {best.split('/')[1]} are certified than "
            f"of {_STANDARD} (first {both} test images).\n"
            f"So noise in training {'buys' if more.low > 0 else 'does not clearly buy'} certificates. They hold"
        )
    else:
        claim = "No model with noise in training is certified alike, so nothing is claimed of noise. Certificates hold"
    caption = f"{claim} for a vote under noise of σ = {settings['sigma']:g}, not for the model itself."
    numbers = pd.DataFrame(rows, columns=COLUMNS)
    return FigurePlan(numbers, partial(_paint_certified, title, numbers, data.choose_styles(list(stored)), caption))


def _is_alike(settings: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Return whether two smoothed classifiers are certified alike. The draws and their error limit every radius."""
    return all(settings[key] == others[key] for key in ("sigma", "draws", "alpha"))


def _read_sigma(data: FigureData, name: str) -> float:
    entry = data.find_entry(name)
    return float(entry.card.recipe.sigma) if entry and entry.card.recipe else 0.0


def _paint_certified(title: str, numbers: pd.DataFrame, styles: Mapping[str, ModelStyle], caption: str) -> Figure:
    figure = make_figure(7.6, 4.6)
    ax = figure.subplots()
    for name, style in styles.items():
        mine = numbers[(numbers["panel"] == "A") & (numbers["model"] == name)]
        draw_band(ax, mine, style.colour, style.dashes, style.label, "")
    ax.set(xlabel="L2 radius", ylabel="certified, %; band: Wilson 95 %", ylim=(0, 100))
    figure.suptitle(title)
    add_legend_below(figure, [ax], caption)
    return figure


def plan_noise_accuracy(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan the accuracy under the usual PGD and under a strong suite, over the noise of the training."""
    usual, strong = (data.standard_results(dataset, suite) for suite in ("whitebox", _STRONG))
    names = [name for name in usual if name in strong and data.find_entry(name)]
    needed = [f"{dataset}/{short}" for short in (_STANDARD, _ADVERSARIAL)]
    missing = [data.make_command(name, f"eval -m {{}} --suite {_STRONG}") for name in needed if name not in names]
    noisy = [name for name in names if _read_sigma(data, name) > 0]
    if missing or not noisy:
        return FigurePlan.empty(*missing)
    rows: list[Row] = []
    robust = {}
    for name in names:
        pgd = next(a for a in usual[name].attacks if a.name.startswith("PGD-") and a.name.endswith("-xent"))
        robust[name] = read_vouched_robust(data.locate_result(strong[name]))
        for panel, accuracy, n in (
            ("A", pgd.robust_accuracy, usual[name].n),
            ("B", strong[name].robust_accuracy, strong[name].n),
        ):
            found = Estimate(accuracy.value, accuracy.low, accuracy.high, n)
            rows.append(make_row(panel, name, "", _read_sigma(data, name), found))
    shares = {row[1]: row[4] for row in rows if row[0] == "A"}
    best = max(noisy, key=lambda name: (strong[name].robust_accuracy.value, shares[name], name))
    claims = []
    for other in needed:
        both = robust[best].index.intersection(robust[other].index)
        found = compare_shares(robust[best][both].to_numpy(bool), robust[other][both].to_numpy(bool))
        claims.append(found)
        rows.append(make_row("claim", best, f"{_STRONG}: robust, minus {other.split('/')[1]}", 0, found))
    caption = (
        f"B: the best model with noise is {best.split('/')[1]}. Its robust accuracy minus that of {_STANDARD} is "
        f"{format_points(claims[0])}, and minus that of {_ADVERSARIAL} {format_points(claims[1])}.\n"
        "Shafahi et al. 2019: smoothing or squeezing with noise is as robust as adversarial training. "
        f"{describe_likeness(claims[1], -_LESS, 1.0)}"
    )
    numbers = pd.DataFrame(rows, columns=COLUMNS)
    return FigurePlan(numbers, partial(_paint_accuracy, title, numbers, data.choose_styles(names), caption))


def _paint_accuracy(title: str, numbers: pd.DataFrame, styles: Mapping[str, ModelStyle], caption: str) -> Figure:
    figure = make_figure(9.6, 5.2)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, letter, what in zip(axes, "AB", ("PGD on cross-entropy, one start", f"suite {_STRONG}"), strict=True):
        rows = numbers[numbers["panel"] == letter]
        place = rows.groupby("x").cumcount() - (rows.groupby("x")["x"].transform("count") - 1) / 2
        rows = rows.assign(shown=rows["x"] + 0.012 * place)
        for i, (name, style) in enumerate(styles.items()):
            mine = rows[rows["model"] == name]
            value = 100 * mine["value"]
            ax.errorbar(
                mine["shown"],
                value,
                yerr=[value - 100 * mine["low"], 100 * mine["high"] - value],
                fmt=MARKERS[i % len(MARKERS)],
                ms=4.5,
                lw=1,
                color=style.colour,
                label=name.split("/")[1],
            )
        ax.set(title=f"{letter}: {what}", xlabel="σ of the noise in training; marks of one σ lie side by side")
        ax.set_xticks(sorted(rows["x"].unique()))
    axes[0].set(ylabel="robust accuracy, %", ylim=(-2, None))
    figure.suptitle(title)
    add_legend_below(figure, [axes[0]], caption, columns=5)
    return figure
