"""Images that models see differently: Figures B.2 and B.3 of Seguin et al. 2021.

The CSV has one row per line of pixels of each shown image, with the columns x0, x1, ... The rows of the panel "claim"
are the numbers of the caption. Images need the data set; the digits are a part of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from robbench.analysis.logits import (
    Estimate,
    Integers,
    compute_confidence,
    estimate_mean,
    rank_within_class,
)
from robbench.analysis.record import StoredLogits
from robbench.core.errors import ResultError
from robbench.core.types import Dataset
from robbench.data.sets import load
from robbench.linear.theory import Values
from robbench.papers.figures.logits import describe_finding, format_mean, format_points
from robbench.report.figures.canvas import add_footnote, make_figure
from robbench.report.figures.source import FigureData, FigurePlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plan_confident_images", "plan_neighbours"]

_STANDARD, _ADVERSARIAL = "natural", "at"
_SHOWN = 8  # the class of B.2, as in Figure 3A
_PER_GROUP = 8
_SEEDS, _NEIGHBOURS = 5, 5
_RESAMPLES = 500
_KEYS = ("panel", "group", "place", "sample", "label", "value", "low", "high", "n", "line")


def _plan(
    data: FigureData,
    dataset: str,
    compute: Callable[[Mapping[str, StoredLogits], Values, str], tuple[list[pd.DataFrame], str]],
    paint: Callable[[pd.DataFrame, str], Figure],
) -> FigurePlan:
    stored = data.read_logits(dataset)
    needed = [f"{dataset}/{short}" for short in (_STANDARD, _ADVERSARIAL)]
    missing = [data.make_command(name, "measure logits -m {}") for name in needed if name not in stored]
    if missing:
        return FigurePlan.empty(*missing)
    n = min(len(stored[name]) for name in needed)
    logits = {short: stored[name].take_first(n) for short, name in zip((_STANDARD, _ADVERSARIAL), needed, strict=True)}
    images = load(dataset, "test", data.data_dir)
    frames, caption = compute(logits, _pick_images(images, logits[_STANDARD]), dataset)
    numbers = pd.concat(frames, ignore_index=True)
    return FigurePlan(numbers, partial(paint, numbers, caption), decimals=4)


def _pick_images(images: Dataset, logits: StoredLogits) -> Values:
    """Return the images of stored logits, [n, C, H, W] in [0, 1].

    Raises:
        ResultError: the data set has other images or labels.
    """
    place = {int(index): i for i, index in enumerate(images.index)}
    at = [place.get(int(sample), -1) for sample in logits.sample]
    if min(at) < 0 or not np.array_equal(images.y[at], logits.label):
        raise ResultError(
            f"The logits were measured on other images than those of the data set {images.name} on this machine. "
            "Measure them again: `robbench measure logits`, with --model and --overwrite."
        )
    return images.x[at].astype(np.float64) / images.scale


def _frame(
    panel: str, group: str, place: int, i: int, logits: StoredLogits, image: Values, value: float
) -> pd.DataFrame:
    """Make the rows of a shown image. Channels are averaged."""
    grey = image.mean(0)
    pixels = pd.DataFrame(grey, columns=[f"x{k}" for k in range(grey.shape[1])])
    about = (panel, group, place, logits.sample[i], logits.label[i], value, np.nan, np.nan, 1)
    return pd.concat([pd.DataFrame(dict(zip(_KEYS, about, strict=False)), index=pixels.index), pixels], axis=1).assign(
        line=np.arange(len(grey))
    )


def _claim(what: str, found: Estimate) -> pd.DataFrame:
    return pd.DataFrame(
        [("claim", what, 0, -1, -1, found.value, found.low, found.high, found.n, -1)], columns=list(_KEYS)
    )


def plan_confident_images(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan Figure B.2: images of one class on which two models are sure or unsure, together or alone."""
    return _plan(data, dataset, _compute_confident, partial(_paint_confident, title))


