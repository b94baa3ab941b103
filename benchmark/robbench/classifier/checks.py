"""What is checked before a number is derived from a model: its images, its clean answers, and whether they change."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robbench.classifier.guard import Guarded, in_bfloat16, out_of_memory
from robbench.classifier.prepare import Target
from robbench.core.errors import DataError, ModelError
from robbench.core.types import format_ids

__all__ = [
    "RANDOMIZED_DRAWS",
    "answers",
    "blunted",
    "check_images",
    "classify",
    "drift",
    "time_round",
]

RANDOMIZED_DRAWS = 11
"""Answers that decide over a break of a model that answers at random."""

# Different kernels may round differently; this share of the logits' length is far above that (AutoAttack's check).
_NOISE = 1e-4

_BLUNT = 0.02  # see `blunted`


def check_images(x: Tensor, y: Tensor) -> None:
    """Check images and labels that a user brought.

    Raises:
        DataError: wrong shapes or types, or values outside [0, 1].
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise DataError(f"x is {x.dtype} of shape {tuple(x.shape)}; expected floating-point images [N, C, H, W].")
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise DataError(f"y is {y.dtype} of shape {tuple(y.shape)}; expected {len(x)} integer labels [N].")
    if not len(y):
        raise DataError("x holds no images.")
    low, high = float(x.min()), float(x.max())
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise DataError(
            f"x spans [{low:g}, {high:g}]; expected [0, 1]. Divide pixel values by 255, and put mean/std "
            "normalization inside the model: eps is measured on what the model is given."
        )
    if int(y.min()) < 0:
        raise DataError(f"y holds the label {int(y.min())}; labels are 0 or more.")


def classify(
    target: Target,
    x: Tensor,
    y: Tensor,
    num_classes: int | None,
    lanes: int,
    sample: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], dict[str, str]]:
    """Predict clean images and look for answers that no robust accuracy can be derived from.

    Args:
        target: the model.
        x: [N, C, H, W] in [0, 1], on the CPU.
        y: [N] labels.
        num_classes: how many logits there must be; None asks only for more than the largest label.
        lanes: batch width, padded at the end so that kernels see one shape.
        sample: [N] official indices, for flags and errors; by default the images are counted from 0.

    Returns:
        Predictions [N], -1 where the answer holds NaN or infinity, and flags: name of the problem -> sentence.

    Raises:
        ModelError: the output is not [N, K], is finite for no image, or has the wrong number of classes.
    """
    ids = np.arange(len(x)) if sample is None else sample
    predictions: list[NDArray[np.int64]] = []
    first = bad = None
    for start, (batch, real) in zip(range(0, len(x), lanes), _batches(x, lanes), strict=True):
        try:
            logits = _logits(target, batch)[:real]
        except ModelError as error:
            at = _failing(target, batch, real)
            alone = f"it fails on {format_ids(ids[start : start + real][at])}" if at else "none of them fails alone"
            raise ModelError(f"{error} (clean images, {format_ids(ids[start : start + real])}: {alone})") from error
        if first is None:
            first = (batch, real, logits)
            _check_logits(logits, y, num_classes)
        finite = logits.isfinite().all(1)
        if bad is None and not bool(finite.all()):
            bad = logits[~finite][0].tolist()
        predictions.append(torch.where(finite, logits.argmax(1), -1).cpu().numpy())
    assert first is not None  # x is not empty
    prediction = np.concatenate(predictions)
    lost = prediction < 0
    if lost.all():
        raise ModelError(
            f"The model answers NaN or infinity to every clean image; to {format_ids(ids[:1])}: {bad}. A robust "
            "accuracy of it would mean nothing."
        )
    flags = _flags(target, *first) | (target.module.flags if isinstance(target.module, Guarded) else {})
    if lost.any():
        flags["nonfinite_clean"] = (
            f"The model answers NaN or infinity to {int(lost.sum())} clean images; they count as misclassified: "
            f"{format_ids(ids[lost])}."
        )
    return prediction, flags


def _failing(target: Target, batch: Tensor, real: int) -> list[int]:
    """Ask about each image of a batch that failed, alone at the same width; returns the positions that fail again."""
    at = []
    for i in range(real if real > 1 else 0):
        try:
            _logits(target, batch[i : i + 1].expand_as(batch).contiguous())
        except ModelError:
            at.append(i)
    return at


def drift(target: Target, x: Tensor, before: Tensor, lanes: int) -> dict[str, str]:
    """Ask the same again after a run: a model whose state changes between calls was not one model.

    Args:
        target: the model.
        x: [N, C, H, W] clean images.
        before: [N, K] what it answered to them before the run.
        lanes: batch width.

    Returns:
        A flag if the answers differ by more than rounding: name of the problem -> sentence.
    """
    now = answers(target, x, lanes)
    scale = before.norm(dim=1).clamp(min=1e-12)
    change = float(((now - before).norm(dim=1) / scale).nan_to_num(0.0).max())
    flips = int((now.argmax(1) != before.argmax(1)).sum())
    if change <= _NOISE and not flips:
        return {}
    return {
        "state": (
            f"The model answers differently after the attacks than before ({flips} of {len(x)} predictions of clean "
            f"images changed, logits by up to {change:.1e} of their length): something in it changes between calls. "
            "The verdicts are of different models, and neither breaks nor survivors can be relied on."
        )
    }


