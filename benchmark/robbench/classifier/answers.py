"""The answers of a model to a few fixed images: a fingerprint of its function, whatever that function is made of.

The digest of the tensors does not see a function that lies in NumPy arrays, plain lists, closures, files or numbers of
a TorchScript module. The answers change with it. They are stored beside a result as text, one line of logits per image.
The line of an image is empty if the model fails on it. If the model answers it differently when it is asked twice, the
line holds the mean of 16 answers, and their spread after a "|".
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robbench.classifier.checks import compute_logits
from robbench.classifier.prepare import Target
from robbench.core import rng
from robbench.core.errors import ModelError

__all__ = ["FIRST_IMAGES", "AnswerProbe", "describe_other_answers", "is_comparable"]

FIRST_IMAGES = 8
"""Number of images of the data set that a probe takes."""

_MIXED, _NOISE = 12, 12  # means of two images lie near boundaries of classes; noise lies where no image is
_ROUNDING = 2e-3
"""Share of the spread of the logits that kernels, processors and torch versions may change. At most 1e-6 was seen."""
_COARSE_ROUNDING = 5e-2  # the same for a model that computes with fewer bits than float32
_OFFSET = 1e-2  # share of the length of the logits that counts as spread: rounding grows with logits, not with spread
_DRAWS = 16  # answers to an image that is answered at random
_MAX_ERRORS = 5.0  # standard errors by which two means of so many answers may differ
_MORE_ASKS = 8  # when answers differ: a model that is random at times gives the stored answer again
_MOST_OUTLIERS = 1  # rounding can tip one image over a step inside the model, such as the sign of an activation

Row = NDArray[np.float64] | None


def is_comparable(answers: Sequence[str]) -> bool:
    """Return whether any of the stored answers can be compared."""
    return any(answers)


def describe_other_answers(where: object, change: str) -> str:
    """Return the message for stored records of a model that answers differently now: what changed, and what to do."""
    return (
        f"{where}: the model answers differently since: {change}. Class, structure and tensors are the same, so its "
        "function lies elsewhere too: NumPy arrays, plain lists, a closure, a file, numbers. Nothing was computed or "
        "overwritten. Use --overwrite to replace the stored records, or another name or --results DIR for new ones."
    )


@dataclass(frozen=True, eq=False)
class AnswerProbe:
    """Asks a model about a few fixed images, in one narrow batch. The state of global random generators is kept.

    Attributes:
        target: the model.
        first: the first images of the data set, at most `FIRST_IMAGES`, [n, C, H, W] in [0, 1].
        lanes: batch width of the run.
    """

    target: Target
    first: Tensor
    lanes: int

    def record(self) -> list[str]:
        """Return the answers as they are stored. The model is asked twice, and 16 times more if its answers differ."""
        x = self._make_images()
        with _keep_random_state(self.target.device):  # around both: a random model must not draw the same twice
            once, again = self._ask(x), self._ask(x)
            steady = _measure_changes(once, again) <= self._choose_tolerance(again)
            means, spreads = self._ask_often(x) if not steady.all() else (once, np.zeros(len(x)))
        lines = []
        for row, other, same, mean, spread in zip(once, again, steady, means, spreads, strict=True):
            if row is None or other is None or mean is None:
                lines.append("")
            elif same:
                lines.append(" ".join(f"{v:.9g}" for v in row))
            else:
                lines.append(" ".join(f"{v:.9g}" for v in mean) + f" | {spread:.9g}")
        return lines

    def describe_change(self, stored: Sequence[str]) -> str:
        """Say how the answers differ from stored ones, beyond rounding. Return "" if they do not.

        Images that were not answered, then or now, are not compared. The model is asked again only if its answers
        differ.
        """
        x, (rows, spreads) = self._make_images(), _parse(stored)
        if not is_comparable(stored) or len(rows) != len(x):
            return ""
        least = np.full(len(x), math.inf)
        flips = compared = tolerance = 0.0
        with _keep_random_state(self.target.device):
            for _ in range(1 + _MORE_ASKS):
                now, slack = self._ask(x), np.zeros(len(x))
                if spreads.any():
                    means, noise = self._ask_often(x)
                    now = [mean if s else row for row, mean, s in zip(now, means, spreads, strict=True)]
                    slack = _MAX_ERRORS * (2 / _DRAWS) ** 0.5 * np.where(spreads > 0, np.maximum(spreads, noise), 0)
                least = np.minimum(least, _measure_changes(rows, now, slack))
                tolerance = self._choose_tolerance(now)
                both = [(a, b) for a, b in zip(rows, now, strict=True) if a is not None and b is not None]
                flips, compared = sum(_predict(a) != _predict(b) for a, b in both), len(both)
                if (least > tolerance).sum() <= (_MOST_OUTLIERS if compared > FIRST_IMAGES else 0):
                    return ""
        size = float(least.max())
        how = f"by up to {100 * size:.2g} % of their spread" if math.isfinite(size) else "in shape, or in NaN"
        return (
            f"its logits for {int((least > tolerance).sum())} of {compared} fixed images differ {how}, and "
            f"{flips} of its predictions"
        )

    def _make_images(self) -> Tensor:
        """Return the images, means of pairs, and uniform noise, [n + 24, C, H, W]. All processors make the same."""
        first, n, k = self.first, len(self.first), torch.arange(_MIXED)
        mixed = (first[k % n] + first[(k + 1 + k // n) % n]) / 2
        draws, zero = torch.arange(_NOISE), torch.zeros(_NOISE, dtype=torch.int64)
        noise = rng.uniform(rng.make_key(0, "answers"), draws, zero, 0, math.prod(first.shape[1:]))
        return torch.cat([first, mixed, noise.view(_NOISE, *first.shape[1:]).to(first.dtype)])

    def _ask(self, x: Tensor) -> list[Row]:
        """Return the logits of each image, [K]; None where the model fails."""
        with _full_precision(self.target.device):
            try:
                return list(compute_logits(self.target, x, min(len(x), self.lanes)).double().numpy())
            except (ModelError, RuntimeError, MemoryError):
                return [self._ask_alone(image) for image in x.split(1)]  # type: ignore[no-untyped-call]

    def _ask_often(self, x: Tensor) -> tuple[list[Row], NDArray[np.float64]]:
        """Return the mean of 16 answers to each image, None unless all of them are finite, and their spreads [n].

        The spread is the root of the summed variances of the logits.
        """
        draws = [self._ask(x) for _ in range(_DRAWS)]
        means: list[Row] = []
        spreads = np.zeros(len(x))
        for i, rows in enumerate(zip(*draws, strict=True)):
            given = [row for row in rows if row is not None and np.isfinite(row).all()]
            whole = len(given) == _DRAWS and len({row.shape for row in given}) == 1
            means.append(np.mean(given, axis=0) if whole else None)
            spreads[i] = float(np.var(given, axis=0, ddof=1).sum()) ** 0.5 if whole else 0.0
        return means, spreads

    def _ask_alone(self, image: Tensor) -> Row:
        # At the width of the run: a traced model may know no other.
        batch = image.expand(self.lanes, *image.shape[1:]).contiguous()
        try:
            row: Row = compute_logits(self.target, batch, self.lanes)[0].double().numpy()
        except (ModelError, RuntimeError, MemoryError):  # the run itself words it
            return None
        return row

    def _choose_tolerance(self, rows: Sequence[Row]) -> float:
        """Return what rounding may change: more if weights or answers have fewer bits than float32."""
        parts = [*self.target.module.parameters(), *self.target.module.buffers()]
        narrow = any(p.is_floating_point() and p.element_size() < 4 for p in parts)
        narrow |= any("quantized" in type(part).__module__ for part in self.target.module.modules())
        answered = [row for row in rows if row is not None]
        if answered and not narrow:
            z = torch.from_numpy(np.concatenate(answered)).float().nan_to_num(0.0, 0.0, 0.0)
            narrow = any(torch.equal(z.to(kind).float(), z) for kind in (torch.bfloat16, torch.float16))
        return _COARSE_ROUNDING if narrow else _ROUNDING


def _parse(stored: Sequence[str]) -> tuple[list[Row], NDArray[np.float64]]:
    """Read stored answers: logits of each image, and the spread of random ones, 0 for steady ones, [n]."""
    parts = [text.partition("|") for text in stored]
    rows = [np.array([float(v) for v in logits.split()]) if logits else None for logits, _, _ in parts]
    return rows, np.array([float(spread or 0) for _, _, spread in parts])


def _predict(row: NDArray[np.float64]) -> int:
    return int(np.nan_to_num(row, nan=-math.inf).argmax())


def _measure_changes(
    stored: Sequence[Row], now: Sequence[Row], slack: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Return for each image the distance of its two answers beyond `slack` [n], as a share of the stored spread.

    The share is 0 where an answer is missing, and infinite if shapes or the places of NaN and infinity differ.
    """
    spreads = [None if row is None else _measure_spread(row) for row in stored]
    typical = float(np.median([s for s in spreads if s is not None] or [0.0]))
    changes = np.zeros(len(stored))
    for i, (a, b, spread) in enumerate(zip(stored, now, spreads, strict=True)):
        if a is None or b is None or spread is None:
            continue
        if a.shape != b.shape or not np.array_equal(np.isfinite(a), np.isfinite(b)):
            changes[i] = math.inf
            continue
        finite = np.isfinite(a)
        scale = max(spread, typical) + _OFFSET * float(np.linalg.norm(a[finite]))
        distance = float(np.linalg.norm(a[finite] - b[finite])) - (0.0 if slack is None else slack[i])
        changes[i] = max(distance, 0.0) / max(scale, 1e-12)
    return changes


def _measure_spread(row: NDArray[np.float64]) -> float:
    finite = row[np.isfinite(row)]
    return float(np.linalg.norm(finite - finite.mean())) if len(finite) else 0.0


@contextlib.contextmanager
def _keep_random_state(device: torch.device) -> Iterator[None]:
    """Restore the global random generators, so that a randomized model draws the same numbers as without a probe."""
    numbers, words = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        np.random.set_state(numbers)
        random.setstate(words)


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Switch TF32 off on a GPU, where convolutions use it by default: its answers differ from those of a CPU."""
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cudnn
    kept = {name: bool(getattr(settings, name)) for name in ("enabled", "benchmark", "deterministic")}
    with settings.flags(**kept, allow_tf32=False):
        yield
