"""Targeted attacks: a point breaks its sample if the model predicts the target class there.

An attack sees a problem of two classes: class 0 is the largest logit of all other classes, and class 1 the logit of the
target. So every attack of the engine, with each of its losses, looks for the target, and none of them knows about it.
Its margin is z_target − max_{j≠target} z_j, which is positive exactly where the judge sees a break. The judge reads the
model's own logits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from robbench.core.types import Problem

__all__ = ["as_attacked", "two_classes"]


def as_attacked(p: Problem) -> Problem:
    """Return the problem that an attack sees: y is class 0 of two. Without a target it is the problem itself."""
    return p if p.target is None else replace(p, y=torch.zeros_like(p.y), target=None)


def two_classes(logits: Tensor, target: Tensor | None) -> Tensor:
    """Return the logits that an attack sees: the best other logit and the target's, [L, K], [L] -> [L, 2].

    Where a logit is not finite, both are NaN. Without a target these are the logits themselves.
    """
    if target is None:
        return logits
    wanted = logits.gather(1, target[:, None])
    # The lowest finite value instead of −inf keeps the gradient finite.
    other = logits.scatter(1, target[:, None], torch.finfo(logits.dtype).min).amax(1, keepdim=True)
    return torch.where(logits.isfinite().all(1, keepdim=True), torch.cat([other, wanted], dim=1), torch.nan)
