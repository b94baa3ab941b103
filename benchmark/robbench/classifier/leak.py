"""Whether a model keeps what it is given: measured so that nothing else in the process can be what grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from robbench.classifier.batch_width import compute_probe
from robbench.classifier.prepare import Target
from robbench.core.machine import allocated_bytes

__all__ = ["keeps_memory"]

_IMAGES, _WARM_UP, _CALLS = 2, 4, 16
_LEAST = 64  # bytes for each image; a copy of an 8x8 image has 256


def keeps_memory(
    target: Target,
    shape: Sequence[int],
    dtype: torch.dtype,
    allocated: Callable[[], int | None] = allocated_bytes,
) -> bool:
    """Ask the model about images of noise, keep nothing, and tell whether allocated memory rose.

    In a run, records, adversarial examples, kernels for new batch widths and free blocks grow too. Here only the model
    is called, at one width, with and without a gradient, and what it answers is dropped. A buffer or a cache of fixed
    size does not count: the run and a few calls before have filled it.

    Args:
        target: the model.
        shape: of an image, (C, H, W).
        dtype: of the images.
        allocated: measures the bytes; tests put something else here.

    Returns:
        Whether memory rose by 64 bytes or more for each image. Also true where that cannot be measured, or where
        the model fails on noise.
    """
    on_gpu = target.device.type == "cuda"
    measure = (lambda: torch.cuda.memory_allocated(target.device)) if on_gpu else allocated
    before: int | None = None
    for call in range(_WARM_UP + _CALLS):
        if call == _WARM_UP:
            before = measure()
        x = torch.rand(_IMAGES, *shape, dtype=dtype, generator=torch.Generator().manual_seed(call)).to(target.device)
        try:
            if call % 2:
                compute_probe(target.module, x)
            else:
                with torch.no_grad():
                    target.module(x)
        except Exception:  # a user's module may raise anything about images of noise
            return True
        del x
    after = measure()
    if before is None or after is None:
        return True
    return after - before >= _LEAST * _IMAGES * _CALLS
