"""Looking ahead in a random search: one batch holds the next proposals of each search.

A random search keeps few of its proposals. So the next proposals are known in advance: they follow from the point that
the search holds now, as long as it keeps none of them. The batch holds several of them for each search. Each search
then moves to the first proposal that it keeps or that ends it. Answers to later proposals are dropped. A proposal that
does not change the point is not queried, because its answer is known. The records are the same as step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robbench.attacks.base import Searching
from robbench.core.threat import Ball
from robbench.core.types import Judge, Problem, State
from robbench.engine.judge import read_logits
from robbench.engine.query import take_lanes
from robbench.engine.targeted import as_attacked

__all__ = ["MAX_QUERIES", "Lookahead", "look_ahead"]

MAX_QUERIES = 8
"""Queries for one search in one batch. If a search keeps one proposal in 20, it uses 5 of 6 answers."""


@dataclass(frozen=True, eq=False)
class Lookahead:
    """Where each of L searches went.

    Attributes:
        x: the point that the search is at now, [L, C, H, W].
        logits: at x, [L, K].
        loss: at x, [L].
        steps: number of proposals that the search passed without keeping them, [L] int64.
        nonfinite: number of these whose logits held NaN or infinity, [L] int64.
    """

    x: Tensor
    logits: Tensor
    loss: Tensor
    steps: Tensor
    nonfinite: Tensor


def look_ahead(
    ask: Callable[[Problem, State], tuple[Tensor, Tensor]],
    attack: Searching,
    p: Problem,
    s: State,
    ball: Ball,
    t: Tensor,
    *,
    width: int,
    judge: Judge,
) -> Lookahead:
    """Follow each search to the next point that it keeps, that breaks its sample, or that is the last of its trial.

    Args:
        ask: (problem, state) -> logits and loss at `state["x"]`, for exactly `width` lanes. The state holds `x` only.
        attack: proposes the points.
        p: one row per search: L of them, at most `width`.
        s: the state of each search, before the query.
        ball: where the points lie.
        t: the step that each search is at, [L].
        width: queries in the batch. Each search gets `width // L` of them, at most `MAX_QUERIES`.
        judge: whether any point may break a sample, or the final one only.
    """
    each = min(width // len(t), MAX_QUERIES)
    points, known = attack.further(as_attacked(p), ball, s, t, each)
    ahead = torch.arange(points.shape[1], device=t.device)
    step = t[:, None] + ahead
    # A last point is always queried, because the judge needs its logits. A search queries at least one point.
    asked = (~known | (step == attack.steps) | ((ahead == len(ahead) - 1) & known.all(1, keepdim=True))) & (
        step <= attack.steps
    )
    asked &= asked.cumsum(1) <= each
    lane, number = asked.nonzero(as_tuple=True)
    n = len(lane)
    padding = lane.new_zeros(width - n)
    at = torch.cat([lane, padding])
    logits, loss = ask(take_lanes(p, {}, at)[0], {"x": points[at, torch.cat([number, padding])]})
    answer = torch.zeros_like(step)  # the row of the batch that holds the answer to each point
    answer[lane, number] = torch.arange(n, device=t.device)
    stop = attack.keeps(s, loss[answer]) | (step == attack.steps)
    target = None if p.target is None else p.target[at]
    _, is_wrong, is_finite = (row[answer] for row in read_logits(logits, p.y[at], target))
    if judge == "any":
        stop |= is_wrong
    stop &= asked
    last = torch.where(asked, ahead, 0).amax(1)
    first = torch.where(stop.any(1), stop.int().argmax(1), last)
    every = torch.arange(len(t), device=t.device)
    chosen, passed = answer[every, first], asked & (ahead < first[:, None])
    return Lookahead(points[every, first], logits[chosen], loss[chosen], first, (passed & ~is_finite).sum(1))
