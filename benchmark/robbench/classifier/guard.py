"""A wrapper around the model under test: what it answers is brought into order or refused, and what it does is noted.

Every query of a run goes through it. What each kind of misbehaviour leads to is in docs/misbehaving.md.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import Tensor, nn

from robbench.core.errors import ModelError

__all__ = ["Guarded", "in_bfloat16", "out_of_memory"]

_NOTED = {
    "input_changed": (
        "The model changes its input in place. It was given copies, so points and verdicts are unharmed; whoever "
        "calls it directly is not so lucky."
    ),
    "device": "The model answers on another device than the one it is asked on; its answers were moved back.",
    "dtype": (
        "The model answers in {what}, coarser than its input. Logits that differ by less than that resolves are ties, "
        "their gradients vanish, and attacks look weaker than they are. Return the logits as they are computed."
    ),
}


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out; the CPU's allocator has no type of its own for that."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in said or "can't allocate memory" in said)


_IN_BFLOAT16 = ContextVar("_IN_BFLOAT16", default=False)  # of this thread; an autocast of the caller's is not ours


@contextlib.contextmanager
def in_bfloat16(device: torch.device, asked: bool = True) -> Iterator[None]:
    """Have models compute what is costly in bfloat16, if asked to; their weights stay float32."""
    if not asked:
        yield
        return
    token = _IN_BFLOAT16.set(True)
    try:
        with torch.autocast(device.type, torch.bfloat16):
            yield
    finally:
        _IN_BFLOAT16.reset(token)


class Guarded(nn.Module):
    """A model as the engine wants it: [L, C, H, W] in [0, 1] -> logits [L, K], on the device of its input.

    Logits come back in the dtype of the input or a finer one. Errors of the model become a `ModelError`, except that
    memory ran out, which the engine can mend.

    Attributes:
        inner: the model.
        flags: what was noticed so far: name of the problem -> sentence.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.flags: dict[str, str] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the model; what a copy notices is noted here too."""
        other = type(self)(copy.deepcopy(self.inner, memo))
        other.flags = self.flags
        return other.train(self.training)

    def try_out(self, x: Tensor) -> None:
        """Find out on a few images whether the model leaves its input alone; from then on it is given copies if not."""
        given = x.clone()
        try:
            with torch.no_grad():
                self.inner(given)
        except Exception:  # whatever a module raises about its input; `forward` words it
            return
        if not torch.equal(given, x):
            self.flags["input_changed"] = _NOTED["input_changed"]

    def forward(self, x: Tensor) -> Tensor:
        """Ask the model.

        Raises:
            ModelError: it fails, changes its input only now and then, or answers with something that is no logits.
        """
        given = x.clone() if "input_changed" in self.flags else x
        version = given._version
        try:
            logits = self.inner(given)
        except Exception as error:  # a transformer asserts its image size, others raise ValueError
            if out_of_memory(error):
                raise
            reason = str(error) or type(error).__name__
            raise ModelError(
                f"The model cannot be run on images of shape {tuple(x.shape)} ({x.dtype}): {reason}"
            ) from error
        if given is x and x._version != version:
            raise ModelError(
                "The model changes its input in place, and did not when it was tried out, so no point of this batch "
                "can be trusted. Let it work on a copy: x = x.clone()."
            )
        return self._ordered(x, logits)

    def _ordered(self, x: Tensor, logits: object) -> Tensor:
        """Bring an answer to the device and at least the precision of the input."""
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
            given = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ModelError(f"The model answers with {given} to {len(x)} images; expected logits [N, classes].")
        if not logits.is_floating_point():
            raise ModelError(f"The model answers in {logits.dtype}; expected floating-point logits [N, classes].")
        if logits.device != x.device:
            if logits.is_meta:
                raise ModelError("The model answers on the device meta, which holds no values.")
            self.flags["device"] = _NOTED["device"]
            logits = logits.to(x.device)
        if torch.finfo(logits.dtype).eps > torch.finfo(x.dtype).eps and not _IN_BFLOAT16.get():
            self.flags["dtype"] = _NOTED["dtype"].format(what=logits.dtype)
        return logits.to(x.dtype)
