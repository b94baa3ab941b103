"""Networks as graphs of four kinds of nodes: input, affine map, sum, and maximum of two values. All float64.

Every layer that is understood becomes such nodes, one function a layer. A ReLU is the maximum of a value and 0. A max
pooling is a tree of maxima. So bounds and exact programs know one nonlinear node, `b + max(a − b, 0)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Affine", "Graph", "Input", "Maximum", "Node", "Shape", "Sum", "add_avg_pool", "add_conv", "add_linear",
    "add_max_pool", "add_move", "add_relu", "add_replay", "add_scale", "list_parents",
]  # fmt: skip

Shape = tuple[int, ...]
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Input:
    """The image.

    Attributes:
        shape: shape of a value without the batch.
    """

    shape: Shape


@dataclass(frozen=True, eq=False)
class Affine:
    """A x + b. The maps take and return batches: `apply` and `absolute` [N, *in] -> [N, *out], `transpose` back.

    Attributes:
        parent: the node of x.
        shape: shape of the output without the batch.
        apply: A x.
        absolute: |A| x, with the absolute values of the entries of A.
        transpose: Aᵀ g.
        bias: b, of the shape of the output.
        bias_size: what |b| stands for in the rounding error; more than |b| where a layer adds and subtracts parts of b.
        terms: how many products one output sums; 0 where values only move and no rounding occurs.
    """

    parent: int
    shape: Shape
    apply: Map
    absolute: Map
    transpose: Map
    bias: Tensor
    bias_size: Tensor
    terms: int


@dataclass(frozen=True, eq=False)
class Sum:
    """The sum of two nodes of one shape."""

    parents: tuple[int, int]
    shape: Shape


@dataclass(frozen=True, eq=False)
class Maximum:
    """max(a, b), entry by entry. Without a second parent, b is 0."""

    a: int
    b: int | None
    shape: Shape


Node = Input | Affine | Sum | Maximum


@dataclass(eq=False)
class Graph:
    """Nodes in an order in which every node follows its parents. The first is the input, the last holds the logits."""

    nodes: list[Node] = field(default_factory=list)

    def add(self, node: Node) -> int:
        """Append a node, and return its index."""
        self.nodes.append(node)
        return len(self.nodes) - 1

    def shape(self, at: int) -> Shape:
        """Return the shape of a node's value without the batch."""
        return self.nodes[at].shape

    @property
    def maxima(self) -> list[int]:
        """The indices of the nonlinear nodes."""
        return [i for i, node in enumerate(self.nodes) if isinstance(node, Maximum)]

    def cut(self, last: int) -> Graph:
        """Return the graph of the nodes on which a node depends, which becomes the last one."""
        needed = {0, last}
        for at in range(last, 0, -1):
            if at in needed:
                needed |= set(list_parents(self.nodes[at]))
        new = {at: i for i, at in enumerate(sorted(needed))}
        return Graph([_replace_parents(self.nodes[at], new) for at in new])

    def run(self, x: Tensor) -> Tensor:
        """Compute the logits of images: [N, C, H, W] float64 -> [N, K] float64."""
        values: list[Tensor] = []
        for node in self.nodes:
            match node:
                case Input():
                    values.append(x)
                case Affine():
                    values.append(node.apply(values[node.parent]) + node.bias)
                case Sum():
                    values.append(values[node.parents[0]] + values[node.parents[1]])
                case Maximum():
                    a = values[node.a]
                    values.append(a.clamp(min=0) if node.b is None else torch.maximum(a, values[node.b]))
        return values[-1]

    def difference(self, at: int, rows: Tensor) -> dict[int, Tensor]:
        """Write rows over a − b of a maximum as rows over its parents: [R, *shape] -> node: [R, *shape]."""
        node = self.nodes[at]
        assert isinstance(node, Maximum)
        return {node.a: rows} if node.b is None else {node.a: rows, node.b: -rows}


def list_parents(node: Node) -> list[int]:
    """List the nodes on which a node depends directly."""
    match node:
        case Input():
            return []
        case Affine():
            return [node.parent]
        case Sum():
            return [*node.parents]
    return [node.a] if node.b is None else [node.a, node.b]


def _replace_parents(node: Node, new: dict[int, int]) -> Node:
    match node:
        case Input():
            return node
        case Affine():
            return replace(node, parent=new[node.parent])
        case Sum():
            return replace(node, parents=(new[node.parents[0]], new[node.parents[1]]))
    return replace(node, a=new[node.a], b=None if node.b is None else new[node.b])


def _transpose_by_gradient(apply: Map, in_shape: Shape) -> Map:
    def transpose(g: Tensor) -> Tensor:
        with torch.enable_grad():
            x = torch.zeros((len(g), *in_shape), dtype=g.dtype, requires_grad=True)
            return torch.autograd.grad(apply(x), x, g, create_graph=g.requires_grad)[0]

    return transpose


def _add_affine(
    graph: Graph,
    parent: int,
    apply: Map,
    *,
    absolute: Map,
    terms: int,
    transpose: Map | None = None,
    bias: Tensor | None = None,
    bias_size: Tensor | None = None,
) -> int:
    in_shape = graph.shape(parent)
    with torch.no_grad():
        shape = tuple(apply(torch.zeros((1, *in_shape), dtype=torch.float64)).shape[1:])
    offset = torch.zeros(shape, dtype=torch.float64) if bias is None else bias.double().expand(shape)
    return graph.add(
        Affine(
            parent=parent,
            shape=shape,
            apply=apply,
            absolute=absolute,
            transpose=transpose or _transpose_by_gradient(apply, in_shape),
            bias=offset,
            bias_size=offset.abs() if bias_size is None else bias_size.expand(shape),
            terms=terms,
        )
    )


