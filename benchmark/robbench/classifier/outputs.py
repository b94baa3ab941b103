"""What kind of numbers a model answers with: outputs that are no plain logits, and weaken attacks or hide gradients."""

from __future__ import annotations

from torch import Tensor

__all__ = ["OUTPUT_FLAGS", "find_output_flags"]

OUTPUT_FLAGS = ("probabilities", "bounded_outputs", "log_probabilities", "rounded_outputs")

_GRID = 1e-4  # of the outputs' range: finer steps than that are those of half precision and of rounding
_MIN_VALUES = 12  # so many different values lie on a grid by chance less than once in 10^7 models


def find_output_flags(logits: Tensor) -> dict[str, str]:
    """Look for outputs that are no logits.

    Args:
        logits: of clean images, [n, K]. Rows with NaN or infinity are left out.

    Returns:
        Name of the problem -> sentence.
    """
    z = logits[logits.isfinite().all(1)].double().cpu()
    if not len(z):
        return {}
    flags = {}
    if bool((z >= 0).all() and (z <= 1).all()):
        if bool(((z.sum(1) - 1).abs() < 1e-5).all()):
            flags["probabilities"] = (
                "The model's outputs are probabilities, not logits: cross-entropy on them vanishes where the model is "
                "sure, and attacks look weaker than they are. Return the logits."
            )
        elif bool(z.min() < 0.1 and z.max() > 0.9):  # models trained for small logits stay far from 1
            flags["bounded_outputs"] = (
                "All outputs of the model lie in [0, 1], come close to both ends, and do not sum to 1, like those of a "
                "sigmoid: cross-entropy on them can tell classes apart by 1 at most, their gradients vanish at both "
                "ends, and attacks look weaker than they are. Return the logits."
            )
    elif bool((z.logsumexp(1).abs() < 1e-5).all()):
        flags["log_probabilities"] = (
            "The model's outputs are log-probabilities, not logits: where the model is sure, the largest one rounds to "
            "0 and its gradient vanishes. Return the logits."
        )
    if step := _find_step(z):
        flags["rounded_outputs"] = (
            f"All outputs of the model are multiples of about {step:.3g} from each other, so they are rounded: "
            "differences below that are ties, and the gradient of rounding is zero or made up. Return the logits as "
            "they are computed."
        )
    return flags


def _find_step(z: Tensor) -> float:
    """Find the step of a coarse grid that all outputs [n, K] lie on; 0 if there is none.

    Columns that hold one value only, such as a class that never occurs, say nothing.
    """
    z = z[:, (z != z[0]).any(0)]
    values = z.unique()  # type: ignore[no-untyped-call]  # torch's annotation is missing
    has_ties = z.numel() >= 4 * max(len(values), _MIN_VALUES)
    if len(values) < 2 or not (len(values) >= _MIN_VALUES or has_ties):
        return 0.0
    spread = float(values[-1] - values[0])
    gaps = values.diff()
    least = float(gaps[gaps > 1e-6 * spread].min())
    for part in range(1, 5):  # the smallest gap may be several steps
        step = least / part
        step = float(gaps.sum() / (gaps / step).round().sum())  # the smallest gap alone is rounded itself
        at = (values - values[0]) / step
        if step >= _GRID * spread and bool(((at - at.round()).abs() < 0.05).all()):
            return step
    return 0.0
