"""What one call of `engine.attack_samples` has to do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.attacks.base import Attack
from robbench.classifier.batch_width import BatchWidths
from robbench.core.threat import Ball
from robbench.core.types import Judge

__all__ = ["AttackJob"]


@dataclass(frozen=True, eq=False)
class AttackJob:
    """The arguments of `engine.attack_samples`, and what follows from them.

    Attributes:
        device: the model's device.
        ends_cycles: whether a trial ends when it comes back to one of its last two points.
        logits: the model's logits at the clean images [N, K], where the attack asks for them; [N, 2] with targets.
        target: the class that breaks each sample, [N] int64 on the CPU; None if every class but y does.
    """

    model: nn.Module
    attack: Attack
    x: Tensor
    y: Tensor
    sample: NDArray[np.int64]
    ball: Ball
    key: tuple[int, int]
    judge: Judge
    widths: BatchWidths
    draws: int
    keep_adversarials: bool
    device: torch.device
    ends_cycles: bool
    logits: Tensor | None = None
    target: Tensor | None = None

    @property
    def bfloat16(self) -> bool:
        """Whether queries with a gradient run in bfloat16."""
        return self.widths.bfloat16 and not getattr(self.attack, "precise", False)
