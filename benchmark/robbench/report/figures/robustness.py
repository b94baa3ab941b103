"""Robust accuracy over the radius, over an attack's steps, and by class, from stored results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from robbench.core.types import Status
from robbench.report.figures.canvas import DASHES, MARKERS, OKABE_ITO, blank, footnote, grid, legend_below
from robbench.report.figures.source import Picture, Source
from robbench.report.linear import find_standard_radius, format_radius
from robbench.report.sweep import sweep
from robbench.results.schema import Accuracy, ResultFile
from robbench.results.store import read_rows
from robbench.results.summary import accuracy, robust_samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["over_classes", "over_eps", "over_steps"]

_SUITE = "whitebox"
_GRID = 60  # radii at which the prediction is evaluated
_PREDICTED, _WORST, _OTHER, _ONE_STEP = "Equation 4", "worst case", "worst case of a weaker suite", "FGSM-CW"
_RADIUS_LOOKS: dict[str, dict[str, Any]] = {
    _PREDICTED: {"color": OKABE_ITO["black"], "ls": DASHES[1], "marker": None},
    _ONE_STEP: {"color": OKABE_ITO["blue"], "ls": DASHES[0], "marker": "o"},
    _OTHER: {"color": OKABE_ITO["grey"], "ls": DASHES[2], "marker": "D"},
    _WORST: {"color": OKABE_ITO["vermillion"], "ls": DASHES[0], "marker": "s"},
}


# ---- over the radius


def over_eps(source: Source, title: str, dataset: str) -> Picture:
    """Set the accuracy that Eq. 4 predicts beside what attacks leave, at every Linf radius with a stored result."""
    results = [r for r in source.results if r.dataset == dataset and r.threat.norm == "Linf"]
    results = [r for r in results if not set(r.overrides) - {"eps", "norm"}]
    order = source.measured(dataset)
    order += [n for n in dict.fromkeys(f"{r.dataset}/{r.model}" for r in results) if n not in order]
    rows = [row for name in order for row in _radius_rows(source, name, results)]
    if not rows:
        return Picture.nothing(source.commands(f"{dataset}/natural", "measure linear -m {}"))
    numbers = _told_apart(pd.DataFrame(rows))
    missing = [source.commands(n, "measure linear -m {}") for n in order if source.linear(n) is None]
    swept = numbers[(numbers["series"] == _WORST) & (numbers["eps"] > 0)].groupby("model")["eps"].nunique()
    usual = find_standard_radius(dataset)
    if usual is not None:
        radii = ",".join(["0", *(format_radius(usual * k / 4) for k in (1, 2, 3, 4, 5))])
        if single := [n for n in order if swept.get(n, 0) < 2]:
            missing.append(f"robbench eval {' '.join(f'-m {n}' for n in single)} --suite quick --eps {radii}")
    return Picture(numbers, partial(_paint_eps, numbers, title), missing)


def _radius_rows(source: Source, name: str, results: list[ResultFile]) -> Iterator[dict[str, Any]]:
    mine = [r for r in results if f"{r.dataset}/{r.model}" == name]
    measured = source.linear(name)
    usual = find_standard_radius(name.partition("/")[0])
    known = [float(Fraction(r.identity["threat"]["eps"])) for r in mine]
    top = max([*known, 1.5 * float(usual or 0)]) or 1.0
    if measured is not None:
        radius = measured.take_at_nearest("radius")
        for eps in map(float, np.linspace(0, top, _GRID + 1)):
            yield _point(name, _PREDICTED, "linear", eps, accuracy(int((radius > eps).sum()), len(radius)), len(radius))
    # Of the same suite and n they are on the same images: the first n.
    for suite, n in dict.fromkeys((r.suite, r.n) for r in mine):
        group = [r for r in mine if (r.suite, r.n) == (suite, n)]
        for point in sweep(source.root, group, clean=True).points:
            eps = float(Fraction(point.eps))
            yield _point(name, _WORST, suite, eps, point.worst_case, n)
            if _ONE_STEP in point.attacks and group[0].mode == "full":
                yield _point(name, _ONE_STEP, suite, eps, point.attacks[_ONE_STEP], n)


def _told_apart(numbers: pd.DataFrame) -> pd.DataFrame:
    """Call the worst case of a suite that is the strongest at none of its radii a weaker one's."""
    worst = numbers[(numbers["series"] == _WORST) & (numbers["eps"] > 0)]
    keys = ["model", "suite", "images"]
    lowest = worst["high"] == worst.groupby(["model", "eps"])["high"].transform("min")
    strong = pd.MultiIndex.from_frame(worst.loc[lowest, keys])
    weaker = (numbers["series"] == _WORST) & ~pd.MultiIndex.from_frame(numbers[keys]).isin(strong)
    return numbers.assign(series=numbers["series"].mask(weaker, _OTHER))


