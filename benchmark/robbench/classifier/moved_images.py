"""Images beside the clean ones that a model is asked about before the attacks: moved, of another range, and attacked.

A model may answer clean images well and change once an image leaves the grid of clean pixels, once a batch has other
extremes, or once it is unsure. Attacks ask about such points, so the checks of a model do too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robbench.core import rng
from robbench.core.errors import ModelError

__all__ = ["Ask", "AskWithGradient", "MovedImages", "ask_moved_images", "choose_least", "measure_change"]

Ask = Callable[[Tensor], Tensor]
"""Images [L, C, H, W] -> logits [L, K], all in one batch, without gradients."""

AskWithGradient = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Images [L, C, H, W] -> logits [L, K] while gradients are on, and the gradient of a loss, None if there is none."""

NARROW = 32
"""Most images of a batch of attacked images, and of the other compositions."""

_KINDS: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    lambda x, noise, other: x + 0.6 * (noise - 0.5),
    lambda x, noise, other: x / 2,
    lambda x, noise, other: 0.75 - x / 2,
    lambda x, noise, other: 0.5 + x / 2,
    lambda x, noise, other: torch.zeros_like(x),
    lambda x, noise, other: torch.ones_like(x),
    lambda x, noise, other: (x + other) / 2,
    lambda x, noise, other: x + 0.06 * (noise - 0.5),
    lambda x, noise, other: x + 0.2 * (noise - 0.5),
)
"""Ways to move an image x, given uniform noise in [0, 1) and another image."""

_SCALED = slice(1, 4)  # the kinds of another brightness and contrast

_STEPS = (0.3, 0.03, 0.1, 0.2)  # of attacked images: some are close to a boundary, some are far beyond


def measure_change(answer: Tensor, expected: Tensor, least: float = 0.0) -> Tensor:
    """Measure how far answers [n, K] are from the expected ones, as a share of their length: [n].

    The change is 0 where both hold NaN or infinity, and infinite where only one of them does. A length below `least`
    counts as `least`: a network without offsets answers a black image with zeros up to rounding.
    """
    change = (answer - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=max(least, 1e-12))
    lost, was = ~answer.isfinite().all(1), ~expected.isfinite().all(1)
    return torch.where(lost & was, 0.0, torch.where(lost | was, torch.inf, change))


def choose_least(logits: Tensor) -> float:
    """Choose the least length of logits [N, K] that changes are measured by: a tenth of the usual one."""
    lengths = logits.double().norm(dim=1)
    return float(lengths[lengths.isfinite()].median()) / 10 if bool(lengths.isfinite().any()) else 0.0


@dataclass(eq=False)
class MovedImages:
    """Batches of moved, attacked and clean images, and a model's answers to them.

    Attributes:
        clean: so many of the first clean images are the last rows of each mixed batch.
        batches: mixed batches of the run's width; after them, if the model has a gradient, a narrow batch of attacked
            images, [L, C, H, W] each.
        attacked: the batch of attacked images; None if there is none.
        logits: answers without gradients, [L, K] each.
        with_gradient: answers while gradients are on, [L, K]; None where the model failed.
    """

    clean: int
    batches: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    with_gradient: list[Tensor | None] = field(default_factory=list)
    attacked: Tensor | None = None

    @property
    def x(self) -> Tensor:
        """All images, [N, C, H, W]."""
        return torch.cat(self.batches)

    @property
    def answers(self) -> Tensor:
        """All answers without gradients, [N, K]."""
        return torch.cat(self.logits)

    @property
    def now(self) -> Tensor:
        """The answers to the clean images of the first mixed batch, in the order of the clean images: [clean, K]."""
        return self.logits[0][-self.clean :].flip(0)

    @property
    def least(self) -> float:
        """The least length of logits that changes are measured by (`measure_change`)."""
        return choose_least(self.answers)

    def find_scaled(self) -> Tensor:
        """Find one image of each other brightness or contrast, as rows of `x`."""
        free = len(self.batches[0]) - self.clean
        return torch.tensor([i // free * len(self.batches[0]) + i % free for i in range(len(_KINDS))[_SCALED]])

    def find_unsure(self, n: int) -> Tensor:
        """Find the n images whose two largest logits are closest, as rows of `x`."""
        z = self.answers.double()
        top = z.topk(2, dim=1).values
        lead = torch.where(z.isfinite().all(1), top[:, 0] - top[:, 1], torch.inf)
        return lead.argsort()[:n].cpu()


def ask_moved_images(ask: Ask, ask_with_gradient: AskWithGradient, batch: Tensor, real: int) -> MovedImages | None:
    """Ask a model about moved images beside clean ones, without gradients and with them, and about attacked images.

    Costs two passes of the batch's width and two narrow ones; more where a batch is narrower than the kinds of images.

    Args:
        ask: queries the model without gradients.
        ask_with_gradient: queries the model with gradients, and returns a gradient that lowers its lead.
        batch: clean images [L, C, H, W].
        real: the first so many images count; the others are padding.

    Returns:
        What was asked and answered; None if the model fails on a mixed batch (`ModelError`).
    """
    width = max(len(batch), 2)
    clean = min(real, (width + 1) // 2)
    free, attacked = width - clean, None
    moved = _move(batch[torch.arange(max(free, len(_KINDS))) % real])
    found = MovedImages(clean)
    for start in range(0, len(moved), free):
        x = torch.cat([moved[torch.arange(start, start + free) % len(moved)], batch[:clean].flip(0)])
        try:
            found.logits.append(ask(x))
        except ModelError:
            return None
        found.batches.append(x)
        answer, slope = _try_with_gradient(ask_with_gradient, x)
        found.with_gradient.append(answer)
        if slope is not None and attacked is None:
            attacked = _attack(x, slope, clean, min(width, NARROW))
    if attacked is not None:
        with_gradient, _ = _try_with_gradient(ask_with_gradient, attacked)
        try:
            found.logits.append(ask(attacked))
        except ModelError:  # a traced model may know one width only
            return found
        found.batches.append(attacked)
        found.attacked = attacked
        found.with_gradient.append(with_gradient)
    return found


def _try_with_gradient(ask: AskWithGradient, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    try:
        return ask(x)
    except (ModelError, RuntimeError, MemoryError):  # an attack that meets the error words it
        return None, None


def _move(x: Tensor) -> Tensor:
    """Move images [n, C, H, W], each in its own way, within [0, 1]. All processors move them alike."""
    n, size = len(x), math.prod(x.shape[1:])
    draws = torch.arange(n)
    noise = rng.uniform(rng.make_key(0, "moved images"), draws, torch.zeros_like(draws), 0, size)
    noise = noise.view(x.shape).to(x.dtype)
    moved = [_KINDS[i % len(_KINDS)](x[i], noise[i], x[(i + 1) % n]) for i in range(n)]
    return torch.stack(moved).clamp(0, 1)


def _attack(x: Tensor, slope: Tensor, clean: int, width: int) -> Tensor:
    """Step along the sign of the slope from the clean images of a mixed batch: [width, C, H, W]."""
    at = len(x) - 1 - torch.arange(width) % clean
    steps = torch.tensor([_STEPS[i % len(_STEPS)] for i in range(width)], dtype=x.dtype)
    moved: Tensor = x[at] + steps.view(-1, 1, 1, 1) * slope.cpu().sign()[at]
    return moved.nan_to_num(0.0).clamp(0, 1)
