"""Models with a known exact answer, and other things that several tests share."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robbench.__main__ import main
from robbench.attacks import Attack
from robbench.classifier.batch_width import BatchWidths
from robbench.core import rng
from robbench.core.threat import Ball
from robbench.core.types import NORMS
from robbench.engine import engine

# The models here are tiny: threads only wait for each other, above all on a machine that is busy otherwise.
torch.set_num_threads(1)


class Linear(nn.Module):
    """Two classes told apart by w·x + b in float64-exact arithmetic: logits (+s, −s) / 2 · scale."""

    def __init__(self, w: Tensor, b: Tensor | float, classes: int = 2, scale: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(w.flatten())
        self.b = nn.Parameter(torch.as_tensor(b, dtype=w.dtype))
        self.classes, self.scale = classes, scale

    def forward(self, x: Tensor) -> Tensor:
        s = (x.flatten(1) @ self.w + self.b) * self.scale / 2
        rest = torch.full((len(x), self.classes - 2), -10.0 * self.scale, dtype=x.dtype)
        return torch.cat([torch.stack([s, -s], dim=1), rest], dim=1)


@dataclass(frozen=True, kw_only=True)
class Scripted:
    """An attack that proposes whatever the test tells it to."""

    kind: ClassVar[str] = "scripted"
    version: ClassVar[int] = 1
    norms: ClassVar[tuple[str, ...]] = NORMS
    needs_grad: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False
    memoryless: ClassVar[bool] = False
    points: tuple[float, ...]  # every pixel takes these values in turn
    trials: int = 1

    @property
    def steps(self):
        return len(self.points) - 1

    def init(self, p, ball):
        return {"x": torch.full_like(p.x, self.points[0])}

    def loss(self, logits, p, s):
        return torch.zeros_like(logits[:, 0])

    def step(self, p, ball, s, t, logits, loss, grad):
        values = torch.tensor(self.points)[(t + 1).clamp(max=self.steps)]
        return {"x": torch.ones_like(s["x"]) * values.view(-1, 1, 1, 1)}


def run_attack(
    model: nn.Module,
    attack: Attack,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    sample: np.ndarray | None = None,
    lanes: int = 16,
    seed: int = 0,
    **options: object,
) -> engine.Rows:
    """Call the engine with the usual defaults; rows come back ordered by sample."""
    ids = np.arange(len(y)) if sample is None else sample
    widths = options.pop("widths", None) or BatchWidths(model, x.shape[1:], lanes, x.dtype)
    key = rng.make_key(seed, "test")
    rows = engine.attack_samples(model, attack, x, y, ids, ball, key=key, widths=widths, **options)
    order = np.argsort(rows.sample)
    columns = {n: getattr(rows, n)[order] for n in engine.Rows.__dataclass_fields__ if n != "x_adv"}
    x_adv = None if rows.x_adv is None else rows.x_adv[torch.from_numpy(order)]
    return engine.Rows(**columns, x_adv=x_adv)


def run(*args: object, cwd: Path | None = None, code: int = 0, **env: str) -> SimpleNamespace:
    """Run a command as `python -m robbench` does, in this process, and check its exit code: its stdout and stderr."""
    out, err, found = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, env),
        mock.patch.object(sys, "argv", ["robbench", *map(str, args)]),
    ):
        try:
            main()
        except SystemExit as ended:
            found = int(ended.code or 0)
    assert found == code, out.getvalue() + err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def small(seed: int = 0) -> nn.Module:
    """A network of two layers with fixed weights."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (2 / max(p[0].numel(), 1)) ** 0.5)
    return net.eval()


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A model, 60 images, and labels of which every tenth is misclassified."""
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    model = small()
    y = model(x).argmax(1)
    y[::10] = (y[::10] + 1) % 10  # every tenth is misclassified
    return model, x, y


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test's own folder makes importable is gone afterwards: the next one may have a module of the same name."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if "pytest-of-" in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def repo() -> Path:
    """The checkout that holds these tests."""
    return Path(__file__).resolve().parents[1]
