"""Logit gaps, order of the images and order of the classes: Figures 2, 3 and 4 of Seguin et al. 2021.

The CSV of each figure has one row per plotted number: panel, model, other (a second model, or what was done), x, value,
the 95 % interval low to high, and n images. The rows of the panel "claim" are the numbers of the caption.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from robbench.analysis.logits import (
    Estimate,
    average_overlap,
    change_tail,
    compute_confidence,
    compute_divergence,
    compute_gaps,
    count_by_gap,
    estimate_mean,
    estimate_share,
    rank_errors,
    rank_within_class,
)
from robbench.analysis.record import StoredLogits
from robbench.core.stats import paired_difference
from robbench.report.figures.canvas import MARKERS, add_legend_below, make_figure, set_log_axis
from robbench.report.figures.claims import format_mean, format_points, format_share
from robbench.report.figures.source import FigureData, FigurePlan, ModelStyle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLUMNS",
    "Row",
    "describe_finding",
    "describe_likeness",
    "draw_band",
    "format_mean",
    "format_points",
    "format_share",
    "make_row",
    "plan_fixed_logits",
    "plan_logit_gaps",
    "plan_logit_orders",
]

COLUMNS = ["panel", "model", "other", "x", "value", "low", "high", "n"]
_STANDARD, _ADVERSARIAL, _SECOND = "natural", "at", "trades"  # TRADES stands in for a second seed of `at`
_BINS, _GROUPS = 48, 6
_SHOWN = 8  # the class of Figure 3A; the paper shows its frogs
_HOWS: tuple[Literal["permute", "average"], ...] = ("permute", "average")

Row = tuple[str, str, str, float, float, float, float, int]


def make_row(panel: str, model: str, other: str, x: float, found: Estimate) -> Row:
    """Make a row of the CSV."""
    return panel, model, other, x, found.value, found.low, found.high, found.n


def describe_finding(shows: bool) -> str:
    """Return the sentence of a caption that says whether a finding of the paper shows."""
    return "The paper's finding shows here." if shows else "The paper's finding does not show here."


def describe_likeness(difference: Estimate, least: float, most: float) -> str:
    """Return the sentence that says whether two things are alike, as a paper finds.

    A wide interval around 0 shows nothing. They are alike if the whole interval is from `least` to `most`, and not
    alike if another interval is without 0.
    """
    if least <= difference.low and difference.high <= most:
        return describe_finding(True)
    if difference.low <= 0 <= difference.high:
        return "The interval is too wide to say whether the paper's finding shows here."
    return describe_finding(False)


def _plan(
    data: FigureData,
    dataset: str,
    needed: tuple[str, ...],
    compute: Callable[[Mapping[str, StoredLogits], str], tuple[list[Row], str]],
    paint: Callable[[pd.DataFrame, Mapping[str, ModelStyle], str], Figure],
) -> FigurePlan:
    """Plan a figure of all models with logits, or of none if one that it cannot do without is missing."""
    stored = data.read_logits(dataset)
    missing = [
        data.make_command(name, "measure logits -m {}")
        for short in needed
        if (name := f"{dataset}/{short}") not in stored and data.find_entry(name)
    ]
    if missing or not stored:
        return FigurePlan.empty(*missing)
    n = min(len(z) for z in stored.values())  # each measurement has the first images of the test set
    rows, caption = compute({name: z.take_first(n) for name, z in stored.items()}, dataset)
    numbers = pd.DataFrame(rows, columns=COLUMNS)
    return FigurePlan(numbers, partial(paint, numbers, data.choose_styles(list(stored)), caption))


def plan_logit_gaps(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan Figure 2: the distribution of logit gaps, and the adversarial accuracy of images by their gap."""
    return _plan(data, dataset, (_STANDARD, _ADVERSARIAL), _compute_gap_rows, partial(_paint_gaps, title))


