"""Adversarial examples with their perturbations, from results that store them (`eval --save-adversarials`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robbench.analysis.logits import estimate_share
from robbench.core.errors import ResultError
from robbench.core.types import Dataset, Status
from robbench.data.sets import load
from robbench.report.figures.canvas import add_footnote, format_level, make_figure
from robbench.report.figures.claims import Claim, add_claim, format_share
from robbench.report.figures.source import FigureData, FigurePlan
from robbench.results.adversarials import FILE, read
from robbench.results.places import list_folders
from robbench.results.reader import read_vouched, read_vouched_rows
from robbench.results.schema import ResultFile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plan_gallery"]

_EXAMPLES = 8  # images per model
_MODELS = 4
_KINDS = ("clean", "adversarial")
_ORDERS = {"Linf": np.inf, "L2": 2, "L1": 1, "L0": 0}


def plan_gallery(data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan a figure with the first broken image of each of eight classes, for up to four models.

    Raises:
        DataError: the data set is not on this machine.
        ResultError: a result was measured on other images than those of the data set, or its points are damaged.
    """
    by_model: dict[str, tuple[Path, ResultFile]] = {}
    for r in data.results:
        if r.dataset == dataset and r.model not in by_model and (folder := _find_examples(data, r)) is not None:
            by_model[r.model] = folder, r
    if not by_model:
        command = data.make_command(f"{dataset}/natural", "eval -m {} --suite quick --samples 100 --save-adversarials")
        return FigurePlan.empty(command)
    images = load(dataset, "test", data.data_dir)
    frames = [f for folder, r in list(by_model.values())[:_MODELS] for f in _example_frames(folder, r, images)]
    if not frames:
        return FigurePlan.empty(f"no attack on {', '.join(sorted(by_model))} broke an image")
    plotted = pd.concat(frames, ignore_index=True)
    numbers, note = add_claim(plotted, _claim(plotted, images))
    return FigurePlan(numbers, partial(_paint, plotted, title, note), decimals=4)


def _find_examples(data: FigureData, result: ResultFile) -> Path | None:
    """Return the folder of a run that holds its adversarial examples; None if there is none.

    Older versions stored a run twice. The examples can be in the folder with fewer images.
    """
    for folder in list_folders(data.root / result.dataset / result.model, result.suite, result.run_id):
        if (folder / FILE).exists():
            with contextlib.suppress(ResultError):  # a damaged result is in `data.damaged`
                if read_vouched(folder).run_id == result.run_id:
                    return folder
    return None


def _example_frames(folder: Path, result: ResultFile, images: Dataset) -> Iterator[pd.DataFrame]:
    """Yield the images of a result's examples: one row per image, channel and line of pixels."""
    if result.identity["data"] != images.digest:
        raise ResultError(
            f"{folder} was measured on other images than those of the data set {images.name} on this machine. "
            "Evaluate the model again with --overwrite."
        )
    rows = read_vouched_rows(folder)
    broken = rows[rows["status"] == Status.BROKEN].drop_duplicates("sample")
    names = images.labels or tuple(map(str, range(images.num_classes)))
    chosen = broken.drop_duplicates("label").sort_values("label").head(_EXAMPLES)
    points = read(folder / FILE).points
    positions = dict(zip(images.index.tolist(), range(len(images)), strict=True))
    for number, row in enumerate(chosen.to_dict("records")):
        adversarial = next(
            (g.x[i] for g in points for i in np.flatnonzero((g.sample == row["sample"]) & (g.attack == row["attack"]))),
            None,
        )
        if adversarial is None:
            raise ResultError(
                f"{folder / FILE} lacks the point of image {row['sample']}, {row['attack']}. Check the result with "
                "`robbench verify`."
            )
        clean = images.x[positions[int(row["sample"])]].astype(np.float64) / images.scale
        for kind, image in zip(_KINDS, (clean, adversarial.astype(np.float64)), strict=True):
            about = {
                "model": f"{result.dataset}/{result.model}", "suite": result.suite, "eps": result.threat.eps,
                "norm": result.threat.norm, "example": number, "sample": row["sample"], "attack": row["attack"],
                "label": names[row["label"]], "prediction": names[row["prediction"]], "distance": row["distance"],
                "value": np.nan, "low": np.nan, "high": np.nan, "images": 1, "image": kind,
            }  # fmt: skip
            yield _image_to_frame(image, about)


