"""The targets of training: smoothed labels, and changed logits of a teacher. Pure functions.

z are logits [N, K], y are labels [N]. Nothing here has a gradient. `fix`, `correct` and `hybrid` are the names that
Seguin et al. 2021 give to their changes of a teacher's logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robbench.core import rng

__all__ = ["correct", "fix", "hybrid", "smooth_labels", "wrong_mass"]


def smooth_labels(y: Tensor, alpha: float, mass: Tensor | int) -> Tensor:
    """Label smoothing: y_warm = y_hot − α (y_hot − mass) (Shafahi et al. 2019, Sec. 2): [N] -> [N, K] float32.

    `mass` [N, K] says which classes get the removed probability (see `wrong_mass`). The number K stands for 1/K
    everywhere.
    """
    classes, spread = (mass, 1 / mass) if isinstance(mass, int) else (mass.shape[1], mass)
    hot = F.one_hot(y, classes).to(torch.float32)
    return hot - alpha * (hot - spread)


def wrong_mass(kind: str, z: Tensor, y: Tensor, temperature: float = 1.0) -> Tensor:
    """Distribution of the removed probability in the variants of Goibert & Dohmatob 2019: [N, K], rows sum to 1.

    `adversarial`: the least likely class gets all, which is the worst label that smoothing can reach. `second_best`:
    the most likely class other than y gets all. `boltzmann`: all classes, in proportion to exp(−z / temperature). The
    distribution has no gradient. For `adversarial` this gives the gradient of the inner maximum. The other kinds are
    defined so.
    """
    z = z.detach().to(torch.float32)
    if kind == "adversarial":
        return F.one_hot(z.argmin(1), z.shape[1]).to(torch.float32)
    if kind == "second_best":
        others = z.scatter(1, y[:, None], -torch.inf)
        return F.one_hot(others.argmax(1), z.shape[1]).to(torch.float32)
    return (-z / temperature).softmax(1)


def fix(z: Tensor, k: int, rest: str, sample: Tensor, key: tuple[int, int]) -> Tensor:
    """Keep each image's k largest logits, and `permute` or `average` the other ones (Seguin et al. 2021, Fig. 4A).

    The permutation is uniform. It is drawn once per image, from the index `sample` [N].
    """
    top = torch.zeros_like(z, dtype=torch.bool).scatter(1, z.topk(k, dim=1).indices, True)
    if rest == "average":
        mean = z.masked_fill(top, 0).sum(1, keepdim=True) / max(z.shape[1] - k, 1)
        return torch.where(top, z, mean)
    draw = rng.bits(key, sample, torch.zeros_like(sample), 0, z.shape[1])
    # `source` and the argsort of `kept_first` are two orders of the classes. Both begin with the kept classes, in the
    # same order. The logit of the i-th class of the first order goes to the i-th class of the second order.
    kept_first = draw.masked_fill(top, -1)
    source = torch.arange(z.shape[1], device=z.device).expand_as(z).masked_fill(top, -1).argsort(stable=True, dim=1)
    return torch.empty_like(z).scatter(1, kept_first.argsort(stable=True, dim=1), z.gather(1, source))


def correct(z: Tensor, y: Tensor) -> Tensor:
    """Exchange the largest logit with that of the true class: all predictions become right (Seguin et al. 2021)."""
    predicted, true = z.argmax(1, keepdim=True), y[:, None]
    return z.scatter(1, predicted, z.gather(1, true)).scatter(1, true, z.gather(1, predicted))


def hybrid(values: Tensor, ranks: Tensor) -> Tensor:
    """Give the sorted logits of one teacher (`values`) to the classes in the order of another's logits (`ranks`).

    Seguin et al. 2021, "hybrid ST-AT".
    """
    order = ranks.argsort(stable=True, dim=1, descending=True)
    return torch.empty_like(values).scatter(1, order, values.sort(1, descending=True).values)
