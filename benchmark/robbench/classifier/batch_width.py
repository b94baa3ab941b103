"""How wide a batch is: a default that depends on nothing but the images, and narrower widths that change no bit."""

import contextlib
import copy
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from robbench.classifier.guard import in_bfloat16, out_of_memory
from robbench.core import rng

__all__ = ["Widths", "default_lanes", "device_of", "probe", "twin", "using_threads"]


def default_lanes(shape: Sequence[int], device: torch.device) -> int:
    """Choose a lane width for images of this shape: wide enough to be efficient, the same on every such machine."""
    pixels = int(np.prod(shape))
    budget, low, high = (2**23, 64, 2048) if device.type == "cuda" else (2**17, 32, 256)
    return min(max(1 << max(budget // pixels, 1).bit_length() - 1, low), high)


def device_of(model: nn.Module) -> torch.device:
    """Tell where a model lives: where its first parameter or buffer does."""
    return next((v.device for v in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def probe(model: nn.Module, x: Tensor, coarse: bool = False) -> tuple[Tensor, Tensor]:
    """Ask for logits [L, K] at x and for a gradient [L, C, H, W] through them: what two ways to compute should share.

    With `coarse`, in bfloat16.
    """
    x = x.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        with in_bfloat16(x.device, coarse):
            logits = model(x)
        # Unequal weights on the logits: no cancellation as in a cross-entropy that is already zero.
        weighted = (logits * torch.linspace(1, 2, logits.shape[1], dtype=logits.dtype, device=x.device)).sum()
    grad = torch.autograd.grad(weighted, x, allow_unused=True)[0] if weighted.requires_grad else None
    return logits.detach(), torch.zeros_like(x) if grad is None else grad


def twin(model: nn.Module) -> nn.Module:
    """Copy a module so that another thread can ask it; the parameters are shared."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@contextlib.contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Run torch on so many threads, here and in threads that start meanwhile."""
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
    """List the widths tried: by sixteenths, and halves of those; not 1, where everything is summed in other ways."""
    parts = {(lanes >> k) * n / 16 for k in range(lanes.bit_length()) for n in range(8, 16)}
    return sorted(int(w) for w in parts if w % (4 if w >= 16 else 1) == 0 and w >= 2)


class Widths:
    """The width of a batch, and the narrower ones at which a model was seen to give the same bits.

    Which kernel runs, and so how sums are rounded, depends on the shape of a batch and on the number of threads, and
    not on the values: comparing logits and input gradients of random images with those of the full width on one
    thread settles it for this model on this machine. What is wanted is checked when it is first wanted.

    Attributes:
        lanes: the full width.
        coarse: whether gradients are computed in bfloat16, whose bits must be the same as well.
    """

    def __init__(
        self, model: nn.Module, shape: Sequence[int], lanes: int, dtype: torch.dtype, coarse: bool = False
    ) -> None:
        self.model, self.shape, self.lanes, self.dtype, self.coarse = model, tuple(shape), lanes, dtype, coarse
        with contextlib.suppress(Exception):  # whatever a user's module raises when it is copied
            self.model = twin(model)  # other threads may be asking the original
        self._full: list[Tensor] | None = None
        self._same: dict[tuple[int, int], bool] = {}
        self._lock = threading.Lock()

    def fit(self, left: int) -> int:
        """Return the narrowest width that holds `left` lanes and gives the bits of the full one."""
        return next((w for w in _narrower(self.lanes) if w >= left and self.same(w)), self.lanes)

    def same(self, width: int) -> bool:
        """Tell whether a narrower batch, on the threads used here and now, gives the bits of the full one."""
        return self._check(width, torch.get_num_threads())

    def same_with(self, threads: int) -> bool:
        """Tell whether the full width gives the same bits on so many threads as on one."""
        return self._check(self.lanes, threads)

    def _check(self, width: int, threads: int) -> bool:
        with self._lock:
            if (width, threads) not in self._same:
                try:
                    self._same[width, threads] = self._compare(width, threads)
                except Exception as error:  # whatever a user's module raises about images that are none
                    if out_of_memory(error):
                        raise
                    self._same[width, threads] = False
            return self._same[width, threads]

    def _compare(self, width: int, threads: int) -> bool:
        if self._full is None:
            self._full = self._answer(self.lanes, 1)
        answer = self._answer(width, threads)
        return all(torch.equal(ours, full[:width]) for ours, full in zip(answer, self._full, strict=True))

    def halve(self) -> None:
        """Make the full width half of what it was, because memory ran out."""
        self.lanes //= 2
        self._full, self._same = None, {}

    def _answer(self, width: int, threads: int) -> list[Tensor]:
        device = device_of(self.model)
        with using_threads(threads if device.type == "cpu" else torch.get_num_threads()):
            return [*self._ask(width, False), *(self._ask(width, True) if self.coarse else ())]

    def _ask(self, width: int, coarse: bool) -> tuple[Tensor, Tensor]:
        lane = torch.arange(width, device=device_of(self.model))
        pixels = rng.uniform((0, 0), lane, torch.zeros_like(lane), 0, int(np.prod(self.shape)))
        return probe(self.model, pixels.to(self.dtype).view(width, *self.shape), coarse)
