"""Several steps of a random search with one question: most proposals are not kept, so the next ones are known before.

The batch holds the next proposals of each search, as they follow if none of them is kept. Each search then goes to the
first that is, or that ends it; what was asked beyond that is dropped. Proposals that change nothing are not asked at
all: their answer is known. Step by step the same comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robbench.attacks.base import Searching
from robbench.core.threat import Ball
from robbench.core.types import Judge, Problem, State

__all__ = ["MOST", "Leap", "leap", "rows"]

MOST = 8  # questions for one search at once: with one proposal in 20 kept, 5 of 6 answers are of use


@dataclass(frozen=True, eq=False)
class Leap:
    """Where each search went, [L] and more.

    Attributes:
        x: the point it is at now, [L, C, H, W].
        logits: the answer there, [L, K].
        loss: the attack's there, [L].
        steps: how many it passed on the way, none of which it kept, [L] int64.
        nonfinite: how many of the answers to those were NaN or infinite, [L] int64.
    """

    x: Tensor
    logits: Tensor
    loss: Tensor
    steps: Tensor
    nonfinite: Tensor


def rows(p: Problem, s: State, at: Tensor) -> tuple[Problem, State]:
    """Take some lanes of a problem and of its state."""
    taken = {name: getattr(p, name)[at] for name in ("x", "y", "sample", "trial")}
    p = replace(p, **taken, logits=None if p.logits is None else p.logits[at])
    return p, {name: value[at] for name, value in s.items()}


def leap(
    ask: Callable[[Problem, State], tuple[Tensor, Tensor]],
    attack: Searching,
    p: Problem,
    s: State,
    ball: Ball,
    t: Tensor,
    *,
    width: int,
    judge: Judge,
) -> Leap:
    """Follow each search to the next point that it keeps, that breaks it, or that is its last.

    Args:
        ask: (problem, state) -> logits and loss at `state["x"]`, all that the state holds, for exactly `width` lanes.
        attack: what proposes.
        p: one row per search, L of them, at most `width`.
        s: the state of each, about to be asked about.
        ball: where the points lie.
        t: the step each is at, [L].
        width: questions in all; each search has `width // L` of them, or `MOST`.
        judge: whether any point may break a sample.
    """
    each = min(width // len(t), MOST)
    points, known = attack.further(p, ball, s, t, each)
    ahead = torch.arange(points.shape[1], device=t.device)
    step = t[:, None] + ahead
    # The last point is asked about again, because it may be judged; a search that would ask nothing asks one.
    asked = (~known | (step == attack.steps) | ((ahead == len(ahead) - 1) & known.all(1, keepdim=True))) & (
        step <= attack.steps
    )
    asked &= asked.cumsum(1) <= each
    lane, number = asked.nonzero(as_tuple=True)
    n = len(lane)
    padding = lane.new_zeros(width - n)
    at = torch.cat([lane, padding])
    logits, loss = ask(rows(p, {}, at)[0], {"x": points[at, torch.cat([number, padding])]})
    answer = torch.zeros_like(step)  # which of them belongs to which point
    answer[lane, number] = torch.arange(n, device=t.device)
    finite = logits.isfinite().all(1)[answer]
    stop = attack.keeps(s, loss[answer]) | (step == attack.steps)
    if judge == "any":
        stop |= finite & (logits.argmax(1)[answer] != p.y[:, None])
    stop &= asked
    last = torch.where(asked, ahead, 0).amax(1)
    first = torch.where(stop.any(1), stop.int().argmax(1), last)
    every = torch.arange(len(t), device=t.device)
    chosen, passed = answer[every, first], asked & (ahead < first[:, None])
    return Leap(points[every, first], logits[chosen], loss[chosen], first, (passed & ~finite).sum(1))
