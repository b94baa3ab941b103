"""The exact answer for one wrong class in a Linf ball: a mixed-integer linear program, solved by HiGHS.

The encoding is that of Tjeng, Xiao and Tedrake 2019. A difference d whose sign the bounds decide is linear. Every other
one has a binary variable. The program looks for a point with a margin of at most `cutoff`. So a solver that errs by
less than the cutoff cannot miss a point with a negative margin.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds as Limits
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import coo_array, csr_array, diags_array, hstack, vstack
from torch import Tensor

from robbench.certify.bounds import Gaps, Region, margin_rows
from robbench.certify.branch import Answer
from robbench.certify.layers import Affine, Graph, Input, Maximum, Sum, list_parents

__all__ = ["MOST_NUMBERS", "MOST_UNITS", "Program", "count_numbers", "solve_margin"]

MOST_UNITS = 4000
"""The most differences of unknown sign for which a program is written."""
MOST_NUMBERS = 2**28
"""The most numbers that a layer may take while a program is written."""
_INFEASIBLE = "The problem is infeasible"  # how `milp` begins; its status 2 also means that HiGHS refused the program
_LARGE = 1e3  # beyond this, variables are measured in larger units
_DROPPED = 1e-9  # HiGHS takes coefficients up to this size for 0
_DEEP = 1e-2  # the search goes on until a margin is negative by this much, which no rounding makes up for
_TOLERANCE = 1e-5  # of a margin in a larger unit: ten times those of HiGHS


@dataclass(eq=False)
class Program:
    """The network over a region, as linear constraints on variables: the pixels, then the variables of the maxima.

    A difference d of unknown sign is d = up − down, with up in [0, u z] and down in [0, −l (1 − z)]; max(d, 0) is up.
    HiGHS has absolute tolerances. So up, down and d are measured in units in which they are neither tiny nor huge.
    Every value may be off by rounding (`Gaps.noise`): constraints are that much wider. A ReLU that is always on has a
    variable for its value, so that the error of a layer does not grow in the next ones as absolute values would.

    Attributes:
        low: smallest value of each variable.
        high: largest value of each variable.
        integer: 1 for the binary variables, 0 for the others.
        rows: constraints, each as (columns, coefficients, least, most).
        logits: the logits as rows over the variables, [K, V], their constants [K], and their rounding errors [K].
    """

    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    integer: list[int] = field(default_factory=list)
    rows: list[tuple[csr_array, NDArray[np.float64], NDArray[np.float64]]] = field(default_factory=list)
    logits: tuple[csr_array, NDArray[np.float64], NDArray[np.float64]] = field(init=False)

    @classmethod
    def of(cls, graph: Graph, region: Region, gaps: Gaps) -> Program:
        """Write the program. The region must be a Linf ball, and `gaps` must hold one part."""
        program = cls()
        program.low += region.low.flatten().tolist()
        program.high += region.high.flatten().tolist()
        program.integer += [0] * len(program.low)
        values: dict[int, _Linear] = {}
        last_use = {parent: at for at, node in enumerate(graph.nodes) for parent in list_parents(node)}
        for at, node in enumerate(graph.nodes):
            match node:
                case Input():
                    pixels = torch.eye(len(program.low), dtype=torch.float64)
                    zero = torch.zeros(node.shape, dtype=torch.float64)
                    values[at] = _Linear(pixels.view(-1, *node.shape), zero, zero)
                case Affine():
                    value = values[node.parent]
                    error = node.absolute(value.error[None])[0] + gaps.noise[at][0]
                    constant = node.apply(value.constant[None])[0] + node.bias
                    values[at] = _Linear(node.apply(value.rows), constant, error)
                case Sum():
                    value = values[node.parents[0]].plus(values[node.parents[1]], 1)
                    values[at] = _Linear(value.rows, value.constant, value.error + gaps.noise[at][0])
                case Maximum():
                    b = _Linear.zero(node.shape) if node.b is None else values[node.b]
                    values[at] = program.add_maximum(
                        values[node.a], b, gaps.low[at][0], gaps.high[at][0], node.b is None
                    )
            for parent in set(list_parents(node)):
                if last_use[parent] == at:
                    del values[parent]
        program.logits = values[len(graph.nodes) - 1].pad(len(program.low)).export()
        return program

    def add_maximum(self, a: _Linear, b: _Linear, low: Tensor, high: Tensor, is_relu: bool) -> _Linear:
        """Add the variables of max(a, b), where a − b lies in [low, high], and return the maximum."""
        width = len(self.low)
        a, b = a.pad(width), b.pad(width)
        out = _Linear(*(torch.where(low >= 0, *pair) for pair in zip(a.parts, b.parts, strict=True)))
        gap = a.plus(b, -1)
        for side, sign in ((low, 1), (high, -1)):  # where a part was cut at 0, d has the sign of the part
            rows, constant, error = gap.select((side == 0).flatten().nonzero().flatten()).export()
            self.rows.append((sign * rows, -sign * constant - error, np.full(len(constant), np.inf)))
        if is_relu:
            out = self.name_values(out, (low >= 0) & (out.error > 0), low, high)
            width = len(self.low)
            gap = gap.pad(width)
        unsure = ((low < 0) & (high > 0)).flatten().nonzero().flatten()
        n = len(unsure)
        if not n:
            return out
        least, most = low.flatten()[unsure].numpy(), high.flatten()[unsure].numpy()
        unit = _choose_unit(np.maximum(most, -least))
        rows, constant, error = gap.select(unsure).export()
        rows, constant, error = csr_array(_diagonal(1 / unit) @ rows), constant / unit, error / unit
        least, most = least / unit, most / unit
        self.low += [0.0] * 3 * n
        self.high += [*most.tolist(), *(-least).tolist(), *[1.0] * n]
        self.integer += [0] * 2 * n + [1] * n
        one, none = _diagonal(np.ones(n)), csr_array((n, n))
        before, none_below = csr_array((n, width)), np.full(n, -np.inf)
        self.rows += [
            (csr_array(hstack([-rows, one, -one, none])), constant - error, constant + error),  # d = up − down
            (csr_array(hstack([before, one, none, -_diagonal(most)])), none_below, np.zeros(n)),  # up <= u z
            (
                csr_array(hstack([before, none, one, -_diagonal(least)])),
                np.full(n, -np.inf),
                -least,
            ),  # down <= −l (1 − z)
        ]
        taller = out.pad(width + 3 * n)
        taller.rows.view(len(taller.rows), -1)[width + torch.arange(n), unsure] = torch.from_numpy(unit)
        return taller

    def name_values(self, value: _Linear, chosen: Tensor, low: Tensor, high: Tensor) -> _Linear:
        """Add variables for the chosen entries of a value, which lie in [low, high], and return it in terms of them."""
        at = chosen.flatten().nonzero().flatten()
        n, width = len(at), len(self.low)
        if not n:
            return value
        least, most = low.flatten()[at].numpy(), high.flatten()[at].numpy()
        unit = _choose_unit(np.maximum(np.abs(least), np.abs(most)))
        rows, constant, error = value.pad(width).select(at).export()
        matrix = csr_array(hstack([-_diagonal(1 / unit) @ rows, _diagonal(np.ones(n))]))
        self.rows.append((matrix, (constant - error) / unit, (constant + error) / unit))
        self.low += (least / unit).tolist()
        self.high += (most / unit).tolist()
        self.integer += [0] * n
        named = value.pad(width + n)
        named.rows.view(len(named.rows), -1)[:, at] = 0.0
        named.rows.view(len(named.rows), -1)[width + torch.arange(n), at] = torch.from_numpy(unit)
        return _Linear(named.rows, named.constant.masked_fill(chosen, 0), named.error.masked_fill(chosen, 0))

    def constraints(self, margin: csr_array, constant: float) -> tuple[LinearConstraint, int]:
        """Return all constraints, with one more variable t >= margin; and the number of variables."""
        count = len(self.low) + 1
        blocks = [_widen(rows, count) for rows, _, _ in self.rows]
        blocks.append(csr_array(hstack([-_widen(margin, count - 1), csr_array([[1.0]])])))
        least = np.concatenate([*(low for _, low, _ in self.rows), [constant]])
        most = np.concatenate([*(high for _, _, high in self.rows), [np.inf]])
        matrix = csr_array(vstack(blocks))
        # What HiGHS would drop is dropped here, and the constraints are relaxed by what it can amount to.
        reach = np.maximum(np.abs([*self.low, 0.0]), np.abs([*self.high, 0.0]))
        tiny = csr_array(abs(matrix))
        tiny.data[tiny.data > 2 * _DROPPED] = 0
        matrix.data[np.abs(matrix.data) <= 2 * _DROPPED] = 0
        matrix.eliminate_zeros()
        return LinearConstraint(matrix, least - tiny @ reach, most + tiny @ reach), count


def count_numbers(graph: Graph, gaps: Gaps) -> int:
    """Count the numbers that the largest layer takes in `Program.of`: a coefficient for each variable and entry."""
    width, most = prod(graph.shape(0)), 0
    for at, node in enumerate(graph.nodes):
        if at in gaps.low:
            width += 3 * int(gaps.unstable(at).sum()) + int((gaps.low[at] >= 0).sum())
        most = max(most, width * prod(node.shape))
    return most


@dataclass(frozen=True, eq=False)
class _Linear:
    """Values that are linear in the variables, up to an error: coefficients [V, *shape], constants, errors [*shape]."""

    rows: Tensor
    constant: Tensor
    error: Tensor

    @classmethod
    def zero(cls, shape: tuple[int, ...]) -> _Linear:
        none = torch.zeros(shape, dtype=torch.float64)
        return cls(torch.zeros((0, *shape), dtype=torch.float64), none, none)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows, self.constant, self.error

    def pad(self, width: int) -> _Linear:
        """Give it coefficients of 0 for the variables that were added since."""
        more = torch.zeros((width - len(self.rows), *self.constant.shape), dtype=torch.float64)
        return _Linear(torch.cat([self.rows, more]), self.constant, self.error)

    def plus(self, other: _Linear, factor: float) -> _Linear:
        width = max(len(self.rows), len(other.rows))
        first, second = self.pad(width), other.pad(width)
        error = first.error + abs(factor) * second.error
        return _Linear(first.rows + factor * second.rows, first.constant + factor * second.constant, error)

    def select(self, entries: Tensor) -> _Linear:
        rows = self.rows.reshape(len(self.rows), -1)[:, entries]
        return _Linear(rows, self.constant.flatten()[entries], self.error.flatten()[entries])

    def export(self) -> tuple[csr_array, NDArray[np.float64], NDArray[np.float64]]:
        """Return the coefficients as a sparse matrix [entries, V], and constants and errors [entries]."""
        rows = csr_array(coo_array(self.rows.reshape(len(self.rows), -1).T.numpy()))
        return rows, self.constant.flatten().numpy(), self.error.flatten().numpy()


def _diagonal(values: NDArray[np.float64]) -> csr_array:
    return csr_array(diags_array(values))


def _choose_unit(size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Choose the units of variables of these sizes. Usual sizes, from 1 to `_LARGE`, have the unit 1."""
    return np.where(size < 1, np.maximum(size, 1e-300), np.maximum(size / _LARGE, 1.0))


