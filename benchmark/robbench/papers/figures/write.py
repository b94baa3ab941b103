"""Writes each figure as a PNG and a CSV of its numbers, and checks whether the files on disk are up to date."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from robbench.core.errors import DataError, ResultError
from robbench.core.files import read_bounded, refuse_links, write_atomically
from robbench.papers.figures.definitions import FIGURES, FigureDefinition
from robbench.report.escape import format_csv
from robbench.report.figures.canvas import render_png
from robbench.report.figures.source import FigureData, FigurePlan

__all__ = ["WrittenFigure", "explain_stale", "write_figure", "write_figures", "write_plan"]

_KEY = "Numbers-SHA256"


@dataclass(frozen=True)
class WrittenFigure:
    """The outcome of writing or checking a figure.

    Attributes:
        name: the figure and its data set.
        paths: the PNG and the CSV; empty if nothing was drawn.
        missing: commands that make missing measurements.
        stale: why the files on disk are not up to date; empty if they are.
    """

    name: str
    paths: tuple[Path, ...] = ()
    missing: tuple[str, ...] = ()
    stale: str = ""


def write_figure(
    data: FigureData, figure: FigureDefinition, dataset: str, folder: Path, check: bool = False
) -> WrittenFigure:
    """Write `<folder>/<dataset>/<id>.png` and `.csv`, or check whether they are up to date.

    Args:
        data: the data of figures.
        figure: the figure.
        dataset: one of the figure's data sets.
        folder: the folder of all figures.
        check: write nothing and compare the files on disk.

    Raises:
        ResultError: a stored result is damaged, or the figure is not drawn for the data set.
        DataError: the figure needs images that are not on this machine.
    """
    if dataset not in figure.datasets:
        raise ResultError(f"{figure.id} is not drawn for {dataset!r}; allowed: {', '.join(figure.datasets)}.")
    plan = figure.plan(data, dataset)
    name, missing = f"{figure.id}, {dataset}", tuple(plan.missing)
    if plan.numbers is None:
        return WrittenFigure(name, missing=missing)
    paths = (folder / dataset / f"{figure.id}.png", folder / dataset / f"{figure.id}.csv")
    if not check:
        refuse_links(folder, paths[0].parent)
    return WrittenFigure(name, paths, missing, write_plan(plan, figure.id, *paths, check))


def write_plan(plan: FigurePlan, title: str, picture: Path, numbers: Path, check: bool = False) -> str:
    """Write the PNG and the CSV of a plan with numbers, or return why these files are not up to date (may be empty)."""
    assert plan.numbers is not None, "there is nothing to draw"
    table = _to_csv(plan.numbers, plan.decimals)
    if check:
        return explain_stale(picture, numbers, table)
    write_atomically(numbers, table)
    digest = hashlib.sha256(table).hexdigest()
    write_atomically(picture, render_png(plan.paint, {"Title": title, _KEY: digest}, plan.caption))
    return ""


def write_figures(data: FigureData, folder: Path, check: bool = False) -> Iterator[WrittenFigure]:
    """Write or check every figure for its first data set and for its other data sets with measurements.

    If a figure needs images that are not on this machine, its outcome says so and its files stay unchanged.
    """
    for figure in FIGURES.values():
        for dataset in (d for d in figure.datasets if d == figure.datasets[0] or data.has_data(d)):
            try:
                yield write_figure(data, figure, dataset, folder, check)
            except DataError as error:
                yield WrittenFigure(f"{figure.id}, {dataset}", missing=(str(error),))


def explain_stale(picture: Path, numbers: Path, table: bytes) -> str:
    """Return why the files on disk are not up to date; empty if they are.

    The CSV must have the same bytes. The PNG must hold the digest of the CSV. Its bytes are not compared, because they
    change with the version of matplotlib.

    Args:
        picture: the PNG on disk.
        numbers: the CSV on disk.
        table: the up-to-date content of the CSV.
    """
    from PIL import Image

    try:
        if read_bounded(numbers, 2**26) != table:
            return f"{numbers} is stale"
    except OSError:
        return f"{numbers} is stale"
    try:
        with Image.open(io.BytesIO(read_bounded(picture, 2**26))) as image:
            image.load()
            digest = image.info.get(_KEY)
    except OSError:
        return f"{picture} is missing or damaged"
    return "" if digest == hashlib.sha256(table).hexdigest() else f"{picture} was drawn from other numbers"


def _to_csv(numbers: pd.DataFrame, digits: int) -> bytes:
    return format_csv(numbers, f"%.{digits}g").encode()
