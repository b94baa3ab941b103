"""Everything that the checks look at, measured on one model; the records of the suite `sanity` are made before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pandas as pd
import torch

from robbench.attacks import PGD
from robbench.core.threat import Ball, whole_box
from robbench.evaluation.stages import ReadyStage
from robbench.evaluation.transfer import Transfer
from robbench.masking.binarization import binarization
from robbench.masking.compare import challenges, standing
from robbench.masking.gradients import autograd_calls, gradient_quality, linear_estimate, loss_scale, randomness
from robbench.masking.measurements import Cost, Curve, Grid, Measurements, Traces, Transferred
from robbench.masking.probe import Probe, Trace
from robbench.results.schema import ResultFile

__all__ = ["Budget", "measure"]

_T = TypeVar("_T")

_RADII = (0.25, 0.5, 1.0, 2.0, 4.0)  # of eps; the whole box comes last
_SIZES = (0.05, 0.25, 1.0, 2.0)  # of eps
_ITERATIONS = (5, 10, 20, 40)
_USUAL = (1, 2)  # the cell of the usual PGD: a quarter of eps, 20 steps
_LAST = 10  # steps in which a finished attack no longer rises (Pintor et al. 2022, indicator 4)
_NEIGHBOURS, _WIDTH = 100, 8 / 255  # of the indicator of unstable predictions


@dataclass(frozen=True, kw_only=True)
class Budget:
    """On how many images the dear measurements are made; docs/sanity.md says what each costs."""

    gradients: int = 32
    traces: int = 64
    unstable: int = 16
    curve: int = 64
    grid: int = 32
    binarization: int = 16
    linear: int = 64
    transfers: int = 64
    randomness: int = 128


def measure(
    probe: Probe,
    result: ResultFile,
    rows: pd.DataFrame,
    transfers: Sequence[ReadyStage],
    *,
    differentiable: bool,
    probabilities: bool,
    budget: Budget | None = None,
) -> Measurements:
    """Measure a model on its correctly classified images.

    Args:
        probe: model and images.
        result: of the suite `sanity` on them.
        rows: its records.
        transfers: its transfer stages.
        differentiable: whether the model's answer has a path for gradients at all.
        probabilities: whether its answers are probabilities.
        budget: how many images each measurement looks at.
    """
    b = budget or Budget()
    usual = PGD(objective="ce", steps=20)
    annealed = PGD(objective="ce_scaled", steps=20, relative_step=2.0, anneal=True)

    def timed(name: str, images: int, run: Callable[[Probe], _T]) -> _T:
        part = probe.first(images)
        with part.counting(name):
            return run(part)

    zero = _zero_share(result, rows)
    dead = not differentiable or zero >= 0.5  # only then do a stand-in's points carry the number
    left = standing(rows, result.attacks[0].name)
    left_of = torch.from_numpy(left.reindex(probe.sample).to_numpy(dtype=bool, copy=True))
    with torch.no_grad():
        classes = probe.target.module(probe.x[:2].to(probe.target.device)).shape[1]
    measurements = Measurements(
        n=result.n,
        correct=len(probe),
        classes=classes,
        pgd=result.attacks[0].robust_accuracy,
        best=result.robust_accuracy,
        differentiable=differentiable,
        probabilities=probabilities,
        zero_gradients=zero,
        challenges=challenges(result, rows),
        autograd_calls=timed("autograd", 2, autograd_calls),
        randomness=timed("randomness", b.randomness, randomness),
        scale=timed("loss scale", len(probe), loss_scale),
        gradients=timed("gradient quality", b.gradients, gradient_quality),
        traces=timed("loss curves", b.traces, lambda part: _traces(part, usual, b.unstable)),
        curve=timed("radii", b.curve, lambda part: _curve(part, usual)),
        grid=timed("step sizes", b.grid, _grid),
        binarization=timed("binarization", b.binarization, lambda part: binarization(part, (usual, annealed))),
        linear=timed("linear estimate", b.linear, lambda part: linear_estimate(part, left_of[: b.linear])),
        transferred=timed("transfer", b.transfers, lambda part: [_transferred(part, s) for s in transfers if dead]),
        cost={},
    )
    cost = {"suite": Cost(forwards=result.forwards - result.backwards, pairs=result.backwards, seconds=result.seconds)}
    return measurements.model_copy(update={"cost": cost | probe.costs})


def _zero_share(result: ResultFile, rows: pd.DataFrame) -> float:
    """Share of exactly zero gradients among all that the usual PGD and its control asked for."""
    usual = result.attacks[0]
    names = [a.name for a in result.attacks if a.config == usual.config]
    mine = rows[rows["attack"].isin(names)]
    asked = int(mine["backwards"].sum())
    return int(mine["zero_gradients"].sum()) / asked if asked else 0.0


def _traces(probe: Probe, usual: PGD, unstable: int) -> Traces:
    """Follow the usual PGD and one of twice its steps to their ends."""
    longer = probe.trace("trace", replace(usual, steps=2 * usual.steps))
    # The first half is the usual attack: the same start and the same constant step.
    end = usual.steps + 1
    short = Trace(longer.loss[:end], longer.margin[:end], longer.x)
    broken = short.margin > 0
    until = broken.cummax(0).values
    stands = ~longer.margin.gt(0).any(0)
    low, middle, high = (short.loss.double().quantile(q, dim=1).tolist() for q in (0.1, 0.5, 0.9))
    return Traces(
        images=len(probe),
        standing=int((~until[-1]).sum()),
        silent=int((until[-1] & ~broken[-1]).sum()),
        unfinished=_unfinished(longer, stands),
        unstable=_unstable(probe.first(unstable), short),
        loss=_finite(middle),
        loss_low=_finite(low),
        loss_high=_finite(high),
        longer=_finite(longer.loss.double().quantile(0.5, dim=1).tolist()),
        share=(1 - until.double().mean(1)).tolist(),
    )


def _finite(values: list[float]) -> list[float]:
    return [v if math.isfinite(v) else 1e30 for v in values]


def _unfinished(found: Trace, stands: torch.Tensor) -> float | None:
    """Measure, over images that stand, the median share of the best loss's rise that came in the last steps."""
    best = found.loss[:, stands].double().cummax(0).values
    if not best.shape[1]:
        return None
    rise = best[-1] - best[0]
    last = best[-1] - best[-1 - _LAST]
    return float((last / rise.clamp(min=1e-12)).median())


