"""What a recipe means: small pure functions, combined by `objective`. z are logits [N, K], y labels [N]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from robbench import rng
from robbench.attacks import PGD, Attack
from robbench.models.card import Adversary, Recipe

__all__ = ["add_noise", "augment", "inner_attack", "learning_rate", "objective", "smooth_labels", "squeeze"]


def smooth_labels(y: Tensor, alpha: float, classes: int) -> Tensor:
    """Label smoothing: y_warm = y_hot − α (y_hot − 1/K) (Shafahi et al. 2019, Sec. 2): [N] -> [N, K] float32."""
    hot = F.one_hot(y, classes).to(torch.float32)
    return hot - alpha * (hot - 1 / classes)


def squeeze(logits: Tensor) -> Tensor:
    """Logit squeezing: the 2-norm of all logits of the batch, not squared, over N (Shafahi et al. 2019, Eq. 5).

    Eq. 5 leaves open over what the norm is taken. Read per sample, Σ_i L_i + β ‖z_i‖, all logits zero would be a
    minimum for every β ≥ 0.95 (the norm of the cross-entropy's gradient there, with ten classes), yet Table 5 has
    99 % accuracy at β = 5. Read over the batch, Σ_i L_i + β ‖Z‖, that happens from β = 0.95 √N on: 6.7 at the
    paper's batch of 50, between β = 5, which trains, and β = 10, which collapses, in Table 5; and 10.7 at its
    CIFAR-10 batch of 128, where β = 10 still trains. The sum over the batch is divided by N, as the loss is.
    """
    norm: Tensor = torch.linalg.vector_norm(logits)
    return norm / len(logits)


def objective(logits: Tensor, y: Tensor, recipe: Recipe) -> Tensor:
    """Cross-entropy with smoothed labels plus β times the squeezing term, averaged over the batch: a scalar."""
    if recipe.alpha == 0:
        loss = F.cross_entropy(logits, y)
    else:
        loss = F.cross_entropy(logits, smooth_labels(y, recipe.alpha, logits.shape[1]))
    return loss if recipe.beta == 0 else loss + recipe.beta * squeeze(logits)


def add_noise(x: Tensor, sigma: float, sample: Tensor, iteration: int, key: tuple[int, int]) -> Tensor:
    """Add Gaussian noise of standard deviation σ in pixel units, without clipping: [N, C, H, W] -> the same.

    The papers do not clip, and clipping would halve the noise on the many pixels that are exactly 0.
    """
    noise = rng.normal(key, sample, torch.full_like(sample, iteration), 0, x[0].numel())
    return x + sigma * noise.view_as(x).to(x.dtype)


def augment(x: Tensor, kind: str, sample: Tensor, iteration: int, key: tuple[int, int]) -> Tensor:
    """Shift each image by up to an eighth of its height, zero-padded, and flip half of them for `crop_flip`.

    An eighth is the 4 pixels of the usual CIFAR-10 crop.
    """
    n, _, height, width = x.shape
    pad = height // 8
    u = rng.uniform(key, sample, torch.full_like(sample, iteration), 0, 3)
    top, left = (u[:, :2] * (2 * pad + 1)).long().unbind(1)
    rows = top[:, None] + torch.arange(height, device=x.device)
    columns = left[:, None] + torch.arange(width, device=x.device)
    if kind == "crop_flip":
        columns = torch.where(u[:, 2:] < 0.5, columns.flip(1), columns)
    padded = F.pad(x, (pad, pad, pad, pad))
    lane = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[lane, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def inner_attack(adversary: Adversary) -> Attack:
    """Make the attack of adversarial training; it is the one that evaluation uses."""
    return PGD(
        objective=adversary.loss,
        steps=adversary.steps,
        step_size=float(adversary.step_size),
        random_start=adversary.random_start,
    )


def learning_rate(recipe: Recipe, iteration: int) -> float:
    """Learning rate at an iteration, counted from 0."""
    done = iteration / recipe.iterations
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))
    if recipe.schedule == "steps":
        return recipe.lr * recipe.gamma ** sum(done >= m for m in recipe.milestones)
    return recipe.lr