def _claim(plotted: pd.DataFrame, images: Dataset) -> Claim:
    """Count the shown examples within the radius, and those whose nearest other image (L2) has each class.

    The model has no part in this judgement. The image itself is left out: it is nearly always the nearest.
    """
    names = images.labels or tuple(map(str, range(images.num_classes)))
    known = images.x.reshape(len(images), -1).astype(np.float32) / np.float32(images.scale)
    inside, near, answers = [], [], []
    for _, rows in plotted.groupby(["model", "example"], sort=False):
        first = rows.iloc[0]
        clean, adversarial = (_frame_to_image(rows[rows["image"] == kind]) for kind in _KINDS)
        norm, eps = first["norm"], float(Fraction(first["eps"]))
        slack = 1e-6 if norm == "Linf" else 1e-6 + 1e-5 * eps  # as attacks allow it (`Ball.contains`)
        inside.append(np.linalg.norm((adversarial - clean).ravel(), _ORDERS[norm]) <= eps + slack)
        x = adversarial.transpose(2, 0, 1).reshape(-1).astype(np.float32)
        squares = np.where(images.index == first["sample"], np.inf, ((known - x) ** 2).sum(1))
        near.append(names[images.y[squares.argmin()]] == first["label"])
        answers.append(names[images.y[squares.argmin()]] == first["prediction"])
    within, true, wrong = (estimate_share(np.array(yes)) for yes in (inside, near, answers))
    what = "nearest other test image has the"
    claimed = [
        {**dict.fromkeys(("example", "sample", "channel", "line"), -1), "image": image, "value": found.value,
         "low": found.low, "high": found.high, "images": found.n}
        for image, found in (
            ("within the radius", within), (f"{what} true class", true), (f"{what} class of the answer", wrong)
        )
    ]  # fmt: skip
    return claimed, (
        f"Of the {within.n} examples shown, {format_share(within)} lie within ε of their image.\n"
        f"The nearest other image (L2) has the true class for {format_share(true)}, and the answer's class for "
        f"{format_share(wrong)}."
    )


def _image_to_frame(image: NDArray[Any], about: dict[str, Any]) -> pd.DataFrame:
    channels, height, width = image.shape
    frame = pd.DataFrame(image.reshape(channels * height, width), columns=[f"x{i}" for i in range(width)])
    position = {"channel": np.repeat(np.arange(channels), height), "line": np.tile(np.arange(height), channels)}
    return pd.concat([pd.DataFrame({**about, **position}, index=frame.index), frame], axis=1)


def _frame_to_image(rows: pd.DataFrame) -> NDArray[np.float64]:
    """Return the image of these rows, [H, W, C]."""
    pixels = rows[[c for c in rows.columns if c[0] == "x" and c[1:].isdecimal()]].to_numpy(np.float64)
    channels = int(rows["channel"].max()) + 1
    image: NDArray[np.float64] = pixels.reshape(channels, -1, pixels.shape[1]).transpose(1, 2, 0)
    return image


def _paint(numbers: pd.DataFrame, title: str, claim: str) -> Figure:
    models = list(dict.fromkeys(numbers["model"]))
    figure = make_figure(1.15 * _EXAMPLES + 0.9, 3.75 * len(models) + 0.7)
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
            _paint_column(axes[:, int(number)], rows[rows["example"] == number])
    figure.suptitle(title, fontweight="bold")
    note = "Perturbation: orange adds, purple takes away; the scale ends at the largest change of an image."
    add_footnote(figure, f"{claim}\n{note}")
    return figure


def _paint_column(axes: NDArray[Any], rows: pd.DataFrame) -> None:
    clean, adversarial = (_frame_to_image(rows[rows["image"] == kind]) for kind in _KINDS)
    change = adversarial - clean
    first = rows.iloc[0]
    scale = float(np.abs(change).max()) or 1.0
    _show(axes[0], clean, f"{first['label']}")
    mean = change.mean(axis=2)  # over the channels, so that each pixel has one sign
    axes[1].imshow(mean, cmap="PuOr_r", vmin=-scale, vmax=scale, interpolation="nearest")
    in_levels = "/255" in str(first["eps"])
    distance = format_level(first["distance"]) if in_levels else f"{first['distance']:.3f}"
    axes[1].set_title(f"{first['norm']} {distance}", fontsize=8, pad=2)
    _show(axes[2], adversarial, f"→ {first['prediction']}")
    axes[2].set_xlabel(f"{first['attack']}\nimage {first['sample']}", fontsize=6.5)


def _show(ax: Axes, image: NDArray[np.float64], title: str) -> None:
    ax.set_title(title, fontsize=9, pad=2)
    grey = image.shape[2] == 1
    shown = image[:, :, 0] if grey else image.clip(0, 1)
    ax.imshow(shown, cmap="gray" if grey else None, vmin=0, vmax=1, interpolation="nearest")
