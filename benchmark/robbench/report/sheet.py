"""One page of figures for a model's gradient-masking checks, drawn from sanity.json and landscape.parquet.

Imports no torch.
"""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from robbench.core.errors import ResultError
from robbench.masking.landscape_record import read_landscape
from robbench.masking.record import SanityFile
from robbench.report.figures.canvas import format_level, plain_text, set_log_axis, shrink_png
from robbench.report.verdict import describe_verdict

__all__ = ["draw_sheet", "paint_sheet"]

_COLOUR = {  # a trustworthy number has no colour: green would praise the model, which may be at 0 %
    "undecided": "#9a6700", "trustworthy": "#1f2328", "suspicious": "#9a6700", "masked": "#cf222e",
    "randomized": "#cf222e",
}  # fmt: skip
_SMALL: dict[str, Any] = {"fontsize": 9.5, "color": "#444444"}
_UNSEALED = "sanity.json has no digest of landscape.parquet. Measure again: the same `robbench sanity` command."
_PLANES = {"random": "two random directions", "adversarial": "adversarial (up) × random (right)"}


@plain_text()
def draw_sheet(file: SanityFile, landscape: Path) -> bytes:
    """Draw the page as a PNG of about 1600 × 1500 pixels.

    Older versions wrote no digest of the landscape. Nothing vouches for such a landscape, so the page shows a sentence
    in its place.

    Args:
        file: the checks.
        landscape: path of landscape.parquet.

    Raises:
        ResultError: a file is damaged: the landscape cannot be read, or the measurements do not fit together.
    """
    try:
        frame = None
        if file.landscape:
            frame = read_landscape(landscape)
        page = io.BytesIO()
        # The file does not hold matplotlib's version, so the same data give the same bytes.
        paint_sheet(file, frame).savefig(page, metadata={"Software": None})
        return shrink_png(page.getvalue())
    except Exception as error:  # the schema does not say how long each list is, and a reader can raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ResultError(
            f"{landscape.parent}: the page cannot be drawn ({reason}). Remove sanity.json and landscape.parquet, and "
            "run `robbench sanity` again."
        ) from None


