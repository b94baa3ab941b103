"""Questions to a model: logits, the attack's loss and its gradient, and on which samples it fails."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robbench.attacks.base import Attack
from robbench.classifier.guard import in_bfloat16, out_of_memory
from robbench.core.errors import ModelError
from robbench.core.types import Problem, State, format_ids

__all__ = ["Classifier", "blame", "query"]

Classifier = Callable[[Tensor], Tensor]
"""Images [L, C, H, W] in [0, 1] -> logits [L, K]: a module, or what wraps one."""


def query(
    model: Classifier, attack: Attack, p: Problem, s: State, with_grad: bool, coarse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Ask the model at `s["x"]`: logits [L, K], the attack's loss [L] and its gradient (zeros without `with_grad`).

    With `coarse`, the model computes in bfloat16; the loss and its gradient at x stay in the precision of x.
    """
    x = s["x"]
    if not with_grad:
        with torch.no_grad():
            logits = model(x)
            return logits, attack.loss(logits, p, s), torch.zeros_like(x)
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        with in_bfloat16(x.device, coarse):
            logits = model(x)
        loss = attack.loss(logits, p, s)
        if not loss.requires_grad:
            raise ModelError(
                "The model's output does not depend on its input through autograd (was it computed under no_grad, "
                "through numpy, or after detach?), so gradient attacks cannot run. Make it differentiable, or attack "
                "it by queries alone: --suite blackbox."
            )
        try:
            (grad,) = torch.autograd.grad(loss.sum(), x, allow_unused=True)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise ModelError(f"The gradient of the model's answer cannot be computed: {error}.") from error
    return logits.detach(), loss.detach(), torch.zeros_like(x) if grad is None else grad


def blame(model: Classifier, p: Problem, x: Tensor, live: NDArray[np.int64], with_grad: bool, coarse: bool) -> str:
    """Name the samples that a batch failed on, by asking about each point alone at the same width.

    Args:
        model: what failed.
        p: one row per lane.
        x: the points, [L, C, H, W].
        live: the lanes that hold a sample.
        with_grad: whether gradients were asked for.
        coarse: whether in bfloat16.
    """
    samples, failing = p.sample[torch.from_numpy(live).to(x.device)].tolist(), set()
    for lane, sample in zip(live, samples, strict=True):
        alone = x.detach()[lane : lane + 1].expand_as(x).clone().requires_grad_(with_grad)
        try:
            with torch.set_grad_enabled(with_grad):
                with in_bfloat16(x.device, coarse):
                    answer = model(alone).sum()
                if with_grad:
                    torch.autograd.grad(answer, alone, allow_unused=True)
        except (ModelError, RuntimeError):  # the latter from autograd
            failing.add(sample)
    alone_too = f"it fails on {format_ids(sorted(failing))}" if failing else "none of them fails alone"
    how = " in bfloat16; without --gradients it may well answer" if coarse else ""
    return (
        f"(while attacking {format_ids(sorted(set(samples)))}{how}: {alone_too}). Everything that was finished before "
        "is kept; mend the model, and the same command goes on if it still computes the same function."
    )
