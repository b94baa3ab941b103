"""Figures of robust accuracy: over the radius, over an attack's steps, and by class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from robbench.core.types import Status
from robbench.core.words import name_tree
from robbench.report.figures.canvas import (
    DASHES,
    MARKERS,
    OKABE_ITO,
    add_footnote,
    add_legend_below,
    make_figure,
    make_panels,
    set_level_axis,
    shift_marks,
)
from robbench.report.figures.claims import (
    Claim,
    add_claim,
    claim_classes,
    claim_prediction,
    claim_steps,
    count_steps,
)
from robbench.report.figures.source import FigureData, FigurePlan
from robbench.report.linear import find_standard_radius, format_radius
from robbench.report.sweep import build_sweep
from robbench.results.reader import read_vouched_rows
from robbench.results.schema import Accuracy, ResultFile
from robbench.results.summary import find_robust_samples, make_accuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

__all__ = ["plan_classes_figure", "plan_eps_figure", "plan_steps_figure"]

_SUITE = "whitebox"
_PERCENT = (-4, 104)  # leaves room for whole markers at 0 and 100 %
_PREDICTED_RADII = 60  # number of radii at which the prediction is evaluated
_PREDICTED, _WORST, _OTHER, _ONE_STEP = "Equation 4", "worst case", "worst case of a weaker suite", "FGSM-CW"
_RADIUS_STYLES: dict[str, dict[str, Any]] = {
    _PREDICTED: {"color": OKABE_ITO["black"], "ls": DASHES[1], "marker": None},
    _ONE_STEP: {"color": OKABE_ITO["blue"], "ls": DASHES[0], "marker": "o"},
    _OTHER: {"color": OKABE_ITO["grey"], "ls": DASHES[2], "marker": "D"},
    _WORST: {"color": OKABE_ITO["vermillion"], "ls": DASHES[0], "marker": "s"},
}


# ---- over the radius


def plan_eps_figure(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan a figure of predicted (Eq. 4) and measured robust accuracy over the Linf radii of stored results."""
    results = [r for r in data.results if r.dataset == dataset and r.threat.norm == "Linf"]
    results = [r for r in results if not set(r.overrides) - {"eps", "norm"}]
    order = data.measured_models(dataset)
    order += [n for n in dict.fromkeys(f"{r.dataset}/{r.model}" for r in results) if n not in order]
    rows = [row for name in order for row in _radius_rows(data, name, results)]
    if not rows:
        return FigurePlan.empty(data.make_command(f"{dataset}/natural", "measure linear -m {}"))
    plotted = _mark_weaker_suites(pd.DataFrame(rows))
    usual = find_standard_radius(dataset)
    numbers, note = add_claim(plotted, claim_prediction(data, plotted, results, usual))
    missing = [data.make_command(n, "measure linear -m {}") for n in order if data.read_linear(n) is None]
    swept = plotted[(plotted["series"] == _WORST) & (plotted["eps"] > 0)].groupby("model")["eps"].nunique()
    if usual is not None:
        radii = ",".join(["0", *(format_radius(usual * k / 4) for k in (1, 2, 3, 4, 5))])
        if single := [n for n in order if swept.get(n, 0) < 2]:
            models = " ".join(f"-m {n}" for n in single)
            missing.append(f"robbench eval {models} --suite quick --eps {radii}{name_tree(data.root)}")
    in_levels = usual is not None and "/255" in format_radius(usual)
    return FigurePlan(numbers, partial(_paint_eps, plotted, title, in_levels, note), missing)


