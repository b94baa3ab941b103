"""Adversarial examples on their way to disk: in float16 where that changes no verdict, as they are where it does."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robbench.classifier.batch_width import Widths
from robbench.classifier.checks import answers
from robbench.classifier.prepare import Target
from robbench.core.threat import Ball
from robbench.engine.engine import Rows
from robbench.evaluation.inputs import Images
from robbench.results.adversarials import Points

__all__ = ["Keeper", "round_to_float16"]


def round_to_float16(x0: Tensor, x: Tensor) -> Tensor:
    """Round points to float16: to the nearest, or toward x0 where the nearest lies further from x0 than x does.

    Most breaks lie on the surface of the ball, and the nearest float16 of every second pixel lies outside.
    """
    near = x.half()
    wide = near.to(x.dtype)
    away = (wide - x) * (x - x0) > 0
    # The bits of non-negative floats are ordered as they are: the neighbour below or above is one bit away.
    neighbour = near.view(torch.int16) + torch.where(wide > x, -1, 1).to(torch.int16)
    return torch.where(away, neighbour.view(torch.float16), near)


@dataclass(eq=False)
class Keeper:
    """Takes the breaks of a run as they are found, and makes them ready to be stored.

    Attributes:
        run_id: of the run.
        target: the model.
        images: the whole test set.
        ball: threat.
        widths: of the lanes.
        exact: round nothing: for models that answer at random, of which one answer proves nothing.
    """

    run_id: str
    target: Target
    images: Images
    ball: Ball
    widths: Widths
    exact: bool = False
    fresh: list[tuple[str, Rows]] = field(default_factory=list)

    def take(self, attack: str, rows: Rows) -> None:
        """Remember the breaks among rows that just finished."""
        if rows.broken.any():
            self.fresh.append((attack, rows))

    def points(self, exact: bool = False) -> list[Points]:
        """Hand over what was taken since the last time; with `exact` the model is not asked, and nothing is rounded."""
        fresh, self.fresh = self.fresh, []
        if not fresh:
            return []
        attack = np.concatenate([np.full(int(r.broken.sum()), name) for name, r in fresh])
        sample = np.concatenate([r.sample[r.broken] for _, r in fresh])
        prediction = np.concatenate([r.prediction[r.broken] for _, r in fresh])
        x = torch.cat([r.x_adv[torch.from_numpy(r.broken)] for _, r in fresh if r.x_adv is not None])
        small = np.zeros(len(sample), bool)
        half = x.half()
        if not (exact or self.exact):
            x0 = self.images.x(np.searchsorted(self.images.index, sample))
            half = round_to_float16(x0, x)
            small = self._holds(x0, half.to(x.dtype), prediction)
        # What has fewer bits than float32, as bfloat16, fits into it.
        full = x if x.dtype == torch.float64 else x.float()
        return [
            Points.of(self.run_id, sample[at], attack[at], values[torch.from_numpy(at)].numpy())
            for at, values in ((small, half), (~small, full))
            if at.any()
        ]

    def _holds(self, x0: Tensor, x: Tensor, prediction: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which points are in the ball and the box, and predicted as recorded."""
        inside = self.ball.contains(x0, x).numpy()
        logits = answers(self.target, x, self.widths.lanes)
        same = logits.isfinite().all(1).numpy() & (logits.argmax(1).numpy() == prediction)
        held: NDArray[np.bool_] = inside & same
        return held
