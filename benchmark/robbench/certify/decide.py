"""Decides about one image: proven, or a candidate for a break, or open. The judge decides about candidates."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robbench.certify.bounds import Gaps, Region, find_bounds
from robbench.certify.branch import Answer, bound_margins, prove_by_branching
from robbench.certify.exact import MOST_NUMBERS, MOST_UNITS, Program, count_numbers, solve_margin
from robbench.certify.layers import Graph
from robbench.core.threat import Ball
from robbench.core.types import Threat

__all__ = ["Decision", "decide"]

_SOLVER = 1e-5
"""What a margin must exceed to be proven: the tolerances of HiGHS, 1e-6, passed through the layers."""
_RETRY_SHARE = 0.2  # of the time limit that must be left for another round
_STEPS = 40  # with which a point is moved further into the wrong class
_BRANCHING_SHARE = 0.3  # of a class's time in the exact method; the program gets the rest


@dataclass(frozen=True, eq=False)
class Decision:
    """What the bounds, the parts and the program say about one image.

    Attributes:
        is_proven: whether every point of the region has margins above the tolerance.
        margin: a lower bound of the smallest margin over the region.
        point: a point [*shape] whose margin in float64 is negative, or None.
    """

    is_proven: bool
    margin: float
    point: Tensor | None = None


def decide(graph: Graph, x: Tensor, y: int, threat: Threat, method: str, seconds: float) -> Decision:
    """Decide about an image that the network classifies correctly.

    Bounds and programs let every layer be off by what float32 may round (`bounds.bound_noise`). A margin counts as
    proven only above the tolerance of the solver. What lies closer is open.

    Args:
        graph: the network.
        x: the image, [*shape].
        y: its class.
        threat: the ball. The method `exact` needs Linf.
        method: `bounds` for bounds and branching; `exact` for the program, too.
        seconds: time limit.
    """
    deadline = time.monotonic() + seconds
    region = Region.of(x, threat)
    with torch.no_grad():
        found = find_bounds(graph, region, deadline=deadline)
        others = [k for k in range(graph.nodes[-1].shape[0]) if k != y]
        write_whole = functools.cache(lambda: Program.of(graph, region, found.gaps))
        margins = dict(zip(others, bound_margins(graph, region, found.gaps, y, others, _SOLVER), strict=True))
        waiting = sorted((k for k in others if not margins[k] > _SOLVER), key=margins.__getitem__)
        is_lost = False  # whether more time would not help a class
        while waiting and not is_lost and time.monotonic() < deadline - _RETRY_SHARE * seconds:
            undecided = []
            for turn, k in enumerate(waiting):
                begin = time.monotonic()
                left = (deadline - begin) / (len(waiting) - turn)
                answer = _decide_class(graph, region, found.gaps, y, k, left, method, write_whole)
                if answer.point is not None:  # its margin bounds the smallest one from above, not from below
                    return Decision(False, min(margins.values()), _deepen(graph, x, y, threat, answer.point))
                margins[k] = max(margins[k], answer.margin)
                if not answer.is_proven:
                    undecided.append(k)
                    is_lost |= time.monotonic() - begin < left / 2
            waiting = undecided  # they begin anew with the time that other classes left over
    return Decision(not waiting, min(margins.values()))


def _decide_class(
    graph: Graph,
    region: Region,
    gaps: Gaps,
    y: int,
    other: int,
    seconds: float,
    method: str,
    write_whole: Callable[[], Program],
) -> Answer:
    """Decide about one wrong class. `write_whole` writes the program of the whole region, which all classes share."""
    begin = time.monotonic()
    end = begin + seconds

    def solve(part: Gaps) -> Answer | None:
        units = sum(int(part.unstable(at).sum()) for at in part.low)
        is_finite = all(bool(t.isfinite().all()) for v in (part.low, part.high, part.noise) for t in v.values())
        if region.norm != "Linf" or not is_finite or units > MOST_UNITS or count_numbers(graph, part) > MOST_NUMBERS:
            return None
        program = write_whole() if part is gaps else Program.of(graph, region, part)
        return solve_margin(graph, region, program, y, other, _SOLVER, end)

    branching = begin + seconds * (_BRANCHING_SHARE if method == "exact" else 1)
    answer = prove_by_branching(graph, region, gaps, y, other, _SOLVER, branching, solve)
    if answer.is_proven or answer.point is not None or method != "exact":
        return answer
    return solve(gaps) or answer


def _deepen(graph: Graph, x: Tensor, y: int, threat: Threat, point: Tensor) -> Tensor:
    """Move a point of the region into the ball, which is a little smaller, and down the margin.

    The judge computes in float32. It may not confirm a margin that is barely negative.
    """
    ball, clean = Ball.of(threat), x.double()[None]
    at = best = ball.project(clean, point[None])
    least = math.inf
    for step in range(_STEPS):
        at.requires_grad_(True)
        with torch.enable_grad():
            logits = graph.run(at)[0]
            others = torch.cat([logits[:y], logits[y + 1 :]])
            margin = logits[y] - others.max()
            gradient = torch.autograd.grad(margin, at)[0]
        at = at.detach()
        if float(margin.detach()) < least:
            least, best = float(margin.detach()), at
        size = float(threat.eps) * 0.2 * 0.85**step
        at = ball.project(clean, at - size * ball.steepest(at, gradient))
    return best[0]
