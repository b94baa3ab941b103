"""Accuracies of a network during training, on a few test images. They go into the progress line and the log only.

Training does not use them: there is no early stopping and no best checkpoint. Quote numbers of `robbench eval` instead.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from robbench.attacks import PGD
from robbench.core import rng
from robbench.core.threat import Ball
from robbench.core.types import Problem
from robbench.data.sets import load
from robbench.engine import engine
from robbench.models.card import Entry
from robbench.suite import load_suite

__all__ = ["TrainingProbe"]

_IMAGES = 128


class TrainingProbe:
    """Measures accuracies on the first test images, with 10 steps of PGD on the margin, at the quick suite's radius."""

    def __init__(
        self, entry: Entry, data_dir: str | Path | None, device: torch.device, dtype: torch.dtype, seed: int
    ) -> None:
        data = load(entry.dataset, "test", data_dir)
        x = torch.from_numpy(data.x[:_IMAGES]).to(device, dtype) / data.scale
        sample = torch.arange(len(x), device=device)
        self.p = Problem(
            x=x.contiguous(memory_format=torch.channels_last),
            y=torch.from_numpy(data.y[:_IMAGES]).to(device),
            sample=sample,
            trial=torch.zeros_like(sample),
            key=rng.make_key(seed, "train-probe"),
        )
        self.ball = Ball.of(load_suite("quick").threat(entry.dataset))
        self.attack = PGD(objective="margin", steps=10)

    def __call__(self, module: nn.Module) -> tuple[float, float]:
        """Return clean and robust accuracy, in [0, 1]. The module is in training mode afterwards."""
        module.eval()
        with torch.no_grad():
            right = module(self.p.x).argmax(1) == self.p.y
        x_adv = engine.perturb(module, self.attack, self.p, self.ball)
        with torch.no_grad():
            kept = right & (module(x_adv).argmax(1) == self.p.y)
        module.train()
        return float(right.float().mean()), float(kept.float().mean())
