"""Whether the answer to an image depends on the other images of its batch, and why.

Attacks query an image beside other images, beside other points of the same image, and beside padding. A verdict means
something only if the answer to an image is the same in all of these batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.classifier.moved_images import NARROW, Ask, MovedImages, measure_change
from robbench.core.errors import ModelError

__all__ = ["NOISE", "answers_differ", "find_batch_dependence"]

NOISE = 1e-4
"""Share of the logits' length that is far above rounding, in batches of one shape (AutoAttack's check)."""

# Kernels of another batch width may compute in another precision, such as TF32 on a GPU (2^-11 for each product).
_WIDTH_NOISE = 2e-2

_ORDER = "ABBABAABBAABABBA"  # no rhythm: a model that alternates between two answers gives both to A and to B
_LEVEL = 5e-4  # of the permutation test; 2 of the 12870 permutations are its least value


@lru_cache
def _list_signs() -> NDArray[np.float64]:
    """List all ways to divide 16 answers into two groups of 8, as ±1/8: [12870, 16]."""
    half = len(_ORDER) // 2
    chosen = np.array(list(itertools.combinations(range(len(_ORDER)), half)))
    signs = np.full((len(chosen), len(_ORDER)), -1.0)
    np.put_along_axis(signs, chosen, 1.0, axis=1)
    return signs / half


def answers_differ(a: Callable[[], Tensor], b: Callable[[], Tensor], tolerance: float, least: float = 0.0) -> bool:
    """Tell whether two ways to ask give different answers, beyond what the model varies when it is asked again.

    Each way is asked 8 times, in turn. An exact permutation test compares the two mean answers, so a randomized model
    passes, whatever it draws and whether or not the images of a batch share it.

    Args:
        a: asks one way, logits [n, K].
        b: asks the other way about the same images.
        tolerance: the mean answers must differ by more than this share of their length, in the worst image.
        least: see `measure_change`.
    """
    answers = torch.stack([{"A": a, "B": b}[way]().double() for way in _ORDER]).nan_to_num(0.0, 0.0, 0.0)
    first, second = (answers[[way == name for way in _ORDER]] for name in "AB")
    for still, other in ((first, second), (second, first)):
        moves = torch.stack(
            [measure_change(answer, still[0], least) > tolerance for answer in torch.cat([still[1:], other])]
        )
        if not bool(moves[: len(still) - 1].any()) and bool(moves[len(still) - 1 :].any(1).all()):
            return True  # one way always gives the same answer, and the other way never gives it
    if not bool((measure_change(second.mean(0), first.mean(0), least) > tolerance).any()):
        return False
    scale = answers.norm(dim=2).mean(0).clamp(min=max(least, 1e-12))
    flat = (answers / scale[:, None]).flatten(1)
    products = (flat @ flat.T).cpu().numpy()
    signs = _list_signs()
    gaps = ((signs @ products) * signs).sum(1)  # squared distance between the two means, for each division
    ours = np.array([1.0 if way == "A" else -1.0 for way in _ORDER]) / (len(_ORDER) // 2)
    # Rounding always goes with the way to ask, so divisions that give as large a gap up to rounding count as well.
    slack = tolerance / 8 * len(scale) ** 0.5
    return bool((gaps.clip(0) ** 0.5 >= (ours @ products @ ours) ** 0.5 - slack).mean() <= _LEVEL)


@dataclass(frozen=True, eq=False)
class _Composition:
    """Two ways to ask about the same n images: as they were asked about before, and in another batch.

    Attributes:
        how: the other batch in words.
        tolerance: share of the logits' length that may change.
        answered: logits of the first query, [n, K].
        now: logits of the other query, [n, K].
        before: makes the first query again.
        again: makes the other query again.
    """

    how: str
    tolerance: float
    answered: Tensor
    now: Tensor
    before: Callable[[], Tensor]
    again: Callable[[], Tensor]


def find_batch_dependence(
    ask: Ask, batch: Tensor, real: int, logits: Tensor, module: nn.Module, moved: MovedImages | None
) -> str | None:
    """Query clean and moved images again: beside other images, alone, and beside copies of themselves.

    The other images are clean, or attacked, or leave the model unsure. Moved images have another range; they were asked
    about beside black and white ones, and are asked about alone. Costs three narrow passes, and seven of one image.

    Args:
        ask: queries the model with one batch. A batch that it raises a `ModelError` for is not compared.
        batch: clean images [L, C, H, W].
        real: the first so many images count; the others are padding.
        logits: of the images that count, [real, K].
        module: the model, to look for the cause.
        moved: moved images, and the answers to them; None if the model fails on them.

    Returns:
        None, or a sentence that says what differs and names the likely cause.
    """
    least = moved.least if moved else 0.0
    for compose in _list_compositions(ask, batch, real, logits, moved):
        try:
            c = compose()
            change = measure_change(c.now, c.answered, least)
            if not bool((change > c.tolerance).any()) or not answers_differ(c.before, c.again, c.tolerance, least):
                continue
        except ModelError:
            continue
        predicted = int((c.now.argmax(1) != c.answered.argmax(1)).sum())
        return (
            f"The model's answer to an image depends on the other images of the batch: {c.how}, the logits of "
            f"{int((change > c.tolerance).sum())} of {len(change)} images change by up to {float(change.max()):.1e} of "
            f"their length, and {predicted} predictions change. {_name_cause(module)}"
        )
    return None


def _list_compositions(
    ask: Ask, batch: Tensor, real: int, logits: Tensor, moved: MovedImages | None
) -> Iterator[Callable[[], _Composition]]:
    """Yield functions that ask about images in another batch."""

    def compare(how: str, n: int, again: Callable[[], Tensor], now: Tensor | None = None) -> Callable[[], _Composition]:
        """Compare the first n clean images with what was answered in the batch of clean images."""
        same = moved is not None and now is not None and len(moved.batches[0]) == len(batch)
        noise = NOISE if same else _WIDTH_NOISE
        return lambda: _Composition(
            how, noise, logits[:n], again() if now is None else now, lambda: ask(batch)[:n], again
        )

    def alone(x: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.cat([ask(image) for image in x.split(1)])  # type: ignore[no-untyped-call]

    def beside(x: Tensor, others: Tensor) -> Callable[[], Tensor]:
        filled = torch.cat([x, others[torch.arange(narrow - len(x)) % len(others)]])
        return lambda: ask(filled)[: len(x)]

    if moved is not None:
        n, mixed = moved.clean, moved.batches[0]
        yield compare("in another order, beside other images", n, lambda: ask(mixed)[-n:].flip(0), moved.now)
    yield compare("alone", min(real, 2), alone(batch[: min(real, 2)]))
    copies = batch[:1].expand(3, *batch.shape[1:]).contiguous()
    yield compare("beside copies of itself", 1, lambda: ask(copies)[:1])
    if moved is None:
        return
    x, narrow = moved.x, min(len(mixed), NARROW)
    some, scaled = min(real, max(1, narrow // 8)), moved.find_scaled()
    unsure = moved.find_unsure(narrow)
    yield compare("beside images that it is unsure about", some, beside(batch[:some], x[unsure]))
    if (attacked := moved.attacked) is not None:
        stay = min(some, max(1, len(attacked) // 8))
        yield compare("beside attacked images", stay, beside(batch[:stay], attacked))
    rows = torch.cat([scaled, unsure[:2]])
    parts = moved.batches
    yield lambda: _Composition(
        "for moved images, alone",
        _WIDTH_NOISE,
        moved.answers[rows],
        alone(x[rows])(),
        lambda: torch.cat([ask(part) for part in parts])[rows],
        alone(x[rows]),
    )


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
