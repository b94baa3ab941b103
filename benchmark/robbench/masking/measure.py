"""Measurements of one model for the checks. The suite `sanity` must have run on the model before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pandas as pd
import torch

from robbench.attacks import PGD
from robbench.classifier.batch_width import device_of
from robbench.core.numbers import whole_box
from robbench.core.threat import Ball
from robbench.evaluation.stages import ReadyStage
from robbench.evaluation.transfer import Transfer
from robbench.masking.binarization import run_binarization_test
from robbench.masking.compare import compare_attacks, compute_zero_share, mark_robust
from robbench.masking.gradient_probe import AttackTrace, GradientProbe
from robbench.masking.gradients import (
    choose_points,
    count_autograd_calls,
    measure_gradient_quality,
    measure_linear_estimate,
    measure_logit_scale,
    measure_randomness,
)
from robbench.masking.measurements import Cost, LossTraces, Measurements, RadiusCurve, StepGrid, Transferred
from robbench.results.schema import ResultFile

__all__ = ["CheckBudget", "run_measurements"]

_T = TypeVar("_T")

_RADII = (0.25, 0.5, 1.0, 2.0, 4.0)  # shares of eps; a radius that contains the whole box is added
_SIZES = (0.05, 0.25, 1.0, 2.0)  # shares of eps
_ITERATIONS = (5, 10, 20, 40)
_USUAL = (1, 2)  # indices in _SIZES and _ITERATIONS of the usual PGD: eps/4, 20 steps
_LAST = 10  # last steps, in which the loss of a converged attack no longer rises (Pintor et al. 2022, indicator 4)
_NEIGHBOURS, _WIDTH = 100, 8 / 255  # number and side of the box of neighbours (Pintor et al. 2022, indicator 2)


@dataclass(frozen=True, kw_only=True)
class CheckBudget:
    """Number of images of each expensive measurement. docs/sanity.md gives the cost of each."""

    gradients: int = 32
    traces: int = 64
    unstable: int = 16
    curve: int = 64
    grid: int = 32
    binarization: int = 16
    linear: int = 64
    transfers: int = 64
    randomness: int = 128


def run_measurements(
    probe: GradientProbe,
    result: ResultFile,
    rows: pd.DataFrame,
    transfers: Sequence[ReadyStage],
    *,
    differentiable: bool,
    probabilities: bool,
    budget: CheckBudget | None = None,
) -> Measurements:
    """Measure a model on its correctly classified images.

    Args:
        probe: the model and the correctly classified images.
        result: the result of the suite `sanity` on this model.
        rows: the records of the result.
        transfers: the transfer stages of the suite.
        differentiable: whether autograd connects the model's output to its input.
        probabilities: whether the model's outputs are probabilities.
        budget: number of images of each measurement; None means the defaults.
    """
    b = budget or CheckBudget()
    usual = PGD(objective="ce_scaled", steps=20)
    annealed = PGD(objective="ce_scaled", steps=20, relative_step=2.0, anneal=True)

    def timed(name: str, images: int, run: Callable[[GradientProbe], _T]) -> _T:
        part = probe.take_first(images)
        with part.count_cost(name):
            return run(part)

    points = timed("points", b.gradients, lambda part: choose_points(part, usual))
    zero = compute_zero_share(result, rows)
    no_gradient = not differentiable or zero >= 0.5
    transfers = transfers if no_gradient else ()  # all other models are attacked by their own gradient
    robust = mark_robust(rows, result.attacks[0].name)
    robust_of = torch.from_numpy(robust.reindex(probe.sample).to_numpy(dtype=bool, copy=True))
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
        nonfinite_gradients="nonfinite_gradients" in result.flags,
        challenges=compare_attacks(result, rows),
        autograd_calls=timed("autograd", 2, count_autograd_calls),
        randomness=timed("randomness", b.randomness, lambda part: measure_randomness(part, points)),
        scale=timed("loss scale", len(probe), measure_logit_scale),
        gradients=timed("gradient quality", b.gradients, lambda part: measure_gradient_quality(part, points)),
        traces=timed("loss curves", b.traces, lambda part: _measure_traces(part, usual, b.unstable)),
        curve=timed("radii", b.curve, lambda part: _measure_curve(part, usual)),
        grid=timed("step sizes", b.grid, _measure_grid),
        binarization=timed("binarization", b.binarization, lambda part: run_binarization_test(part, (usual, annealed))),
        linear=timed("linear estimate", b.linear, lambda part: measure_linear_estimate(part, robust_of[: b.linear])),
        transferred=timed("transfer", b.transfers, lambda part: [_measure_transfer(part, s) for s in transfers]),
        cost={},
    )
    cost = {"suite": Cost(forwards=result.forwards - result.backwards, pairs=result.backwards, seconds=result.seconds)}
    return measurements.model_copy(update={"cost": cost | probe.costs})


def _measure_traces(probe: GradientProbe, usual: PGD, unstable: int) -> LossTraces:
    """Record the losses of the usual PGD and of PGD with twice its steps."""
    longer = probe.trace_attack("trace", replace(usual, steps=2 * usual.steps))
    # Both attacks have the same start and step size, so the first half of the longer trace is the usual PGD's trace.
    end = usual.steps + 1
    short = AttackTrace(longer.loss[:end], longer.margin[:end], longer.x)
    broken = short.margin > 0
    broken_so_far = broken.cummax(0).values
    robust = ~longer.margin.gt(0).any(0)
    low, middle, high = (short.loss.double().quantile(q, dim=1).tolist() for q in (0.1, 0.5, 0.9))
    return LossTraces(
        images=len(probe),
        standing=int((~broken_so_far[-1]).sum()),
        silent=int((broken_so_far[-1] & ~broken[-1]).sum()),
        unfinished=_measure_unfinished(longer, robust),
        unstable=_measure_unstable(probe.take_first(unstable), short),
        loss=_finite(middle),
        loss_low=_finite(low),
        loss_high=_finite(high),
        longer=_finite(longer.loss.double().quantile(0.5, dim=1).tolist()),
        share=(1 - broken_so_far.double().mean(1)).tolist(),
    )


def _finite(values: list[float]) -> list[float]:
    """Replace infinite and undefined values, which JSON cannot store, by 1e30."""
    return [v if math.isfinite(v) else 1e30 for v in values]


def _measure_unfinished(trace: AttackTrace, robust: torch.Tensor) -> float | None:
    """Return the share of the best loss's rise in the last steps, as a median over robust images."""
    best = trace.loss[:, robust].double().cummax(0).values
    if not best.shape[1]:
        return None
    rise = best[-1] - best[0]
    last = best[-1] - best[-1 - _LAST]
    # Where the losses are NaN or infinite, nothing says that they have stopped to rise.
    return float((last / rise.clamp(min=1e-12)).nan_to_num(1.0, 1.0, 1.0).median())


