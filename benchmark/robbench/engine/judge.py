"""The judge: the only code that decides whether a point counts as a break.

A point breaks its sample if all of this holds:

1. The suite's rule lets the point count: `any` queried point, or only the `final` point of a trial (`judge_points`).
2. The logits are finite, and the predicted class is not y, or with a target, it is the target (`read_logits`).
3. The point is finite, lies in the box [0, 1], and lies in the ball (`check_inside`).
4. If the logits come from a query with a gradient, 2. also holds without one and in the precision of the images, as the
   model is used (`ask_without_gradient`).
5. If the model is randomized, more than half of `draws` answers are wrong (`confirm_by_majority`). In float32
   this takes the place of 4., because all answers but the first are without a gradient.
6. Of a model that looked deterministic, every break is asked about twice. If the answers differ, 5. holds for this
   break (`find_random_lanes`), and a flag of the model says so.

An attack only proposes points. The judge believes nothing that an attack claims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robbench.classifier.batch_dependence import NOISE
from robbench.classifier.checks import RANDOMIZED_DRAWS
from robbench.classifier.gradient_mode import MODE_NOISE
from robbench.classifier.guard import list_flags
from robbench.classifier.moved_images import choose_least, measure_change
from robbench.core.threat import Ball
from robbench.core.types import Problem, State
from robbench.engine.job import AttackJob
from robbench.engine.query import take_lanes

__all__ = ["Answers", "Verdict", "judge_points", "read_answers", "read_logits"]

_MODE_CHANGE = 2e-2
"""Share of the logits' length that a query with a gradient may change by other kernels, at any batch width."""

_RANDOMIZED = (
    "The model answers differently when the judge asks about a break again, though it answers the images before the "
    f"attacks steadily. Such a break counts if more than half of {RANDOMIZED_DRAWS} answers are wrong. Gradients are "
    "noisy: attack the expectation over its randomness (eot = 20 in a suite) before trusting these numbers."
)

_GRADIENT_MODE = (
    "The model answers attacked images differently while gradients are on. A break counts only if it holds in "
    "torch.no_grad(). But attacks follow the gradients of another function, so the model looks more robust than it is. "
    "Look for torch.is_grad_enabled() and x.requires_grad in the model; attack it by queries too: --suite queries."
)

Ask = Callable[[Problem, State, int], tuple[Tensor, Tensor]]
"""(problem, state, n) -> logits [W, K] and loss [W] in the precision of the images, without a gradient.

Problem and state have W rows. The rows from n on are padding.
"""


@dataclass(eq=False)
class Answers:
    """What the logits say, on the CPU, one entry per lane.

    Attributes:
        prediction: predicted class, [L] int64.
        is_wrong: whether the logits are finite and the prediction is not y, or is the target, [L] bool.
        is_finite: whether all logits are finite, [L] bool.
    """

    prediction: NDArray[np.int64]
    is_wrong: NDArray[np.bool_]
    is_finite: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the judge found, one entry per lane.

    Attributes:
        is_break: whether the point counts as a break, [L] bool.
        distance: ‖x − x0‖ where the judge measured it, NaN elsewhere, [L] float64.
        forwards: further forward passes that the record is charged for, [L] int64.
        corrected: lanes [n], with their logits [n, K] and losses [n] in the precision of the images; None if the judge
            did not ask again.
    """

    is_break: NDArray[np.bool_]
    distance: NDArray[np.float64]
    forwards: NDArray[np.int64]
    corrected: tuple[Tensor, Tensor, Tensor] | None


def judge_points(
    job: AttackJob,
    p: Problem,
    s: State,
    answers: Answers,
    live: NDArray[np.bool_],
    last: NDArray[np.bool_],
    with_grad: bool,
    ask: Ask,
    logits: Tensor,
) -> Verdict:
    """Decide for every lane whether its point `s["x"]` counts as a break.

    Args:
        job: ball, rule, number of draws, and whether gradients are computed in bfloat16.
        p: one row per lane.
        s: the state that was queried.
        answers: what the logits say. Where the judge asks again, the new answers replace these.
        live: which lanes hold a sample, [L].
        last: which lanes are at the last point of their trial, [L].
        with_grad: whether the logits come from a query with a gradient.
        ask: asks the model again.
        logits: what was answered, [L, K].
    """
    bfloat16 = with_grad and job.bfloat16
    may_count = live & (last | (job.judge == "any"))
    # At the last point bfloat16 may have hidden a break, so the judge asks again wherever a trial ends.
    candidate = may_count & (answers.is_wrong | (last & bfloat16))
    is_inside, distance = check_inside(job.ball, p.x, s["x"], candidate)
    forwards, corrected = np.zeros(len(live), np.int64), None
    doubtful = candidate & (is_inside | (last & bfloat16))
    draws, is_random = job.draws, np.full(len(live), job.draws > 1)
    if (bfloat16 or job.draws == 1) and doubtful.any():
        at, again, loss = ask_without_gradient(job, p, s, answers, doubtful, ask)
        corrected = (at, again, loss) if with_grad else None
        # A last point needs no bfloat16, so its query is charged once. Confirming a break is the judge's own affair.
        forwards += bfloat16 & doubtful & ~last
        if job.draws == 1 and not bfloat16:  # answers in bfloat16 differ anyway
            draws, is_random = RANDOMIZED_DRAWS, find_random_lanes(job, p, s, at, logits, again, with_grad, ask)
    is_break = is_inside & answers.is_wrong
    # If the answers of a model that looked deterministic differ, neither of the two decides.
    claims = is_random & (is_break if job.draws > 1 else is_inside)
    if claims.any():
        forwards += claims * (draws - 1)
        is_break = np.where(claims, confirm_by_majority(job, p, s["x"], answers.is_wrong, claims, draws), is_break)
    return Verdict(is_break, distance, forwards, corrected)


def read_logits(logits: Tensor, y: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Read logits [L, K]: predicted class, whether it is wrong, whether all logits are finite, [L] each.

    With a target [L], only the target is wrong. A lane with a NaN or an infinity is never wrong, so it never breaks its
    sample.
    """
    is_finite, prediction = logits.isfinite().all(1), logits.argmax(1)
    is_wrong = prediction != y if target is None else prediction == target
    return prediction, is_finite & is_wrong, is_finite


