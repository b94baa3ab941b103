"""The vocabulary: small frozen dataclasses and aliases that every other module speaks, and nothing else.

Imported without torch; tensors appear in annotations only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable
    from fractions import Fraction

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    UInt8Array = NDArray[np.uint8]
    Int64Array = NDArray[np.int64]

Norm = Literal["Linf", "L2", "L1"]
NORMS: tuple[Norm, ...] = ("Linf", "L2", "L1")

Judge = Literal["any", "final"]
"""Which iterates may count as a break: `any` queried point (worst case) or the `final` one only."""

JUDGES: tuple[Judge, ...] = ("any", "final")

State = dict[str, "Tensor"]
"""What an attack remembers: tensors with the lane first; `state["x"]` is the next point to query."""


def format_ids(ids: Iterable[int], most: int = 20) -> str:
    """Name samples by their official indices, the first ones where there are many."""
    listed = [int(i) for i in ids]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return f"sample{'s' if len(listed) != 1 else ''} {', '.join(map(str, listed[:most]))}{more}"


class Status(StrEnum):
    """What became of one sample under one attack."""

    MISCLASSIFIED = "misclassified"  # wrong before any attack; never attacked
    BROKEN = "broken"  # the judge confirmed an adversarial example
    ROBUST = "robust"  # the attack spent its whole budget in vain
    SKIPPED = "skipped"  # an earlier stage of the cascade had broken it


@dataclass(frozen=True, slots=True)
class Threat:
    """What the adversary may do: move x within an lp ball of radius eps, inside [0, 1].

    `eps` is exact, in [0, 1] pixel units (`Fraction(8, 255)`), so that it prints and hashes as it was written.
    """

    norm: Norm
    eps: Fraction

    def __str__(self) -> str:
        """Print as `Linf 8/255`."""
        return f"{self.norm} {self.eps_text}"

    @property
    def eps_text(self) -> str:
        """The radius as people write it: `8/255` where it counts pixel levels, a decimal otherwise."""
        eps = self.eps
        if 255 % eps.denominator == 0 and eps.denominator > 1 and float(eps) != round(float(eps), 3):
            return f"{eps * 255}/255"
        return f"{float(eps):g}"


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be attacked, one row per lane.

    Attributes:
        x: clean images, [L, C, H, W], in [0, 1].
        y: true labels, [L] int64.
        sample: official index of each image, [L] int64; with `trial` it selects the random numbers.
        trial: which restart (or target) this lane is at, [L] int64.
        key: the two 32-bit words that key the random numbers of this attack, from the seed and its name.
        logits: the model's answer to x, [L, K], where the attack asks for it (`needs_logits`).
    """

    x: Tensor
    y: Tensor
    sample: Tensor
    trial: Tensor
    key: tuple[int, int]
    logits: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a data set, in official order.

    Attributes:
        name: `digits`, `mnist`, `fashion_mnist`, `cifar10`, `cifar100`, or `custom`.
        split: `train` or `test`.
        x: [N, C, H, W] uint8; `x / scale` lies in [0, 1].
        y: [N] int64 labels in [0, num_classes).
        index: [N] int64 official indices, strictly increasing.
        num_classes: number of labels.
        scale: the value that stands for 1.0 (255; 16 for digits).
        digest: SHA-256 over the content (pixels, labels, indices, scale), whatever the file format was.
        labels: class names, or the digits as text.
    """

    name: str
    split: str
    x: UInt8Array
    y: Int64Array
    index: Int64Array
    num_classes: int
    scale: int
    digest: str
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Count the images."""
        return len(self.y)
