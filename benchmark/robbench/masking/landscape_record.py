"""landscape.parquet: the losses on planes around the first images of a sanity run. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from robbench.core.errors import ResultError
from robbench.core.parquet import read_flat_table
from robbench.masking.record import MOST_LANDSCAPE_BYTES

__all__ = ["COLUMNS", "PLANES", "POINTS", "read_landscape"]

POINTS = 17  # points along each axis, from −eps to eps
PLANES = ("random", "adversarial")
COLUMNS = ("sample", "plane", "a", "b", "cross_entropy", "margin")


def read_landscape(path: Path) -> pd.DataFrame:
    """Read the losses on both planes around each image. The columns are `COLUMNS`; see `compute_landscape`.

    Raises:
        ResultError: the file cannot be read, or does not hold every point of both planes once, with a finite loss.
    """
    try:
        frame: pd.DataFrame = read_flat_table(path, MOST_LANDSCAPE_BYTES).to_pandas(ignore_metadata=True)
    except FileNotFoundError:
        raise ResultError(f"{path} is missing. Measure again: the same `robbench sanity` command.") from None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ResultError(
            f"{path} cannot be read: {reason}. Remove it and sanity.json, and measure again: the same "
            "`robbench sanity` command."
        ) from None
    if reason := _find_fault(frame):
        raise ResultError(
            f"{path}: {reason}. Remove it and sanity.json, and measure again: the same `robbench sanity` command."
        )
    return frame


def _find_fault(frame: pd.DataFrame) -> str:
    """Return what is wrong with a table; empty if it is a landscape."""
    if tuple(frame.columns) != COLUMNS:
        return f"its columns are {', '.join(map(str, frame.columns))}; expected: {', '.join(COLUMNS)}"
    kinds = "".join(frame[column].dtype.kind for column in COLUMNS if column != "plane")
    if kinds != "iffff":
        return "its samples are not whole numbers, or its other columns are not numbers"
    if not np.isfinite(frame[["a", "b", "cross_entropy", "margin"]].to_numpy()).all():
        return "a loss is not finite"
    axis = np.linspace(-1, 1, POINTS)
    grid = pd.MultiIndex.from_product([frame["sample"].unique(), PLANES, axis, axis])
    if len(frame) == 0 or not pd.MultiIndex.from_frame(frame[["sample", "plane", "a", "b"]]).sort_values().equals(
        grid.sort_values()
    ):
        return f"it does not hold the {POINTS} × {POINTS} points of both planes of each image once"
    return ""