def _compute_gap_rows(stored: Mapping[str, StoredLogits], dataset: str) -> tuple[list[Row], str]:
    gaps = {name: compute_gaps(z.clean) for name, z in stored.items()}
    everything = np.concatenate(list(gaps.values()))
    low, high = np.quantile(everything[everything > 0], [0.002, 1])
    edges = np.geomspace(low, high, _BINS + 1)
    rows = []
    for name, values in gaps.items():
        at = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, _BINS - 1)
        rows += [make_row("A", name, "", edges[i], estimate_share(at == i)) for i in range(_BINS)]
    for name, values in gaps.items():
        parts = np.quantile(values, np.linspace(0, 1, _GROUPS + 1))
        parts[-1] = np.inf
        inside = [float(np.median(values[(values >= a) & (values < b)])) for a, b in pairwise(parts)]
        shares = count_by_gap(values, stored[name].robust, parts)
        rows += [make_row("B", name, "", x, share) for x, share in zip(inside, shares, strict=True)]
    standard, adversarial = f"{dataset}/{_STANDARD}", f"{dataset}/{_ADVERSARIAL}"
    smaller = estimate_mean(gaps[adversarial] - gaps[standard])
    half = np.median(gaps[adversarial])
    large = gaps[adversarial] >= half
    below, above = (estimate_share(stored[adversarial].robust[part]) for part in (~large, large))
    rows += [
        make_row("claim", adversarial, f"gap minus that of {_STANDARD}", 0, smaller),
        make_row("claim", adversarial, "robust, gap below the median", 0, below),
        make_row("claim", adversarial, "robust, gap at or above the median", 0, above),
    ]
    caption = (
        f"A: the gap of {_ADVERSARIAL} minus that of {_STANDARD} is {format_mean(smaller)} in the mean. "
        f"{describe_finding(smaller.high < 0)}\n"
        f"B: {format_share(above)} of the images of {_ADVERSARIAL} with a gap at or above its median withstand PGD, "
        f"and {format_share(below)} of the others. {describe_finding(above.low > below.high)}"
    )
    return rows, caption


def _paint_gaps(title: str, numbers: pd.DataFrame, styles: Mapping[str, ModelStyle], caption: str) -> Figure:
    figure = make_figure(9.6, 5.0)
    left, right = figure.subplots(1, 2)
    for name, style in styles.items():
        rows = numbers[(numbers["panel"] == "A") & (numbers["model"] == name)]
        left.step(rows["x"], 100 * rows["value"], where="post", color=style.colour, ls=style.dashes, label=style.label)
        rows = numbers[(numbers["panel"] == "B") & (numbers["model"] == name)]
        draw_band(right, rows, style.colour, style.dashes, style.label, "o")
    for ax, letter, what in (
        (left, "A", "% of the images, per bin"),
        (right, "B", "% that withstand PGD, band: Wilson 95 %"),
    ):
        set_log_axis(ax)
        ax.set(title=letter, xlabel="logit gap: largest minus second largest logit", ylabel=what)
        ax.set_ylim(bottom=0)
    n = int(numbers["n"].max())
    figure.suptitle(f"{title}, n = {n} test images")
    add_legend_below(figure, [left], caption)
    return figure


def draw_band(ax: Axes, rows: pd.DataFrame, colour: str, dashes: Any, label: str, marker: str) -> None:
    """Draw shares in percent over x, with their intervals as a band."""
    ax.plot(rows["x"], 100 * rows["value"], color=colour, ls=dashes, marker=marker, ms=4, label=label)
    ax.fill_between(rows["x"], 100 * rows["low"], 100 * rows["high"], color=colour, alpha=0.15, lw=0)


