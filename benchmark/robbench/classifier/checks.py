"""Checks of images, of a model's clean logits, and of whether these change during a run."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robbench.classifier.batch_dependence import NOISE, find_batch_dependence
from robbench.classifier.batch_width import BatchWidths
from robbench.classifier.gradient_mode import find_gradient_mode_flag, query_with_gradient
from robbench.classifier.guard import Guarded, in_bfloat16, list_flags, out_of_memory
from robbench.classifier.moved_images import Ask, MovedImages, ask_moved_images, measure_change
from robbench.classifier.outputs import OUTPUT_FLAGS, find_output_flags
from robbench.classifier.prepare import Target
from robbench.core.errors import ModelError
from robbench.core.types import format_ids
from robbench.core.user_code import contain_exits
from robbench.core.words import format_count

__all__ = [
    "CLEAN_FLAGS",
    "RANDOMIZED_DRAWS",
    "ImageRows",
    "choose_width",
    "classify",
    "compute_logits",
    "find_bfloat16_flag",
    "find_state_change_flag",
    "measure_pass_seconds",
]

CLEAN_FLAGS = ("randomized", *OUTPUT_FLAGS, "nonfinite_clean", "batch_dependent", "gradient_mode")
"""Flags that `classify` finds anew in each run."""

RANDOMIZED_DRAWS = 11
"""Number of answers that a randomized model gives to a claimed break; the majority decides."""

_OUTPUT_IMAGES = 1024  # enough to see what kind of numbers a model answers with

_MAX_LEAD_CHANGE = 0.02  # see `find_bfloat16_flag`


def choose_width(widths: BatchWidths, n: int) -> int:
    """Choose the batch width at which to look at n images: the narrowest that gives the bits of the full one.

    Raises:
        ModelError: memory runs out at the full width.
    """
    try:
        return widths.fit(n)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise _word_out_of_memory(widths.lanes) from error


def _word_out_of_memory(images: int) -> ModelError:
    return ModelError(f"Out of memory for {images} images at once; use fewer: --lanes N.")


class ImageRows(Protocol):
    """Images [N, C, H, W]: a tensor, or images that are read as they are sliced."""

    def __len__(self) -> int:
        """Count the images."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Return some of the images, on the CPU."""


def classify(
    target: Target,
    x: ImageRows,
    y: Tensor,
    num_classes: int | None,
    lanes: int,
    sample: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], dict[str, str]]:
    """Predict clean images, and look for logits that allow no robust accuracy.

    Args:
        target: the model.
        x: [N, C, H, W] in [0, 1], on the CPU.
        y: [N] labels.
        num_classes: the required number of logits; with None, any number above the largest label will do.
        lanes: batch width. The last batch is padded, so that all batches have one shape.
        sample: [N] official indices, for flags and errors; by default 0, 1, 2, …

    Returns:
        Predictions [N], -1 where the logits hold NaN or infinity, and flags: name of the problem -> sentence.

    Raises:
        ModelError: the output is not [N, K], has the wrong number of classes, is finite for no image, or depends on the
            rest of the batch while the model is not asked one image at a time.
    """
    ids = np.arange(len(x)) if sample is None else sample
    predictions: list[NDArray[np.int64]] = []
    answers: list[Tensor] = []
    first = bad = None
    for start, (batch, real) in zip(range(0, len(x), lanes), _batches(x, lanes), strict=True):
        try:
            logits = _logits(target, batch)[:real]
        except ModelError as error:
            if error.__cause__ is not None and out_of_memory(error.__cause__):  # fewer lanes may do
                raise
            at = _find_failing(target, batch, real)
            alone = f"it fails on {format_ids(ids[start : start + real][at])}" if at else "none of them fails alone"
            raise ModelError(f"{error} (clean images, {format_ids(ids[start : start + real])}: {alone})") from error
        if first is None:
            first = (batch, real, logits)
            _check_logits(logits, y, num_classes)
        finite = logits.isfinite().all(1)
        if bad is None and not bool(finite.all()):
            bad = logits[~finite][0].tolist()
        if start < _OUTPUT_IMAGES:
            answers.append(logits.cpu())
        predictions.append(torch.where(finite, logits.argmax(1), -1).cpu().numpy())
    assert first is not None  # x is not empty
    prediction = np.concatenate(predictions)
    lost = prediction < 0
    if lost.all():
        raise ModelError(
            f"The model answers NaN or infinity to every clean image; to {format_ids(ids[:1])}: {bad}. A robust "
            "accuracy of it would mean nothing."
        )
    flags = _find_flags(target, *first) | find_output_flags(torch.cat(answers))
    flags |= list_flags(target.module)
    if lost.any():
        flags["nonfinite_clean"] = (
            f"The model answers NaN or infinity to {int(lost.sum())} clean images; they count as misclassified: "
            f"{format_ids(ids[lost])}."
        )
    return prediction, flags


