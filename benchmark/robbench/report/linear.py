"""The predictions of Eq. 4 of Shafahi et al. 2019 for measured models, as accuracies and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from robbench.core.errors import SuiteError
from robbench.core.types import Threat
from robbench.linear.record import LinearFile, linear_folder, read_linearization
from robbench.linear.theory import Linearization
from robbench.report.leaderboard import format_percent, format_with_interval
from robbench.results.schema import Accuracy
from robbench.results.summary import make_accuracy
from robbench.suite import load_suite

__all__ = ["find_standard_radius", "format_radius", "make_linear_rows", "predict_accuracy"]


def predict_accuracy(measured: Linearization, eps: Fraction, n: int | None = None) -> Accuracy:
    """Return the accuracy that Eq. 4 predicts at an Linf radius. It is the share of images with L > eps.

    Args:
        measured: the measured logits and gradients.
        eps: the radius, in [0, 1] pixel units.
        n: use the first n images; None means all.
    """
    robust = measured.predict_robust(float(eps))[:n]
    return make_accuracy(int(robust.sum()), len(robust))


def find_standard_radius(dataset: str) -> Fraction | None:
    """Return the Linf radius of the suite whitebox for a data set; None if it has none."""
    try:
        threat = load_suite("whitebox").threat(dataset)
    except SuiteError:
        return None
    return threat.eps if threat.norm == "Linf" else None


def make_linear_rows(files: Sequence[LinearFile], root: Path, eps: Fraction | None) -> list[dict[str, str]]:
    """Make the rows of a table of measurements, one per model.

    Args:
        files: the summaries of the measurements.
        root: the results tree that holds the measurements.
        eps: radius of the prediction; None means the radius of `find_standard_radius`.
    """
    rows = []
    for file in files:
        radius = find_standard_radius(file.dataset) if eps is None else eps
        shown = "–"
        if radius is not None:
            measured = read_linearization(linear_folder(root, file.dataset, file.model))
            shown = f"{format_with_interval(predict_accuracy(measured, radius))} at {format_radius(radius)}"
        rows.append(
            {
                "Model": f"{file.dataset}/{file.model}",
                "n": str(file.n),
                "Clean, %": format_percent(file.clean_accuracy),
                "L > ε, %": shown,
                "Median L": _short(file.medians["radius"]),
                "Logit gap": _short(file.medians["logit_gap"]),
                "Gradient gap": _short(file.medians["gradient_gap"]),
                "Cosine": _short(file.medians["cosine"]),
                "Flags": ", ".join(file.flags) or "none",
            }
        )
    return rows


def format_radius(eps: Fraction) -> str:
    """Format a radius in its usual notation, such as 8/255 or 0.3."""
    return Threat("Linf", eps).eps_text


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
