"""Randomized smoothing (Cohen, Rosenfeld and Kolter 2019): what Gaussian noise certifies in L2.

A certificate is about the smoothed classifier, which answers the class that the model votes for most often under noise.
It says nothing about the model without noise.

The draws are numbers of the counter-based generator: draw number t is a function of the seed, t and the pixel. All
images share the draws of a seed, so that they are made once. Each certificate is wrong with a chance of at most alpha.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robbench.certify.radius import smoothing_radius
from robbench.classifier.prepare import Target
from robbench.core import rng
from robbench.core.errors import RobbenchError

__all__ = ["Smoothing"]

_CHOICE = 2**31  # number of the first draw that chooses the class; the counting draws are numbered from 0
_KEPT_BYTES = 2**30  # noise that is kept for the next images


@dataclass(frozen=True)
class Smoothing:
    """The method `smoothing`.

    Attributes:
        sigma: standard deviation of the noise, in [0, 1] pixel units. The noise is not clipped, as in training.
        draws: number of draws that are counted.
        choice: number of other draws, which choose the class that is counted.
        alpha: chance that the certificate of an image is wrong.
        seed: seed of the draws.

    Raises:
        RobbenchError: a value is not allowed.
    """

    sigma: float
    draws: int = 10_000
    choice: int = 100
    alpha: float = 0.001
    seed: int = 0
    _noise: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 < self.sigma <= 10:
            raise RobbenchError(f"sigma: {self.sigma} given; allowed: above 0, at most 10.")
        if not 0 < self.alpha < 0.5:
            raise RobbenchError(f"alpha: {self.alpha} given; allowed: above 0 and below 0.5.")
        if self.seed < 0:
            raise RobbenchError(f"seed: {self.seed} given; allowed: a whole number, at least 0.")
        for name, count in (("draws", self.draws), ("choice", self.choice)):
            if not 1 <= count < _CHOICE:
                raise RobbenchError(f"{name}: {count} given; allowed: from 1 to {_CHOICE - 1}.")

    def describe(self) -> dict[str, Any]:
        """Return the method's part of the identity."""
        settings = {name: getattr(self, name) for name in ("sigma", "draws", "choice", "alpha", "seed")}
        return {"method": "smoothing", "threat": None, "settings": settings}

    def decide(self, target: Target, x: Tensor, y: int, sample: int, lanes: int) -> dict[str, Any]:
        """Certify the class of an image [*shape], and return its row."""
        begin = time.process_time()
        guess = int(self.vote(target, x, _CHOICE, self.choice, lanes).argmax())
        count = int(self.vote(target, x, 0, self.draws, lanes)[guess])
        radius = smoothing_radius(count, self.draws, self.alpha, self.sigma)
        verdict = "open" if radius == 0 else "proven" if guess == y else "wrong"
        return {
            "sample": sample,
            "label": y,
            "verdict": verdict,
            "prediction": guess,
            "margin": float("nan"),
            "radius": radius,
            "count": count,
            "seconds": round(time.process_time() - begin, 4),
            "limit": 0.0,
        }

    @torch.no_grad()
    def vote(self, target: Target, x: Tensor, first: int, draws: int, lanes: int) -> Tensor:
        """Count the classes under noise, with the draws from `first` on: -> [K] int64."""
        votes = None
        image = x.to(target.device)
        for begin in range(0, draws, lanes):
            real = min(lanes, draws - begin)
            noise = self.draw(first + begin, lanes, x).to(target.device)  # the last batch has the width of the others
            logits = target.module(image + self.sigma * noise.to(x.dtype))[:real]
            counted = torch.bincount(logits.argmax(1)[logits.isfinite().all(1)], minlength=logits.shape[1])
            votes = counted if votes is None else votes + counted
        assert votes is not None
        return votes.cpu()

    def draw(self, first: int, count: int, x: Tensor) -> Tensor:
        """Draw standard normal noise for draws of consecutive numbers: -> [count, *shape] float32."""
        place = (first, count, tuple(x.shape))
        if place in self._noise:
            return self._noise[place]
        number = torch.arange(first, first + count)
        zero = torch.zeros_like(number)
        noise = rng.normal(rng.make_key(self.seed, "smoothing"), zero, number, 0, x.numel()).view(count, *x.shape)
        if sum(n.nbytes for n in self._noise.values()) + noise.nbytes <= _KEPT_BYTES:
            self._noise[place] = noise
        return noise
