"""Loss gradients and large perturbations: Figures 2, 3, 4, 8, 9 and 10 of Tsipras et al. 2019.

The CSV of each figure has one row per plotted number: panel, model, kind (what the number is), shown (place of the
image), x, value, the 95 % interval low to high, n images, and levels. A row of the panel "picture" is a picture: its
levels are its pixels from 00 to ff, and its value is the model's answer to it. The rows of the panel "claim" are the
numbers of the caption.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from robbench.analysis.gradients_record import KINDS, STEPS, GradientsFile, Pictures
from robbench.analysis.logits import Booleans, Estimate, estimate_mean, estimate_share
from robbench.core.stats import paired_difference
from robbench.linear.theory import Values
from robbench.papers.figures.logits import describe_finding, format_points
from robbench.report.figures.canvas import DASHES, MARKERS, OKABE_ITO, add_footnote, add_legend_below, make_figure
from robbench.report.figures.source import FigureData, FigurePlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plan_examples", "plan_gradients", "plan_interpolation"]

_COLUMNS = ["panel", "model", "kind", "shown", "x", "value", "low", "high", "n", "levels"]
_STANDARD, _LINF, _L2 = "natural", "at", "at_l2"
_COLOURS = {_STANDARD: OKABE_ITO["black"], _LINF: OKABE_ITO["blue"], _L2: OKABE_ITO["vermillion"]}
_TITLES = {_STANDARD: "standard", _LINF: "Linf-trained", _L2: "L2-trained"}
_WAY_SHOWN = 8  # place of the image of Figure 4 among the shown ones; the last one, if they are fewer
_END = {"Linf": "Linf", "L2": str(STEPS - 1)}  # in the names of the columns of an example
_NO_L2 = "No L2-trained model is here."

_Stored = Mapping[str, tuple[GradientsFile, tuple[pd.DataFrame, Pictures]]]
_Row = tuple[str, str, str, int, float, float, float, float, int, str]


def _row(panel: str, model: str, kind: str, x: float, found: Estimate) -> _Row:
    return panel, model, kind, 0, x, found.value, found.low, found.high, found.n, ""


def _number(found: Estimate, sign: str = "") -> str:
    return f"{found.value:{sign}z.3f} [{found.low:{sign}z.3f}, {found.high:{sign}z.3f}]"


def _short(model: str) -> str:
    return model.partition("/")[2]


def _plan(
    data: FigureData,
    title: str,
    dataset: str,
    compute: Callable[[_Stored], tuple[list[_Row], str]],
    paint: Callable[[pd.DataFrame, tuple[int, ...], str, str], Figure],
) -> FigurePlan:
    """Plan a figure of the standard and the Linf-trained model, and of the L2-trained one if it was measured."""
    names = [f"{dataset}/{short}" for short in (_STANDARD, _LINF, _L2)]
    found = data.read_gradients(dataset)
    missing = [
        data.make_command(name, "measure gradients -m {}")
        for name in names
        if name not in found and data.find_entry(name)
    ]
    stored = {name: found[name] for name in names if name in found}
    if any(name not in stored for name in names[:2]):
        return FigurePlan.empty(*missing)
    n = min(file.n for file, _ in stored.values())  # each measurement has the first images of the test set
    stored = {name: (file, (rows.iloc[:n], pictures)) for name, (file, (rows, pictures)) in stored.items()}
    rows, caption = compute(stored)
    numbers = pd.DataFrame(rows, columns=_COLUMNS)
    shape = tuple(next(iter(stored.values()))[0].shape)
    return FigurePlan(numbers, partial(paint, numbers, shape, f"{title}, n = {n} test images", caption), missing)


def _list_pictures(stored: _Stored, kinds: Sequence[str], every: int) -> list[_Row]:
    """List the pictures of every so many shown images: the image itself once, and the kinds of each model."""
    listed = []
    for i, (name, (file, (rows, pictures))) in enumerate(stored.items()):
        answers = {kind: dict(zip(rows["sample"], rows[kind], strict=True)) for kind in ("L2", "Linf", "label")}
        for shown in range(0, len(file.shown), every):
            sample = file.shown[shown]
            for kind in ["image", *kinds] if not i else kinds:
                answer = answers[kind if kind in ("L2", "Linf") else "label"][sample]
                levels = pictures[shown, KINDS.index(kind)].tobytes().hex()
                model = "" if kind == "image" else name
                listed.append(("picture", model, kind, shown, math.nan, float(answer), math.nan, math.nan, 1, levels))
    return listed


def _pick(stored: _Stored, short: str) -> pd.DataFrame | None:
    return next((rows for name, (_, (rows, _)) in stored.items() if _short(name) == short), None)


def plan_gradients(every: int, quantities: tuple[str, ...], data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan Figure 2 or 10: loss gradients at ±3σ, and quantities of them.

    Args:
        every: every so many of the shown images is drawn.
        quantities: of `alignment`, `roughness` and `sparsity`.
        data: the data of figures.
        title: heading.
        dataset: the data set.
    """
    return _plan(data, title, dataset, partial(_compute_gradients, every, quantities), _paint_gradients)