def _measure_unstable(probe: GradientProbe, trace: AttackTrace) -> float | None:
    """Return the relative change of the margin between final points and their neighbours, as a median over images."""
    p = probe.make_problem("unstable")
    ball = Ball("Linf", _WIDTH / 2)
    x, y = trace.x[: len(probe)], p.y
    centre = replace(p, x=x)
    margins = probe.compute_margins(x, y)
    moved = [probe.compute_margins(ball.random(centre, step=k), y) for k in range(_NEIGHBOURS)]
    share = ((torch.stack(moved) - margins).abs() / margins.abs()).nan_to_num(0.0, 1.0, 1.0).clamp(max=1).mean(0)
    return float(share.median()) if len(share) else None


def _measure_curve(probe: GradientProbe, usual: PGD) -> RadiusCurve:
    """Attack at several radii, up to one that contains the whole box."""
    norm, pixels = probe.ball.norm, probe.x[0].numel()
    whole = whole_box(norm, pixels)
    radii = [*(r * probe.ball.eps for r in _RADII if r * probe.ball.eps < whole), whole]
    broken = [probe.run_attack("radii", usual, Ball(norm, eps)).broken.tolist() for eps in radii]
    return RadiusCurve(eps=radii, broken=broken)


def _measure_grid(probe: GradientProbe) -> StepGrid:
    """Attack once with each step size. The records give the result for fewer iterations."""
    broken = []
    for size in _SIZES:
        rows = probe.run_attack("grid", PGD(objective="ce_scaled", steps=max(_ITERATIONS), relative_step=size))
        broken.append([rows.broken & (rows.step <= steps) for steps in _ITERATIONS])
    usual = broken[_USUAL[0]][_USUAL[1]]
    strongest = max((cell for cells in broken for cell in cells), key=lambda cell: int(cell.sum()))
    return StepGrid(
        images=len(probe),
        sizes=list(_SIZES),
        iterations=list(_ITERATIONS),
        standing=[[int((~cell).sum()) for cell in cells] for cells in broken],
        usual=_USUAL,
        beyond=int((strongest & ~usual).sum()),
        behind=int((usual & ~strongest).sum()),
    )


def _measure_transfer(probe: GradientProbe, stage: ReadyStage) -> Transferred:
    """Count the points of a transfer attack that the surrogate and the model classify wrongly."""
    assert isinstance(stage.attack, Transfer)
    fooled = broken = 0
    device = device_of(stage.attack.surrogate)
    for at, batch in stage.attack.propose(probe.x, probe.y, probe.sample, probe.ball, stage.key, probe.widths.lanes):
        order = np.argsort(probe.sample[at])
        y = probe.y[torch.from_numpy(at[order])].repeat_interleave(batch.trials)
        with torch.no_grad():
            surrogate_wrong = stage.attack.surrogate(batch.points.to(device)).argmax(1).cpu() != y
        model_wrong = probe.compute_logits(batch.points.to(probe.target.device)).argmax(1).cpu() != y
        fooled += int(surrogate_wrong.sum())
        broken += int((surrogate_wrong & model_wrong).sum())
    return Transferred(name=stage.name, images=len(probe), fooled=fooled, broken=broken)
