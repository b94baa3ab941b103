"""What a network is trained to answer: smoothed labels, and the logits of a teacher. Pure functions.

z are logits [N, K], y labels [N]; nothing here carries a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robbench.core import rng

__all__ = ["correct", "fix", "hybrid", "smooth_labels", "wrong_mass"]


def smooth_labels(y: Tensor, alpha: float, mass: Tensor | int) -> Tensor:
    """Label smoothing: y_warm = y_hot − α (y_hot − mass) (Shafahi et al. 2019, Sec. 2): [N] -> [N, K] float32.

    `mass` is where the withdrawn probability goes, [N, K] (`wrong_mass`), or K for 1/K everywhere.
    """
    classes, spread = (mass, 1 / mass) if isinstance(mass, int) else (mass.shape[1], mass)
    hot = F.one_hot(y, classes).to(torch.float32)
    return hot - alpha * (hot - spread)


def wrong_mass(kind: str, z: Tensor, y: Tensor, temperature: float = 1.0) -> Tensor:
    """Where the variants of label smoothing put the withdrawn mass (Goibert & Dohmatob 2019): [N, K], rows sum to 1.

    `adversarial`: on the least likely class, the worst label within the smoothing's reach. `second_best`: on the
    likeliest class other than y. `boltzmann`: on all classes by exp(−z / temperature). The mass counts as constant:
    for the adversarial kind this is the gradient of the inner maximum, for the others it is how they are defined.
    """
    z = z.detach().to(torch.float32)
    if kind == "adversarial":
        return F.one_hot(z.argmin(1), z.shape[1]).to(torch.float32)
    if kind == "second_best":
        others = z.scatter(1, y[:, None], -torch.inf)
        return F.one_hot(others.argmax(1), z.shape[1]).to(torch.float32)
    return (-z / temperature).softmax(1)


def fix(z: Tensor, k: int, rest: str, sample: Tensor, key: tuple[int, int]) -> Tensor:
    """Keep each image's k largest logits, and `permute` or `average` the others (Seguin et al. 2021, Fig. 4A).

    The permutation is uniform, and drawn once per image, by its index `sample` [N].
    """
    top = torch.zeros_like(z, dtype=torch.bool).scatter(1, z.topk(k, dim=1).indices, True)
    if rest == "average":
        mean = z.masked_fill(top, 0).sum(1, keepdim=True) / max(z.shape[1] - k, 1)
        return torch.where(top, z, mean)
    draw = rng.bits(key, sample, torch.zeros_like(sample), 0, z.shape[1])
    # Two orders of the classes that both begin with the kept ones: what stands at a place of the first goes to the
    # class at that place of the second.
    kept_first = draw.masked_fill(top, -1)
    source = torch.arange(z.shape[1], device=z.device).expand_as(z).masked_fill(top, -1).argsort(stable=True, dim=1)
    return torch.empty_like(z).scatter(1, kept_first.argsort(stable=True, dim=1), z.gather(1, source))


def correct(z: Tensor, y: Tensor) -> Tensor:
    """Exchange the largest logit with the true class's, so that every prediction is right (Seguin et al. 2021)."""
    predicted, true = z.argmax(1, keepdim=True), y[:, None]
    return z.scatter(1, predicted, z.gather(1, true)).scatter(1, true, z.gather(1, predicted))


def hybrid(values: Tensor, ranks: Tensor) -> Tensor:
    """Give the logits of one teacher to the classes in the order of another (Seguin et al. 2021, "hybrid ST-AT")."""
    order = ranks.argsort(stable=True, dim=1, descending=True)
    return torch.empty_like(values).scatter(1, order, values.sort(1, descending=True).values)