def _radius_rows(data: FigureData, name: str, results: list[ResultFile]) -> Iterator[dict[str, Any]]:
    of_model = [r for r in results if f"{r.dataset}/{r.model}" == name]
    measured = data.read_linear(name)
    usual = find_standard_radius(name.partition("/")[0])
    known = [float(Fraction(r.threat.eps)) for r in of_model]
    top = max([*known, 1.5 * float(usual or 0)]) or 1.0
    if measured is not None:
        radius = measured.take_at_nearest("radius")
        for eps in map(float, np.linspace(0, top, _PREDICTED_RADII + 1)):
            yield _point(
                name, _PREDICTED, "linear", eps, make_accuracy(int((radius > eps).sum()), len(radius)), len(radius)
            )
    # Results with the same suite and n are on the same images, the first n.
    for suite, n in dict.fromkeys((r.suite, r.n) for r in of_model):
        group = [r for r in of_model if (r.suite, r.n) == (suite, n)]
        for point in build_sweep(data.root, group, clean=True).points:
            eps = float(Fraction(point.eps))
            yield _point(name, _WORST, suite, eps, point.worst_case, n)
            if _ONE_STEP in point.attacks and group[0].mode == "full":
                yield _point(name, _ONE_STEP, suite, eps, point.attacks[_ONE_STEP], n)


def _mark_weaker_suites(numbers: pd.DataFrame) -> pd.DataFrame:
    """Rename the series of a suite's worst case if the suite is the strongest at none of its radii."""
    worst = numbers[(numbers["series"] == _WORST) & (numbers["eps"] > 0)]
    keys = ["model", "suite", "images"]
    lowest = worst["high"] == worst.groupby(["model", "eps"])["high"].transform("min")
    strong = pd.MultiIndex.from_frame(worst.loc[lowest, keys])
    weaker = (numbers["series"] == _WORST) & ~pd.MultiIndex.from_frame(numbers[keys]).isin(strong)
    return numbers.assign(series=numbers["series"].mask(weaker, _OTHER))


def _point(model: str, series: str, suite: str, eps: float, value: Accuracy, images: int) -> dict[str, Any]:
    shares = {"value": value.value, "low": value.low, "high": value.high}
    return {"model": model, "series": series, "suite": suite, "eps": eps, **shares, "images": images}


def _paint_eps(numbers: pd.DataFrame, title: str, in_levels: bool, claim: str) -> Figure:
    models = list(dict.fromkeys(numbers["model"]))
    figure, axes = make_panels(len(models), "Linf radius ε (pixel units)", "accuracy, %")
    top = float(numbers["eps"].max())
    for name, ax in zip(models, axes, strict=True):
        mine = numbers[numbers["model"] == name]
        _paint_radius_panel(ax, mine, 0.022 * top)
        ax.set_title(f"{name}, n = {_format_counts(mine)}")
        ax.set_ylim(*_PERCENT)
        ax.set_xlim(-0.03 * top, top)  # leaves room for the whole marker of the clean accuracy at 0
        if in_levels:
            set_level_axis(ax, top)
    figure.suptitle(title)
    note = (
        "Bars and bands: 95 % Wilson intervals. Worst case: broken by no attack of a suite; one mark or curve a suite. "
        "Marks of one radius are beside each other."
    )
    add_legend_below(figure, axes, f"{claim}\n{note}", columns=4)
    return figure


def _paint_radius_panel(ax: Axes, mine: pd.DataFrame, step: float) -> None:
    """Paint the series of one model. Those with one radius are marks beside each other, `step` apart."""
    marks, curves = [], 0
    for series, style in _RADIUS_STYLES.items():
        for _, rows in mine[mine["series"] == series].groupby(["suite", "images"], sort=False):
            attacked = rows[rows["eps"] > 0].sort_values("eps")
            if series == _PREDICTED:
                whole = rows.sort_values("eps")
                ax.plot(whole["eps"], 100 * whole["value"], label="Equation 4 (share of L > ε)", **style)
            elif len(attacked) > 1:
                _paint_radius_curve(ax, series, rows.sort_values("eps"), style)
                curves += 1
            else:
                marks.append((series, attacked, style))
    clean = mine[(mine["eps"] == 0) & (mine["series"] == _WORST)]
    if not curves and len(clean):
        _paint_mark(ax, _WORST, clean.head(1), _RADIUS_STYLES[_WORST], 0)
    for i, (series, rows, style) in enumerate(sorted(marks, key=lambda mark: -float(mark[1]["value"].sum()))):
        # With one radius, draw no line. A line would suggest values between this radius and the clean accuracy.
        _paint_mark(ax, series, rows, style, step * (i + 1 if curves else i - (len(marks) - 1) / 2))


