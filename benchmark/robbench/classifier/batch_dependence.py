"""Whether the answer to an image depends on the other images of its batch, and why.

Attacks query an image beside other images, beside other points of the same image, and beside padding. A verdict means
something only if the answer to an image is the same in all of these batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.core.errors import ModelError

__all__ = ["NOISE", "answers_differ", "find_batch_dependence", "measure_change"]

Ask = Callable[[Tensor], Tensor]
"""Images [L, C, H, W] -> logits [L, K], all in one batch."""

NOISE = 1e-4
"""Share of the logits' length that is far above rounding, in batches of one shape (AutoAttack's check)."""

# Kernels of another batch width may compute in another precision, such as TF32 on a GPU (2^-11 for each product).
_WIDTH_NOISE = 2e-2

_ORDER = "ABBABAABBAABABBA"  # no rhythm: a model that alternates between two answers gives both to A and to B
_LEVEL = 5e-4  # of the permutation test; 2 of the 12870 permutations are its least value


def measure_change(answer: Tensor, expected: Tensor) -> Tensor:
    """Measure how far answers [n, K] are from the expected ones, as a share of these: [n].

    The change is 0 where both hold NaN or infinity, and infinite where only one of them does.
    """
    change = (answer - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-12)
    lost, was = ~answer.isfinite().all(1), ~expected.isfinite().all(1)
    return torch.where(lost & was, 0.0, torch.where(lost | was, torch.inf, change))


@lru_cache
def _list_signs() -> NDArray[np.float64]:
    """List all ways to divide 16 answers into two groups of 8, as ±1/8: [12870, 16]."""
    half = len(_ORDER) // 2
    chosen = np.array(list(itertools.combinations(range(len(_ORDER)), half)))
    signs = np.full((len(chosen), len(_ORDER)), -1.0)
    np.put_along_axis(signs, chosen, 1.0, axis=1)
    return signs / half


def answers_differ(a: Callable[[], Tensor], b: Callable[[], Tensor], tolerance: float) -> bool:
    """Tell whether two ways to ask give different answers, beyond what the model varies when it is asked again.

    Each way is asked 8 times, in turn. An exact permutation test compares the two mean answers, so a randomized model
    passes, whatever it draws and whether or not the images of a batch share it.

    Args:
        a: asks one way, logits [n, K].
        b: asks the other way about the same images.
        tolerance: the mean answers must differ by more than this share of their length, in the worst image.
    """
    answers = torch.stack([{"A": a, "B": b}[way]().double() for way in _ORDER]).nan_to_num(0.0, 0.0, 0.0)
    first, second = (answers[[way == name for way in _ORDER]] for name in "AB")
    for still, other in ((first, second), (second, first)):
        moves = torch.stack([measure_change(answer, still[0]) > tolerance for answer in torch.cat([still[1:], other])])
        if not bool(moves[: len(still) - 1].any()) and bool(moves[len(still) - 1 :].any(1).all()):
            return True  # one way always gives the same answer, and the other way never gives it
    if not bool((measure_change(second.mean(0), first.mean(0)) > tolerance).any()):
        return False
    scale = answers.norm(dim=2).mean(0).clamp(min=1e-12)
    flat = (answers / scale[:, None]).flatten(1)
    products = (flat @ flat.T).cpu().numpy()
    signs = _list_signs()
    gaps = ((signs @ products) * signs).sum(1)  # squared distance between the two means, for each division
    ours = np.array([1.0 if way == "A" else -1.0 for way in _ORDER]) / (len(_ORDER) // 2)
    # Rounding always goes with the way to ask, so divisions that give as large a gap up to rounding count as well.
    slack = tolerance / 8 * len(scale) ** 0.5
    return bool((gaps.clip(0) ** 0.5 >= (ours @ products @ ours) ** 0.5 - slack).mean() <= _LEVEL)


def find_batch_dependence(ask: Ask, batch: Tensor, real: int, logits: Tensor, module: nn.Module) -> str | None:
    """Query images of a batch again: in another order beside other images, alone, and beside copies of themselves.

    Costs one pass of the batch's width and three narrow ones.

    Args:
        ask: queries the model with one batch. A batch that it raises a `ModelError` for is not compared.
        batch: images [L, C, H, W].
        real: the first so many images count; the others are padding.
        logits: of the images that count, [real, K].
        module: the model, to look for the cause.

    Returns:
        None, or a sentence that says what differs and names the likely cause.
    """
    for how, tolerance, n, again in _compositions(ask, batch, real):
        try:
            change = measure_change(again(), logits[:n])
            if not bool((change > tolerance).any()):
                continue
            if not answers_differ(lambda n=n: ask(batch)[:n], again, tolerance):  # type: ignore[misc]
                continue
        except ModelError:
            continue
        predicted = int((again().argmax(1) != logits[:n].argmax(1)).sum())
        return (
            f"The model's answer to an image depends on the other images of the batch: {how}, the logits of "
            f"{int((change > tolerance).sum())} of {n} images change by up to {float(change.max()):.1e} of their "
            f"length, and {predicted} predictions change. {_name_cause(module)}"
        )
    return None


def _compositions(ask: Ask, batch: Tensor, real: int) -> Iterator[tuple[str, float, int, Callable[[], Tensor]]]:
    """Yield in words how images are asked again, the tolerance, how many images, and the query for their logits."""
    width = max(len(batch), 2)
    n = min(real, (width + 1) // 2)
    others = 0.75 - batch[torch.arange(width - n) % real] / 2  # gray negatives, in [0, 1]
    mixed = torch.cat([others, batch[:n].flip(0)])
    alone = min(real, 2)
    copies = batch[:1].expand(3, *batch.shape[1:]).contiguous()
    same = width == len(batch)
    yield "in another order, beside other images", NOISE if same else _WIDTH_NOISE, n, lambda: ask(mixed)[-n:].flip(0)
    yield "alone", _WIDTH_NOISE, alone, lambda: torch.cat([ask(batch[i : i + 1]) for i in range(alone)])
    yield "beside copies of itself", _WIDTH_NOISE, 1, lambda: ask(copies)[:1]


def _name_cause(module: nn.Module) -> str:
    """Name the modules that are known to mix the images of a batch."""
    found = []
    for name, part in module.named_modules():
        about = f"{name.removeprefix('inner.')} ({type(part).__name__}"
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
            found.append(f"{about} with track_running_stats=False)")
        elif getattr(part, "batch_first", True) is False and isinstance(part, nn.RNNBase | nn.MultiheadAttention):
            found.append(f"{about} with batch_first=False)")
        elif isinstance(part, nn.Softmax | nn.LogSoftmax | nn.Softmin | nn.CosineSimilarity) and part.dim == 0:
            found.append(f"{about} with dim=0)")
        elif isinstance(part, nn.Flatten) and part.start_dim == 0:
            found.append(f"{about} with start_dim=0)")
    if found:
        return f"Likely cause: {', '.join(found[:3])}{' and more' if found[3:] else ''}."
    return (
        "No module of it is known to do that: look in `forward` for a mean, norm, softmax, pooling, sort or ranking "
        "over dim 0, for batch statistics, for normalization (InstanceNorm) of images without a batch dimension, and "
        "for something that is kept from an earlier batch."
    )