def _compute_gradients(every: int, quantities: tuple[str, ...], stored: _Stored) -> tuple[list[_Row], str]:
    listed = _list_pictures(stored, ("gradient",), every)
    for quantity in quantities:
        for name, (_, (rows, _)) in stored.items():
            listed.append(_row("bars", name, quantity, 0, estimate_mean(rows[quantity].to_numpy())))
    standard, linf, l2 = (_pick(stored, short) for short in (_STANDARD, _LINF, _L2))
    assert standard is not None and linf is not None, "the plan asks for both"
    lines = []
    for quantity, sign, text in (
        ("alignment", 1, "The cosine of −gradient and the class's mean image minus the others' changes by"),
        ("roughness", -1, "The roughness of the gradient (noise: 1) changes by"),
    ):
        if quantity in quantities:
            change = estimate_mean((linf[quantity] - standard[quantity]).to_numpy())
            listed.append(_row("claim", _LINF, f"{quantity}, minus that of {_STANDARD}", 0, change))
            shows = change.low > 0 if sign > 0 else change.high < 0
            lines.append(f"{text} {_number(change, '+')} from {_STANDARD} to {_LINF}. {describe_finding(shows)}")
    if "sparsity" in quantities and l2 is None:
        lines.append(f"{_NO_L2} Whether it has less sparse gradients is open.")
    if "sparsity" in quantities and l2 is not None:
        change = estimate_mean((linf["sparsity"] - l2["sparsity"]).to_numpy())
        listed.append(_row("claim", _LINF, f"sparsity, minus that of {_L2}", 0, change))
        lines.append(
            f"The sparsity of {_LINF} minus that of {_L2} is {_number(change, '+')}. {describe_finding(change.low > 0)}"
        )
    return listed, "\n".join(lines)