def add_linear(graph: Graph, parent: int, weight: Tensor, bias: Tensor | None) -> int:
    """Add W x + b over the last axis: weight [out, in]."""
    w = weight.detach().double()
    return _add_affine(
        graph,
        parent,
        lambda x: F.linear(x, w),
        absolute=lambda x: F.linear(x, w.abs()),
        transpose=lambda g: g @ w,
        bias=None if bias is None else bias.detach(),
        terms=w.shape[1],
    )


def add_conv(
    graph: Graph,
    parent: int,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> int:
    """Add a two-dimensional convolution with zero padding: weight [out, in / groups, kH, kW]."""
    w = weight.detach().double().contiguous()  # a channels-last weight gives values in channels-last layout

    def convolve(x: Tensor, kernel: Tensor) -> Tensor:
        return F.conv2d(x, kernel, None, stride, padding, dilation, groups)

    def transpose(g: Tensor) -> Tensor:
        return F.conv_transpose2d(g, w, None, 1, padding, 0, groups, dilation)

    return _add_affine(
        graph,
        parent,
        lambda x: convolve(x, w),
        absolute=lambda x: convolve(x, w.abs()),
        transpose=transpose if stride == (1, 1) else None,  # a larger stride may leave rows and columns out
        bias=None if bias is None else bias.detach().view(-1, 1, 1),
        terms=prod(w.shape[1:]),
    )


def add_scale(
    graph: Graph, parent: int, scale: Tensor | float, shift: Tensor | float = 0.0, shift_size: Tensor | None = None
) -> int:
    """Add scale · x + shift, entry by entry. Normalization and batch norm in eval mode are of this kind.

    Args:
        graph: the graph.
        parent: the node of x.
        scale: broadcasts against x.
        shift: broadcasts against x.
        shift_size: see `Affine.bias_size`.
    """
    shape = graph.shape(parent)
    factor = torch.as_tensor(scale, dtype=torch.float64).detach()
    offset = torch.as_tensor(shift, dtype=torch.float64).detach()
    return _add_affine(
        graph,
        parent,
        lambda x: x * factor,
        absolute=lambda x: x * factor.abs(),
        transpose=lambda g: g * factor,
        bias=offset.expand(shape),
        bias_size=None if shift_size is None else shift_size,
        terms=5,  # batch norm: a difference, a root, a quotient, a product and a sum
    )


def add_replay(graph: Graph, parent: int, apply: Map, terms: int) -> int:
    """Add a linear map whose matrix has no negative entries: a pooling or a mean of `terms` values, or a move."""
    return _add_affine(graph, parent, apply, absolute=apply, terms=terms)


def add_move(graph: Graph, parent: int, shape: Shape) -> int:
    """Give the values another shape (flatten, view)."""
    before = graph.shape(parent)
    return _add_affine(
        graph,
        parent,
        lambda x: x.reshape(len(x), *shape),
        absolute=lambda x: x.reshape(len(x), *shape),
        transpose=lambda g: g.reshape(len(g), *before),
        terms=0,
    )


def add_avg_pool(graph: Graph, parent: int, apply: Map, kernel: tuple[int, int]) -> int:
    """Add an average pooling whose windows have at most these sizes."""
    return add_replay(graph, parent, apply, prod(kernel))


def add_relu(graph: Graph, parent: int) -> int:
    """Add max(x, 0)."""
    return graph.add(Maximum(parent, None, graph.shape(parent)))


def add_max_pool(
    graph: Graph,
    parent: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool = False,
) -> int:
    """Add a max pooling as a tree of maxima of two values."""
    channels, rows, columns = graph.shape(parent)
    place = torch.arange(rows * columns, dtype=torch.float64).view(1, 1, rows, columns) + 1  # 0 is padding
    out = tuple(F.max_pool2d(place, kernel, stride, padding, dilation, ceil_mode).shape[2:])
    # The windows may end before the padding does, or reach beyond it.
    ends = [
        max((n - 1) * s + d * (k - 1) + 1 - size - p, 0)
        for n, size, k, s, p, d in zip(out, (rows, columns), kernel, stride, padding, dilation, strict=True)
    ]
    padded = F.pad(place, (padding[1], ends[1], padding[0], ends[0]))
    windows = F.unfold(padded, kernel, dilation, 0, stride)[0].long() - 1  # [kH · kW, windows]
    # Padding never wins. A value of the window stands in for it.
    windows = torch.where(windows < 0, windows.max(0).values, windows)
    parts = [_add_pick(graph, parent, at, (channels, *out)) for at in windows]
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        merged = [graph.add(Maximum(a, b, graph.shape(a))) for a, b in pairs]
        parts = merged + parts[2 * len(merged) :]
    return parts[0]


def _add_pick(graph: Graph, parent: int, at: Tensor, shape: Sequence[int]) -> int:
    """Take the pixels at these positions of every channel."""
    before = graph.shape(parent)

    def pick(x: Tensor) -> Tensor:
        return x.flatten(2)[:, :, at].reshape(len(x), *shape)

    def put(g: Tensor) -> Tensor:
        back = torch.zeros((len(g), before[0], prod(before[1:])), dtype=g.dtype)
        return back.index_add(2, at, g.flatten(2)).reshape(len(g), *before)

    return _add_affine(graph, parent, pick, absolute=pick, transpose=put, terms=0)
