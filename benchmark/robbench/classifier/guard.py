"""A wrapper around the model under test: it corrects or refuses what the model answers, and notes what the model does.

Every query of a run goes through it. docs/misbehaving.md lists the kinds of misbehaviour and their consequences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from robbench.classifier.answer_part import make_two_logits, take_part
from robbench.core.errors import ModelError
from robbench.core.user_code import contain_exits
from robbench.core.words import format_count

__all__ = ["Guarded", "in_bfloat16", "list_flags", "out_of_memory"]

_SENTENCES = {
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
    """Tell whether an error means that memory ran out. The CPU's allocator has no error type for that."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in said or "can't allocate memory" in said)


# Whether robbench asked for bfloat16 in this thread. The caller may have an autocast of its own.
_IN_BFLOAT16 = ContextVar("_IN_BFLOAT16", default=False)


@contextlib.contextmanager
def in_bfloat16(device: torch.device, asked: bool = True) -> Iterator[None]:
    """If asked, run the costly layers of models in bfloat16 (torch's autocast). Weights stay float32."""
    if not asked:
        yield
        return
    token = _IN_BFLOAT16.set(True)
    try:
        with torch.autocast(device.type, torch.bfloat16):
            yield
    finally:
        _IN_BFLOAT16.reset(token)


def list_flags(module: nn.Module) -> dict[str, str]:
    """Return the problems that a model's guard has noticed so far, to read or to add to. Others have none."""
    return module.flags if isinstance(module, Guarded) else {}


def _compare_sizes(inner: nn.Module, x: Tensor, reason: str) -> str:
    """Say where the first layer of a network takes images of other channels, or of another size; else empty."""
    layer = next((m for m in inner.modules() if isinstance(m, nn.Conv2d | nn.Linear)), None)
    if isinstance(layer, nn.Conv2d) and layer.in_channels in (1, 3) and layer.in_channels != x.shape[1]:
        kind = "gray" if layer.in_channels == 1 else "colour"
        return (
            f". The model takes {kind} images, and these have {format_count(x.shape[1], 'channel')}. With --data, "
            f"--channels {layer.in_channels} reads {kind} images (in Python channels={layer.in_channels})."
        )
    if isinstance(layer, nn.Linear) and layer.in_features != x[0].numel() and "cannot be multiplied" in reason:
        return (
            f". The first layer of the model takes {layer.in_features} numbers, and an image has {x[0].numel()}. With "
            "--data, --resize and --crop change the size, and --channels 1 makes gray images (in Python resize=, crop= "
            "and channels=)."
        )
    return ""


def _fit(weights: set[str]) -> str:
    """Say how weights of these types and images come to fit each other. Images of 16 bits are none that we attack."""
    if weights & {"torch.float16", "torch.bfloat16"}:
        return "attacks need float32: call model.float() first"
    return f"x.to({min(weights)}) may fit"


class Guarded(nn.Module):
    """A model as the engine needs it: [L, C, H, W] in [0, 1] -> logits [L, K], on the device of the input.

    Logits have the dtype of the input. An error of the model becomes a `ModelError`. Only an error that means that
    memory ran out is passed on, because the engine then halves the batch.

    Attributes:
        inner: the model.
        one_by_one: whether the model is given each image in a batch of its own.
        output: which part of its answers holds the logits (`answer_part`).
        binary: whether it answers with one logit, of class 1.
        flags: problems noticed so far: name of the problem -> sentence.
    """

    def __init__(
        self, inner: nn.Module, one_by_one: bool = False, output: str | int | None = None, binary: bool = False
    ) -> None:
        super().__init__()
        self.inner, self.one_by_one, self.output, self.binary = inner, one_by_one, output, binary
        self.flags: dict[str, str] = {}

    def try_out(self, x: Tensor) -> None:
        """Find out on a few images whether the model changes its input. If so, it is given copies from then on."""
        given = x.clone()
        try:
            with torch.no_grad(), contain_exits():
                self.inner(given)
        except Exception:  # a user's module may raise anything about its input; `forward` words it
            return
        if not torch.equal(given, x):
            self.flags["input_changed"] = _SENTENCES["input_changed"]

    def forward(self, x: Tensor) -> Tensor:
        """Query the model, with each image alone if `one_by_one`. Raises what `ask_together` raises."""
        if self.one_by_one and len(x) > 1:
            return torch.cat([self.ask_together(image) for image in x.split(1)])  # type: ignore[no-untyped-call]
        return self.ask_together(x)

    def ask_together(self, x: Tensor) -> Tensor:
        """Query the model with one batch.

        Raises:
            ModelError: the model fails, it changes its input only at times, or its output is no logits.
        """
        given = x.clone() if "input_changed" in self.flags else x
        version = None if given.is_inference() else given._version  # inference tensors count no versions
        try:
            with contain_exits():
                logits = self.inner(given)
        except Exception as error:  # a transformer asserts its image size, others raise ValueError
            if out_of_memory(error):
                raise
            reason = str(error) or type(error).__name__
            weights = {str(p.dtype) for p in self.inner.parameters()} - {str(x.dtype)}
            remedy = f". Its weights are {', '.join(sorted(weights))}; {_fit(weights)}." if weights else ""
            remedy += _compare_sizes(self.inner, x, reason)
            raise ModelError(
                f"The model cannot be run on images of shape {tuple(x.shape[1:])} ({x.dtype}): {reason}{remedy}"
            ) from error
        if given is x and version is not None and x._version != version:
            raise ModelError(
                "The model changes its input in place, and did not when it was tried out, so no point of this batch "
                "can be trusted. Let it work on a copy: x = x.clone()."
            )
        logits, taken = take_part(logits, self.output, len(x))
        if taken:
            self.flags["output_part"] = taken
        return self._check_logits(x, make_two_logits(logits) if self.binary else logits)

    def _check_logits(self, x: Tensor, logits: object) -> Tensor:
        """Check an output, and bring it to the device and the dtype of the input."""
        if isinstance(logits, Tensor) and (logits.is_nested or logits.layout != torch.strided):
            kind = "a nested tensor" if logits.is_nested else f"a tensor of layout {logits.layout}"
            raise ModelError(f"The model answers with {kind}; expected a dense one: logits.to_dense() may make it.")
        if isinstance(logits, Tensor) and not logits.is_floating_point():
            raise ModelError(
                f"The model answers in {logits.dtype}; expected floating-point logits [N, classes]. If it answers with "
                "predicted classes, return 1.0 at the predicted class and 0.0 elsewhere, and take --suite queries."
            )
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
            given = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ModelError(
                f"The model answers with {given} to a batch of {len(x)} images (few images are padded to the width of "
                f"a batch); expected logits of shape ({len(x)}, classes). One logit an image: --binary."
            )
        if logits.device != x.device:
            if logits.is_meta:
                raise ModelError("The model answers on the device meta, which holds no values.")
            self.flags["device"] = _SENTENCES["device"]
            logits = logits.to(x.device)
        if torch.finfo(logits.dtype).eps > torch.finfo(x.dtype).eps and not _IN_BFLOAT16.get():
            self.flags["dtype"] = _SENTENCES["dtype"].format(what=logits.dtype)
        return logits.to(x.dtype)