def plan_logit_orders(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan Figure 3: whether models agree on which images they are sure of, and on the order of the classes."""
    needed = (_STANDARD, _ADVERSARIAL, _SECOND)
    return _plan(data, dataset, needed, _compute_order_rows, partial(_paint_orders, title))


def _compute_order_rows(stored: Mapping[str, StoredLogits], dataset: str) -> tuple[list[Row], str]:
    standard, adversarial, second = (f"{dataset}/{name}" for name in (_STANDARD, _ADVERSARIAL, _SECOND))
    label = stored[standard].label
    ranks = {name: rank_within_class(compute_confidence(z.clean), label) for name, z in stored.items()}
    points = [(ranks[standard][i], ranks[adversarial][i]) for i in np.flatnonzero(label == _SHOWN)]
    rows: list[Row] = [("A", standard, adversarial, x, y, np.nan, np.nan, len(label)) for x, y in points]
    for a, b in combinations(stored, 2):
        rows.append(make_row("B", a, b, 0, estimate_share(np.abs(ranks[a] - ranks[b]) > 0.5)))
    for name in (standard, adversarial):
        z = stored[name]
        wrong = rank_errors(z.clean, z.adversarial.argmax(1), z.label)
        rows += [make_row("C", name, "", k, estimate_share(wrong == k)) for k in range(2, z.clean.shape[1] + 1)]
    overlaps = {}
    for a, b in ((standard, adversarial), (adversarial, second)):
        for how, within in (("same image", None), ("same class", label)):
            overlap = average_overlap(stored[a].clean, stored[b].clean, within)
            overlaps[a, how] = overlap[:, 2]
            rows += [make_row("D", a, f"{b}, {how}", k + 1, estimate_mean(v)) for k, v in enumerate(overlap.T)]
    far = [np.abs(ranks[a] - ranks[adversarial]) > 0.5 for a in (standard, second)]
    apart, alike = (estimate_share(f) for f in far)
    only = int((far[0] & ~far[1]).sum()), int((far[1] & ~far[0]).sum())
    more = Estimate((only[0] - only[1]) / len(label), *paired_difference(*only, len(label)), len(label))
    mixed, same = overlaps[standard, "same image"], overlaps[adversarial, "same image"]
    closer = estimate_mean(same - mixed)
    rows += [
        make_row("claim", standard, f"{adversarial}: ranks more than half apart", 0, apart),
        make_row("claim", second, f"{adversarial}: ranks more than half apart", 0, alike),
        make_row("claim", standard, f"{adversarial}: as before, minus that of {second}", 0, more),
        make_row("claim", standard, f"{adversarial}: AO@3", 3, estimate_mean(mixed)),
        make_row("claim", second, f"{adversarial}: AO@3", 3, estimate_mean(same)),
        make_row("claim", second, f"{adversarial}: AO@3 minus that of {standard}", 3, closer),
    ]
    caption = (
        f"B: {_STANDARD} and {_ADVERSARIAL} rank {format_share(apart)} of the images more than half the range apart, "
        f"{_SECOND} and {_ADVERSARIAL} {format_share(alike)}.\n"
        f"The difference is {format_points(more)}. {describe_finding(more.low > 0)}\n"
        f"D: AO@3 of {_SECOND} and {_ADVERSARIAL} on one image is {format_mean(closer)} above that of {_STANDARD} and "
        f"{_ADVERSARIAL}. {describe_finding(closer.low > 0)}\n"
        f"{_SECOND} stands in for a second seed of {_ADVERSARIAL}."
    )
    return rows, caption


def _paint_orders(title: str, numbers: pd.DataFrame, styles: Mapping[str, ModelStyle], caption: str) -> Figure:
    figure = make_figure(9.6, 8.2)
    (scatter, bars), (errors, overlap) = figure.subplots(2, 2)
    panel = {key: rows for key, rows in numbers.groupby("panel")}
    rows = panel["A"]
    far = (rows["x"] - rows["value"]).abs() > 0.5
    for mine, colour in ((rows[~far], "#7F7F7F"), (rows[far], "#D55E00")):
        scatter.scatter(mine["x"], mine["value"], s=12, color=colour)
    scatter.set(
        title=f"A: the images of class {_SHOWN}",
        xlabel="rank of the confidence, natural",
        ylabel="rank of the confidence, at",
    )
    rows = panel["B"]
    names = [f"{a.split('/')[1]} – {b.split('/')[1]}" for a, b in zip(rows["model"], rows["other"], strict=True)]
    value = 100 * rows["value"]
    spread = [value - 100 * rows["low"], 100 * rows["high"] - value]
    bars.barh(names, value, xerr=spread, color="#56B4E9", error_kw={"lw": 1})
    bars.tick_params(axis="y", labelsize=7.5)
    bars.invert_yaxis()
    bars.set(title="B: two models", xlabel="% of images with ranks more than half the range apart")
    for i, (name, mine) in enumerate(panel["C"].groupby("model", sort=False)):
        style = styles[str(name)]
        draw_band(errors, mine, style.colour, style.dashes, style.label, MARKERS[i])
    errors.set(
        title="C: wrong answers, clean and under PGD", xlabel="place of the answer in the mean logits of its class"
    )
    errors.set_ylabel("% of the wrong answers")
    for key, mine in panel["D"].groupby(["model", "other"], sort=False):
        first, other = map(str, key)
        pair, _, how = other.partition(", ")
        text = f"{first.split('/')[1]} – {pair.split('/')[1]}, {how}"
        dashes = "-" if how == "same image" else "--"
        colour = styles[first].colour
        overlap.plot(mine["x"], mine["value"], ls=dashes, color=colour, label=text)
        overlap.fill_between(mine["x"], mine["low"], mine["high"], color=colour, alpha=0.15, lw=0)
    overlap.set(title="D: order of the classes", xlabel="k", ylabel="average overlap AO@k")
    figure.suptitle(f"{title}, n = {int(numbers['n'].max())} test images")
    add_legend_below(figure, [errors, overlap], caption)
    return figure


def plan_fixed_logits(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan Figure 4: what remains of the logits of `at` when all but the k largest are permuted or averaged."""
    return _plan(data, dataset, (_ADVERSARIAL,), _compute_fixed_rows, partial(_paint_fixed, title))


def _compute_fixed_rows(stored: Mapping[str, StoredLogits], dataset: str) -> tuple[list[Row], str]:
    name = f"{dataset}/{_ADVERSARIAL}"
    z = stored[name].clean
    classes = z.shape[1]
    shown = int(np.argsort(compute_gaps(z))[len(z) // 4])  # an image with a small gap has a tail that is easy to see
    rows: list[Row] = []
    for how, values in (("original", z), *((how, change_tail(z, 3, how)) for how in _HOWS)):
        rows += [("A", name, how, k, values[shown, k], np.nan, np.nan, 1) for k in range(classes)]
    lost = {}
    for how in _HOWS:
        for k in range(1, classes - 1):  # a tail of one logit does not change
            lost[how, k] = estimate_mean(compute_divergence(z, change_tail(z, k, how)))
            rows.append(make_row("B", name, how, k, lost[how, k]))
    kept = 7  # what the paper's students need
    whole, tail = (compute_divergence(z, change_tail(z, k, "permute")) for k in (1, kept))
    difference = estimate_mean(tail - 0.01 * whole)
    rows += [
        make_row("claim", name, "permute: divergence at k = 1", 1, lost["permute", 1]),
        make_row("claim", name, "permute: divergence at k = 7", kept, lost["permute", kept]),
        make_row("claim", name, "permute: divergence at k = 7 minus 1 % of that at k = 1", kept, difference),
    ]
    caption = (
        f"B: permuting all but 1 logit changes the softmax by {format_mean(lost['permute', 1])} nats, all but 7 by "
        f"{format_mean(lost['permute', kept])}, {'less' if difference.high < 0 else 'not less'} than 1 % of it.\n"
        "The paper trains students on these targets; they need k = 7 for 99 % of their robustness. No student was "
        "trained here.\nThe change of the targets stands in for it, so whether the paper's finding shows here is open."
    )
    return rows, caption


def _paint_fixed(title: str, numbers: pd.DataFrame, styles: Mapping[str, ModelStyle], caption: str) -> Figure:
    figure = make_figure(9.6, 4.8)
    left, right = figure.subplots(1, 2)
    colours = {"original": "#000000", "permute": "#0072B2", "average": "#E69F00"}
    rows = numbers[numbers["panel"] == "A"]
    for i, (how, mine) in enumerate(rows.groupby("other", sort=False)):
        left.bar(mine["x"] + 0.27 * (i - 1), mine["value"], 0.27, color=colours[str(how)], label=f"{how}")
    left.set(title="A: one image, k = 3", xlabel="class", ylabel="logit", xticks=range(len(mine)))
    rows = numbers[numbers["panel"] == "B"]
    for i, (how, mine) in enumerate(rows.groupby("other", sort=False)):
        colour = colours[str(how)]
        right.plot(mine["x"], mine["value"], color=colour, marker=MARKERS[i], ms=4)
        right.fill_between(mine["x"], mine["low"], mine["high"], color=colour, alpha=0.15, lw=0)
    set_log_axis(right, vertical=True)
    right.set(
        title="B: all images", xlabel="k, the number of logits that are kept", ylabel="change of the softmax (KL, nats)"
    )
    figure.suptitle(f"{title}, n = {int(numbers['n'].max())} test images")
    add_legend_below(figure, [left], caption, columns=3)
    return figure
