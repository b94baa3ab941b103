"""How wide a batch is: a default that depends on the images alone, and narrower widths that change no bit."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from robbench.classifier.guard import in_bfloat16, out_of_memory
from robbench.core import rng
from robbench.core.user_code import contain_exits

__all__ = ["BatchWidths", "choose_lanes", "compute_probe", "default_lanes", "device_of", "using_threads"]


def default_lanes(shape: Sequence[int], device: torch.device) -> int:
    """Choose a batch width for images of this shape: wide enough to be efficient, the same on every such machine."""
    pixels = int(np.prod(shape))
    # On a CPU, eight large images fill all cores, and a run on few images compares its batches with one full batch.
    budget, low, high = (2**23, 64, 2048) if device.type == "cuda" else (2**17, 8, 256)
    return min(max(1 << max(budget // pixels, 1).bit_length() - 1, low), high)


def choose_lanes(given: int | None, n: int, shape: Sequence[int], device: torch.device) -> int:
    """Choose the batch width: the given one, but none wider than n images fill, or the default if it is wider than n.

    Args:
        given: what the user asked for; None means the default.
        n: number of images.
        shape: of an image, (C, H, W).
        device: where the model runs.
    """
    default = default_lanes(shape, device)
    return default if given is None else min(given, max(n, default))


def device_of(model: nn.Module) -> torch.device:
    """Tell where a model lives: on the device of its first parameter or buffer, else on the CPU."""
    return next((v.device for v in (*model.parameters(), *model.buffers())), torch.device("cpu"))


@contain_exits()
def compute_probe(model: nn.Module, x: Tensor, bfloat16: bool = False) -> tuple[Tensor, Tensor]:
    """Compute what two ways to run a model are compared by: logits and an input gradient.

    Args:
        model: what to run.
        x: images [L, C, H, W].
        bfloat16: whether the model computes in bfloat16.

    Returns:
        Logits [L, K], and the gradient of a weighted sum of them at x, [L, C, H, W].
    """
    x = x.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        with in_bfloat16(x.device, bfloat16):
            logits = model(x)
        # A cross-entropy that is already zero has no gradient. A sum with unequal weights has one.
        weighted = (logits * torch.linspace(1, 2, logits.shape[1], dtype=logits.dtype, device=x.device)).sum()
    grad = torch.autograd.grad(weighted, x, allow_unused=True)[0] if weighted.requires_grad else None
    return logits.detach(), torch.zeros_like(x) if grad is None else grad


@contextlib.contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Run torch on so many threads."""
    before = torch.get_num_threads()
    if threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache
def _narrower(lanes: int) -> list[int]:
    """List the widths to try: 1, and sixteenths of the full width and halves of these."""
    parts = {(lanes >> k) * n / 16 for k in range(lanes.bit_length()) for n in range(8, 16)}
    return sorted(int(w) for w in parts if w % (4 if w >= 16 else 1) == 0 and 1 <= w < lanes)


class BatchWidths:
    """The full width of a batch, and the narrower widths at which a model was seen to give the same bits.

    Which kernel runs, and so how sums are rounded, depends on the shape of a batch and on the number of threads. It
    does not depend on the values. So one comparison settles the question for this model on this machine: logits and
    input gradients of random images, compared with those at full width on one thread. Each comparison is made when its
    result is first wanted.

    Args:
        model: [L, C, H, W] -> logits [L, K].
        shape: of an image, (C, H, W).
        lanes: the full width.
        dtype: of the images.
        bfloat16: whether gradients are computed in bfloat16. Their bits must be the same as well.
    """

    def __init__(
        self, model: nn.Module, shape: Sequence[int], lanes: int, dtype: torch.dtype, bfloat16: bool = False
    ) -> None:
        self.model, self.shape, self.lanes, self.dtype, self.bfloat16 = model, tuple(shape), lanes, dtype, bfloat16
        self._full: list[Tensor] | None = None
        self._same: dict[tuple[int, int], bool] = {}

    def fit(self, lanes: int) -> int:
        """Find the narrowest width that holds so many lanes and gives the bits of the full one."""
        threads = torch.get_num_threads()
        return next((w for w in _narrower(self.lanes) if w >= lanes and self.has_same_bits(w, threads)), self.lanes)

    def choose_threads(self, lanes: int) -> int:
        """Choose all threads of torch on a CPU if batches of up to so many lanes then give the right bits, else one.

        So verdicts do not depend on the number of cores. A run on few images never needs the full width. For such a run
        one narrow width is compared first, which costs less.
        """
        threads = torch.get_num_threads()
        if threads == 1 or device_of(self.model).type != "cpu":
            return threads
        if any(same and width >= lanes and on == threads for (width, on), same in self._same.items()):
            return threads
        narrow = next((w for w in _narrower(self.lanes) if w >= lanes), self.lanes)
        return threads if self.has_same_bits(narrow, threads) or self.has_same_bits(self.lanes, threads) else 1

    def has_same_bits(self, width: int, threads: int) -> bool:
        """Tell whether this width on so many threads gives the bits of the full width on one thread."""
        if (width, threads) not in self._same:
            try:
                self._same[width, threads] = self._compare(width, threads)
            except Exception as error:  # a user's module may raise anything about images of noise
                if out_of_memory(error):
                    raise
                self._same[width, threads] = False
        return self._same[width, threads]

    def halve(self) -> None:
        """Halve the full width, because memory ran out."""
        self.lanes //= 2
        self._full, self._same = None, {}

    def _compare(self, width: int, threads: int) -> bool:
        if self._full is None:
            self._full = self._compute(self.lanes, 1)
        answer = self._compute(width, threads)
        return all(torch.equal(ours, full[:width]) for ours, full in zip(answer, self._full, strict=True))

    def _compute(self, width: int, threads: int) -> list[Tensor]:
        device = device_of(self.model)
        lane = torch.arange(width, device=device)
        pixels = rng.uniform((0, 0), lane, torch.zeros_like(lane), 0, int(np.prod(self.shape)))
        x = pixels.to(self.dtype).view(width, *self.shape)
        with using_threads(threads if device.type == "cpu" else torch.get_num_threads()):
            return [t for kind in (False, True)[: 1 + self.bfloat16] for t in compute_probe(self.model, x, kind)]