def blunted(target: Target, x: Tensor, lanes: int) -> dict[str, str]:
    """Ask about clean images in bfloat16 too: what it does to the lead of the predicted class, it does to losses.

    Args:
        target: the model.
        x: [N, C, H, W] clean images, in float32.
        lanes: batch width.

    Returns:
        A flag if the lead changes by more than 2 % (median): name of the problem -> sentence. Of the registered models
        with weights the largest has 0.9 %; 100 added to all logits of `digits/ls095_sigma03` make it 7 %, and the
        suite `fast` leaves 52 of 200 images instead of 48.

    Raises:
        ModelError: the model fails in bfloat16.
    """
    full = answers(target, x, lanes)
    try:
        with in_bfloat16(target.device):
            coarse = answers(target, x, lanes)
    except ModelError as error:
        raise ModelError(f"{error} (in bfloat16; without --gradients it may well answer)") from error
    top = full.topk(2, dim=1).indices
    lead, now = ((z.gather(1, top[:, :1]) - z.gather(1, top[:, 1:])).squeeze(1) for z in (full, coarse))
    change = float(((now - lead).abs() / lead.clamp(min=1e-12)).nan_to_num(0.0).median())
    if change <= _BLUNT:
        return {}
    return {
        "bfloat16": (
            f"In bfloat16 the lead of the predicted class changes by {100 * change:.1f} % (median of {len(x)} clean "
            "images): the logits are close together for their size, so attacks see too little and the model looks "
            "more robust than it is. Run it without --gradients."
        )
    }


def answers(target: Target, x: Tensor, lanes: int) -> Tensor:
    """Ask the model about images [N, C, H, W] in batches of one width: logits [N, K] on the CPU."""
    return torch.cat([_logits(target, batch)[:real].cpu() for batch, real in _batches(x, lanes)])


def _batches(x: Tensor, lanes: int) -> Iterator[tuple[Tensor, int]]:
    for start in range(0, len(x), lanes):
        batch = x[start : start + lanes]
        real = len(batch)
        if real < lanes:
            batch = torch.cat([batch, batch.new_zeros((lanes - real, *x.shape[1:]))])
        yield batch, real


def _logits(target: Target, batch: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            logits: Tensor = target.module(batch.to(target.device))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise ModelError(f"Out of memory for {len(batch)} images at once; use fewer: --lanes N.") from None
    return logits


def _check_logits(logits: Tensor, y: Tensor, num_classes: int | None) -> None:
    found, top = logits.shape[1], int(y.max())
    if num_classes is not None and found != num_classes:
        raise ModelError(f"The model has {found} classes; the data set has {num_classes}.")
    if found < 2 or top >= found:
        raise ModelError(f"The model has {found} classes; the labels go up to {top}.")


def _flags(target: Target, batch: Tensor, real: int, logits: Tensor) -> dict[str, str]:
    """Look at the first batch again: chance in the answers, probabilities instead of logits."""
    flags = {}
    again = torch.stack([_logits(target, batch)[:real] for _ in range(2)])
    scale = logits.norm(dim=1).clamp(min=1e-12)
    change = float(((again - logits).norm(dim=2) / scale).nan_to_num(0.0).max())
    flips = int((again.argmax(2) != logits.argmax(1)).any(0).sum())
    if change > _NOISE or flips:
        flags["randomized"] = (
            f"The model answers differently to the same images ({flips} of {real} predictions changed, logits by up "
            f"to {change:.1e} of their length), so gradients are noisy. A break counts here if more than half of "
            f"{RANDOMIZED_DRAWS} answers are wrong. Attack the expectation over its randomness (eot = 20 in a suite) "
            "before trusting these numbers."
        )
    sums = logits.sum(1)
    if bool((logits >= 0).all() and (logits <= 1).all() and ((sums - 1).abs() < 1e-5).all()):
        flags["probabilities"] = (
            "The model's outputs are probabilities, not logits: cross-entropy on them vanishes where the model is "
            "sure, and attacks look weaker than they are. Return the logits."
        )
    return flags


def time_round(target: Target, shape: Sequence[int], lanes: int, dtype: torch.dtype, coarse: bool = False) -> float:
    """Measure seconds for one forward and backward pass of a full batch, after one that warms up; NaN if it fails.

    With `coarse`, in bfloat16.
    """
    x = torch.full((lanes, *shape), 0.5, dtype=dtype, device=target.device).requires_grad_(True)
    begin = math.nan
    for _ in range(2):
        begin = time.perf_counter()
        try:
            with torch.enable_grad(), in_bfloat16(target.device, coarse):
                out = target.module(x).sum()
            if out.requires_grad:
                torch.autograd.grad(out, x, allow_unused=True)
        except Exception:  # whatever the model raises; an attack that meets it says so, with its samples
            return math.nan
        if target.device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - begin
