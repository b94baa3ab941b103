"""Common code of the comparisons with other libraries: the input of both sides, and one judge."""

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

BATCH = 250  # AutoAttack's default batch size; torchattacks has none


class PassCounts:
    """The number of samples that passed through a model and its copies, forwards and backwards."""

    def __init__(self) -> None:
        self.forwards = self.backwards = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class CountingModel(nn.Module):
    """Counts the samples that pass through a model, forwards and backwards. Copies share the counters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, PassCounts()
        # A new module is in training mode. Torchattacks would set the model to this mode.
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the model."""
        logits: Tensor = self.model(x)
        self.seen.forwards += len(x)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, grad: Tensor) -> None:
        self.seen.backwards += len(grad)


@dataclass(frozen=True)
class Setup:
    """The settings that all processes share."""

    samples: int
    seed: int
    threads: int
    device: str
    data_dir: str | None
    gradients: str | None = None  # robbench's, as `evaluate` takes it


@dataclass(frozen=True, eq=False)
class SharedInput:
    """The input of every side: the model as loaded and as prepared, correctly classified images, and the threat."""

    plain: nn.Module  # as loaded
    prepared: nn.Module  # the copy that robbench runs on
    x: Tensor
    y: Tensor
    index: NDArray[np.int64]
    ball: Ball
    dataset: str
    widths: BatchWidths  # checked in the uncounted run; an evaluation checks them once for all attacks
    n: int  # number of images, with misclassified ones
    right: NDArray[np.int64]  # positions of the correctly classified images among the n images
    weights: str  # SHA-256 of the model's weights
    seed: int
    device: torch.device


@dataclass(frozen=True)
class SideResult:
    """The result of one side on a model: robust images, number of passes, and seconds."""

    robust: NDArray[np.bool_]
    passes: int
    seconds: float


def evaluate_side(model: str, suite: str, **options: Any) -> tuple[SideResult, int]:
    """Run a suite. Return the result of this side, and the number of correctly classified images."""
    with tempfile.TemporaryDirectory() as folder:
        result = evaluate(model, suite, results=folder, **options)
        (path,) = Path(folder).glob("*/*/*/outcomes.parquet")
        rows = pd.read_parquet(path)
    status = rows.pivot(index="sample", columns="attack", values="status")
    robust = (status == Status.ROBUST).all(axis=1).to_numpy()
    clean = int((status.iloc[:, 0] != Status.MISCLASSIFIED).sum())
    return SideResult(robust, result.forwards + result.backwards, result.seconds), clean


def compare_sides(a: SideResult, b: SideResult) -> tuple[str, str]:
    """Return the counts of images that only a and only b broke, and the p of the exact McNemar test, as text."""
    only_a, only_b = int((b.robust & ~a.robust).sum()), int((a.robust & ~b.robust).sum())
    return f"{only_a} / {only_b}", f"{mcnemar(only_a, only_b):.2g}"


@cache
def load_input(model: str, setup: Setup) -> SharedInput:
    """Load a model and its images. Each process loads them once."""
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
    g = SharedInput(
        plain, prepared, x, y, data.index[:n], ball, entry.dataset, widths, n, every, weights, setup.seed, device
    )  # fmt: skip
    right = np.flatnonzero(~find_wrong(plain, g, x))
    return replace(g, x=x[right], y=y[right], index=g.index[right], right=right)


@torch.no_grad()
def find_wrong(model: nn.Module, g: SharedInput, x: Tensor) -> NDArray[np.bool_]:
    """Return which images [N, C, H, W] the model misclassifies with finite logits, [N]."""
    logits = torch.cat([model(part.to(g.device)).cpu() for part in x.split(BATCH)])
    return ((logits.argmax(1) != g.y) & logits.isfinite().all(1)).numpy()


def start_process(setup: Setup, keep: bool) -> None:
    """Set up a process. With `keep`, it has robbench's settings of memory and arithmetic, otherwise the usual ones."""
    torch.set_num_threads(setup.threads)
    # Pyautoattack warns of zero gradients of the DLR loss at every batch.
    warnings.filterwarnings("ignore", message="there are .* points with zero gradient")
    if keep:
        keep_freed_memory()
    else:
        os.environ.pop("MKL_CBWR", None)
