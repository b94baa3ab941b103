"""The targets of a targeted evaluation: which class each image is to be driven to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robbench.core.errors import DataError
from robbench.core.philox import draw_targets
from robbench.evaluation.inputs import Images
from robbench.evaluation.options import TARGETS

__all__ = ["Targets"]


@dataclass(frozen=True)
class Targets:
    """The rule that gives each image its target.

    Attributes:
        rule: a member of `TARGETS`, a class as text, or one class for each image of the test set.
        classes: number of classes.
        seed: seed of the random targets.
    """

    rule: str | tuple[int, ...]
    classes: int
    seed: int

    @property
    def needs_logits(self) -> bool:
        """Whether the targets follow from what the model answers to the clean images."""
        return self.rule == "least-likely"

    def check(self, images: Images) -> None:
        """Check the rule against the images.

        Raises:
            DataError: a class is none of the model's, or is the true class of its image, or targets are missing.
        """
        rule, last = self.rule, self.classes - 1
        if isinstance(rule, str):
            if rule not in TARGETS and int(rule) > last:
                raise DataError(f"target: {rule} given; allowed: a class from 0 to {last}, or {', '.join(TARGETS)}.")
            return
        if len(rule) != len(images.y):
            raise DataError(f"target: {len(rule)} classes given for {len(images.y)} images; each image needs one.")
        given = torch.tensor(rule)
        for at in ((given < 0) | (given > last)).nonzero().flatten().tolist()[:1]:
            raise DataError(f"target[{at}]: {rule[at]} given; allowed: 0 to {last}.")
        for at in (given == images.y).nonzero().flatten().tolist()[:1]:
            raise DataError(f"target[{at}]: {rule[at]} given, which is the true class of this image.")

    def choose(self, images: Images, sample: NDArray[np.int64], logits: Tensor | None = None) -> Tensor:
        """Choose the targets of samples: official indices [N] -> classes [N] int64, none of them the true one.

        With one class for all, images of this class get the next class.

        Args:
            images: the whole test set.
            sample: official indices, [N].
            logits: what the model answers to the clean images [N, K], if `needs_logits`.
        """
        positions = np.searchsorted(images.index, sample)
        y = images.y[positions]
        following = (y + 1) % self.classes
        if not isinstance(self.rule, str):
            return torch.tensor(self.rule)[positions]
        if self.rule == "next":
            return following
        if self.rule == "random":
            return torch.from_numpy(draw_targets(self.seed, sample, y.numpy(), self.classes))
        if self.rule == "least-likely":
            assert logits is not None
            return logits.cpu().scatter(1, y[:, None], torch.inf).argmin(1)
        chosen = torch.full_like(y, int(self.rule))
        return torch.where(chosen == y, following, chosen)
