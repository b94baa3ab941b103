"""Figures of short trainings with several seeds: 1, B.1, B.5 and B.6 of Seguin et al. 2021.

The CSV has the columns of `papers/figures/logits.py`. Rows of the panels of 1 and B.1 name a quantile in `other`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations, product
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from robbench.analysis.logits import (
    Estimate,
    average_overlap,
    compute_gaps,
    count_by_gap,
    estimate_mean,
    estimate_share,
)
from robbench.linear.theory import Values
from robbench.papers.figures.logits import (
    COLUMNS,
    Row,
    describe_finding,
    describe_likeness,
    draw_band,
    format_mean,
    format_points,
    make_row,
)
from robbench.report.figures.canvas import MARKERS, add_legend_below, make_figure, set_log_axis
from robbench.report.figures.source import FigureData, FigurePlan, ModelStyle

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plan_gap_evolution", "plan_logit_evolution", "plan_seed_gaps", "plan_seed_overlaps", "plan_studies"]

_STANDARD, _ADVERSARIAL = "natural", "at"
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_GROUPS = 5
_RESAMPLES = 500
_ALIKE = 0.1  # two mean gaps are alike if they differ by at most so much of the larger one
_T_OF_THREE = 4.303  # 97.5 % quantile of Student's t with 2 degrees of freedom

Tables = Mapping[str, pd.DataFrame]


def _logits(rows: pd.DataFrame, split: str, iteration: int, seed: int) -> Values:
    """Return the logits [n, K] of a split at an iteration of a seed."""
    mine = rows[(rows["split"] == split) & (rows["iteration"] == iteration) & (rows["seed"] == seed)]
    return mine.filter(like="logit_").to_numpy(np.float64)


def plan_studies(
    data: FigureData,
    dataset: str,
    compute: Callable[[Tables], tuple[list[Row], str]],
    paint: Callable[[pd.DataFrame, Mapping[str, ModelStyle], str], Figure],
    kinds: tuple[tuple[str, str], ...] = (("training", _STANDARD), ("training", _ADVERSARIAL)),
) -> FigurePlan:
    """Plan a figure of the series (kind, model), or none if one of them is missing."""
    tables, missing = {}, []
    for kind, short in kinds:
        name = f"{dataset}/{short}"
        rows = data.read_series(kind, dataset).get(name)
        if rows is None:
            missing.append(data.make_command(name, f"measure {kind} -m {{}}"))
        else:
            tables[short if kind == "training" else kind] = rows
    if missing:
        return FigurePlan.empty(*missing)
    found, caption = compute(tables)
    numbers = pd.DataFrame(found, columns=COLUMNS)
    styles = data.choose_styles([f"{dataset}/{name}" for name in (_STANDARD, _ADVERSARIAL)])
    return FigurePlan(numbers, partial(paint, numbers, styles, caption))


def _compute_quantiles(panel: str, model: str, values: Mapping[int, Values]) -> list[Row]:
    """Make the rows of a panel: the quantiles of values at each iteration."""
    return [
        make_row(panel, model, f"quantile {q}", i, Estimate(float(np.quantile(v, q)), np.nan, np.nan, len(v)))
        for i, v in values.items()
        for q in _QUANTILES
    ]


def _resample(first: Values, second: Values, statistic: Callable[[Values], float]) -> Estimate:
    """Return statistic(first) − statistic(second) of values of the same images, with its bootstrap interval."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(first), (_RESAMPLES, len(first)))
    found = [statistic(first[at]) - statistic(second[at]) for at in picks]
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(statistic(first) - statistic(second), float(low), float(high), len(first))


def _skew(values: Values) -> float:
    z = values - values.mean()
    return float((z**3).mean() / (z**2).mean() ** 1.5)