def _paint_radius_curve(ax: Axes, series: str, rows: pd.DataFrame, style: dict[str, Any]) -> None:
    ax.fill_between(rows["eps"], 100 * rows["low"], 100 * rows["high"], color=style["color"], alpha=0.15, lw=0)
    ax.plot(rows["eps"], 100 * rows["value"], ms=4.5, label=series, **style)


def _paint_mark(ax: Axes, series: str, rows: pd.DataFrame, style: dict[str, Any], shift: float) -> None:
    value = 100 * rows["value"]
    spread = [value - 100 * rows["low"], 100 * rows["high"] - value]
    about = {"fmt": style["marker"], "color": style["color"], "ms": 4, "capsize": 2, "lw": 1.2}
    ax.errorbar(rows["eps"] + shift, value, yerr=spread, label=series, **about)


# ---- over the steps of an attack


def plan_steps_figure(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan a figure of the robust accuracy after each step of each attack. The records hold the step of each break."""
    results = [r for r in data.standard_results(dataset, _SUITE).values() if r.judge == "any"]
    rows = [row for r in results for row in _step_rows(data, r)]
    return _plan_suite_figure(data, title, dataset, rows, claim_steps(data, results), _paint_steps)


def _step_rows(data: FigureData, result: ResultFile) -> Iterator[dict[str, Any]]:
    rows = read_vouched_rows(data.locate_result(result))
    for attack in result.attacks:
        of_attack = rows[rows["attack"] == attack.name]
        if attack.config.get("steps") is None:
            continue
        total, broken_at = count_steps(of_attack, attack.config)
        correct = len(of_attack) - int((of_attack["status"] == Status.MISCLASSIFIED).sum())
        for step in _choose_steps(total):
            robust = make_accuracy(correct - int((broken_at <= step).sum()), len(of_attack))
            yield {
                "model": f"{result.dataset}/{result.model}", "attack": attack.name, "step": step,
                "value": robust.value, "low": robust.low, "high": robust.high, "images": len(of_attack),
                "threat": f"{result.threat.norm} {result.threat.eps}",
            }  # fmt: skip


def _choose_steps(total: int) -> list[int]:
    """Choose steps from the starting point (0) to the last one, evenly spaced on a logarithmic axis."""
    return sorted({0, total, *(int(s) for s in np.geomspace(1, total, 40).round())})


def _paint_steps(numbers: pd.DataFrame, title: str, claim: str) -> Figure:
    models = list(dict.fromkeys(numbers["model"]))
    figure, axes = make_panels(len(models), "steps of the attack (0: its starting point)", "accuracy, %")
    kinds = list(dict.fromkeys(numbers["attack"]))
    for name, ax in zip(models, axes, strict=True):
        mine = numbers[numbers["model"] == name]
        last = mine.groupby("attack", sort=False)["step"].max()
        for i, attack in enumerate(kinds):
            if attack in last:
                beside = [a for a in kinds if last.get(a) == last[attack]]
                shift = shift_marks(ax, beside.index(attack), len(beside))
                _paint_step_series(ax, attack, i, mine[mine["attack"] == attack], shift)
        ax.set_title(f"{name}, n = {_format_counts(mine)}")
        ax.set_xscale("symlog", linthresh=1, linscale=0.35)
        ax.set_xticks([0, 1, 3, 10, 30, 100], ["0", "1", "3", "10", "30", "100"])
        ax.set_xlim(0, 1.3 * float(numbers["step"].max()))
        ax.set_ylim(*_PERCENT)
    figure.suptitle(f"{title}, {', '.join(dict.fromkeys(numbers['threat']))}")
    note = (
        "Every queried point that is misclassified inside the ball counts. The marker is the attack's last step. "
        "Markers of equally many steps are beside each other."
    )
    add_legend_below(figure, axes, f"{claim}\n{note}", columns=3)
    return figure


def _paint_step_series(ax: Axes, attack: str, position: int, rows: pd.DataFrame, shift: Transform) -> None:
    colour = list(OKABE_ITO.values())[position % len(OKABE_ITO)]
    marker: dict[str, Any] = {"color": colour, "marker": MARKERS[position % len(MARKERS)], "ms": 4.5}
    dashes = DASHES[position % len(DASHES)]
    ax.plot(rows["step"], 100 * rows["value"], ls=dashes, markevery=[], label=attack, **marker)
    last = rows.iloc[-1]
    ax.plot([last["step"]], [100 * last["value"]], ls="", transform=shift, zorder=3, **marker)


# ---- by class


def plan_classes_figure(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan a figure of the worst-case robust accuracy of every class."""
    results = data.standard_results(dataset, _SUITE).values()
    rows = [row for r in results for row in _class_rows(data, r)]
    return _plan_suite_figure(data, title, dataset, rows, claim_classes(rows), _paint_classes)


def _class_rows(data: FigureData, result: ResultFile) -> Iterator[dict[str, Any]]:
    rows = read_vouched_rows(data.locate_result(result))
    robust = find_robust_samples(rows)
    label = rows.drop_duplicates("sample").set_index("sample")["label"].reindex(robust.index)
    groups = [*robust.groupby(label), ("all", robust)]
    for name, group in groups:
        share = make_accuracy(int(group.sum()), len(group))
        yield {
            "model": f"{result.dataset}/{result.model}", "class": str(name), "value": share.value, "low": share.low,
            "high": share.high, "images": len(group), "threat": f"{result.threat.norm} {result.threat.eps}",
        }  # fmt: skip


def _paint_classes(numbers: pd.DataFrame, title: str, claim: str) -> Figure:
    values = 100 * numbers.pivot(index="model", columns="class", values="value")
    models, classes = list(dict.fromkeys(numbers["model"])), _sort_classes(numbers)
    values = values.reindex(index=models, columns=classes)
    figure = make_figure(1.9 + 0.62 * len(classes), 1.9 + 0.42 * len(models))
    ax = figure.subplots()
    ax.grid(False)
    image = ax.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for i, model in enumerate(models):
        for j, name in enumerate(classes):
            value = values.loc[model, name]
            weight = "bold" if name == "all" else "normal"
            text = "–" if np.isnan(value) else f"{value:.0f}"
            ax.text(j, i, text, ha="center", va="center", color="black" if value > 55 else "white", fontweight=weight)
    if "all" in classes:
        ax.axvline(len(classes) - 1.5, color="white", lw=3)
    ax.set_xticks(range(len(classes)), classes)
    ax.set_yticks(range(len(models)), models)
    ax.tick_params(length=0)
    ax.set_xlabel("true class")
    figure.colorbar(image, ax=ax, label="robust accuracy, %", pad=0.02)
    figure.suptitle(f"{title}, {', '.join(dict.fromkeys(numbers['threat']))}")
    each = numbers[numbers["class"] != "all"].groupby("class")["images"]
    total = _format_counts(numbers[numbers["class"] == "all"])
    few, many = int(each.min().min()), int(each.max().max())
    note = f"n = {total} images, {few} to {many} of a class. Worst case of suite {_SUITE}; intervals: CSV."
    add_footnote(figure, f"{claim}\n{note}")
    return figure


def _sort_classes(numbers: pd.DataFrame) -> list[str]:
    names = [c for c in dict.fromkeys(numbers["class"]) if c != "all"]
    return [*sorted(names, key=int), "all"]


# ---- shared


def _plan_suite_figure(
    data: FigureData,
    title: str,
    dataset: str,
    rows: list[dict[str, Any]],
    claim: Claim,
    paint: Callable[[pd.DataFrame, str, str], Figure],
) -> FigurePlan:
    """Plan a figure of rows from results of the suite. Without rows, the plan names the command that makes results."""
    if not rows:
        return FigurePlan.empty(data.make_command(f"{dataset}/natural", f"eval -m {{}} --suite {_SUITE}"))
    numbers, note = add_claim(pd.DataFrame(rows), claim)
    return FigurePlan(numbers, partial(paint, pd.DataFrame(rows), title, note))


def _format_counts(rows: pd.DataFrame) -> str:
    return " / ".join(str(int(n)) for n in sorted(set(rows["images"])))
