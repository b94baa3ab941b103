"""How far the nearest break of each image is: the results of suites with the judge `nearest`. Imports no torch.

The distance of an image is 0 if the model misclassifies it, and infinite if no attack broke it. It is an upper bound:
a stronger attack may find a nearer break.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from robbench.core.files import write_atomically
from robbench.core.types import Status
from robbench.core.words import format_count, format_goal
from robbench.report.console import TerminalConsole
from robbench.report.escape import format_csv
from robbench.report.figures.canvas import OKABE_ITO, make_figure, render_png
from robbench.report.leaderboard import format_percent
from robbench.report.tables import print_numbers
from robbench.results.places import locate_result
from robbench.results.reader import read_vouched_rows
from robbench.results.schema import ResultFile
from robbench.results.summary import make_accuracy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "NEAREST", "describe_distances", "find_distances", "list_quartiles", "print_distances", "read_distances",
    "summarize_distances", "trace_survival", "write_survival",
]  # fmt: skip

NEAREST = "nearest"
"""The column of the smallest distances."""
_QUARTILES = {"25 %": 0.25, "Median": 0.5, "75 %": 0.75}
_CAPTION = (
    "What to see: the share of images that no attack of the suite broke within a radius. A stronger one may lower it."
)
_SAME = 1.001  # an attack that comes so close to the smallest distance of an image found it, too


def find_distances(rows: pd.DataFrame) -> pd.DataFrame:
    """Find the distances in records: one row per sample, one column per attack, and `nearest`, their minimum."""
    broken, lost = rows["status"] == Status.BROKEN, rows["status"] == Status.MISCLASSIFIED
    value = rows["distance"].where(broken, np.inf).mask(lost, 0.0)
    table = rows.assign(value=value).pivot(index="sample", columns="attack", values="value")
    table = table.reindex(index=rows["sample"].unique(), columns=rows["attack"].unique())
    return table.assign(**{NEAREST: table.min(axis=1)})


def read_distances(root: Path, result: ResultFile) -> pd.DataFrame:
    """Read the distances of a stored result: see `find_distances`.

    Raises:
        ResultError: the result is damaged.
    """
    rows = read_vouched_rows(locate_result(root, result))
    # The records are in the order of selection. An earlier run may have stored more images than this result has.
    return find_distances(rows[rows["sample"].isin(rows["sample"].unique()[: result.n])])


def trace_survival(distances: pd.Series[float]) -> pd.DataFrame:
    """Trace the robust accuracy over the radius.

    Returns:
        One row for radius 0 and for each distance of an image, increasing. `value` is the share of images without a
        break within the radius, `low` and `high` are its 95 % Wilson interval.
    """
    known = np.sort(distances.to_numpy())
    radii = np.unique(np.append(known[np.isfinite(known)], 0.0))
    robust = len(known) - np.searchsorted(known, radii, side="right")
    points = [make_accuracy(int(count), len(known)).model_dump() for count in robust]
    return pd.DataFrame({"radius": radii, **{key: [p[key] for p in points] for key in ("value", "low", "high")}})


def _find_quantiles(distances: pd.Series[float]) -> dict[str, float]:
    """Find the quartiles: each is the distance of an image, so that infinite ones do no harm."""
    values = distances.to_numpy()
    return {name: float(np.quantile(values, q, method="inverted_cdf")) for name, q in _QUARTILES.items()}


def list_quartiles(table: pd.DataFrame) -> list[dict[str, str]]:
    """List the quartiles of each attack and of the nearest breaks as rows of a printed table."""
    rows, nearest, clean = [], table[NEAREST], table[NEAREST] > 0
    for name, column in table.items():
        found = clean & np.isfinite(column)
        closest = found & (column <= nearest * _SAME)
        rows.append(
            {"Attack": "nearest of all" if name == NEAREST else str(name), "Breaks": f"{int(found.sum())}"}
            | {key: format_distance(value) for key, value in _find_quantiles(column).items()}
            | {"Is nearest": f"{int(closest.sum())}"}
        )
    return rows


def format_distance(value: float) -> str:
    """Format a distance with four digits, and an infinite one as a dash."""
    return f"{value:.4g}" if math.isfinite(value) else "–"


def describe_distances(table: pd.DataFrame) -> dict[str, Any]:
    """Describe distances for JSON: quartiles of each attack (null where they are infinite), and the curve."""
    attacks = {
        str(name): {
            key: value if math.isfinite(value) else None
            for key, value in zip(
                ("lower_quartile", "median", "upper_quartile"), _find_quantiles(column).values(), strict=True
            )
        }
        for name, column in table.items()
    }
    return {"attacks": attacks, "survival": trace_survival(table[NEAREST]).to_dict("records")}


def summarize_distances(result: ResultFile, table: pd.DataFrame) -> str:
    """Say a result in one sentence."""
    low, median, high = (format_distance(value) for value in _find_quantiles(table[NEAREST]).values())
    unbroken = int(np.isinf(table[NEAREST]).sum())
    rest = f", and {format_count(unbroken, 'image')} that no attack broke at any distance" if unbroken else ""
    return (
        f"{result.model}: {format_percent(result.clean_accuracy)} % clean, median distance of a break "
        f"{result.threat.norm}{format_goal(result.identity)}: {median} (quartiles {low} and {high}) on "
        f"{format_count(result.n, 'image')}{rest}; upper bounds, as a stronger attack may find nearer breaks"
    )


def print_distances(console: TerminalConsole, result: ResultFile, table: pd.DataFrame) -> None:
    """Print the table of a result and its sentence."""
    rows = list_quartiles(table)
    print_numbers(console, rows, title=f"{_name(result)}: distances of breaks, n = {result.n}")
    console.print(summarize_distances(result, table), soft_wrap=True)


def write_survival(root: Path, result: ResultFile) -> tuple[Path, Path]:
    """Write the curve of robust accuracy over the radius beside the folder of a result: CSV and PNG.

    Raises:
        ResultError: the result is damaged.
    """
    folder = locate_result(root, result)
    curve = trace_survival(read_distances(root, result)[NEAREST])
    numbers, picture = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("csv", "png"))
    write_atomically(numbers, format_csv(curve.assign(n=result.n, run_id=result.run_id)).encode())
    png = render_png(partial(_paint_survival, result, curve), {"Title": _name(result)}, _CAPTION)
    write_atomically(picture, png)
    return numbers, picture


def _name(result: ResultFile) -> str:
    goal = f"{result.threat.norm}{format_goal(result.identity)}"
    return f"{result.dataset}/{result.model} · {result.suite} · {goal}{f', seed {result.seed}' if result.seed else ''}"


def _paint_survival(result: ResultFile, curve: pd.DataFrame) -> Figure:
    """Paint the curve with its band."""
    figure = make_figure(7, 4)
    axes = figure.subplots()
    end = 1.05 * float(curve["radius"].iloc[-1]) or 1.0
    curve = pd.concat([curve, curve.iloc[[-1]].assign(radius=end)])
    low, high = 100 * curve["low"], 100 * curve["high"]
    axes.fill_between(curve["radius"], low, high, step="post", color=OKABE_ITO["blue"], alpha=0.2, lw=0)
    axes.step(curve["radius"], 100 * curve["value"], where="post", color=OKABE_ITO["blue"])
    axes.set_xlim(0, end)
    axes.set_ylim(0, 101)
    axes.set_xlabel(f"radius ({result.threat.norm}, pixels in [0, 1])")
    axes.set_ylabel("images without a break found, %")
    axes.set_title(f"{_name(result)}, n = {result.n}: upper bound, 95 % Wilson band")
    return figure