def _point(model: str, series: str, suite: str, eps: float, value: Accuracy, images: int) -> dict[str, Any]:
    shares = {"value": value.value, "low": value.low, "high": value.high}
    return {"model": model, "series": series, "suite": suite, "eps": eps, **shares, "images": images}


def _paint_eps(numbers: pd.DataFrame, title: str) -> Figure:
    models = list(dict.fromkeys(numbers["model"]))
    figure, axes = grid(len(models), "Linf radius ε (pixel units)", "accuracy, %")
    top = float(numbers["eps"].max())
    for name, ax in zip(models, axes, strict=True):
        mine = numbers[numbers["model"] == name]
        for series, look in _RADIUS_LOOKS.items():
            for _, rows in mine[mine["series"] == series].groupby(["suite", "images"], sort=False):
                _radius_series(ax, series, rows, look)
        ax.set_title(f"{name}, n = {_counted(mine)}")
        ax.set_ylim(0, 101)
        ax.set_xlim(-0.03 * top, top)  # the clean accuracy, at 0, is not cut in half
    figure.suptitle(title)
    note = (
        "Bars and bands: 95 % Wilson intervals. Worst case: broken by no attack of a suite; one mark or curve a suite."
    )
    legend_below(figure, axes, note, columns=4)
    return figure


def _radius_series(ax: Axes, series: str, rows: pd.DataFrame, look: dict[str, Any]) -> None:
    rows = rows.sort_values("eps")
    at, value = rows["eps"], 100 * rows["value"]
    if series == _PREDICTED:
        ax.plot(at, value, label="Equation 4 (share of L > ε)", **look)
        return
    attacked = rows["eps"] > 0
    if attacked.sum() > 1:
        ax.fill_between(at, 100 * rows["low"], 100 * rows["high"], color=look["color"], alpha=0.15, lw=0)
        ax.plot(at, value, ms=4.5, label=series, **look)
        return
    # One radius alone: no line suggests what lies between it and the clean accuracy.
    spread = [value - 100 * rows["low"], 100 * rows["high"] - value]
    ax.errorbar(at, value, yerr=spread, fmt=look["marker"], color=look["color"], ms=5, capsize=2, lw=1.2, label=series)


# ---- over the steps of an attack


def over_steps(source: Source, title: str, dataset: str) -> Picture:
    """Tell how many images stand after each step, per attack; a break counts from the step that the records name."""
    results = [r for r in source.standard(dataset, _SUITE).values() if r.judge == "any"]
    return _of_suite(source, title, dataset, [row for r in results for row in _step_rows(source, r)], _paint_steps)


def _step_rows(source: Source, result: ResultFile) -> Iterator[dict[str, Any]]:
    rows = read_rows(source.folder(result) / "outcomes.parquet")
    for attack in result.attacks:
        mine = rows[rows["attack"] == attack.name]
        steps = attack.config.get("steps")
        if steps is None:
            continue
        total = steps * attack.config.get("restarts", 1) * attack.config.get("targets", 1)
        broken = mine[mine["status"] == Status.BROKEN]
        when = (broken["trial"] * steps + broken["step"]).to_numpy()
        right = len(mine) - int((mine["status"] == Status.MISCLASSIFIED).sum())
        for step in _marks(total):
            standing = accuracy(right - int((when <= step).sum()), len(mine))
            yield {
                "model": f"{result.dataset}/{result.model}", "attack": attack.name, "step": step,
                "value": standing.value, "low": standing.low, "high": standing.high, "images": len(mine),
                "threat": f"{result.threat.norm} {result.threat.eps}",
            }  # fmt: skip


