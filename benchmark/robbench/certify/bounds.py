"""Lower bounds of margins over a ball: intervals, and linear relaxation (CROWN) with slopes that can be optimized.

Sources: interval propagation as in Gowal et al. 2018; CROWN, Zhang et al. 2018; slopes and multipliers of splits as in
Wang et al. 2021 (beta-CROWN). Everything is float64. A maximum is b + max(d, 0) with d = a − b, so a relaxation bounds
max(d, 0) over an interval [l, u] of d: from above by u (d − l) / (u − l), from below by slope · d with slope in [0, 1].

The judge computes in float32. So every bound is of the network whose nodes may each be off by what float32 may round
(`bound_noise`). What is computed in float32 is one case of this, and so is what is computed exactly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robbench.certify.layers import Affine, Graph, Input, Maximum, Sum
from robbench.core.threat import DUAL, Ball, length
from robbench.core.types import Norm, Threat

__all__ = [
    "Bounds",
    "Gaps",
    "Region",
    "Relaxed",
    "bound_noise",
    "default_slopes",
    "find_bounds",
    "margin_rows",
    "relax",
]

_WIDEN = 1e-9
"""Relative and absolute amount by which every interval of a neuron grows: far above the rounding errors of float64."""
_MOST_NUMBERS = 2**24  # of one batch of rows


@dataclass(frozen=True, eq=False)
class Region:
    """The points that the judge lets count: a ball with the judge's slack, cut with the box [0, 1].

    Attributes:
        x: the image, [*shape] float64.
        norm: Linf, L2 or L1.
        eps: the radius, with slack.
        low: smallest value of each pixel, [*shape].
        high: largest value of each pixel, [*shape].
    """

    x: Tensor
    norm: Norm
    eps: float
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, x: Tensor, threat: Threat) -> Region:
        """Make the region around an image [*shape]."""
        x, eps = x.double().contiguous(), float(threat.eps)
        eps += 1.1e-6 if threat.norm == "Linf" else 1.1e-6 + 1.1e-5 * eps  # more than `Ball.contains` allows
        return cls(x, threat.norm, eps, (x - eps).clamp(min=0), (x + eps).clamp(max=1))

    def minimize(self, rows: Tensor) -> Tensor:
        """Bound linear functions from below: rows [R, *shape] -> [R]. In Linf, the bound is the exact minimum."""
        flat, low, high = rows.flatten(1), self.low.flatten(), self.high.flatten()
        box = flat.clamp(min=0) @ low + flat.clamp(max=0) @ high
        if self.norm == "Linf":
            return box
        return torch.maximum(box, flat @ self.x.flatten() - self.eps * length(DUAL[self.norm], flat))

    def minimizer(self, rows: Tensor) -> Tensor:
        """Return a point of the region where each linear function is small: [R, *shape] -> [R, *shape]."""
        if self.norm == "Linf":
            return torch.where(rows > 0, self.low, self.high)
        ball = Ball(self.norm, self.eps)
        start = self.x.expand_as(rows)
        return ball.project(start, start - self.eps * ball.steepest(start, rows))


@dataclass(eq=False)
class Gaps:
    """Intervals of d = a − b of every maximum: node -> [S or 1, *shape]. S is the number of subproblems.

    `noise` bounds the rounding errors of the other nodes: node -> [1, *shape].
    """

    low: dict[int, Tensor] = field(default_factory=dict)
    high: dict[int, Tensor] = field(default_factory=dict)
    noise: dict[int, Tensor] = field(default_factory=dict)

    def unstable(self, at: int) -> Tensor:
        """Return which entries may have either sign."""
        return (self.low[at] < 0) & (self.high[at] > 0)


@dataclass(eq=False)
class Bounds:
    """Intervals of all nodes for one region.

    Attributes:
        low: node -> [1, *shape].
        high: node -> [1, *shape].
        gaps: intervals of the maxima's differences.
    """

    low: dict[int, Tensor] = field(default_factory=dict)
    high: dict[int, Tensor] = field(default_factory=dict)
    gaps: Gaps = field(default_factory=Gaps)

    def size(self, at: int) -> Tensor:
        """Return the largest absolute value of each entry of a node, [1, *shape]."""
        return torch.maximum(self.low[at].abs(), self.high[at].abs())


@dataclass(frozen=True, eq=False)
class Relaxed:
    """A linear lower bound.

    Attributes:
        bound: lower bounds, [R].
        rows: the coefficients of the image, [R, *shape].
        slack: by how much each maximum's relaxation may miss the truth, node -> [R, *shape]; only if asked for.
    """

    bound: Tensor
    rows: Tensor
    slack: dict[int, Tensor]


def _spread(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return low - _WIDEN * (1 + low.abs()), high + _WIDEN * (1 + high.abs())


def find_bounds(graph: Graph, region: Region, relaxed: bool = True, deadline: float = math.inf) -> Bounds:
    """Find an interval of every node.

    Args:
        graph: the network.
        region: the points.
        relaxed: whether entries that interval propagation leaves unstable are bounded by linear relaxation, too.
        deadline: `time.monotonic()` from which on intervals must do.
    """
    found = Bounds()
    for at, node in enumerate(graph.nodes):
        match node:
            case Input():
                low, high = region.low[None], region.high[None]
            case Affine():
                centre = (found.low[node.parent] + found.high[node.parent]) / 2
                reach = node.absolute((found.high[node.parent] - found.low[node.parent]) / 2)
                centre = node.apply(centre) + node.bias
                noise = found.gaps.noise[at] = bound_noise(node, [found.size(node.parent)])
                low, high = _spread(centre - reach - noise, centre + reach + noise)
            case Sum():
                first, second = node.parents
                noise = found.gaps.noise[at] = bound_noise(node, [found.size(first), found.size(second)])
                low, high = _spread(
                    found.low[first] + found.low[second] - noise, found.high[first] + found.high[second] + noise
                )
            case Maximum():
                _bound_difference(graph, region, found, at, deadline if relaxed else -math.inf)
                gap_low, gap_high = found.gaps.low[at], found.gaps.high[at]
                if node.b is None:
                    low, high = gap_low.clamp(min=0), gap_high.clamp(min=0)
                else:
                    a, b = node.a, node.b
                    low = torch.maximum(found.low[a], found.low[b])
                    high = torch.maximum(found.high[a], found.high[b])
        found.low[at], found.high[at] = low, high
    return found


def _bound_difference(graph: Graph, region: Region, found: Bounds, at: int, deadline: float) -> None:
    node = graph.nodes[at]
    assert isinstance(node, Maximum)
    low, high = found.low[node.a], found.high[node.a]
    if node.b is not None:
        low, high = low - found.high[node.b], high - found.low[node.b]
    low, high = (side.clone(memory_format=torch.contiguous_format) for side in (low, high))
    unsure = ((low < 0) & (high > 0)).flatten().nonzero().flatten()
    if found.gaps.low or node.b is not None or region.norm != "Linf":
        slopes = default_slopes(found.gaps)
        for part in _chunks(graph, unsure):
            if time.monotonic() > deadline:
                break
            rows = torch.zeros(len(part), low.numel(), dtype=torch.float64)
            rows[torch.arange(len(part)), part] = 1
            rows = rows.view(-1, *node.shape)
            for sign, side in ((1, low), (-1, high)):
                start = graph.difference(at, sign * rows)
                bound = sign * relax(graph, region, found.gaps, start, slopes).bound
                pair = _spread(bound, bound)
                tight = torch.maximum if sign > 0 else torch.minimum
                flat = side.view(-1)
                flat[part] = tight(flat[part], pair[0] if sign > 0 else pair[1])
    found.gaps.low[at], found.gaps.high[at] = low, high


def _chunks(graph: Graph, entries: Tensor) -> Iterator[Tensor]:
    largest = max(math.prod(node.shape) for node in graph.nodes)
    width = max(1, _MOST_NUMBERS // largest)
    yield from (entries[i : i + width] for i in range(0, len(entries), width))


def default_slopes(gaps: Gaps) -> dict[int, Tensor]:
    """Choose the lower slopes of CROWN: 1 where the interval reaches further above 0 than below, else 0."""
    return {at: (gaps.high[at] >= -gaps.low[at]).double() for at in gaps.low}


def relax(
    graph: Graph,
    region: Region,
    gaps: Gaps,
    rows: dict[int, Tensor],
    slopes: dict[int, Tensor],
    multipliers: dict[int, Tensor] | None = None,
    *,
    want_slack: bool = False,
) -> Relaxed:
    """Bound linear functions of nodes from below over a region.

    Args:
        graph: the network.
        region: the points.
        gaps: intervals of the maxima, which may differ from row to row, and the rounding errors.
        rows: node -> coefficients [R, *shape]; the function is the sum over the nodes.
        slopes: lower slopes in [0, 1] of the maxima, [R or 1, *shape].
        multipliers: numbers added to the coefficients of d. For a split that asks d >= 0, any number <= 0 keeps the
            bound valid; for d <= 0, any number >= 0.
        want_slack: whether to compute `Relaxed.slack`.
    """
    waiting = dict(rows)
    count = len(next(iter(rows.values())))
    constant = torch.zeros(count, dtype=torch.float64)
    slack = {}

    def give(to: int, value: Tensor) -> None:
        waiting[to] = waiting[to] + value if to in waiting else value

    for at in range(max(waiting), 0, -1):
        given = waiting.pop(at, None)
        if given is None:
            continue
        if at in gaps.noise:
            constant = constant - given.abs().reshape(count, -1) @ gaps.noise[at].flatten()
        match graph.nodes[at]:
            case Affine() as node:
                constant = constant + given.reshape(count, -1) @ node.bias.flatten()
                give(node.parent, node.transpose(given))
            case Sum() as node:
                for parent in node.parents:
                    give(parent, given)
            case Maximum() as node:
                low, high = gaps.low[at], gaps.high[at]
                steep = (high.clamp(min=0) / (high.clamp(min=0) - low.clamp(max=0)).clamp(min=1e-300)).detach()
                below = torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, slopes[at]))
                through = given.clamp(min=0) * below + given.clamp(max=0) * steep
                lift = -steep * low.clamp(max=0)
                constant = constant + (given.clamp(max=0) * lift).reshape(count, -1).sum(1)
                if want_slack:
                    slack[at] = given.abs() * lift
                if multipliers is not None:
                    through = through + multipliers[at]
                give(node.a, through)
                if node.b is not None:
                    give(node.b, given - through)
    image = waiting.get(0)
    if image is None:
        image = torch.zeros((count, *region.x.shape), dtype=torch.float64)
    return Relaxed(constant + region.minimize(image), image, slack)


def margin_rows(graph: Graph, y: int, others: list[int]) -> dict[int, Tensor]:
    """Return the rows of logit y minus each of the other logits: last node -> [len(others), K]."""
    classes = graph.nodes[-1].shape[0]
    rows = torch.zeros(len(others), classes, dtype=torch.float64)
    rows[:, y] = 1
    rows[torch.arange(len(others)), torch.tensor(others)] -= 1
    return {len(graph.nodes) - 1: rows}


def bound_noise(node: Affine | Sum, sizes: list[Tensor], precision: torch.dtype = torch.float32) -> Tensor:
    """Bound what rounding adds to the values of a node whose parents have these sizes: sizes and answer [1, *shape].

    A sum of n products errs by at most n u / (1 − n u) of the sum of their sizes, in any order (Higham 2002, Section
    3.1), where u is half the spacing of numbers at 1. Where a number may be too large for the precision, the bound is
    infinite or NaN.
    """
    unit, largest = torch.finfo(precision).eps / 2, torch.finfo(precision).max / 2
    if isinstance(node, Sum):
        size, share = sizes[0] + sizes[1], unit
    elif node.terms:
        size, share = node.absolute(sizes[0]) + node.bias_size, (node.terms + 2) * unit
        share = share / (1 - share)
    else:  # values only move
        return torch.zeros((1, *node.shape), dtype=torch.float64)
    return (share * size).masked_fill(~(size < largest), torch.inf)
