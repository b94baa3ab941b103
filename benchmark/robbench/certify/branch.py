"""Branch and bound over the signs of maxima: the ball is cut until every part is proven, or time runs out.

A part is a choice of signs for some differences d = a − b. Its bound is the linear relaxation with the intervals of its
signs, with slopes and multipliers found by gradient steps (Wang et al. 2021, beta-CROWN). Whatever the steps find is a
valid bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from robbench.certify.bounds import Gaps, Region, Relaxed, default_slopes, margin_rows, relax
from robbench.certify.layers import Graph

__all__ = ["Answer", "bound_margins", "prove_by_branching"]

_STEPS = 20  # gradient steps for a bound
_RATE, _DECAY = 0.25, 0.9  # of Adam
_PARTS = 64  # most parts that are bounded together
_MOST_NUMBERS = 2**24  # of the values of all nodes, in such parts
_MOST_PARTS = 2**16  # waiting; beyond this the class is open


@dataclass(frozen=True, eq=False)
class Answer:
    """What is known about one wrong class.

    Attributes:
        margin: a lower bound of logit y minus the logit of the class, over the region; with a point, its margin.
        is_proven: whether the margin is at least what was asked for, everywhere in the region.
        point: an image [*shape] whose margin in float64 is negative, or None.
    """

    margin: float
    is_proven: bool
    point: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Units:
    """The differences that interval and relaxation leave unstable: M of them, over all maxima.

    Attributes:
        at: node -> their positions in the flattened node, and the slice of them among all M.
        count: M.
    """

    graph: Graph
    gaps: Gaps
    at: dict[int, tuple[Tensor, slice]]
    count: int

    @classmethod
    def of(cls, graph: Graph, gaps: Gaps) -> _Units:
        at, begin = {}, 0
        for node in gaps.low:
            place = gaps.unstable(node).flatten().nonzero().flatten()
            at[node] = (place, slice(begin, begin + len(place)))
            begin += len(place)
        return cls(graph, gaps, at, begin)

    def spread(self, values: Tensor) -> dict[int, Tensor]:
        """Write values of the units as values of the nodes, 0 elsewhere: [S, M] -> node: [S, *shape]."""
        out = {}
        for node, (place, part) in self.at.items():
            shape = self.graph.shape(node)
            full = torch.zeros((len(values), prod(shape)), dtype=torch.float64)
            out[node] = full.index_copy(1, place, values[:, part].double()).view(-1, *shape)
        return out

    def gather(self, values: dict[int, Tensor]) -> Tensor:
        """Take the values of the units: node: [S, *shape] -> [S, M]. A node that is left out has zeros."""
        count = len(next(iter(values.values())))
        parts = [
            values[node].reshape(count, -1)[:, place]
            if node in values
            else torch.zeros(count, len(place), dtype=torch.float64)
            for node, (place, _) in self.at.items()
        ]
        return torch.cat(parts, dim=1)

    def split(self, signs: Tensor) -> Gaps:
        """Cut the intervals by signs [S, M] of 1, −1, and 0 for no split."""
        cut, chosen = Gaps(noise=self.gaps.noise), self.spread(signs)
        for node, sign in chosen.items():
            cut.low[node] = torch.where(sign > 0, self.gaps.low[node].clamp(min=0), self.gaps.low[node])
            cut.high[node] = torch.where(sign < 0, self.gaps.high[node].clamp(max=0), self.gaps.high[node])
        return cut


@dataclass(eq=False)
class _Parts:
    """Parts of the region, S of them: bounds [S], next unit to split [S]; signs, slopes and multipliers [S, M]."""

    bound: Tensor
    pick: Tensor
    signs: Tensor
    slopes: Tensor
    multipliers: Tensor

    def take(self, at: Tensor) -> _Parts:
        return _Parts(*(value[at] for value in vars(self).values()))

    def join(self, other: _Parts) -> _Parts:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Parts(*(torch.cat(pair) for pair in pairs))


def _climb(
    graph: Graph, region: Region, units: _Units, rows: dict[int, Tensor], parts: _Parts, enough: float, steps: int
) -> Relaxed:
    """Raise the bounds of parts by gradient steps on slopes and multipliers. Update `parts` with the best found."""
    gaps, signs = units.split(parts.signs), parts.signs.double()
    slopes = parts.slopes.double().requires_grad_(True)
    sizes = parts.multipliers.double().requires_grad_(True)
    adam = torch.optim.Adam([slopes, sizes], lr=_RATE)
    found = None
    for step in range(steps + 1):
        with torch.enable_grad():
            found = relax(
                graph, region, gaps, rows, units.spread(slopes), units.spread(-signs * sizes),
                want_slack=step == steps,
            )  # fmt: skip
            better = found.bound.detach() > parts.bound
            parts.bound = torch.where(better, found.bound.detach(), parts.bound)
            parts.slopes = torch.where(better[:, None], slopes.detach().to(parts.slopes.dtype), parts.slopes)
            kept = sizes.detach().to(parts.multipliers.dtype)
            parts.multipliers = torch.where(better[:, None], kept, parts.multipliers)
            if step == steps or bool((parts.bound > enough).all()):
                break
            adam.zero_grad()
            (-found.bound.clamp(max=enough + 1).sum()).backward()  # type: ignore[no-untyped-call]
        adam.step()
        with torch.no_grad():
            slopes.clamp_(0, 1)
            sizes.clamp_(min=0)
        for group in adam.param_groups:
            group["lr"] *= _DECAY
    assert found is not None
    return Relaxed(found.bound.detach(), found.rows.detach(), {k: v.detach() for k, v in found.slack.items()})


def bound_margins(graph: Graph, region: Region, gaps: Gaps, y: int, others: list[int], enough: float) -> list[float]:
    """Bound the margins to several classes from below, without branching: one number per class."""
    rows, units = margin_rows(graph, y, others), _Units.of(graph, gaps)
    parts = _start(units, len(others))
    _climb(graph, region, units, rows, parts, enough, _STEPS if units.count else 0)
    margins: list[float] = parts.bound.tolist()
    return margins


def _start(units: _Units, count: int) -> _Parts:
    slopes = units.gather(default_slopes(units.gaps)).float() if units.at else torch.zeros(1, 0)
    return _Parts(
        torch.full((count,), -torch.inf, dtype=torch.float64),
        torch.zeros(count, dtype=torch.int64),
        torch.zeros(count, units.count, dtype=torch.int8),
        slopes.expand(count, -1).clone(),
        torch.zeros(count, units.count),
    )


def prove_by_branching(
    graph: Graph,
    region: Region,
    gaps: Gaps,
    y: int,
    other: int,
    enough: float,
    deadline: float,
    solve_leaf: Callable[[Gaps], Answer | None],
) -> Answer:
    """Prove that the margin to a class exceeds a number, find a point where it is negative, or give up.

    Args:
        graph: the network.
        region: the points.
        gaps: intervals of the maxima over the region.
        y: the true class.
        other: the wrong class.
        enough: the margin that counts as proven.
        deadline: `time.monotonic()` at which to give up.
        solve_leaf: called with the intervals of a part all of whose signs are fixed, where the network is linear.
            Returns None if it cannot tell.
    """
    units, row = _Units.of(graph, gaps), margin_rows(graph, y, [other])
    last, together = len(graph.nodes) - 1, _MOST_NUMBERS // sum(prod(node.shape) for node in graph.nodes)
    together = min(max(together, 1), _PARTS)
    fresh, least = _start(units, 1), torch.inf
    waiting = fresh.take(torch.arange(0))
    while len(fresh.bound):
        rows = {last: row[last].expand(len(fresh.bound), -1)}
        found = _climb(graph, region, units, rows, fresh, enough, _STEPS if units.count else 0)
        points = region.minimizer(found.rows)
        margins = (graph.run(points) * row[last]).sum(1)
        if float(margins.min()) < 0:
            return Answer(float(margins.min()), False, points[margins.argmin()])
        is_open, free = ~(fresh.bound > enough), (fresh.signs == 0).any(1)
        least = min([least, *fresh.bound[~is_open].tolist()])
        for i in (is_open & ~free).nonzero().flatten():
            leaf = solve_leaf(units.split(fresh.signs[i : i + 1]))
            if leaf is None or not leaf.is_proven:
                known = [least, *fresh.bound.tolist(), *waiting.bound.tolist()]
                return leaf or Answer(min(known), False)
            least = min(least, leaf.margin)
        going = (is_open & free).nonzero().flatten()
        fresh.pick = units.gather(found.slack).masked_fill(fresh.signs != 0, -1).argmax(1) if len(going) else fresh.pick
        waiting = waiting.join(fresh.take(going))
        if len(waiting.bound) and (time.monotonic() > deadline or len(waiting.bound) > _MOST_PARTS):
            return Answer(min([least, *waiting.bound.tolist()]), False)
        order = waiting.bound.argsort()
        fresh, waiting = _halve(waiting.take(order[:together])), waiting.take(order[together:])
    return Answer(least, True)


def _halve(parts: _Parts) -> _Parts:
    """Split every part at its unit: the children with d >= 0, then those with d <= 0."""
    children = parts.join(parts)
    sign = torch.ones(len(parts.pick), dtype=children.signs.dtype)
    children.signs[torch.arange(len(children.pick)), children.pick] = torch.cat([sign, -sign])
    return children
