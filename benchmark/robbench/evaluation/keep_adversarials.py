"""Prepare adversarial examples for storage: in float16 if that does not change the verdict, otherwise unchanged."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robbench.classifier.batch_width import BatchWidths
from robbench.classifier.checks import compute_logits
from robbench.classifier.prepare import Target
from robbench.core.threat import Ball
from robbench.engine.engine import Rows
from robbench.evaluation.inputs import Images
from robbench.results.adversarials import Points

__all__ = ["Keeper", "round_to_float16"]


def round_to_float16(x0: Tensor, x: Tensor) -> Tensor:
    """Round points to the nearest float16, or toward x0 where the nearest float16 is farther from x0 than x is.

    Most breaks are on the surface of the ball. Without the rule, every second pixel would leave the ball.
    """
    near = x.half()
    wide = near.to(x.dtype)
    farther = (wide - x) * (x - x0) > 0
    # The bits of non-negative floats, as integers, have the order of the floats. A neighbour differs by 1.
    neighbour = near.view(torch.int16) + torch.where(wide > x, -1, 1).to(torch.int16)
    return torch.where(farther, neighbour.view(torch.float16), near)


@dataclass(eq=False)
class Keeper:
    """Collects the breaks of a run and prepares them for storage.

    Attributes:
        run_id: the run.
        target: the model.
        images: the whole test set.
        ball: the threat model.
        widths: the batch widths of the lanes.
        exact: do not round. For models with random answers, one answer cannot show that rounding changes no verdict.
            For the nearest breaks, the distance counts, too.
        fresh: stage and rows of the breaks since the last call of `points`.
    """

    run_id: str
    target: Target
    images: Images
    ball: Ball
    widths: BatchWidths
    exact: bool = False
    fresh: list[tuple[str, Rows]] = field(default_factory=list)

    def take(self, attack: str, rows: Rows) -> None:
        """Keep the breaks among rows that just finished."""
        if rows.broken.any():
            self.fresh.append((attack, rows))

    def points(self, exact: bool = False) -> list[Points]:
        """Return the breaks taken since the last call. With `exact` they are not rounded, without a query."""
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
            small = self._keep_verdict(x0, half.to(x.dtype), prediction)
        # Types with fewer bits, such as bfloat16, fit into float32.
        full = x if x.dtype == torch.float64 else x.float()
        return [
            Points.of(self.run_id, sample[at], attack[at], values[torch.from_numpy(at)].numpy())
            for at, values in ((small, half), (~small, full))
            if at.any()
        ]

    def _keep_verdict(self, x0: Tensor, x: Tensor, prediction: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which points are in the ball and the box and get the recorded prediction: [n] bool."""
        inside = self.ball.contains(x0, x).numpy()
        logits = compute_logits(self.target, x, self.widths.lanes)
        same = logits.isfinite().all(1).numpy() & (logits.argmax(1).numpy() == prediction)
        valid: NDArray[np.bool_] = inside & same
        return valid
