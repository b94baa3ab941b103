"""Run one attack in the ways that tests need, and judge what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from robbench.attacks import Attack
from robbench.classifier.batch_width import BatchWidths, default_lanes
from robbench.core import rng
from robbench.core.threat import Ball
from robbench.core.types import NORMS, Problem
from robbench.engine import engine

FIELDS = [f for f in engine.Rows.__dataclass_fields__ if f not in ("seconds", "x_adv")]


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


def differing(a, b):
    """Name the columns in which two tables of records differ; wall time does not count."""
    return [f for f in FIELDS if not np.array_equal(getattr(a, f), getattr(b, f), equal_nan=f == "distance")]


def judged(model, x, y, x_adv, ball):
    """One judge for both sides, apart from the engine's: wrong, finite, inside ball and box, in float32."""
    assert x_adv.dtype == torch.float32
    with torch.no_grad():
        logits = model(x_adv)
    return ((logits.argmax(1) != y) & logits.isfinite().all(1) & ball.contains(x, x_adv)).numpy()


def ours(model, x, y, ball, attack, **options):
    """Which images an attack of robbench breaks; `judged` must agree with its records."""
    lanes = default_lanes(x.shape[1:], torch.device("cpu"))
    rows = run_attack(model, attack, x, y, ball, lanes=lanes, keep_adversarials=True, **options)
    broken = judged(model, x, y, rows.x_adv, ball)
    assert np.array_equal(broken, rows.broken), "the records say what the adversarial examples show"
    return broken


def walk(attack, x, ball, losses, key=(1, 2)):
    """Every state of a trial whose losses [steps, L] are given, the first one included."""
    lanes = torch.arange(len(x))
    p = Problem(x=x, y=torch.zeros_like(lanes), sample=lanes, trial=torch.zeros_like(lanes), key=key)
    states = [attack.init(p, ball)]
    for t, loss in enumerate(losses):
        logits, grad = torch.zeros(len(x), 2), torch.zeros_like(x)
        states.append(attack.step(p, ball, states[-1], torch.full_like(lanes, t), logits, loss.to(x.dtype), grad))
    return states


def queried(model, attack, x, y, ball, trial=0):
    """Run one trial as a plain loop; every point that is queried, and whether it is misclassified."""
    lanes = torch.arange(len(y))
    with torch.no_grad():
        p = Problem(x, y, lanes, torch.full_like(lanes, trial), rng.make_key(0, "test"), model(x))
    s = attack.init(p, ball)
    points = [s["x"]]
    for t in range(attack.steps):
        s = attack.step(p, ball, s, torch.full_like(lanes, t), *engine.query(model, attack, p, s, True))
        points.append(s["x"])
    with torch.no_grad():
        return points, [model(v).argmax(1) != y for v in points]


def smallest(points, wrong, x, ball):
    """The distance of the nearest misclassified point of each trial, infinite where there is none."""
    found = [torch.where(w, ball.distance(x, v), torch.inf) for v, w in zip(points, wrong, strict=True)]
    return torch.stack(found).amin(0)