def _compute_confident(
    stored: Mapping[str, StoredLogits], images: Values, dataset: str
) -> tuple[list[pd.DataFrame], str]:
    label = stored[_STANDARD].label
    ranks = {name: rank_within_class(compute_confidence(z.clean), label) for name, z in stored.items()}
    first, second = ranks[_STANDARD], ranks[_ADVERSARIAL]
    mine = np.flatnonzero(label == _SHOWN)
    orders = {
        "both sure": first + second,
        f"{_STANDARD} surer": first - second,
        f"{_ADVERSARIAL} surer": second - first,
        "both unsure": -first - second,
    }
    frames = []
    for group, order in orders.items():
        for place, i in enumerate(mine[np.argsort(-order[mine], kind="stable")][:_PER_GROUP]):
            frames.append(_frame("A", group, place, i, stored[_STANDARD], images[i], float(first[i] - second[i])))
    typical = rank_within_class(-_distance_to_mean(images, label), label)
    clear = _compare_correlations(second, first, typical)
    what = "rank and closeness to the class mean"
    alone = {name: _correlate(rank, typical) for name, rank in ranks.items()}
    frames += [_claim(f"{what}: {name}", found) for name, found in alone.items()]
    frames.append(_claim(f"{what}: {_ADVERSARIAL} minus {_STANDARD}", clear))
    return frames, (
        "The rank of an image by confidence correlates with its closeness to the mean image of its class by\n"
        f"{format_mean(alone[_ADVERSARIAL])} for {_ADVERSARIAL} and {format_mean(alone[_STANDARD])} for {_STANDARD}.\n"
        f"The difference is {format_mean(clear)}, over all classes. {describe_finding(clear.low > 0)}\n"
        "The paper judges by eye that the sure images of adversarial training are unambiguous."
    )


def _distance_to_mean(images: Values, label: Integers) -> Values:
    """Return the L2 distance of each image to the mean image of its class, [n]."""
    flat = images.reshape(len(images), -1)
    distance = np.zeros(len(flat))
    for c in np.unique(label):
        distance[label == c] = np.linalg.norm(flat[label == c] - flat[label == c].mean(0), axis=1)
    return distance


def _correlate(values: Values, other: Values) -> Estimate:
    """Return corr(values, other), with its bootstrap interval over the images."""
    return _resample(lambda at: float(np.corrcoef(values[at], other[at])[0, 1]), len(other))


def _compare_correlations(first: Values, second: Values, other: Values) -> Estimate:
    """Return corr(first, other) − corr(second, other), with its bootstrap interval over the images."""

    def compare(at: Any) -> float:
        return float(np.corrcoef(first[at], other[at])[0, 1] - np.corrcoef(second[at], other[at])[0, 1])

    return _resample(compare, len(other))


def _resample(compute: Callable[[Any], float], n: int) -> Estimate:
    """Return a number of n images, with its bootstrap interval. `compute` takes the positions of the images."""
    rng = np.random.default_rng(0)
    low, high = np.quantile([compute(rng.integers(0, n, n)) for _ in range(_RESAMPLES)], [0.025, 0.975])
    return Estimate(compute(slice(None)), float(low), float(high), n)


def _paint_confident(title: str, numbers: pd.DataFrame, caption: str) -> Figure:
    rows = numbers[numbers["panel"] == "A"]
    groups = list(dict.fromkeys(rows["group"]))
    figure = make_figure(1.0 * _PER_GROUP + 1.2, 1.2 * len(groups) + 1.0)
    axes = figure.subplots(len(groups), _PER_GROUP, squeeze=False)
    for line, group in zip(axes, groups, strict=True):
        for place, ax in enumerate(line):
            _show(ax, rows[(rows["group"] == group) & (rows["place"] == place)])
        line[0].set_ylabel(group.replace(" ", "\n"), fontsize=8)
    figure.suptitle(f"{title}\nimages of class {_SHOWN}")
    add_footnote(figure, caption)
    return figure


