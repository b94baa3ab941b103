"""What the comparisons with other libraries share: a model and its images as both sides get them, and one judge."""

import os
import tempfile
import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.classifier.batch_width import BatchWidths, default_lanes
from robbench.classifier.prepare import pick_device, prepare
from robbench.core.machine import keep_freed_memory
from robbench.core.stats import mcnemar
from robbench.core.threat import Ball
from robbench.core.types import Status
from robbench.data.sets import load
from robbench.evaluation.run import evaluate
from robbench.models.card import Registry
from robbench.models.load import load_model
from robbench.suite import load_suite

BATCH = 250  # AutoAttack's default; torchattacks has none


class Seen:
    """Samples that passed through a model and its copies."""

    def __init__(self) -> None:
        self.forwards = self.backwards = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class Counted(nn.Module):
    """Counts the samples that pass through a model, forwards and backwards; copies of it count in the same place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, Seen()
        self.train(model.training)  # a new module trains, and torchattacks would hand that mode on to the model

    def forward(self, x: Tensor) -> Tensor:
        """Answer as the model does."""
        logits: Tensor = self.model(x)
        self.seen.forwards += len(x)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, grad: Tensor) -> None:
        self.seen.backwards += len(grad)


@dataclass(frozen=True)
class Setup:
    """What all processes agree on."""

    samples: int
    seed: int
    threads: int
    device: str
    data_dir: str | None
    gradients: str | None = None  # robbench's, as `evaluate` takes it


@dataclass(frozen=True, eq=False)
class Given:
    """What every side is given: the model twice, correctly classified images on the CPU, and the threat."""

    plain: nn.Module  # as loaded
    prepared: nn.Module  # the copy that robbench runs on
    x: Tensor
    y: Tensor
    index: NDArray[np.int64]
    ball: Ball
    dataset: str
    widths: BatchWidths  # checked in the uncounted run, as evaluation checks them once for all attacks
    n: int  # images before the misclassified ones were left out
    right: NDArray[np.int64]  # the positions among them of those that stayed
    weights: str  # SHA-256 of the model's
    seed: int
    device: torch.device


@dataclass(frozen=True)
class Side:
    """What one side did with a model: which images stand, how many passes it made, and how long it took."""

    robust: NDArray[np.bool_]
    passes: int
    seconds: float


def evaluated(model: str, suite: str, **options: Any) -> tuple[Side, int]:
    """Run a suite; returns what it did, and how many images are classified correctly."""
    with tempfile.TemporaryDirectory() as folder:
        result = evaluate(model, suite, results=folder, **options)
        (path,) = Path(folder).glob("*/*/*/outcomes.parquet")
        rows = pd.read_parquet(path)
    status = rows.pivot(index="sample", columns="attack", values="status")
    robust = (status == Status.ROBUST).all(axis=1).to_numpy()
    clean = int((status.iloc[:, 0] != Status.MISCLASSIFIED).sum())
    return Side(robust, result.forwards + result.backwards, result.seconds), clean


def against(a: Side, b: Side) -> tuple[str, str]:
    """Count the images that only a and only b broke, with the p of the exact McNemar test on them, as text."""
    mine, other = int((b.robust & ~a.robust).sum()), int((a.robust & ~b.robust).sum())
    return f"{mine} / {other}", f"{mcnemar(mine, other):.2g}"


@cache
def given(model: str, setup: Setup) -> Given:
    """Load a model and its images, once in each process."""
    device = pick_device(setup.device)
    entry = Registry.default().find(model)
    data = load(entry.dataset, "test", setup.data_dir)
    loaded = load_model(entry, device)
    plain = loaded.module
    n = min(setup.samples, len(data))
    x, y = torch.from_numpy(data.x[:n]).float() / data.scale, torch.from_numpy(data.y[:n])
    ball, prepared = Ball.of(load_suite("autoattack").threat(entry.dataset)), prepare(plain, device, x[:2])
    widths = BatchWidths(
        prepared, x.shape[1:], default_lanes(x.shape[1:], device), x.dtype, setup.gradients is not None
    )
    every, weights = np.arange(n), loaded.weights_sha256
    g = Given(
        plain, prepared, x, y, data.index[:n], ball, entry.dataset, widths, n, every, weights, setup.seed, device
    )  # fmt: skip
    right = np.flatnonzero(~wrong(plain, g, x))
    return replace(g, x=x[right], y=y[right], index=g.index[right], right=right)


@torch.no_grad()
def wrong(model: nn.Module, g: Given, x: Tensor) -> NDArray[np.bool_]:
    """Tell which images [N, C, H, W] the model gets wrong, with finite logits."""
    logits = torch.cat([model(part.to(g.device)).cpu() for part in x.split(BATCH)])
    return ((logits.argmax(1) != g.y) & logits.isfinite().all(1)).numpy()


def start(setup: Setup, keep: bool) -> None:
    """Begin a process: robbench keeps freed memory and sums in one order, a peer's user does not."""
    torch.set_num_threads(setup.threads)
    # pyautoattack remarks on zero gradients of the DLR loss at every batch.
    warnings.filterwarnings("ignore", message="there are .* points with zero gradient")
    if keep:
        keep_freed_memory()
    else:
        os.environ.pop("MKL_CBWR", None)
