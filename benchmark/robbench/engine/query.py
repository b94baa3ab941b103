"""Queries to a model: logits, the attack's loss and its gradient, and the samples that the model fails on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robbench.attacks.base import Attack
from robbench.classifier.guard import in_bfloat16, out_of_memory
from robbench.core.errors import ModelError
from robbench.core.types import Problem, State, format_ids
from robbench.core.user_code import contain_exits
from robbench.engine.targeted import as_attacked, two_classes

__all__ = ["Classifier", "name_failing_samples", "query", "take_lanes"]

Classifier = Callable[[Tensor], Tensor]
"""Images [L, C, H, W] in [0, 1] -> logits [L, K]: a module, or a function around one."""


def query(
    model: Classifier, attack: Attack, p: Problem, s: State, with_grad: bool, bfloat16: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Query the model at `s["x"]`. With a target, the loss is that of two classes (`engine.targeted`).

    Args:
        model: what to query.
        attack: whose loss.
        p: one row per lane.
        s: the state, whose `x` is [L, C, H, W].
        with_grad: whether to compute the gradient.
        bfloat16: whether the model computes the logits of a query with a gradient in bfloat16. The loss and the
            gradient at x keep the dtype of x.

    Returns:
        Logits [L, K], loss [L], and the gradient of the loss at x [L, C, H, W], zeros without `with_grad`.

    Raises:
        ModelError: the logits have no gradient, or the backward pass fails.
    """
    x = s["x"]
    if not with_grad:
        with torch.no_grad():
            logits = model(x)
            return logits, attack.loss(two_classes(logits, p.target), as_attacked(p), s), torch.zeros_like(x)
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        with in_bfloat16(x.device, bfloat16):
            logits = model(x)
        loss = attack.loss(two_classes(logits, p.target), as_attacked(p), s)
        if not loss.requires_grad:
            raise ModelError(
                "The model's output does not depend on its input through autograd (was it computed under no_grad, "
                "through numpy, or after detach?), so gradient attacks cannot run. Make it differentiable, or attack "
                "it by queries alone: --suite queries."
            )
        try:
            with contain_exits():
                (grad,) = torch.autograd.grad(loss.sum(), x, allow_unused=True)
        except Exception as error:  # a user's hook may raise anything
            if out_of_memory(error):
                raise
            raise ModelError(f"The gradient of the model's answer cannot be computed: {error}.") from error
    return logits.detach(), loss.detach(), torch.zeros_like(x) if grad is None else grad


def take_lanes(p: Problem, s: State, at: Tensor) -> tuple[Problem, State]:
    """Take the lanes `at` [n] of a problem and of its state."""
    taken = {name: getattr(p, name)[at] for name in ("x", "y", "sample", "trial")}
    logits, target = (None if value is None else value[at] for value in (p.logits, p.target))
    p = replace(p, **taken, logits=logits, target=target)
    return p, {name: value[at] for name, value in s.items()}


def name_failing_samples(
    model: Classifier, p: Problem, x: Tensor, live: NDArray[np.int64], with_grad: bool, bfloat16: bool
) -> str:
    """Query each point of a failed batch alone, at the same width, and word which samples fail.

    Args:
        model: what failed.
        p: one row per lane.
        x: the points, [L, C, H, W].
        live: the lanes that hold a sample.
        with_grad: whether the failed query computed a gradient.
        bfloat16: whether it ran in bfloat16.

    Returns:
        The end of an error message.
    """
    samples, failing = p.sample[torch.from_numpy(live).to(x.device)].tolist(), set()
    for lane, sample in zip(live, samples, strict=True):
        alone = x.detach()[lane : lane + 1].expand_as(x).clone().requires_grad_(with_grad)
        try:
            with torch.set_grad_enabled(with_grad), contain_exits():
                with in_bfloat16(x.device, bfloat16):
                    answer = model(alone).sum()
                if with_grad:
                    torch.autograd.grad(answer, alone, allow_unused=True)
        except Exception:  # a user's hook may raise anything
            failing.add(sample)
    which = f"it fails on {format_ids(sorted(failing))}" if failing else "none of them fails alone"
    how = " in bfloat16; without --gradients it may well answer" if bfloat16 else ""
    return (
        f"(while attacking {format_ids(sorted(set(samples)))}{how}: {which}). Everything that was finished before is "
        "kept; mend the model, and the same command goes on if it still computes the same function."
    )