def read_answers(
    logits: Tensor, y: Tensor, more: Sequence[Tensor] = (), target: Tensor | None = None
) -> tuple[Answers, NDArray[np.bool_]]:
    """Read logits [L, K], and copy the answers and m boolean rows [L] to the CPU in one transfer.

    Each transfer synchronizes a GPU.

    Returns:
        The answers, and the further rows, [m, L].
    """
    prediction, is_wrong, is_finite = read_logits(logits, y, target)
    values = torch.stack([prediction, *(row.long() for row in (is_wrong, is_finite, *more))]).cpu().numpy()
    rows: NDArray[np.bool_] = values[1:] == 1
    return Answers(values[0], rows[0], rows[1]), rows[2:]


def check_inside(
    ball: Ball, x0: Tensor, x: Tensor, candidate: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Check where the candidates lie.

    Returns:
        Whether the point is finite, in the box and in the ball (false for other lanes), and ‖x − x0‖ (NaN for other
        lanes), [L] each.
    """
    is_inside, distance = candidate.copy(), np.full(len(x), np.nan)
    if candidate.any():
        at = torch.from_numpy(np.flatnonzero(candidate)).to(x.device)
        is_inside[candidate] = ball.contains(x0[at], x[at]).cpu().numpy()
        distance[candidate] = ball.distance(x0[at], x[at]).cpu().numpy()
    return is_inside, distance


def ask_without_gradient(
    job: AttackJob, p: Problem, s: State, answers: Answers, doubtful: NDArray[np.bool_], ask: Ask
) -> tuple[Tensor, Tensor, Tensor]:
    """Ask again, without a gradient and in the precision of the images, where a verdict depends on it.

    The new answers replace the old ones in `answers`.

    Returns:
        The lanes [n], their logits [n, K], and the attack's losses [n].
    """
    lanes = np.flatnonzero(doubtful)
    n = len(lanes)
    at = torch.from_numpy(np.resize(lanes, job.widths.fit(n))).to(job.device)
    asked, state = take_lanes(p, s, at)
    logits, loss = (answer[:n] for answer in ask(asked, state, n))
    found, _ = read_answers(logits, asked.y[:n], target=None if asked.target is None else asked.target[:n])
    answers.prediction[lanes] = found.prediction
    answers.is_wrong[lanes], answers.is_finite[lanes] = found.is_wrong, found.is_finite
    return at[:n], logits, loss


def find_random_lanes(
    job: AttackJob, p: Problem, s: State, at: Tensor, first: Tensor, again: Tensor, with_grad: bool, ask: Ask
) -> NDArray[np.bool_]:
    """Find the lanes where the model answers the same query differently, and flag the model.

    Costs a pass only if the second answers differ from the first.

    Args:
        job: the model.
        p: one row per lane.
        s: the state that was queried.
        at: the lanes that were asked about again, [n].
        first: the first answers, [L, K].
        again: the second answers, without a gradient, [n, K].
        with_grad: whether the first answers come from a query with a gradient.
        ask: asks the model again.

    Returns:
        One entry per lane, [L] bool.
    """
    is_random = np.zeros(len(first), bool)
    first = first[at]
    least = choose_least(first)
    change = measure_change(again, first, least)
    if not bool((change > MODE_NOISE).any()):
        return is_random
    n = len(at)
    rows = torch.from_numpy(np.resize(at.cpu().numpy(), job.widths.fit(n))).to(at.device)
    third = ask(*take_lanes(p, s, rows), n)[0][:n]
    differs = (measure_change(third, again, least) > NOISE) & (change > MODE_NOISE)
    is_random[at.cpu().numpy()] = differs.cpu().numpy()
    flags = list_flags(job.model)
    if is_random.any():
        flags.setdefault("randomized", _RANDOMIZED)
    elif with_grad and bool((change > _MODE_CHANGE).any()):
        flags.setdefault("gradient_mode", _GRADIENT_MODE)
    return is_random


def confirm_by_majority(
    job: AttackJob, p: Problem, x: Tensor, is_wrong: NDArray[np.bool_], claims: NDArray[np.bool_], draws: int
) -> NDArray[np.bool_]:
    """Tell which claimed breaks hold in more than half of `draws` answers. The first answer is `is_wrong`."""
    votes = torch.from_numpy(is_wrong).to(x.device).long()
    for _ in range(draws - 1):
        with torch.no_grad():
            votes = votes + read_logits(job.model(x), p.y, p.target)[1]
    held: NDArray[np.bool_] = claims & (2 * votes > draws).cpu().numpy()
    return held
