"""Robust accuracy by loops that share nothing with the engine, and an attack that does the same steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from robbench.core.types import NORMS


def draw_signs(shape: tuple[int, ...], count: int) -> np.ndarray:
    """Fixed patterns of signs, [count, C, H, W]."""
    return np.random.default_rng(7).choice(np.float32([-1, 1]), (count, *shape))


@dataclass(frozen=True, kw_only=True)
class Corners:
    """Query fixed corners of the Linf ball, the same for every image."""

    kind: ClassVar[str] = "corners"
    version: ClassVar[int] = 1
    norms: ClassVar[tuple[str, ...]] = NORMS
    needs_grad: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False
    memoryless: ClassVar[bool] = False
    trials: ClassVar[int] = 1
    corners: int = 12

    @property
    def steps(self):
        return self.corners - 1

    def init(self, p, ball):
        return {"x": self.move(p.x, ball, torch.zeros_like(p.sample))}

    def loss(self, logits, p, s):
        return torch.zeros_like(logits[:, 0])

    def step(self, p, ball, s, t, logits, loss, grad):
        return {"x": self.move(p.x, ball, (t + 1).clamp(max=self.steps))}

    def move(self, x, ball, which):
        signs = torch.from_numpy(draw_signs(tuple(x.shape[1:]), self.corners)).to(x.dtype)
        return (x + ball.eps * signs[which]).clamp(0, 1)


def loop_corners(predict, x: Tensor, y: Tensor, eps: float, corners: int = 12) -> float:
    """Robust accuracy under `Corners`: `predict` maps an array [N, C, H, W] to classes [N]."""
    pixels, labels = x.numpy(), y.numpy()
    robust = np.asarray(predict(pixels)) == labels
    for signs in draw_signs(pixels.shape[1:], corners):
        robust &= np.asarray(predict(np.clip(pixels + np.float32(eps) * signs, 0, 1))) == labels
    return float(robust.mean())


def loop_fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> float:
    """Robust accuracy under one step along the sign of the gradient of the cross-entropy, image by image."""
    robust = 0
    for image, label in zip(x, y, strict=True):
        at = image[None].clone().requires_grad_(True)
        logits = model(at)
        right = int(logits.argmax()) == int(label)
        torch.nn.functional.cross_entropy(logits, label[None]).backward()
        moved = (image[None] + eps * at.grad.sign()).clamp(0, 1)
        robust += right and int(model(moved).argmax()) == int(label)
    return robust / len(y)
