"""Whether gradients in bfloat16 gain anything on this processor."""

from __future__ import annotations

import time

import numpy as np
import torch

from robbench.classifier.batch_width import compute_probe
from robbench.classifier.prepare import Target
from robbench.core.machine import has_bfloat16_instructions
from robbench.evaluation.inputs import Images
from robbench.evaluation.options import Options

__all__ = ["explain_bfloat16_cost"]

_MAX_RATIO = 2.0  # far above what the noise of a busy machine makes of equal times
_LEAST = 0.05  # seconds of one narrow pass; small models lose more than twice their time, and nobody waits for it
_IMAGES, _PASSES = 4, 3


def explain_bfloat16_cost(
    target: Target, images: Images, options: Options, device: torch.device | None = None
) -> str | None:
    """Find out whether gradients in bfloat16, if they are asked for, cost more than they gain.

    A CPU without instructions for bfloat16 emulates them, which took 12 times as long for a WRN-16-4. The list of its
    instructions decides, so the answer is the same each time. Where they are there, or where the system has no such
    list, a few passes of a narrow batch are timed as well. Only a pass that takes more than twice as long, and
    50 ms more, counts.

    Args:
        target: the model.
        images: the test set; the first ones are tried.
        options: of the run.
        device: of the workers; None means the device of the target. A GPU is believed to have bfloat16.

    Returns:
        What to tell the user who gets gradients in float32; None if bfloat16 is not asked for, or is worth it.
    """
    if options.gradients is None or images.dtype != torch.float32 or (device or target.device).type != "cpu":
        return None
    rest = "Gradients are computed in float32 here, and the result is that of the same command without --gradients."
    if has_bfloat16_instructions() is False:
        return f"This processor has no instructions for bfloat16 and would be many times slower with it. {rest}"
    try:
        full, coarse = (_measure_seconds(target, images, kind) for kind in (False, True))
    except Exception:  # a user's module may raise anything; the checks of the run word it
        return None
    if coarse <= max(_MAX_RATIO * full, full + _LEAST):
        return None
    times = f"{1e3 * coarse:.1f} ms in bfloat16 and {1e3 * full:.1f} ms in float32"
    return f"A pass of {_IMAGES} images takes {times} on this processor. {rest}"


def _measure_seconds(target: Target, images: Images, bfloat16: bool) -> float:
    """Measure the least CPU time of a narrow forward and backward pass; other programs do not count in it."""
    x = images.x(np.resize(np.arange(len(images.y)), _IMAGES)).to(target.device)
    spent = []
    for _ in range(_PASSES):
        begin = time.process_time()
        compute_probe(target.module, x, bfloat16)
        spent.append(time.process_time() - begin)
    return min(spent)