def _unstable(probe: Probe, found: Trace) -> float | None:
    """Measure how much the margin at the final points changes among their neighbours, as a share of itself."""
    p = probe.problem("unstable")
    ball = Ball("Linf", _WIDTH / 2)
    x, y = found.x[: len(probe)], p.y
    middle = replace(p, x=x)

    here = probe.margins(x, y)
    changes = torch.stack([(probe.margins(ball.random(middle, step=k), y) - here).abs() for k in range(_NEIGHBOURS)])
    share = (changes / here.abs()).nan_to_num(0.0, 1.0, 1.0).clamp(max=1).mean(0)
    return float(share.median()) if len(share) else None


def _curve(probe: Probe, usual: PGD) -> Curve:
    """Attack at other radii, and with the whole box."""
    norm, pixels = probe.ball.norm, probe.x[0].numel()
    whole = whole_box(norm, pixels)
    radii = [*(r * probe.ball.eps for r in _RADII if r * probe.ball.eps < whole), whole]
    broken = [probe.attack("radii", usual, Ball(norm, eps)).broken.tolist() for eps in radii]
    return Curve(eps=radii, broken=broken)


def _grid(probe: Probe) -> Grid:
    """Attack with each step size; fewer iterations are read off the records."""
    broken = []
    for size in _SIZES:
        rows = probe.attack("grid", PGD(objective="ce", steps=max(_ITERATIONS), relative_step=size))
        broken.append([rows.broken & (rows.step <= most) for most in _ITERATIONS])
    usual = broken[_USUAL[0]][_USUAL[1]]
    strongest = max((cell for line in broken for cell in line), key=lambda cell: int(cell.sum()))
    return Grid(
        images=len(probe),
        sizes=list(_SIZES),
        iterations=list(_ITERATIONS),
        standing=[[int((~cell).sum()) for cell in line] for line in broken],
        usual=_USUAL,
        beyond=int((strongest & ~usual).sum()),
        behind=int((usual & ~strongest).sum()),
    )


def _transferred(probe: Probe, stage: ReadyStage) -> Transferred:
    """Try a surrogate's points on the surrogate and on the model."""
    assert isinstance(stage.attack, Transfer)
    fooled = broken = 0
    device = next(stage.attack.surrogate.parameters()).device
    for at, given in stage.attack.propose(probe.x, probe.y, probe.sample, probe.ball, stage.key, probe.widths.lanes):
        order = np.argsort(probe.sample[at])
        y = probe.y[torch.from_numpy(at[order])]
        with torch.no_grad():
            wrong = stage.attack.surrogate(given.points.to(device)).argmax(1).cpu() != y
        held = probe.logits(given.points.to(probe.target.device)).argmax(1).cpu() != y
        fooled += int(wrong.sum())
        broken += int((wrong & held).sum())
    return Transferred(name=stage.name, images=len(probe), fooled=fooled, broken=broken)
