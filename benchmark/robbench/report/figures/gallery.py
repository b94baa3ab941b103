"""Adversarial examples with their perturbations, from results that keep them (`eval --save-adversarials`)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robbench.core.errors import ResultError
from robbench.core.types import Dataset, Status
from robbench.data.sets import load
from robbench.report.figures.canvas import blank, footnote
from robbench.report.figures.source import Picture, Source
from robbench.results.adversarials import FILE, read
from robbench.results.schema import ResultFile
from robbench.results.store import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["gallery"]

_EXAMPLES = 8  # per model
_MODELS = 4
_KINDS = ("clean", "adversarial")


def gallery(source: Source, title: str, dataset: str) -> Picture:
    """Show, for up to four models, the first broken image of each of eight classes.

    Raises:
        DataError: the data set is not here.
        ResultError: a result was measured on other images than the data set has, or its points are damaged.
    """
    kept: dict[str, ResultFile] = {}
    for r in source.results:
        if r.dataset == dataset and (source.folder(r) / FILE).exists():
            kept.setdefault(r.model, r)
    if not kept:
        command = source.commands(f"{dataset}/natural", "eval -m {} --suite quick --samples 100 --save-adversarials")
        return Picture.nothing(command)
    data = load(dataset, "test", source.data_dir)
    frames = [frame for r in list(kept.values())[:_MODELS] for frame in _examples(source, r, data)]
    if not frames:
        return Picture.nothing(f"no attack of {', '.join(sorted(kept))} broke an image")
    numbers = pd.concat(frames, ignore_index=True)
    return Picture(numbers, partial(_paint, numbers, title), decimals=4)


def _examples(source: Source, result: ResultFile, data: Dataset) -> Iterator[pd.DataFrame]:
    """Pick examples of one result: a row per image, channel and line of pixels."""
    folder = source.folder(result)
    if result.identity["data"] != data.digest:
        raise ResultError(f"{folder} was measured on other images than the data set {data.name} has here.")
    rows = read_rows(folder / "outcomes.parquet")
    broken = rows[rows["status"] == Status.BROKEN].drop_duplicates("sample")
    names = data.labels or tuple(map(str, range(data.num_classes)))
    chosen = broken.drop_duplicates("label").sort_values("label").head(_EXAMPLES)
    points = read(folder / FILE).points
    place = dict(zip(data.index.tolist(), range(len(data)), strict=True))
    for number, row in enumerate(chosen.to_dict("records")):
        adversarial = next(
            (g.x[i] for g in points for i in np.flatnonzero((g.sample == row["sample"]) & (g.attack == row["attack"]))),
            None,
        )
        if adversarial is None:
            raise ResultError(f"{folder / FILE} lacks the point of image {row['sample']}, {row['attack']}; verify it.")
        clean = data.x[place[int(row["sample"])]].astype(np.float64) / data.scale
        for kind, image in zip(_KINDS, (clean, adversarial.astype(np.float64)), strict=True):
            about = {
                "model": f"{result.dataset}/{result.model}", "suite": result.suite, "eps": result.threat.eps,
                "norm": result.threat.norm, "example": number, "sample": row["sample"], "attack": row["attack"],
                "label": names[row["label"]], "prediction": names[row["prediction"]], "distance": row["distance"],
                "image": kind,
            }  # fmt: skip
            yield _lines(image, about)


def _lines(image: NDArray[Any], about: dict[str, Any]) -> pd.DataFrame:
    channels, height, width = image.shape
    frame = pd.DataFrame(image.reshape(channels * height, width), columns=[f"x{i}" for i in range(width)])
    where = {"channel": np.repeat(np.arange(channels), height), "line": np.tile(np.arange(height), channels)}
    return pd.concat([pd.DataFrame({**about, **where}, index=frame.index), frame], axis=1)


def _image(rows: pd.DataFrame) -> NDArray[np.float64]:
    """Return an image of the numbers, [H, W, C]."""
    pixels = rows[[c for c in rows.columns if c[0] == "x" and c[1:].isdecimal()]].to_numpy(np.float64)
    channels = int(rows["channel"].max()) + 1
    image: NDArray[np.float64] = pixels.reshape(channels, -1, pixels.shape[1]).transpose(1, 2, 0)
    return image


def _paint(numbers: pd.DataFrame, title: str) -> Figure:
    models = list(dict.fromkeys(numbers["model"]))
    figure = blank(1.15 * _EXAMPLES + 0.9, 3.75 * len(models) + 0.7)
    parts = figure.subfigures(len(models), 1, squeeze=False)[:, 0]
    for name, part in zip(models, parts, strict=True):
        rows = numbers[numbers["model"] == name]
        first = rows.iloc[0]
        axes = part.subplots(3, _EXAMPLES, squeeze=False)
        part.suptitle(f"{name}, {first['norm']} ε = {first['eps']}, suite {first['suite']}")
        for ax in axes.flatten():
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
            for spine in ax.spines.values():
                spine.set_visible(False)
        for line, label in zip(axes[:, 0], ("clean", "perturbation", "adversarial"), strict=True):
            line.set_ylabel(label)
        for number in rows["example"].unique():
            _column(axes[:, int(number)], rows[rows["example"] == number])
    figure.suptitle(title, fontweight="bold")
    footnote(figure, "Perturbation: orange adds, purple takes away; the scale ends at the largest change of an image.")
    return figure


def _column(axes: NDArray[Any], rows: pd.DataFrame) -> None:
    clean, adversarial = (_image(rows[rows["image"] == kind]) for kind in _KINDS)
    change = adversarial - clean
    first = rows.iloc[0]
    scale = float(np.abs(change).max()) or 1.0
    _show(axes[0], clean, f"{first['label']}")
    mean = change.mean(axis=2)  # of the channels: a sign per pixel
    axes[1].imshow(mean, cmap="PuOr_r", vmin=-scale, vmax=scale, interpolation="nearest")
    axes[1].set_title(f"{first['norm']} {first['distance']:.3f}", fontsize=8, pad=2)
    _show(axes[2], adversarial, f"→ {first['prediction']}")
    axes[2].set_xlabel(f"{first['attack']}\nimage {first['sample']}", fontsize=6.5)


def _show(ax: Axes, image: NDArray[np.float64], title: str) -> None:
    ax.set_title(title, fontsize=9, pad=2)
    grey = image.shape[2] == 1
    shown = image[:, :, 0] if grey else image.clip(0, 1)
    ax.imshow(shown, cmap="gray" if grey else None, vmin=0, vmax=1, interpolation="nearest")
