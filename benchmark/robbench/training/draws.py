"""The batches of a training: which images, how they are cropped, and their noise.

All random numbers are drawn by counter from the seed, the image and the number of the iteration. So a batch can be
drawn again anywhere, and trainings with the same seed, batch size and augmentation have the same batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robbench.core import rng
from robbench.core.types import Dataset
from robbench.models.card import Recipe
from robbench.training.recipe import augment, draw_noise

__all__ = ["Batch", "Draws"]


@dataclass(frozen=True)
class Batch:
    """The images of one iteration.

    Attributes:
        sample: positions in the training set, [N].
        trial: number of the iteration, the second counter of all random numbers, [N].
        x: images after the augmentation, [N, C, H, W].
        y: labels, [N].
        noise: Gaussian noise of standard deviation 1, [N, C, H, W]; None if no recipe needs it.
    """

    sample: Tensor
    trial: Tensor
    x: Tensor
    y: Tensor
    noise: Tensor | None


class Draws:
    """The training set on a device, and the batches drawn from it.

    Args:
        data: the training set. It is on the device as uint8 (MNIST 47 MB, CIFAR-10 154 MB).
        recipe: its seed, batch size and augmentation are used.
        device: where to draw.
        dtype: precision of images and noise.
    """

    def __init__(self, data: Dataset, recipe: Recipe, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype, self.scale = device, dtype, data.scale
        self.x = torch.from_numpy(data.x).to(device)
        self.y = torch.from_numpy(data.y).to(device)
        self.size, self.augment = recipe.batch_size, recipe.augment
        self.noise_key, self.augment_key, self.order_key = (
            rng.make_key(recipe.seed, f"train-{name}") for name in ("noise", "augment", "order")
        )
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._last: tuple[int, Batch] | None = None

    def positions(self, iteration: int) -> Tensor:
        """Return the positions of a batch. An epoch is a permutation without the incomplete last batch."""
        n = len(self.y)
        epoch, place = divmod(iteration, n // self.size)
        if self._order[0] != epoch:
            position = torch.arange(n, device=self.device)
            draw = rng.bits(self.order_key, position, torch.full_like(position, epoch), 0, 1).squeeze(1)
            self._order = (epoch, draw.argsort(stable=True))
        return self._order[1][place * self.size : (place + 1) * self.size]

    def draw(self, sample: Tensor, trial: Tensor, noisy: bool) -> Batch:
        """Make the batch of images `sample` [N] in iteration `trial` [N], with noise if `noisy`."""
        x = (self.x[sample].to(self.dtype) / self.scale).contiguous(memory_format=torch.channels_last)
        if self.augment != "none":
            x = augment(x, self.augment, sample, trial, self.augment_key)
        noise = draw_noise(x, sample, trial, self.noise_key) if noisy else None
        return Batch(sample, trial, x, self.y[sample], noise)

    def at(self, iteration: int, noisy: bool) -> Batch:
        """Return the batch of an iteration. The last one is kept, for the next run that asks for it."""
        known = self._last
        if known is None or known[0] != iteration or (noisy and known[1].noise is None):
            sample = self.positions(iteration)
            known = self._last = iteration, self.draw(sample, torch.full_like(sample, iteration), noisy)
        return known[1]
