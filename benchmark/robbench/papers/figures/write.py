"""Writes figures: a PNG and the numbers in it, and tells whether those on disk are up to date."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from robbench.core.errors import DataError, ResultError
from robbench.core.files import write_atomically
from robbench.papers.figures.definitions import FIGURES, Definition
from robbench.report.figures.canvas import render_png
from robbench.report.figures.source import FigureData, FigurePlan

__all__ = ["Written", "every_figure", "stale", "write_figure"]

_KEY = "Numbers-SHA256"


@dataclass(frozen=True)
class Written:
    """What became of a figure.

    Attributes:
        name: the figure and its data set.
        paths: the PNG and the CSV; none where nothing was drawn.
        missing: what it lacks, with the commands that make it.
        stale: why the files on disk are not those that would be written; empty if they are.
    """

    name: str
    paths: tuple[Path, ...] = ()
    missing: tuple[str, ...] = ()
    stale: str = ""


def write_figure(data: FigureData, figure: Definition, dataset: str, folder: Path, check: bool = False) -> Written:
    """Write `<folder>/<dataset>/<id>.png` and `.csv`, or look whether they are up to date.

    Raises:
        ResultError: a stored result is damaged, or the figure is not drawn for the data set.
        DataError: it needs images that are not here.
    """
    if dataset not in figure.datasets:
        raise ResultError(f"{figure.id} is not drawn for {dataset!r}; allowed: {', '.join(figure.datasets)}.")
    picture = figure.make(data, figure.heading(dataset), dataset)
    name, missing = f"{figure.id}, {dataset}", tuple(picture.missing)
    if picture.numbers is None:
        return Written(name, missing=missing)
    table = _table(picture.numbers, picture.decimals)
    paths = (folder / dataset / f"{figure.id}.png", folder / dataset / f"{figure.id}.csv")
    if check:
        return Written(name, paths, missing, stale(paths[0], paths[1], table))
    write_atomically(paths[1], table)
    write_atomically(paths[0], draw(picture, figure, table))
    return Written(name, paths, missing)


def draw(picture: FigurePlan, figure: Definition, table: bytes) -> bytes:
    """Draw a picture as a PNG that names the figure and the digest of the numbers in it."""
    return render_png(picture.paint, {"Title": figure.id, _KEY: hashlib.sha256(table).hexdigest()})


def every_figure(data: FigureData, folder: Path, check: bool = False) -> Iterator[Written]:
    """Write or check every figure for its first data set and for all others that something was measured on.

    One whose images are not here says so and is left as it is.
    """
    for figure in FIGURES.values():
        for dataset in (d for d in figure.datasets if d == figure.datasets[0] or data.has_data(d)):
            try:
                yield write_figure(data, figure, dataset, folder, check)
            except DataError as error:
                yield Written(f"{figure.id}, {dataset}", missing=(str(error),))


def stale(picture: Path, numbers: Path, table: bytes) -> str:
    """Say why files on disk are not up to date; empty if they are.

    The numbers must be the same bytes. Of the picture, whose bytes change with the version of matplotlib, it is the
    digest of its numbers that must be theirs.
    """
    from PIL import Image

    if not numbers.exists() or numbers.read_bytes() != table:
        return f"{numbers} is stale"
    try:
        with Image.open(picture) as image:
            image.load()
            found = image.info.get(_KEY)
    except OSError:
        return f"{picture} is missing or damaged"
    return "" if found == hashlib.sha256(table).hexdigest() else f"{picture} was drawn from other numbers"


def _table(numbers: pd.DataFrame, digits: int) -> bytes:
    text = io.StringIO()
    numbers.to_csv(text, index=False, lineterminator="\n", float_format=f"%.{digits}g")
    return text.getvalue().encode()