def plan_examples(norms: tuple[str, ...], every: int, data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan Figure 3, 8 or 9: large perturbations in some norms, and how often they look like the model's answer."""
    paint = partial(_paint_examples, norms)
    return _plan(data, title, dataset, partial(_compute_examples, norms, every), paint)


def look_alike(rows: pd.DataFrame, norm: str) -> Booleans:
    """Return which perturbed images the model gives a wrong class, and the nearest training image the same class."""
    found: Booleans = ((rows[norm] != rows["label"]) & (rows[norm] == rows[f"near_{_END[norm]}"])).to_numpy()
    return found


def compare_look_alikes(first: Booleans, second: Booleans) -> Estimate:
    """Return the share of the first minus that of the second, image by image, with its interval."""
    only = int((first & ~second).sum()), int((second & ~first).sum())
    n = len(first)
    return Estimate((only[0] - only[1]) / n, *paired_difference(*only, n), n)


def _compute_examples(norms: tuple[str, ...], every: int, stored: _Stored) -> tuple[list[_Row], str]:
    listed = _list_pictures(stored, norms, every)
    lines = [f"Changes from {_STANDARD} (whether the paper's finding shows here):"]
    for norm in norms:
        alike = {name: look_alike(rows, norm) for name, (_, (rows, _)) in stored.items()}
        far = {name: rows[f"distance_{_END[norm]}"].to_numpy() for name, (_, (rows, _)) in stored.items()}
        listed += [_row("bars", name, f"{norm}, alike", 0, estimate_share(found)) for name, found in alike.items()]
        listed += [_row("bars", name, f"{norm}, distance", 0, estimate_mean(found)) for name, found in far.items()]
        standard, *trained = stored
        for name in trained:
            more, farther = compare_look_alikes(alike[name], alike[standard]), estimate_mean(far[name] - far[standard])
            listed.append(_row("claim", name, f"alike, {norm}, minus that of {_STANDARD}", 0, more))
            listed.append(_row("claim", name, f"distance, {norm}, minus that of {_STANDARD}", 0, farther))
            lines.append(
                f"{norm}, {_short(name)}: the share that looks like the new class {format_points(more, '+')} "
                f"({'yes' if more.low > 0 else 'no'}), the distance from the nearest training image "
                f"{_number(farther, '+')} ({'yes' if farther.high < 0 else 'no'})."
            )
    file = next(iter(stored.values()))[0]
    radii = ", ".join(f"{norm} {file.identity['eps'][norm]:.3g}" for norm in norms)
    lines.append(
        f"Radius: {radii}. The nearest training image is of the right class for {100 * file.judge.value:.1f} % of the "
        f"clean images.{'' if len(stored) > 2 else f' {_NO_L2}'}"
    )
    return listed, "\n".join(lines)


def plan_interpolation(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan Figure 4: the way from an image to its large L2 perturbation."""
    return _plan(data, title, dataset, _compute_interpolation, _paint_interpolation)


def _compute_interpolation(stored: _Stored) -> tuple[list[_Row], str]:
    chosen = min([_WAY_SHOWN, *(len(file.shown) - 1 for file, _ in stored.values())])
    listed = [row for row in _list_pictures(stored, ("L2",), 1) if row[3] == chosen]
    for name, (_, (rows, _)) in stored.items():
        for k in range(STEPS):
            x = k / (STEPS - 1)
            listed.append(_row("way", name, "distance", x, estimate_mean(rows[f"distance_{k}"].to_numpy())))
    standard, *trained = stored
    lines = []
    for name in trained:
        change = estimate_mean(_average_middle(stored[name][1][0]) - _average_middle(stored[standard][1][0]))
        listed.append(_row("claim", name, f"distance half-way, minus that of {_STANDARD}", 0.5, change))
        lines.append(
            f"Half-way, the distance from the nearest training image changes by {_number(change, '+')} from "
            f"{_STANDARD} to {_short(name)}. {describe_finding(change.high < 0)}"
        )
    lines += [] if len(stored) > 2 else [_NO_L2]
    return listed, "\n".join(lines)


def _average_middle(rows: pd.DataFrame) -> Values:
    """Return the mean distance of the two points around the middle of the way, [n]."""
    middle: Values = rows[[f"distance_{k}" for k in (STEPS // 2 - 1, STEPS // 2)]].to_numpy().mean(1)
    return middle


def _draw_picture(ax: Axes, levels: Pictures, shape: tuple[int, ...], is_gradient: bool = False) -> None:
    pixels = levels.reshape(shape)
    if shape[0] == 1:
        cmap, top = ("RdBu", 254) if is_gradient else ("gray", 255)
        ax.imshow(pixels[0], cmap=cmap, vmin=0, vmax=top)
    else:
        ax.imshow(np.moveaxis(pixels, 0, 2))
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)


def _levels(row: Any) -> Pictures:
    return np.frombuffer(bytes.fromhex(row.levels), np.uint8)


def _draw_rows(
    figure: Figure, grid: Any, numbers: pd.DataFrame, shape: tuple[int, ...], labels: Mapping[tuple[str, str], str]
) -> None:
    """Draw one row of pictures for each (model, kind) of `labels`."""
    pictures = numbers[numbers["panel"] == "picture"]
    for i, ((model, kind), label) in enumerate(labels.items()):
        own = pictures[(pictures["model"] == model) & (pictures["kind"] == kind)]
        for j, row in enumerate(own.itertuples()):
            ax = figure.add_subplot(grid[i, j])
            _draw_picture(ax, _levels(row), shape, kind == "gradient")
            if not j:
                ax.set_ylabel(label, fontsize=7.5)
            if kind in ("L2", "Linf"):
                ax.set_title(f"answer {row.value:.0f}", fontsize=7, pad=2)


def _make_labels(numbers: pd.DataFrame, kinds: Sequence[str]) -> dict[tuple[str, str], str]:
    models = [name for name in numbers[numbers["panel"] == "picture"]["model"].unique() if name]
    labels = {("", "image"): "image"}
    for kind in kinds:
        suffix = f"\n{kind}" if kind != "gradient" else ""
        labels |= {(name, kind): f"{_short(name)}{suffix}" for name in models}
    return labels


def _make_grid(numbers: pd.DataFrame, rows: int, bars: int) -> tuple[Figure, Any, list[Axes]]:
    """Make a figure with a grid of pictures on the left, and panels of bars on the right, one below the other."""
    columns = numbers[numbers["panel"] == "picture"]["shown"].nunique()
    figure = make_figure(max(7.6, 0.75 * columns + 4.2), max(3.6, 0.82 * rows + 1.4, 1.1 * bars + 1.8))
    halves = figure.add_gridspec(1, 2, width_ratios=(0.75 * columns, 3.2))
    lower = halves[1].subgridspec(bars, 1)
    return figure, halves[0].subgridspec(rows, columns), [figure.add_subplot(lower[i, 0]) for i in range(bars)]


def _wrap(figure: Figure, caption: str) -> str:
    """Break the lines of a caption to the width of its figure, as `add_caption` does."""
    width = int(17 * figure.get_size_inches()[0])
    return "\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in caption.splitlines())


def _draw_bars(ax: Axes, rows: pd.DataFrame, label: str, scale: float = 1.0) -> None:
    names = [_short(name) for name in rows["model"]]
    value = scale * rows["value"].to_numpy()
    spread = [value - scale * rows["low"].to_numpy(), scale * rows["high"].to_numpy() - value]
    colours = [_COLOURS[name] for name in names]
    ax.barh([f"{name}: {_TITLES[name]}" for name in names], value, xerr=spread, color=colours, alpha=0.7)
    ax.invert_yaxis()
    ax.tick_params(axis="y", labelsize=7.5)
    ax.set_xlabel(label, fontsize=8)


def _paint_gradients(numbers: pd.DataFrame, shape: tuple[int, ...], title: str, caption: str) -> Figure:
    labels = _make_labels(numbers, ("gradient",))
    bars = numbers[numbers["panel"] == "bars"]
    quantities = list(bars["kind"].unique())
    figure, grid, panels = _make_grid(numbers, len(labels), len(quantities))
    _draw_rows(figure, grid, numbers, shape, labels)
    for ax, quantity in zip(panels, quantities, strict=True):
        _draw_bars(ax, bars[bars["kind"] == quantity], f"{quantity} of the gradient, mean")
    figure.suptitle(title)
    add_footnote(figure, _wrap(figure, caption))
    return figure


def _paint_examples(
    norms: tuple[str, ...], numbers: pd.DataFrame, shape: tuple[int, ...], title: str, caption: str
) -> Figure:
    labels = _make_labels(numbers, norms)
    bars = numbers[numbers["panel"] == "bars"]
    figure, grid, panels = _make_grid(numbers, len(labels), 2 * len(norms))
    _draw_rows(figure, grid, numbers, shape, labels)
    for i, norm in enumerate(norms):
        alike, far = (bars[bars["kind"] == f"{norm}, {what}"] for what in ("alike", "distance"))
        _draw_bars(panels[2 * i], alike, f"{norm}: % that look like the new class", 100)
        _draw_bars(panels[2 * i + 1], far, f"{norm}: distance, nearest training image")
    figure.suptitle(title)
    add_footnote(figure, _wrap(figure, caption))
    return figure


def _paint_interpolation(numbers: pd.DataFrame, shape: tuple[int, ...], title: str, caption: str) -> Figure:
    pictures = numbers[numbers["panel"] == "picture"]
    begin = _levels(next(pictures[pictures["kind"] == "image"].itertuples())).astype(float)
    models = [name for name in pictures["model"].unique() if name]
    figure = make_figure(10.4, 4.4)
    halves = figure.add_gridspec(1, 2, width_ratios=(6, 4))
    grid, curves = halves[0].subgridspec(len(models), STEPS), figure.add_subplot(halves[1])
    for i, name in enumerate(models):
        row = next(pictures[(pictures["model"] == name)].itertuples())
        for k in range(STEPS):
            share = k / (STEPS - 1)
            ax = figure.add_subplot(grid[i, k])
            mixed = np.rint((1 - share) * begin + share * _levels(row)).astype(np.uint8)
            _draw_picture(ax, mixed, shape)
            ax.set_title(f"{share:.1f}" if k < STEPS - 1 else f"answer {row.value:.0f}", fontsize=7, pad=2)
            if not k:
                ax.set_ylabel(_short(name), fontsize=7.5)
        own = numbers[(numbers["panel"] == "way") & (numbers["model"] == name)]
        colour = _COLOURS[_short(name)]
        label = f"{_short(name)}: {_TITLES[_short(name)]}"
        curves.plot(own["x"], own["value"], color=colour, ls=DASHES[i], marker=MARKERS[i], ms=4, label=label)
        curves.fill_between(own["x"], own["low"], own["high"], color=colour, alpha=0.15, lw=0)
    curves.set(xlabel="part of the way to the L2 example", ylabel="L2 distance from the nearest training image")
    figure.suptitle(title)
    add_legend_below(figure, [curves], caption, columns=3)
    return figure