def _find_flags(target: Target, batch: Tensor, real: int, logits: Tensor) -> dict[str, str]:
    """Query the images of the first batch again, as they are and moved, and look for answers that mean little."""
    together = target.module.ask_together if isinstance(target.module, Guarded) else target.module
    ask = functools.partial(_logits, target, ask=together)

    def ask_with_gradient(x: Tensor) -> tuple[Tensor, Tensor | None]:
        return query_with_gradient(together, x.to(target.device))

    def ask_in_inference_mode(x: Tensor) -> Tensor:
        with torch.inference_mode():
            answer: Tensor = together(x.to(target.device))
        return answer.clone()

    moved = ask_moved_images(ask, ask_with_gradient, batch, real)
    # Where the model fails on moved images, the clean ones are all there is.
    asked = moved or MovedImages(real, [batch], [ask(batch)], [ask_with_gradient(batch)[0]])
    flags = _find_random_flag(ask, asked) | _find_batch_flag(target, ask, batch, real, logits, moved)
    return flags | find_gradient_mode_flag(ask, ask_with_gradient, ask_in_inference_mode, asked)


def _find_random_flag(ask: Ask, moved: MovedImages) -> dict[str, str]:
    """Query clean and moved images again, each batch as it was, and look for a model that answers at random."""
    again = torch.cat([ask(x) for x in moved.batches])
    change = measure_change(again, moved.answers, moved.least)
    if not bool((change > NOISE).any()):
        return {}
    flips = int((again.argmax(1) != moved.answers.argmax(1)).sum())
    return {
        "randomized": (
            f"The model answers differently to the same images, clean or moved a little ({flips} of {len(again)} "
            f"predictions changed, logits by up to {float(change.max()):.1e} of their length), so gradients are noisy. "
            f"A break counts here if more than half of {RANDOMIZED_DRAWS} answers are wrong. Attack the expectation "
            "over its randomness (eot = 20 in a suite) before trusting these numbers."
        )
    }


def _find_batch_flag(
    target: Target, ask: Ask, batch: Tensor, real: int, logits: Tensor, moved: MovedImages | None
) -> dict[str, str]:
    """Find out whether answers depend on the rest of the batch. Such a model is refused, or asked image by image."""
    module = target.module
    found = find_batch_dependence(ask, batch, real, logits, module, moved)
    if found is None:
        return {}
    if isinstance(module, Guarded) and module.one_by_one:
        return {"batch_dependent": f"{found} Here it was asked one image at a time (one_by_one)."}
    raise ModelError(
        f"{found} So it has no accuracy of its own. Mend the model, or measure how it answers single images, which is "
        "slow: one_by_one=True (--one-by-one)."
    )


def _find_failing(target: Target, batch: Tensor, real: int) -> list[int]:
    """Query each image of a failed batch alone, at the same width. Returns the positions that fail again."""
    at = []
    for i in range(real if real > 1 else 0):
        try:
            _logits(target, batch[i : i + 1].expand_as(batch).contiguous())
        except ModelError:
            at.append(i)
    return at


def find_state_change_flag(target: Target, x: Tensor, y: Tensor, before: Tensor, lanes: int) -> dict[str, str]:
    """Compute the clean logits again after a run. If they differ, the state of the model changes between calls.

    Args:
        target: the model.
        x: [N, C, H, W] clean images.
        y: [N] the classes that were predicted when the clean images were classified.
        before: [N, K] their logits before the run.
        lanes: batch width.

    Returns:
        A flag if the logits differ by more than rounding: name of the problem -> sentence.
    """
    now = compute_logits(target, x, lanes)
    scale = before.norm(dim=1).clamp(min=1e-12)
    change = float(((now - before).norm(dim=1) / scale).nan_to_num(0.0).max())
    flips = int((now.argmax(1) != before.argmax(1)).sum())
    # The state may have changed before the attacks began. Ties are no change.
    early = before.amax(1) - before.gather(1, y[:, None])[:, 0] > NOISE * scale
    if change <= NOISE and not flips:
        if not bool(early.any()):
            return {}
        flips = int(early.sum())
    return {
        "state": (
            f"The model answers differently after the attacks than before ({flips} of {len(x)} predictions of clean "
            f"images changed, logits by up to {change:.1e} of their length): something in it changes between calls. "
            "The verdicts are of different models, and neither breaks nor survivors can be relied on."
        )
    }


