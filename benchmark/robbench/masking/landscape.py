"""Losses on planes around images: two random directions, and an adversarial one with a random one."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import torch
from torch import Tensor

from robbench.attacks import Attack
from robbench.core.losses import cross_entropy, margin
from robbench.masking.probe import Probe

__all__ = ["COLUMNS", "POINTS", "landscape"]

POINTS = 17  # along each axis, from −eps to eps
COLUMNS = ("sample", "plane", "a", "b", "cross_entropy", "margin")


def landscape(probe: Probe, attack: Attack) -> pd.DataFrame:
    """Evaluate both losses on two planes through each image.

    Args:
        probe: the images, whether classified correctly or not.
        attack: its final points give the adversarial directions.

    Returns:
        A row per point, `COLUMNS`: official index; plane `random` or `adversarial` (whose first axis is the
        adversarial one); coordinates as shares of eps in [−1, 1]; cross-entropy and margin of the true class, at the
        point brought into [0, 1].
    """
    found = probe.trace("landscape", attack)
    x = probe.x.to(probe.target.device)
    first, second = (_unit(probe, probe.signs("landscape", k)) for k in (0, 1))
    adversarial = _unit(probe, found.x - x)
    planes = (("random", first, second), ("adversarial", adversarial, second))
    frames = [frame for name, u, v in planes for frame in _plane(probe, name, x, u, v)]
    return pd.concat(frames, ignore_index=True)


def _unit(probe: Probe, direction: Tensor) -> Tensor:
    """Scale directions to the radius."""
    length = probe.ball.distance(torch.zeros_like(direction), direction).clamp(min=1e-12).to(direction.dtype)
    return direction * (probe.ball.eps / length).view(-1, 1, 1, 1)


def _plane(probe: Probe, name: str, x: Tensor, u: Tensor, v: Tensor) -> Iterator[pd.DataFrame]:
    axis = torch.linspace(-1, 1, POINTS, dtype=x.dtype, device=x.device)
    a, b = (grid.flatten() for grid in torch.meshgrid(axis, axis, indexing="ij"))
    for i, sample in enumerate(probe.sample.tolist()):
        points = (x[i] + a.view(-1, 1, 1, 1) * u[i] + b.view(-1, 1, 1, 1) * v[i]).clamp(0, 1)
        logits = probe.logits(points)
        y = probe.y[i].to(x.device).expand(len(points))
        columns = (sample, name, a, b, cross_entropy(logits, y), margin(logits, y))
        values = [c.double().cpu().numpy() if isinstance(c, Tensor) else c for c in columns]
        yield pd.DataFrame(dict(zip(COLUMNS, values, strict=True)))
