"""What kind of numbers a model answers with: outputs that are no plain logits, and weaken attacks or hide gradients."""

from __future__ import annotations

from torch import Tensor

__all__ = ["OUTPUT_FLAGS", "find_output_flags"]

OUTPUT_FLAGS = ("probabilities", "bounded_outputs", "log_probabilities", "rounded_outputs")

_GRID = 1e-4  # of the outputs' range: finer steps than that are those of half precision and of rounding
_MIN_VALUES = 12  # so many different values lie on a grid by chance less than once in 10^7 models
_ROUNDING = 1e-5  # of the outputs' range, in sums over a row

# Bounds of `_is_bounded`, all in shares of the outputs' range. On 60,000 draws of 8 to 64 images from the registered
# models, with plain, centered and scaled logits, 10, 3 and 2 classes, one draw of 16 or more images was flagged.
_MIN_ROWS = 8
_MIN_ROWS_BOTH_ENDS = 16
_AT_BOUND = 0.002
_NEAR_TOP, _NEAR_BOTTOM = 0.025, 0.12  # honest: at least 0.12 from the top, but label smoothing comes closer
_SHARE_AT_BOTTOM = 0.2

_REMEDY = (
    "its gradients vanish where the model is sure, and attacks look weaker than they are. Return the logits: what goes "
    "into that function."
)


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
    if _is_softmax(z):
        flags["probabilities"] = (
            "The model's outputs are probabilities (or these, scaled and shifted), not logits: cross-entropy on them "
            "vanishes where the model is sure, and attacks look weaker than they are. Return the logits."
        )
    elif bool((z >= 0).all() and (z <= 1).all() and z.min() < 0.1 and z.max() > 0.9):  # small logits stay far from 1
        flags["bounded_outputs"] = (
            "All outputs of the model lie in [0, 1], come close to both ends, and do not sum to 1, like those of a "
            "sigmoid: cross-entropy on them can tell classes apart by 1 at most, their gradients vanish at both "
            "ends, and attacks look weaker than they are. Return the logits."
        )
    elif _is_log_softmax(z):
        flags["log_probabilities"] = (
            "The model's outputs are log-probabilities, not logits: where the model is sure, the largest one rounds to "
            "0 and its gradient vanishes. Return the logits."
        )
    elif _is_bounded(z):
        flags["bounded_outputs"] = (
            f"The model's outputs pile up at the end of a range ({float(z.min()):.3g} to {float(z.max()):.3g}), like "
            f"those of a sigmoid, tanh, clamp, ReLU or softplus behind the logits: {_REMEDY}"
        )
    step = _find_step(z)
    # Probabilities of a model that is sure of everything are 0 and 1 without any rounding.
    if step and not ("probabilities" in flags and step > 0.9):
        flags["rounded_outputs"] = (
            f"All outputs of the model are multiples of about {step:.3g} from each other, so they are rounded: "
            "differences below that are ties, and the gradient of rounding is zero or made up. Return the logits as "
            "they are computed."
        )
    return flags


def _is_softmax(z: Tensor) -> bool:
    """Tell whether rows [n, K] are a·p + b, where p are probabilities and a may be negative.

    Then all rows have one sum, and nearly all of them come close to the same least (or largest) value. Centered logits
    have one sum, too, but no such value.
    """
    sums, spread = z.sum(1), float(z.max() - z.min())
    if bool((z >= 0).all() and (z <= 1).all() and ((sums - 1).abs() < _ROUNDING).all()):
        return True
    if float(sums.max() - sums.min()) >= _ROUNDING * max(spread, 0.01 * float(z.abs().max())):
        return False
    ends = (z.amin(1) - z.min(), z.max() - z.amax(1))
    return _has_many_answers(z) and any(float(end.quantile(0.75)) < 0.005 * spread for end in ends)


def _is_log_softmax(z: Tensor) -> bool:
    """Tell whether rows [n, K] are log(p) + b, where p are probabilities, or log(p + c), which has a bound below.

    Then the exponentials of all rows have one sum. Where one logit outweighs all others in every row, the largest
    logits are such sums, and say nothing.
    """
    total = z.logsumexp(1)
    if bool((total.abs() < _ROUNDING).all()):
        return True
    is_constant = float(total.max() - total.min()) < _ROUNDING * max(1.0, 0.01 * float(z.abs().max()))
    return _has_many_answers(z) and is_constant and float((total - z.amax(1)).max()) > 1e-3


def _has_many_answers(z: Tensor) -> bool:
    """Tell whether rows [n, K] differ enough to say something. Those of a constant model all have one sum."""
    return len(z.unique(dim=0)) >= _MIN_ROWS  # type: ignore[no-untyped-call]


def _is_bounded(z: Tensor) -> bool:
    """Tell whether outputs [n, K] pile up at one or both ends of their range.

    Logits have tails: the largest logit of most images lies far below the largest of all. Constant columns, and images
    that come twice, say nothing.
    """
    z = z[:, (z != z[0]).any(0)]
    if z.shape[1] < 2 or len(z := z.unique(dim=0)) < _MIN_ROWS:  # type: ignore[no-untyped-call]
        return False
    low, high = float(z.min()), float(z.max())
    at_bottom = float((z < low + _AT_BOUND * (high - low)).double().mean())
    if at_bottom >= _SHARE_AT_BOTTOM:
        return True
    from_top = (high - float(z.amax(1).quantile(0.4))) / (high - low)  # 60 % of the images are at least so close
    from_bottom = (float(z.amin(1).median()) - low) / (high - low)
    is_at_both = len(z) >= _MIN_ROWS_BOTH_ENDS and from_top < _NEAR_TOP and from_bottom < _NEAR_BOTTOM
    return len(z.argmax(1).unique()) > 1 and (from_top < _AT_BOUND or is_at_both)  # type: ignore[no-untyped-call]


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
