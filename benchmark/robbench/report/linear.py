"""What Eq. 4 of Shafahi et al. 2019 predicts for measured models: shares with intervals, and a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from robbench.core.errors import SuiteError
from robbench.core.types import Threat
from robbench.linear.record import LinearFile, linear_folder, read_linearization
from robbench.linear.theory import Linearization
from robbench.report.leaderboard import percent, with_interval
from robbench.results.schema import Accuracy
from robbench.results.summary import make_accuracy
from robbench.suite import load_suite

__all__ = ["linear_rows", "predicted", "standard_radius", "text_of"]


def predicted(measured: Linearization, eps: Fraction, n: int | None = None) -> Accuracy:
    """Return the accuracy that Eq. 4 predicts at an Linf radius: the share of images with L > eps.

    Args:
        measured: what was found.
        eps: the radius, in [0, 1] pixel units.
        n: the first n images; None, or more than there are, means all of them.
    """
    standing = measured.standing(float(eps))[:n]
    return make_accuracy(int(standing.sum()), len(standing))


def standard_radius(dataset: str) -> Fraction | None:
    """Look up the Linf radius at which a data set is usually attacked; None if no suite says."""
    try:
        threat = load_suite("whitebox").threat(dataset)
    except SuiteError:
        return None
    return threat.eps if threat.norm == "Linf" else None


def linear_rows(files: Sequence[LinearFile], root: Path, eps: Fraction | None) -> list[dict[str, str]]:
    """Lay measurements out, a row per model.

    Args:
        files: their summaries.
        root: the results tree that holds them.
        eps: the radius of the prediction; None means the data set's usual one.
    """
    rows = []
    for file in files:
        radius = standard_radius(file.dataset) if eps is None else eps
        shown = "–"
        if radius is not None:
            measured = read_linearization(linear_folder(root, file.dataset, file.model))
            shown = f"{with_interval(predicted(measured, radius))} at {text_of(radius)}"
        rows.append(
            {
                "Model": f"{file.dataset}/{file.model}",
                "n": str(file.n),
                "Clean, %": percent(file.clean_accuracy),
                "L > ε, %": shown,
                "Median L": _short(file.medians["radius"]),
                "Logit gap": _short(file.medians["logit_gap"]),
                "Gradient gap": _short(file.medians["gradient_gap"]),
                "Cosine": _short(file.medians["cosine"]),
                "Flags": ", ".join(file.flags) or "none",
            }
        )
    return rows


def text_of(eps: Fraction) -> str:
    """Print a radius as people write it: 8/255, 0.3."""
    return Threat("Linf", eps).eps_text


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