def paint_sheet(file: SanityFile, frame: pd.DataFrame | None) -> Figure:
    """Paint the page from the measurements, and from the margins around the first images (landscape.parquet)."""
    heights = [1.5, 0.5 if frame is None else 5.2, 8.3]  # inches
    figure = Figure(figsize=(16, sum(heights)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(3, 1, squeeze=False, height_ratios=heights)
    head, planes, plots = parts[:, 0]
    _draw_head(head, file)
    if frame is None:
        planes.text(0.01, 0.5, f"No landscape: {_UNSEALED}", fontsize=12)
    else:
        _draw_planes(planes, frame)
    axes = plots.subplots(2, 2)
    _draw_radii(axes[0, 0], file)
    _draw_grid(axes[0, 1], file)
    _draw_curves(axes[1, 0], file)
    _draw_challenges(axes[1, 1], file)
    return figure


def _draw_head(part: SubFigure, file: SanityFile) -> None:
    m = file.measurements
    title = f"{file.dataset}/{file.model} · {file.threat.norm} {file.threat.eps} · {file.n} images · seed {file.seed}"
    part.text(0.01, 0.8, title, fontsize=17, weight="bold")
    statement = f"The usual PGD leaves {m.pgd.value:.1%} robust: {describe_verdict(file.verdict)}"
    part.text(0.01, 0.52, statement, fontsize=17, weight="bold", color=_COLOUR[file.verdict])
    by = f"decided by {', '.join(file.decided_by)}" if file.decided_by else "no check speaks against the usual PGD"
    part.text(0.01, 0.27, f"Verdict on this number: {file.verdict}, {by}", fontsize=12)
    numbers = (
        f"clean {m.correct / m.n:.1%}   ·   usual PGD {m.pgd.value:.1%}   ·   "
        f"all attacks of this run {m.best.value:.1%}   ·   overestimation {file.overestimation:.1f} points   ·   "
        "each number is an upper bound"
    )
    part.text(0.01, 0.04, numbers, fontsize=12)


def _set_title(axis: Axes, title: str, see: str) -> None:
    """Set the title of a panel, and a line below it that says what to see."""
    axis.set_title(f"{title}\n")
    axis.text(0.5, 1.02, see, transform=axis.transAxes, ha="center", va="bottom", **_SMALL)


def _draw_planes(part: SubFigure, frame: pd.DataFrame) -> None:
    """Draw the margin around each image, one row per plane. The black line is the decision boundary."""
    samples = list(dict.fromkeys(frame["sample"]))
    part.suptitle(
        "Margin of the true class around the first test images, ± eps: blue is right, red is wrong, black is the "
        "boundary. Smooth slopes lead an attack; flat or broken planes mislead it.",
        fontsize=12,
    )
    axes = part.subplots(2, len(samples), squeeze=False)
    for row, (plane, title) in enumerate(_PLANES.items()):
        for column, sample in enumerate(samples):
            axis = axes[row, column]
            here = frame[(frame["sample"] == sample) & (frame["plane"] == plane)]
            _draw_plane(axis, here)
            if row == 0:
                axis.set_title(f"image {sample}", fontsize=10)
        axes[row, 0].set_ylabel(title, fontsize=9)


def _draw_plane(axis: Axes, here: pd.DataFrame) -> None:
    values = here.pivot(index="a", columns="b", values="margin").to_numpy()
    # Each panel has its own scale, so that small margins (squeezed logits) are visible too.
    limit = max(float(np.abs(values).max()), 1e-12)
    extent = (-1.0, 1.0, -1.0, 1.0)
    axis.imshow(values, origin="lower", extent=extent, cmap="coolwarm", vmin=-limit, vmax=limit)
    if values.min() < 0 < values.max():
        side = np.linspace(-1, 1, len(values))
        axis.contour(side, side, values, levels=[0], colors="black", linewidths=1)
    axis.plot(0, 0, "k+", markersize=6)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel(f"max |margin| {limit:.2g}", fontsize=8)


def _draw_radii(axis: Axes, file: SanityFile) -> None:
    curve, m = file.measurements.curve, file.measurements
    robust = [100.0, *(100 * (1 - float(np.mean(b))) for b in curve.broken)]
    at = np.arange(len(robust))
    axis.plot(at, robust, "o-", color="#0969da", label=f"usual PGD, {len(curve.broken[0])} right images")
    show = format_level if "/255" in file.threat.eps else "{:.3g}".format
    axis.set_xticks(at, ["0", *(show(e) for e in curve.eps[:-1]), "whole box"])
    axis.axhline(100 / m.classes, color="gray", linestyle=":", label="chance")
    axis.set_ylim(-3, 103)
    axis.set_xlabel(f"eps ({file.threat.norm}; not to scale)")
    axis.set_ylabel("robust, %")
    _set_title(
        axis, "Accuracy over the radius", "It must fall to 0: in a large enough ball, every answer can be changed."
    )
    axis.legend()


def _draw_grid(axis: Axes, file: SanityFile) -> None:
    grid = file.measurements.grid
    share = 100 * np.array(grid.standing) / grid.images
    picture = axis.imshow(share, origin="lower", cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for i, j in np.ndindex(share.shape):
        usual = " (usual)" if (i, j) == grid.usual else ""
        axis.text(
            j, i, f"{share[i, j]:.0f}{usual}", ha="center", va="center", color="white" if share[i, j] < 60 else "black"
        )
    axis.set_xticks(range(len(grid.iterations)), [str(i) for i in grid.iterations])
    axis.set_yticks(range(len(grid.sizes)), [f"{s:g}" for s in grid.sizes])
    axis.set_xlabel("iterations")
    axis.set_ylabel("step size, shares of eps")
    title = f"PGD on cross-entropy: robust, % of {grid.images} right images"
    _set_title(axis, title, "More iterations or another step size must not lower the usual number much.")
    axis.figure.colorbar(picture, ax=axis)


def _draw_curves(axis: Axes, file: SanityFile) -> None:
    traces = file.measurements.traces
    steps = np.arange(len(traces.loss))
    axis.fill_between(steps, _positive(traces.loss_low), _positive(traces.loss_high), color="#0969da", alpha=0.2)
    # Both medians are the same at first. The wide line is below the narrow one, so both can be seen.
    axis.plot(steps, _positive(traces.loss), color="#54aeff", linewidth=4, label="usual PGD: median and deciles")
    longer = _positive(traces.longer)
    axis.plot(np.arange(len(longer)), longer, "--", color="#6639ba", label="twice the steps: median")
    set_log_axis(axis, vertical=True)
    axis.set_xlabel("step")
    axis.set_ylabel("cross-entropy")
    title = f"Loss along the attack, {traces.images} right images, and how many still stand"
    _set_title(
        axis, title, "The loss must rise and level off. If twice the steps raise it much, the attack stops too early."
    )
    right = axis.twinx()
    right.plot(steps, 100 * np.array(traces.share), ":", color="#1a7f37", linewidth=2, label="not broken yet, %")
    right.set_ylim(-3, 103)
    right.set_ylabel("not broken yet, %", color="#1a7f37")
    handles = [*axis.get_lines(), *right.get_lines()]
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False)


def _positive(values: list[float]) -> NDArray[np.float64]:
    """Raise losses of zero to a small value, which a logarithmic axis can show."""
    return np.clip(values, 1e-12, None)


def _draw_challenges(axis: Axes, file: SanityFile) -> None:
    challenges = file.measurements.challenges
    given = challenges[0].given if challenges else 0
    title = "What other attacks break (gray: the usual one again)"
    _set_title(axis, title, "If the number of the usual PGD can be trusted, no other attack breaks many of its images.")
    if not any(c.broken for c in challenges):
        _list_unbroken(axis, [c.name for c in challenges], given)
        return
    at = np.arange(len(challenges))[::-1]
    colours = ["gray" if c.role == "control" else "#cf222e" if c.alone else "#0969da" for c in challenges]
    axis.barh(at, [c.broken for c in challenges], color=colours)
    for y, c in zip(at, challenges, strict=True):
        alone = f", {c.alone} of them by no attack with gradients" if c.alone else ""
        place: dict[str, Any] = {"ha": "right", "color": "white"} if c.broken > 0.6 * given else {"ha": "left"}
        axis.text(c.broken, y, f" {c.broken}{alone} ", va="center", fontsize=9, **place)
    axis.set_yticks(at, [c.name for c in challenges])
    axis.set_xlim(0, given)
    axis.set_xlabel(f"images broken, of the {given} that the usual PGD left")


def _list_unbroken(axis: Axes, names: list[str], given: int) -> None:
    """Write which attacks broke nothing, in the place of empty bars."""
    text = f"None of the {given} images that the usual PGD left is broken by {', '.join(names)}."
    if not given:
        text = "The usual PGD left no image. So other attacks had nothing to break."
    axis.set_axis_off()
    axis.text(0.5, 0.5, textwrap.fill(text, 70), ha="center", va="center", fontsize=12, transform=axis.transAxes)