def find_bfloat16_flag(target: Target, x: Tensor, lanes: int) -> dict[str, str]:
    """Compare clean logits in bfloat16 with those in float32.

    The lead of a class is its logit minus the next largest one. Attacks' losses are made of such differences. So a lead
    that changes much in bfloat16 means losses that change much.

    Args:
        target: the model.
        x: [N, C, H, W] clean images, in float32.
        lanes: batch width.

    Returns:
        A flag if the lead of the predicted class changes by more than 2 % (median): name of the problem -> sentence.
        Of the registered models with weights, the largest change is 0.9 %. With 100 added to all logits of
        `digits/ls095_sigma03` it is 7 %, and the suite `fast` leaves 52 of 200 images instead of 48.

    Raises:
        ModelError: the model fails in bfloat16.
    """
    full = compute_logits(target, x, lanes)
    try:
        with in_bfloat16(target.device):
            rounded = compute_logits(target, x, lanes)
    except ModelError as error:
        raise ModelError(f"{error} (in bfloat16; without --gradients it may well answer)") from error
    top = full.topk(2, dim=1).indices
    lead, now = ((z.gather(1, top[:, :1]) - z.gather(1, top[:, 1:])).squeeze(1) for z in (full, rounded))
    change = float(((now - lead).abs() / lead.clamp(min=1e-12)).nan_to_num(0.0).median())
    if change <= _MAX_LEAD_CHANGE:
        return {}
    return {
        "bfloat16": (
            f"In bfloat16 the lead of the predicted class changes by {100 * change:.1f} % (median of {len(x)} clean "
            "images): the logits are close together for their size, so attacks see too little and the model looks "
            "more robust than it is. Run it without --gradients."
        )
    }


def compute_logits(target: Target, x: ImageRows, lanes: int) -> Tensor:
    """Compute the logits of images [N, C, H, W] in batches of one width: [N, K] on the CPU."""
    return torch.cat([_logits(target, batch)[:real].cpu() for batch, real in _batches(x, lanes)])


def _batches(x: ImageRows, lanes: int) -> Iterator[tuple[Tensor, int]]:
    for start in range(0, len(x), lanes):
        batch = x[start : start + lanes]
        real = len(batch)
        if real < lanes:
            batch = torch.cat([batch, batch.new_zeros((lanes - real, *batch.shape[1:]))])
        yield batch, real


def _logits(target: Target, batch: Tensor, ask: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    try:
        with torch.no_grad():
            logits: Tensor = (ask or target.module)(batch.to(target.device))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise _word_out_of_memory(len(batch)) from error
    return logits


def _check_logits(logits: Tensor, y: Tensor, num_classes: int | None) -> None:
    found, top = logits.shape[1], int(y.max())
    if num_classes is not None and found != num_classes:
        raise ModelError(
            f"The model has {format_count(found, 'class')}; the data set has {num_classes}. With --data and "
            "some of the model's classes, --classes FILE says which output each class is."
        )
    if found == 1:
        raise ModelError(
            "The model answers with one logit per image; expected one per class. If it is that of class 1 against "
            "class 0: --binary (in Python binary=True)."
        )
    if top >= found:
        raise ModelError(f"The model has {found} classes; the labels go up to {top}.")


def measure_pass_seconds(
    target: Target, shape: Sequence[int], lanes: int, dtype: torch.dtype, bfloat16: bool = False
) -> float:
    """Measure the seconds of one forward and backward pass of a full batch, after one pass to warm up.

    Args:
        target: the model.
        shape: of an image, (C, H, W).
        lanes: batch width.
        dtype: of the images.
        bfloat16: whether the pass runs in bfloat16.

    Returns:
        Seconds; NaN if the model fails.
    """
    x = torch.full((lanes, *shape), 0.5, dtype=dtype, device=target.device).requires_grad_(True)
    begin = math.nan
    for _ in range(2):
        begin = time.perf_counter()
        try:
            with contain_exits():
                with torch.enable_grad(), in_bfloat16(target.device, bfloat16):
                    out = target.module(x).sum()
                if out.requires_grad:
                    torch.autograd.grad(out, x, allow_unused=True)
        except Exception:  # a user's module may raise anything; an attack that meets the error words it
            return math.nan
        if target.device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - begin