def _show(ax: Any, rows: pd.DataFrame, title: str = "") -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    if len(rows):
        pixels = rows[[c for c in rows.columns if c[0] == "x" and c[1:].isdecimal()]].to_numpy(np.float64)
        ax.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        ax.set_title(title, fontsize=7.5, pad=2)


def plan_neighbours(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan Figure B.3: the images whose logits have the largest cosine with those of a seed image."""
    return _plan(data, dataset, _compute_neighbours, partial(_paint_neighbours, title))


def _compute_neighbours(
    stored: Mapping[str, StoredLogits], images: Values, dataset: str
) -> tuple[list[pd.DataFrame], str]:
    label = stored[_STANDARD].label
    flat = images.reshape(len(images), -1)
    nearest = {name: _find_nearest(z.clean) for name, z in stored.items()}
    seeds = [int(np.flatnonzero(label == c)[0]) for c in np.unique(label)[:_SEEDS]]
    frames = []
    for row, i in enumerate(seeds):
        frames.append(_frame("A", "seed", row, i, stored[_STANDARD], images[i], 0.0))
        for name, order in nearest.items():
            for k, j in enumerate(order[i]):
                distance = float(np.linalg.norm(flat[i] - flat[j]))
                frames.append(_frame("A", name, row * _NEIGHBOURS + k, j, stored[_STANDARD], images[j], distance))
    apart, same = {}, {}
    for name, order in nearest.items():
        apart[name] = np.linalg.norm(flat[:, None] - flat[order], axis=2).mean(1)
        same[name] = (label[order] == label[:, None]).mean(1)
    closer = estimate_mean(apart[_STANDARD] - apart[_ADVERSARIAL])
    mixed = estimate_mean(same[_STANDARD] - same[_ADVERSARIAL])
    frames += [
        _claim(f"L2 distance of the neighbours: {_STANDARD} minus {_ADVERSARIAL}", closer),
        _claim(f"neighbours of the same class: {_STANDARD} minus {_ADVERSARIAL}", mixed),
    ]
    return frames, (
        f"The {_NEIGHBOURS} nearest images of {_ADVERSARIAL} are {format_mean(closer)} closer in pixels (L2) than "
        f"those of {_STANDARD}, in the mean over all images. {describe_finding(closer.low > 0)}\n"
        f"Of the neighbours of {_STANDARD}, {format_points(mixed)} more are of the same class. "
        f"{describe_finding(mixed.low > 0)}"
    )


def _find_nearest(logits: Values) -> Integers:
    """Return the images with the largest cosine of the logits, [n, k], without the image itself, the nearest first."""
    unit = logits / np.linalg.norm(logits, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    return np.argsort(-cosine, axis=1, kind="stable")[:, :_NEIGHBOURS].astype(np.int64)


def _paint_neighbours(title: str, numbers: pd.DataFrame, caption: str) -> Figure:
    rows = numbers[numbers["panel"] == "A"]
    seeds = int((rows[rows["group"] == "seed"]["place"]).max()) + 1
    figure = make_figure(10.4, 1.05 * seeds + 1.2)
    widths = [1, *[1] * _NEIGHBOURS, 0.3, *[1] * _NEIGHBOURS]
    axes = figure.subplots(seeds, len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
    for row, line in enumerate(axes):
        _show(line[0], rows[(rows["group"] == "seed") & (rows["place"] == row)], "seed" if row == 0 else "")
        line[_NEIGHBOURS + 1].set_visible(False)
        for offset, name in ((1, _STANDARD), (_NEIGHBOURS + 2, _ADVERSARIAL)):
            for k in range(_NEIGHBOURS):
                mine = rows[(rows["group"] == name) & (rows["place"] == row * _NEIGHBOURS + k)]
                _show(line[offset + k], mine, name if row == 0 and k == 2 else "")
    figure.suptitle(title)
    add_footnote(figure, caption)
    return figure