def _marks(total: int) -> list[int]:
    """Choose steps from the starting point (0) to the last, dense where a logarithmic axis shows them."""
    return sorted({0, total, *(int(s) for s in np.geomspace(1, total, 40).round())})


def _paint_steps(numbers: pd.DataFrame, title: str) -> Figure:
    models = list(dict.fromkeys(numbers["model"]))
    figure, axes = grid(len(models), "steps of the attack (0: its starting point)", "accuracy, %")
    kinds = list(dict.fromkeys(numbers["attack"]))
    for name, ax in zip(models, axes, strict=True):
        mine = numbers[numbers["model"] == name]
        for i, attack in enumerate(kinds):
            _step_series(ax, attack, i, mine[mine["attack"] == attack])
        ax.set_title(f"{name}, n = {_counted(mine)}")
        ax.set_xscale("symlog", linthresh=1, linscale=0.35)
        ax.set_xticks([0, 1, 3, 10, 30, 100], ["0", "1", "3", "10", "30", "100"])
        ax.set_xlim(0, 1.15 * float(numbers["step"].max()))
        ax.set_ylim(0, 101)
    figure.suptitle(f"{title}, {', '.join(dict.fromkeys(numbers['threat']))}")
    note = "Every queried point that is misclassified inside the ball counts. The marker is the attack's last step."
    legend_below(figure, axes, note, columns=3)
    return figure


def _step_series(ax: Axes, attack: str, place: int, rows: pd.DataFrame) -> None:
    if rows.empty:
        return
    ax.plot(
        rows["step"],
        100 * rows["value"],
        color=list(OKABE_ITO.values())[place % len(OKABE_ITO)],
        ls=DASHES[place % len(DASHES)],
        marker=MARKERS[place % len(MARKERS)],
        markevery=[len(rows) - 1],
        ms=4.5,
        label=attack,
    )


# ---- by class


def over_classes(source: Source, title: str, dataset: str) -> Picture:
    """Tell the worst-case robust accuracy of every class."""
    results = source.standard(dataset, _SUITE).values()
    return _of_suite(source, title, dataset, [row for r in results for row in _class_rows(source, r)], _paint_classes)


def _class_rows(source: Source, result: ResultFile) -> Iterator[dict[str, Any]]:
    rows = read_rows(source.folder(result) / "outcomes.parquet")
    robust = robust_samples(rows)
    label = rows.drop_duplicates("sample").set_index("sample")["label"].reindex(robust.index)
    groups = [*robust.groupby(label), ("all", robust)]
    for name, group in groups:
        share = accuracy(int(group.sum()), len(group))
        yield {
            "model": f"{result.dataset}/{result.model}", "class": str(name), "value": share.value, "low": share.low,
            "high": share.high, "images": len(group), "threat": f"{result.threat.norm} {result.threat.eps}",
        }  # fmt: skip


def _paint_classes(numbers: pd.DataFrame, title: str) -> Figure:
    values = 100 * numbers.pivot(index="model", columns="class", values="value")
    models, classes = list(dict.fromkeys(numbers["model"])), _classes(numbers)
    values = values.reindex(index=models, columns=classes)
    figure = blank(1.9 + 0.62 * len(classes), 1.9 + 0.42 * len(models))
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
    total = _counted(numbers[numbers["class"] == "all"])
    few, many = int(each.min().min()), int(each.max().max())
    footnote(figure, f"n = {total} images, {few} to {many} of a class. Worst case of suite {_SUITE}; intervals: CSV.")
    return figure


def _classes(numbers: pd.DataFrame) -> list[str]:
    names = [c for c in dict.fromkeys(numbers["class"]) if c != "all"]
    return [*sorted(names, key=int), "all"]


# ---- shared


def _of_suite(
    source: Source, title: str, dataset: str, rows: list[dict[str, Any]], paint: Callable[[pd.DataFrame, str], Figure]
) -> Picture:
    """Make a picture of rows that results of the suite gave; without any, say how to make one."""
    if not rows:
        return Picture.nothing(source.commands(f"{dataset}/natural", f"eval -m {{}} --suite {_SUITE}"))
    numbers = pd.DataFrame(rows)
    return Picture(numbers, partial(paint, numbers, title))


def _counted(rows: pd.DataFrame) -> str:
    return " / ".join(str(int(n)) for n in sorted(set(rows["images"])))