def _widen(rows: csr_array, width: int) -> csr_array:
    return csr_array((rows.data, rows.indices, rows.indptr), shape=(rows.shape[0], width))


def solve_margin(
    graph: Graph, region: Region, program: Program, y: int, other: int, cutoff: float, deadline: float
) -> Answer | None:
    """Find out whether the margin of y to another class can be at most `cutoff`.

    Returns:
        An answer with `margin` = `cutoff` if no point has a smaller margin. An answer with a point if its margin in
        float64 is negative. None if time ran out or the answer lies within the tolerance.
    """
    rows, constants, errors = program.logits
    margin, constant = csr_array(rows[[y]] - rows[[other]]), float(constants[y] - constants[other])
    unit = max(1.0, max(abs(constant), *np.abs(margin.data), 0.0) / _LARGE)
    limit, count = program.constraints(csr_array(margin / unit), constant / unit)
    most = (cutoff + float(errors[y] + errors[other])) / unit + (_TOLERANCE if unit > 1 else 0.0)
    cost = np.zeros(count)
    cost[-1] = 1
    # t = max(margin, −deep), in the unit. So the search ends at the first point that is broken beyond doubt.
    found = milp(
        cost,
        integrality=np.array([*program.integer, 0]),
        bounds=Limits([*program.low, -max(abs(most), _DEEP)], [*program.high, most]),
        constraints=limit,
        options={"time_limit": max(deadline - time.monotonic(), 0.01), "mip_rel_gap": 0.0},
    )
    if found.message.startswith(_INFEASIBLE):
        return Answer(cutoff, True)
    if found.x is None:
        return None
    pixels = torch.from_numpy(np.asarray(found.x[: region.x.numel()])).view(region.x.shape)
    point = torch.minimum(torch.maximum(pixels, region.low), region.high)
    direction = margin_rows(graph, y, [other])[len(graph.nodes) - 1][0]
    reached = float(graph.run(point[None])[0] @ direction)
    return Answer(reached, False, point) if reached < 0 else None
