"""The loss around images: Figures 5 and 9 of Shafahi et al. 2019 (arXiv:1910.11585), from `robbench sanity`.

The CSV has one row per line of a plane: panel (the plane), model, sample, a (place on the vertical axis, in eps), and
the cross-entropy at each place on the horizontal axis, b-1 to b1. The rows of the panel "claim" are the numbers of the
caption: model, what, value, the 95 % interval low to high, and n.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from robbench.analysis.logits import Estimate, estimate_mean, estimate_share
from robbench.linear.theory import Values
from robbench.papers.figures.logits import describe_finding, format_mean, format_share
from robbench.report.figures.canvas import add_footnote, make_figure
from robbench.report.figures.source import FigureData, FigurePlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PLANES", "Plane", "plan_landscapes"]

Plane = Literal["random", "adversarial"]
PLANES: tuple[Plane, ...] = ("random", "adversarial")
_KINDS = (  # a model of each kind, the first that was measured. The paper shows one that squeezes and has noise.
    ("natural", "natural_resnet18"),
    ("at",),
    ("ls095_sigma03", "ls095_sigma05", "ls095_sigma30"),
    ("lsq2_sigma03", "lsq2_sigma05", "lsq10_sigma30"),
)
_LABELS = {"random": "random ↑", "adversarial": "adversarial ↑"}
_ABOUT = ["panel", "model", "sample", "a"]
_CLAIM = ["what", "value", "low", "high", "n"]
_SMALLEST = 1e-12  # a change of the loss below this is rounding


def plan_landscapes(plane: Plane, data: FigureData, title: str, dataset: str) -> FigurePlan:
    """Plan the cross-entropy on one plane through each image, a row of panels for each model."""
    stored = data.read_landscapes(dataset)
    names, missing = [], []
    for kind in _KINDS:
        known = [name for short in kind if data.find_entry(name := f"{dataset}/{short}")]
        measured = [name for name in known if name in stored]
        names += measured[:1]
        if known and not measured:
            missing.append(data.make_command(known[0], "sanity {}"))
    if not names:
        return FigurePlan.empty(*missing)
    surfaces = {name: _make_surfaces(stored[name], plane) for name in names}
    claims, caption = (_claim_random if plane == "random" else _claim_adversarial)(
        {name: stored[name] for name in names}, surfaces
    )
    numbers = pd.concat([*map(_make_rows, [plane] * len(names), names, surfaces.values()), claims], ignore_index=True)
    return FigurePlan(numbers, partial(_paint, title, plane, numbers, caption), missing, decimals=3)


def _make_surfaces(frame: pd.DataFrame, plane: str, column: str = "cross_entropy") -> dict[int, pd.DataFrame]:
    """Return for each image the values on a plane: index a, columns b."""
    here = frame[frame["plane"] == plane]
    samples = here["sample"].unique().tolist()
    return {s: here[here["sample"] == s].pivot(index="a", columns="b", values=column) for s in samples}


def _make_rows(plane: str, name: str, surfaces: dict[int, pd.DataFrame]) -> pd.DataFrame:
    """Make the rows of the CSV of a model."""
    frames = []
    for sample, surface in surfaces.items():
        lines = surface.rename(columns="b{:g}".format).rename_axis(columns=None).reset_index()
        lines.insert(0, "panel", plane)
        lines.insert(1, "model", name)
        lines.insert(2, "sample", sample)
        frames.append(lines)
    return pd.concat(frames, ignore_index=True)


def _make_claims(rows: list[tuple[str, str, Estimate]]) -> pd.DataFrame:
    columns = ["panel", "model", *_CLAIM]
    return pd.DataFrame([("claim", name, what, e.value, e.low, e.high, e.n) for name, what, e in rows], columns=columns)


def measure_change(values: Values) -> float:
    """Return the largest minus the smallest value, at least what rounding may change."""
    return max(float(values.max() - values.min()), _SMALLEST)


def _claim_adversarial(
    stored: dict[str, pd.DataFrame], surfaces: dict[str, dict[int, pd.DataFrame]]
) -> tuple[pd.DataFrame, str]:
    """Compare how much the loss changes along the adversarial and along the random axis, both through the image."""
    rows, parts = [], []
    for name in stored:
        log_ratio = np.array([
            np.log(measure_change(s.loc[:, 0.0].to_numpy()) / measure_change(s.loc[0.0].to_numpy()))
            for s in surfaces[name].values()
        ])  # fmt: skip
        found = _exponentiate(estimate_mean(log_ratio))
        rows.append((name, "change along adversarial / change along random", found))
        parts.append(f"{name.partition('/')[2]} {format_mean(found)}")
    shows = all(found.low > 1 for _, _, found in rows)
    return _make_claims(rows), (
        f"From −ε to ε, the loss changes along the adversarial direction by so many times its change along the random "
        f"one (geometric mean of {rows[0][2].n} images):\n{'; '.join(parts)}.\n"
        f"The paper says that it changes a lot along the first, not much along the second. {describe_finding(shows)}"
    )


def _claim_random(
    stored: dict[str, pd.DataFrame], surfaces: dict[str, dict[int, pd.DataFrame]]
) -> tuple[pd.DataFrame, str]:
    """Say how many images some point of the random plane breaks, and some point of the adversarial one."""
    rows, parts = [], []
    for name, frame in stored.items():
        broken = {}
        for plane in PLANES:
            margins = _make_surfaces(frame, plane, "margin").values()
            broken[plane] = estimate_share(np.array([bool((m.to_numpy() > 0).any()) for m in margins]))
            rows.append((name, f"images with a wrong point on the {plane} plane", broken[plane]))
        parts.append(
            f"{name.partition('/')[2]} {format_share(broken['random'])} and {format_share(broken['adversarial'])}"
        )
    return _make_claims(rows), (
        "Images with a wrongly classified point on this plane, and on the plane with an adversarial direction:\n"
        f"{'; '.join(parts)}.\nThe paper states no finding for its picture."
    )


def _exponentiate(found: Estimate) -> Estimate:
    value, low, high = (float(np.exp(v)) for v in (found.value, found.low, found.high))
    return Estimate(value, low, high, found.n)


def _paint(title: str, plane: str, numbers: pd.DataFrame, caption: str) -> Figure:
    rows = numbers[numbers["panel"] == plane]
    names = list(dict.fromkeys(rows["model"]))
    columns = [c for c in rows.columns if c[0] == "b"]
    shown = max(rows[rows["model"] == name]["sample"].nunique() for name in names)
    figure = make_figure(1.05 * shown + 2.0, 1.25 * len(names) + 1.6)
    axes = figure.subplots(len(names), shown, squeeze=False)
    for line, name in zip(axes, names, strict=True):
        mine = rows[rows["model"] == name]
        values = mine[columns].to_numpy(np.float64)
        for place, ax in enumerate(line):
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
            samples = list(dict.fromkeys(mine["sample"]))[place : place + 1]
            for sample in samples:
                surface = mine[mine["sample"] == sample][columns].to_numpy(np.float64)
                drawn = ax.imshow(
                    surface, origin="lower", extent=(-1, 1, -1, 1), cmap="viridis", vmin=values.min(), vmax=values.max()
                )
                ax.plot(0, 0, "+", color="white", markersize=5)
                ax.set_title(f"image {int(sample)}", fontsize=7.5, pad=2)
        line[0].set_ylabel(f"{name.partition('/')[2]}\n{_LABELS[plane]}", fontsize=8)
        bar = figure.colorbar(drawn, ax=list(line), fraction=0.02, pad=0.01)
        bar.ax.tick_params(labelsize=7)
    figure.suptitle(f"{title}\ncross-entropy from −ε to ε; to the right: a random direction; a scale for each model")
    add_footnote(figure, caption)
    return figure
