"""The shared vocabulary: small frozen dataclasses and type aliases that all other modules use.

Nothing here imports torch. Tensors appear in annotations only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    UInt8Array = NDArray[np.uint8]
    Int64Array = NDArray[np.int64]

Norm = Literal["Linf", "L2", "L1", "L0"]
"""How a perturbation is measured. L0 counts the pixel values that change."""

NORMS: tuple[Norm, ...] = ("Linf", "L2", "L1")
"""The norms of robbench's own attacks. Attacks of other libraries may be made for L0, too."""

IMAGENET = "imagenet"
"""The data set that is known, and whose images are read as they are used."""

Judge = Literal["any", "final", "nearest"]
"""Which points may count as a break: `any` queried point (worst case), or the `final` point of a trial only.

With `nearest`, an attack is one trial, which ends at the nearest break that it found (`attacks.nearest`), and the ball
holds the whole box."""

JUDGES: tuple[Judge, ...] = ("any", "final", "nearest")

State = dict[str, "Tensor"]
"""State of an attack: tensors whose first axis is the lane. `state["x"]` is the next point to query."""


def format_ids(ids: Iterable[int], most: int = 20) -> str:
    """Format official indices as `samples 3, 7, 20–59`. At most `most` indices and ranges are listed."""
    runs: list[list[int]] = []
    for i in (listed := sorted(int(i) for i in ids)):
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    parts = [part for run in runs for part in ([run] if len(run) > 3 else [[i] for i in run])]
    words = [str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts[:most]]
    rest = sum(len(part) for part in parts[most:])
    more = f" and {rest} more" if rest else ""
    return f"sample{'s' if len(listed) != 1 else ''} {', '.join(words)}{more}"


class Status(StrEnum):
    """The outcome of one sample under one attack."""

    MISCLASSIFIED = "misclassified"  # wrong before any attack; never attacked
    BROKEN = "broken"  # the judge confirmed an adversarial example
    ROBUST = "robust"  # the attack used its whole budget without a break
    SKIPPED = "skipped"  # an earlier stage of the suite broke it


@dataclass(frozen=True, slots=True)
class Threat:
    """The threat model: the adversary may move x within an lp ball of radius eps, inside [0, 1].

    `eps` is exact, in [0, 1] pixel units (`Fraction(8, 255)`). It therefore prints and hashes as the user wrote it.
    """

    norm: Norm
    eps: Fraction

    def __str__(self) -> str:
        """Print as `Linf 8/255`."""
        return f"{self.norm} {self.eps_text}"

    @property
    def eps_text(self) -> str:
        """The radius as text: `8/255` if it is a number of pixel levels, otherwise a decimal."""
        eps = self.eps
        if 255 % eps.denominator == 0 and eps.denominator > 1 and float(eps) != round(float(eps), 3):
            return f"{eps * 255}/255"
        return f"{float(eps):g}"

    @property
    def exact_eps(self) -> str:
        """The radius as text without rounding: `eps_text`, or a fraction if `eps_text` rounds."""
        return self.eps_text if Fraction(self.eps_text) == self.eps else str(self.eps)


@dataclass(frozen=True, slots=True)
class Problem:
    """The images that an attack works on, one row per lane.

    Attributes:
        x: clean images, [L, C, H, W], in [0, 1].
        y: true labels, [L] int64.
        sample: official index of each image, [L] int64. `sample` and `trial` select the random numbers.
        trial: number of the lane's restart (or target), [L] int64.
        key: two 32-bit words for the random numbers of this attack, made of the seed and the attack's name.
        logits: the model's logits of x, [L, K], if the attack needs them (`needs_logits`).
        target: the class that breaks each sample, [L] int64; None if every class but y does. Attacks never see it
            (`engine.targeted`).
    """

    x: Tensor
    y: Tensor
    sample: Tensor
    trial: Tensor
    key: tuple[int, int]
    logits: Tensor | None = None
    target: Tensor | None = None


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
        digest: SHA-256 of the content (pixels, labels, indices, scale). It does not depend on the file format.
        labels: class names; for digits, the digits as text.
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