def plan_logit_evolution(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan Figure 1: the maximum logit of training images over a training."""
    return plan_studies(
        data, dataset, partial(_compute_logit_evolution, dataset), partial(_paint_evolution, title, "maximum")
    )


def _compute_logit_evolution(dataset: str, tables: Tables) -> tuple[list[Row], str]:
    rows: list[Row] = []
    last = int(tables[_ADVERSARIAL]["iteration"].max())
    top = {}
    for panel, (name, table) in zip("AB", tables.items(), strict=True):
        seed = int(table["seed"].min())
        top[name] = {int(i): _logits(table, "train", i, seed).max(1) for i in sorted(table["iteration"].unique())}
        rows += _compute_quantiles(panel, f"{dataset}/{name}", top[name])
    larger = estimate_mean(top[_STANDARD][last] - top[_ADVERSARIAL][last])
    skew = _resample(top[_ADVERSARIAL][last], top[_STANDARD][last], _skew)
    rows += [
        make_row("claim", f"{dataset}/{_STANDARD}", f"mean at the end minus that of {_ADVERSARIAL}", last, larger),
        make_row("claim", f"{dataset}/{_ADVERSARIAL}", f"skewness at the end minus that of {_STANDARD}", last, skew),
    ]
    return rows, (
        f"After {last} iterations, the maximum logit of {_STANDARD} is {format_mean(larger)} above that of "
        f"{_ADVERSARIAL} in the mean. {describe_finding(larger.low > 0)}\n"
        f"The skewness of {_ADVERSARIAL} is {format_mean(skew)} above that of {_STANDARD}. "
        f"{describe_finding(skew.low > 0)}\n"
        f"The trainings are short, and each has one seed here. n = {larger.n} training images."
    )


def plan_gap_evolution(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan Figure B.1: the logit gap of training and test images over a training."""
    return plan_studies(
        data, dataset, partial(_compute_gap_evolution, dataset), partial(_paint_evolution, title, "gap")
    )


def _compute_gap_evolution(dataset: str, tables: Tables) -> tuple[list[Row], str]:
    rows: list[Row] = []
    last = int(tables[_ADVERSARIAL]["iteration"].max())
    ends = {}
    for panel, (name, split) in zip(
        "ABC", ((_STANDARD, "train"), (_ADVERSARIAL, "train"), (_ADVERSARIAL, "test")), strict=True
    ):
        table = tables[name]
        seed, iterations = int(table["seed"].min()), sorted(table["iteration"].unique())
        gaps = {int(i): compute_gaps(_logits(table, split, i, seed)) for i in iterations}
        rows += _compute_quantiles(panel, f"{dataset}/{name}", gaps)
        ends[panel] = estimate_mean(gaps[last])
    apart, kept = _subtract(ends["A"], ends["B"]), _subtract(ends["B"], ends["C"])
    alike = _ALIKE * max(ends["A"].value, ends["B"].value)
    rows += [
        make_row("claim", f"{dataset}/{_STANDARD}", f"training images, minus {_ADVERSARIAL}", last, apart),
        make_row("claim", f"{dataset}/{_ADVERSARIAL}", "training images minus test images", last, kept),
    ]
    return rows, (
        f"After {last} iterations, the gap of training images is {format_mean(apart)} larger for {_STANDARD} than for "
        f"{_ADVERSARIAL}. The paper's become alike late in training. {describe_likeness(apart, -alike, alike)}\n"
        f"The gap of {_ADVERSARIAL} is {format_mean(kept)} larger on training images than on test images. "
        f"{describe_finding(kept.low > 0)}\n"
        "The trainings are short, and each has one seed here. What happens late stays open."
    )


def _subtract(first: Estimate, second: Estimate) -> Estimate:
    """Return the difference of two means of different images, with its normal interval."""
    half = float(np.hypot(first.high - first.value, second.high - second.value))
    value = first.value - second.value
    return Estimate(value, value - half, value + half, min(first.n, second.n))


def _paint_evolution(
    title: str, what: str, numbers: pd.DataFrame, styles: Mapping[str, ModelStyle], caption: str
) -> Figure:
    rows = numbers[numbers["panel"] != "claim"]
    panels = list(rows.groupby("panel"))
    figure = make_figure(3.2 * len(panels) + 1.2, 4.4)
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for ax, (letter, mine) in zip(axes, panels, strict=True):
        lines = mine.pivot_table(index="x", columns="other", values="value")
        style = styles[mine["model"].iloc[0]]
        q = [lines[f"quantile {q}"] for q in _QUANTILES]
        for low, high, alpha in ((0, 4, 0.15), (1, 3, 0.25)):
            ax.fill_between(lines.index, q[low], q[high], color=style.colour, alpha=alpha, lw=0)
        ax.plot(lines.index, q[2], color=style.colour, ls=style.dashes, marker="o", ms=4, label=style.label)
        set_log_axis(ax)
        split = ", test images" if letter == "C" else ", training images"
        ax.set(title=f"{letter}: {mine['model'].iloc[0].split('/')[1]}{split}", xlabel="iteration")
    axes[0].set_ylabel(f"{'maximum logit' if what == 'maximum' else 'logit gap'}: median, 25–75 %, 5–95 %")
    figure.suptitle(title)
    add_legend_below(figure, list(axes), caption)
    return figure


def plan_seed_gaps(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan Figure B.5: logit gaps, and the adversarial accuracy by gap with a band over seeds."""
    return plan_studies(data, dataset, partial(_compute_seed_gaps, dataset), partial(_paint_seed_gaps, title))


def _compute_seed_gaps(dataset: str, tables: Tables) -> tuple[list[Row], str]:
    rows: list[Row] = []
    above = []
    for name, table in tables.items():
        end = table[(table["iteration"] == table["iteration"].max()) & (table["split"] == "test")]
        gaps, robust = {}, {}
        for s, mine in end.groupby("seed"):
            z = mine.filter(like="logit_").to_numpy(np.float64)
            gaps[s] = compute_gaps(z)
            robust[s] = (z.argmax(1) == mine["label"].to_numpy()) & ~mine["broken"].to_numpy()
        pooled = np.concatenate(list(gaps.values()))
        model = f"{dataset}/{name}"
        edges = np.linspace(0, float(np.quantile(pooled, 0.999)), 25)
        at = np.clip(np.searchsorted(edges, pooled, side="right") - 1, 0, 23)
        rows += [make_row("A", model, "", edges[i], estimate_share(at == i)) for i in range(24)]
        parts = np.quantile(pooled, np.linspace(0, 1, _GROUPS + 1))
        parts[-1] = np.inf
        shares = np.array([[found.value for found in count_by_gap(gaps[s], robust[s], parts)] for s in gaps])
        for i in range(_GROUPS):
            inside = float(np.median(pooled[(pooled >= parts[i]) & (pooled < parts[i + 1])]))
            mean, deviation = shares[:, i].mean(), shares[:, i].std(ddof=1)
            band = Estimate(float(mean), float(mean - deviation), float(mean + deviation), len(pooled))
            rows.append(make_row("B", model, "mean and deviation over seeds", inside, band))
        if name == _ADVERSARIAL:
            for s, gap in gaps.items():
                large = gap >= np.median(gap)
                above.append(robust[s][large].mean() - robust[s][~large].mean())
    more = float(np.mean(above))
    half = _T_OF_THREE * float(np.std(above, ddof=1)) / len(above) ** 0.5 if len(above) == 3 else float("nan")
    found = Estimate(more, more - half, more + half, len(above))
    rows.append(make_row("claim", f"{dataset}/{_ADVERSARIAL}", "robust, above minus below the median gap", 0, found))
    return rows, (
        f"B: of the images of {_ADVERSARIAL} with a gap at or above the median, {format_points(found)} more withstand "
        f"PGD than of the others. The interval is Student's, over {len(above)} seeds.\n"
        f"{describe_finding(found.low > 0)} The paper's figure is of CIFAR-100."
    )


def _paint_seed_gaps(title: str, numbers: pd.DataFrame, styles: Mapping[str, ModelStyle], caption: str) -> Figure:
    figure = make_figure(9.0, 4.6)
    left, right = figure.subplots(1, 2)
    for name, style in styles.items():
        mine = numbers[numbers["model"] == name]
        a = mine[mine["panel"] == "A"]
        left.step(a["x"], 100 * a["value"], where="post", color=style.colour, ls=style.dashes, label=style.label)
        draw_band(right, mine[mine["panel"] == "B"], style.colour, style.dashes, style.label, "o")
    left.set(title="A", xlabel="logit gap", ylabel="% of the images, per bin")
    right.set(title="B", xlabel="logit gap", ylabel="% that withstand PGD; band: deviation", ylim=(0, 100))
    figure.suptitle(title)
    add_legend_below(figure, [left], caption)
    return figure


def plan_seed_overlaps(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan Figure B.6: the average overlap of the class orders of networks with different seeds."""
    return plan_studies(data, dataset, partial(_compute_overlaps, dataset), partial(_paint_overlaps, title))


def _compute_overlaps(dataset: str, tables: Tables) -> tuple[list[Row], str]:
    ends, label = {}, None
    for name, table in tables.items():
        last = int(table["iteration"].max())
        ends[name] = [_logits(table, "test", last, s) for s in sorted(table["seed"].unique())]
        first = table[
            (table["split"] == "test") & (table["iteration"] == last) & (table["seed"] == table["seed"].min())
        ]
        label = first["label"].to_numpy()
    pairs = {
        f"{_ADVERSARIAL} – {_ADVERSARIAL}": list(combinations(ends[_ADVERSARIAL], 2)),
        f"{_STANDARD} – {_STANDARD}": list(combinations(ends[_STANDARD], 2)),
        f"{_STANDARD} – {_ADVERSARIAL}": list(product(ends[_STANDARD], ends[_ADVERSARIAL])),
    }
    rows: list[Row] = []
    third = {}
    for pair, networks in pairs.items():
        for how, within in (("same image", None), ("same class", label)):
            overlap = np.mean([average_overlap(a, b, within) for a, b in networks], axis=0)
            third[pair, how] = overlap[:, 2]
            rows += [make_row("A", pair, how, k + 1, estimate_mean(v)) for k, v in enumerate(overlap.T)]
    own, _, mixed = pairs
    more = estimate_mean(third[own, "same image"] - third[mixed, "same image"])
    drop = {pair: third[pair, "same image"] - third[pair, "same class"] for pair in (own, mixed)}
    lost = estimate_mean(drop[own] - drop[mixed])
    rows += [
        make_row("claim", own, f"AO@3 minus that of {mixed}", 3, more),
        make_row("claim", own, f"loss of AO@3 by permuting, minus that of {mixed}", 3, lost),
    ]
    return rows, (
        f"AO@3 of two seeds of {_ADVERSARIAL} is {format_mean(more)} above that of {mixed}. "
        f"{describe_finding(more.low > 0)}\n"
        f"Comparing with other images of the class costs {own} {format_mean(lost)} more. "
        f"{describe_finding(lost.low > 0)}\nThe paper's figure is of CIFAR-100."
    )


def _paint_overlaps(title: str, numbers: pd.DataFrame, styles: Mapping[str, ModelStyle], caption: str) -> Figure:
    figure = make_figure(7.6, 4.8)
    ax = figure.subplots()
    colours = ("#0072B2", "#000000", "#D55E00")
    rows = numbers[numbers["panel"] == "A"]
    for i, (pair, mine) in enumerate(rows.groupby("model", sort=False)):
        for how, part in mine.groupby("other", sort=False):
            dashes = "-" if how == "same image" else "--"
            ax.plot(
                part["x"], part["value"], ls=dashes, color=colours[i], marker=MARKERS[i], ms=4, label=f"{pair}, {how}"
            )
            ax.fill_between(part["x"], part["low"], part["high"], color=colours[i], alpha=0.15, lw=0)
    ax.set(xlabel="k", ylabel="average overlap AO@k")
    figure.suptitle(f"{title}, n = {int(rows['n'].max())} test images")
    add_legend_below(figure, [ax], caption, columns=3)
    return figure
