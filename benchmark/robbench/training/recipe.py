"""The terms of a recipe as small pure functions. z are logits [N, K], y are labels [N]."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robbench.attacks import ATTACKS, PGD, Attack, parameters
from robbench.core import rng
from robbench.core.errors import CardError, unknown_name
from robbench.core.types import Problem, State
from robbench.models.card import Adversary, Recipe
from robbench.training.targets import smooth_labels, wrong_mass

__all__ = [
    "DivergencePGD",
    "augment",
    "build_inner_attack",
    "divergence",
    "draw_noise",
    "learning_rate",
    "objective",
    "pairing_penalty",
    "squeeze",
]


def squeeze(z: Tensor, p: float = 2.0) -> Tensor:
    """Logit squeezing: the p-norm of all logits of the batch, not raised to p, over N (Shafahi et al. 2019, Eq. 5).

    Eq. 5 does not say whether the norm is per sample or over the batch. A later version of the paper
    (arXiv:1910.11585) names the Frobenius norm of the mini-batch's logits. The numbers of Table 5 agree with the batch:

    - Per sample, Σ_i L_i + β ‖z_i‖, logits of zero are a minimum for every β ≥ 0.95 (the norm of the cross-entropy's
      gradient there, with ten classes). But Table 5 has 99 % accuracy at β = 5.
    - Over the batch, Σ_i L_i + β ‖Z‖, they are a minimum for β ≥ 0.95 √N. That is 6.7 at the paper's batch of 50. In
      Table 5, β = 5 trains and β = 10 collapses. At its CIFAR-10 batch of 128 it is 10.7, and β = 10 still trains.

    The norm is divided by N, because the loss is a mean over the batch.
    """
    norm: Tensor = torch.linalg.vector_norm(z, ord=p)
    return norm / len(z)


def objective(z: Tensor, y: Tensor, recipe: Recipe, target: Tensor | None = None) -> Tensor:
    """Loss of logits, averaged over the batch, plus β times the squeezing term: a scalar.

    The loss is the cross-entropy with the recipe's labels. With a teacher's logits `target` [N, K] it is the mean
    absolute difference from them (Seguin et al. 2021, App. A).
    """
    if target is not None:
        loss = F.l1_loss(z, target)
    elif recipe.alpha == 0:
        loss = F.cross_entropy(z, y)
    else:
        standard = recipe.smoothing == "standard"
        mass = z.shape[1] if standard else wrong_mass(recipe.smoothing, z, y, recipe.temperature)
        loss = F.cross_entropy(z, smooth_labels(y, recipe.alpha, mass).to(z.dtype))
    return loss if recipe.beta == 0 else loss + recipe.beta * squeeze(z, recipe.squeeze_norm)


def divergence(z: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax reference ‖ softmax z): [N, K], [N, K] -> [N] (Zhang et al. 2019, Eq. 5)."""
    return F.kl_div(z.log_softmax(1), reference.log_softmax(1), reduction="none", log_target=True).sum(1)


def pairing_penalty(kind: str, z: Tensor, z_adv: Tensor | None) -> Tensor:
    """Penalty on the difference between the logits of two batches, z and z' = `z_adv`: a scalar.

    `trades`: the mean divergence of z' from z. `alp`: the mean square of z − z' over images and classes. `clp`: the
    mean square of the first half of z minus the second half, without an odd last image (Kannan et al. 2018, Sec. 4).
    """
    if kind == "clp":
        half = len(z) // 2
        return F.mse_loss(z[:half], z[half : 2 * half])
    assert z_adv is not None, "the schema asks for an adversary"
    return divergence(z_adv, z).mean() if kind == "trades" else F.mse_loss(z, z_adv)


def draw_noise(x: Tensor, sample: Tensor, trial: Tensor, key: tuple[int, int]) -> Tensor:
    """Draw Gaussian noise of standard deviation 1 for images x: [N, C, H, W] -> the same.

    Training adds σ times it, in pixel units, without clipping, as the papers do. Clipping would halve the noise of the
    many pixels that are exactly 0.
    """
    return rng.normal(key, sample, trial, 0, x[0].numel()).view_as(x).to(x.dtype)


def augment(x: Tensor, kind: str, sample: Tensor, trial: Tensor, key: tuple[int, int]) -> Tensor:
    """Shift each image by up to an eighth of its height, with zero padding. For `crop_flip`, also flip half of them.

    For CIFAR-10 an eighth is the usual 4 pixels.
    """
    n, _, height, width = x.shape
    pad = height // 8
    u = rng.uniform(key, sample, trial, 0, 3)
    top, left = (u[:, :2] * (2 * pad + 1)).long().unbind(1)
    rows = top[:, None] + torch.arange(height, device=x.device)
    columns = left[:, None] + torch.arange(width, device=x.device)
    if kind == "crop_flip":
        columns = torch.where(u[:, 2:] < 0.5, columns.flip(1), columns)
    padded = F.pad(x, (pad, pad, pad, pad))
    lane = torch.arange(n, device=x.device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[lane, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return moved.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, kw_only=True)
class DivergencePGD(PGD):
    """PGD that increases the divergence from reference logits [L, K]: the inner maximization of TRADES."""

    reference: Tensor = field(compare=False)

    def loss(self, logits: Tensor, p: Problem, s: State) -> Tensor:
        """Evaluate KL(softmax reference ‖ softmax logits) per lane."""
        return divergence(logits, self.reference)


def build_inner_attack(adversary: Adversary, reference: Tensor | None = None) -> Attack:
    """Make the attack of adversarial training. It is one of the evaluation's attacks. Loss `kl` needs `reference`.

    Raises:
        CardError: the attack is unknown, or a parameter is unknown.
    """
    if adversary.attack not in ATTACKS:
        raise CardError(f"recipe.adversary.attack: {unknown_name('attack', adversary.attack, ATTACKS)}")
    cls = ATTACKS[adversary.attack]
    allowed = parameters(cls)
    named = ("steps", "random_start", "step_size")
    given: dict[str, Any] = {key: getattr(adversary, key) for key in named if key in adversary.model_fields_set}
    if "step_size" in given:
        given["step_size"] = float(given["step_size"])
    given |= {} if adversary.loss == "kl" else {"objective": adversary.loss}
    given |= adversary.args
    for key in given:
        if key not in allowed:
            raise CardError(f"recipe.adversary: {unknown_name(f'parameter of {adversary.attack}', key, allowed)}")
    if adversary.loss == "kl":
        assert reference is not None, "the trainer predicts before it attacks"
        return DivergencePGD(reference=reference, **given)
    return cls(**given)


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Learning rate of an iteration. `progress` is the part of the iterations done before it, in [0, 1)."""
    lr = recipe.lr * (progress / recipe.warmup if progress < recipe.warmup else 1.0)
    if recipe.schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * progress))
    if recipe.schedule == "steps":
        return lr * recipe.gamma ** sum(progress >= m for m in recipe.milestones)
    return lr
