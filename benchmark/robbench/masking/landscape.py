"""Losses on planes around images. One plane has two random directions, the other has an adversarial one."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import torch
from torch import Tensor

from robbench.attacks import Attack
from robbench.core.losses import cross_entropy, margin
from robbench.masking.gradient_probe import GradientProbe
from robbench.masking.landscape_record import COLUMNS, POINTS

__all__ = ["compute_landscape"]


def compute_landscape(probe: GradientProbe, attack: Attack) -> pd.DataFrame:
    """Evaluate cross-entropy and margin on two planes through each image.

    Args:
        probe: the model and images. The model may classify them wrongly.
        attack: the attack whose final points give the adversarial directions.

    Returns:
        One row per point with `COLUMNS`: official index of the image; plane, `random` or `adversarial` (its first axis
        is the adversarial direction); coordinates as shares of eps in [−1, 1]; cross-entropy and margin of the true
        class at the point, which is clipped to [0, 1].
    """
    trace = probe.trace_attack("landscape", attack)
    x = probe.x.to(probe.target.device)
    first, second = (_scale_to_radius(probe, probe.draw_signs("landscape", k)) for k in (0, 1))
    adversarial = _scale_to_radius(probe, trace.x - x)
    planes = (("random", first, second), ("adversarial", adversarial, second))
    frames = [frame for name, u, v in planes for frame in _evaluate_plane(probe, name, x, u, v)]
    return pd.concat(frames, ignore_index=True)


def _scale_to_radius(probe: GradientProbe, direction: Tensor) -> Tensor:
    """Scale directions to the length eps in the threat's norm."""
    length = probe.ball.distance(torch.zeros_like(direction), direction).clamp(min=1e-12).to(direction.dtype)
    return direction * (probe.ball.eps / length).view(-1, 1, 1, 1)


def _evaluate_plane(probe: GradientProbe, name: str, x: Tensor, u: Tensor, v: Tensor) -> Iterator[pd.DataFrame]:
    axis = torch.linspace(-1, 1, POINTS, dtype=x.dtype, device=x.device)
    a, b = (grid.flatten() for grid in torch.meshgrid(axis, axis, indexing="ij"))
    for i, sample in enumerate(probe.sample.tolist()):
        points = (x[i] + a.view(-1, 1, 1, 1) * u[i] + b.view(-1, 1, 1, 1) * v[i]).clamp(0, 1)
        logits = probe.compute_logits(points)
        y = probe.y[i].to(x.device).expand(len(points))
        columns = (sample, name, a, b, cross_entropy(logits, y), margin(logits, y))
        values = [c.double().cpu().numpy() if isinstance(c, Tensor) else c for c in columns]
        yield pd.DataFrame(dict(zip(COLUMNS, values, strict=True)))
