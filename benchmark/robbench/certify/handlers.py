"""What a layer of a module adds to a graph: one function a layer, and the tables of all layers that are understood."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robbench.certify import layers
from robbench.certify.layers import Graph

__all__ = ["BATCH", "FUNCTIONS", "IN_PLACE", "KNOWN", "METHODS", "MODULES", "RefusedError", "Wire"]

KNOWN = (
    "Linear, Conv2d, ReLU, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, BatchNorm, Flatten, view, permute, squeeze, "
    "slices, cat, padding, mean, sums of two layers, and sums and products with constants"
)
BATCH = 2  # stands for the batch size where a module asks for it


@dataclass(frozen=True)
class Wire:
    """A value that depends on the image: a node of the graph."""

    at: int


class RefusedError(Exception):
    """A layer is not understood. The message is the part of the sentence after its name."""


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, list | tuple) else (value, value)
    return int(first), int(second)


# One function a layer. Each takes the graph, and the layer's arguments with wires in place of tensors.


def _linear(graph: Graph, x: Wire, weight: Tensor, bias: Tensor | None = None) -> Wire:
    return Wire(layers.add_linear(graph, x.at, weight, bias))


def _conv(
    graph: Graph,
    x: Wire,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Wire:
    if padding == "valid":
        padding = 0
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(_pair(dilation), weight.shape[2:], strict=True)]
        if any(span % 2 for span in spans):  # one side is padded more than the other
            x = _pad(graph, x, [spans[1] // 2, -(-spans[1] // 2), spans[0] // 2, -(-spans[0] // 2)])
            spans = [0, 0]
        padding = [span // 2 for span in spans]
    return Wire(
        layers.add_conv(graph, x.at, weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups)
    )  # fmt: skip


def _conv_layer(graph: Graph, layer: nn.Conv2d, x: Wire) -> Wire:
    if layer.padding_mode != "zeros":
        raise RefusedError(f"pads with {layer.padding_mode!r}; zeros are understood")
    return _conv(graph, x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def _relu(graph: Graph, x: Wire, inplace: bool = False) -> Wire:
    return Wire(layers.add_relu(graph, x.at))


def _max_pool(
    graph: Graph,
    x: Wire,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Wire:
    if return_indices:
        raise RefusedError("uses return_indices, which is not understood")
    kernel = _pair(kernel_size)
    step = kernel if stride is None else _pair(stride)
    return Wire(layers.add_max_pool(graph, x.at, kernel, step, _pair(padding), _pair(dilation), ceil_mode))


def _max_pool_layer(graph: Graph, layer: nn.MaxPool2d, x: Wire) -> Wire:
    a = layer
    return _max_pool(graph, x, a.kernel_size, a.stride, a.padding, a.dilation, a.ceil_mode, a.return_indices)


def _avg_pool(graph: Graph, x: Wire, kernel_size: Any, *args: Any, **kwargs: Any) -> Wire:
    def pool(value: Tensor) -> Tensor:
        return F.avg_pool2d(value, kernel_size, *args, **kwargs)

    if kwargs.get("divisor_override") is not None or len(args) > 4:
        raise RefusedError("uses divisor_override, which is not understood")
    return Wire(layers.add_avg_pool(graph, x.at, pool, _pair(kernel_size)))


def _avg_pool_layer(graph: Graph, layer: nn.AvgPool2d, x: Wire) -> Wire:
    settings: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "ceil_mode": layer.ceil_mode}
    settings |= {"count_include_pad": layer.count_include_pad, "divisor_override": layer.divisor_override}
    return _avg_pool(graph, x, layer.kernel_size, **settings)


def _adaptive_pool(graph: Graph, x: Wire, output_size: Any) -> Wire:
    def pool(value: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(value, output_size)

    rows, columns = graph.shape(x.at)[1:]
    return Wire(layers.add_avg_pool(graph, x.at, pool, (rows, columns)))


def _adaptive_max_pool(graph: Graph, x: Wire, output_size: Any, return_indices: bool = False) -> Wire:
    sizes = graph.shape(x.at)[1:]
    outs = [s if n is None else int(n) for s, n in zip(sizes, _two(output_size), strict=True)]
    if return_indices or any(s % n for s, n in zip(sizes, outs, strict=True)):
        raise RefusedError(f"pools {tuple(sizes)} to {tuple(outs)}; sizes that divide the others are understood")
    return _max_pool(graph, x, [s // n for s, n in zip(sizes, outs, strict=True)])


def _two(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value, value)


def _batch_norm(graph: Graph, layer: nn.BatchNorm2d, x: Wire) -> Wire:
    if layer.running_mean is None or layer.running_var is None:
        raise RefusedError("has no running statistics, so an answer depends on the batch")
    axes = (-1, *[1] * (len(graph.shape(x.at)) - 1))
    scale = 1 / torch.sqrt(layer.running_var + layer.eps)
    if layer.weight is not None:
        scale = scale * layer.weight
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias
    moved = layer.running_mean * scale
    return Wire(
        layers.add_scale(
            graph, x.at, scale.view(axes), (bias - moved).view(axes), (bias.abs() + moved.abs()).view(axes)
        )
    )


def _reshape(change: Callable[..., Tensor]) -> Callable[..., Wire]:
    """Make the handler of a call that gives values another shape."""

    def handle(graph: Graph, x: Wire, *args: Any, **kwargs: Any) -> Wire:
        shape = change(torch.empty((BATCH, *graph.shape(x.at)), device="meta"), *args, **kwargs).shape
        if shape[0] != BATCH:
            raise RefusedError("moves values between images")
        return Wire(layers.add_move(graph, x.at, tuple(shape[1:])))

    return handle


def _rearrange(change: Callable[..., Tensor]) -> Callable[..., Wire]:
    """Make the handler of a call that takes values of an image from one place to another."""

    def handle(graph: Graph, x: Wire, *args: Any, **kwargs: Any) -> Wire:
        shape = graph.shape(x.at)
        image = torch.arange(BATCH, dtype=torch.float64).view(-1, *[1] * len(shape)).expand(BATCH, *shape)
        moved = change(image, *args, **kwargs)
        if moved.shape[:1] != (BATCH,) or any((row != i).any() for i, row in enumerate(moved)):
            raise RefusedError("moves values between images")
        return Wire(layers.add_replay(graph, x.at, lambda value: change(value, *args, **kwargs), 0))

    return handle


def _pad(graph: Graph, x: Wire, pad: Any, mode: str = "constant", value: float | None = None) -> Wire:
    if mode != "constant" or value or len(pad) > 2 * len(graph.shape(x.at)):
        raise RefusedError(f"pads with {value if mode == 'constant' else mode!r}; zeros are understood")
    return Wire(layers.add_replay(graph, x.at, lambda v: F.pad(v, list(pad)), 0))


def _pad_layer(graph: Graph, layer: nn.ConstantPad2d, x: Wire) -> Wire:
    return _pad(graph, x, layer.padding, "constant", layer.value)


def _cat(graph: Graph, tensors: Any, dim: int = 0) -> Wire:
    if not all(isinstance(t, Wire) for t in tensors):
        raise RefusedError("joins values with constants")
    shapes = [graph.shape(t.at) for t in tensors]
    axis = dim % (len(shapes[0]) + 1) - 1
    if axis < 0 or len({(*s[:axis], *s[axis + 1 :]) for s in shapes}) > 1:
        raise RefusedError("joins images, or values whose shapes do not fit")
    before, whole, joined = 0, sum(s[axis] for s in shapes), None
    for t, shape in zip(tensors, shapes, strict=True):
        behind = [0, 0] * (len(shape) - 1 - axis)
        part = _pad(graph, t, [*behind, before, whole - before - shape[axis]])
        joined = part if joined is None else _add(graph, joined, part)
        before += shape[axis]
    assert joined is not None
    return joined


def _flatten_layer(graph: Graph, layer: nn.Flatten, x: Wire) -> Wire:
    return _reshape(torch.flatten)(graph, x, layer.start_dim, layer.end_dim)


def _unflatten_layer(graph: Graph, layer: nn.Unflatten, x: Wire) -> Wire:
    return _reshape(Tensor.unflatten)(graph, x, layer.dim, layer.unflattened_size)


def _mean(graph: Graph, x: Wire, dim: Any, keepdim: bool = False) -> Wire:
    shape = graph.shape(x.at)
    axes = [d % (len(shape) + 1) for d in (dim if isinstance(dim, list | tuple) else [dim])]
    if 0 in axes:
        raise RefusedError("takes a mean over the batch")
    terms = int(torch.tensor([shape[a - 1] for a in axes]).prod())
    return Wire(layers.add_replay(graph, x.at, lambda value: value.mean(axes, keepdim), terms))


def _add(graph: Graph, a: Any, b: Any, alpha: float = 1) -> Wire:
    if alpha != 1:
        raise RefusedError("uses alpha, which is not understood")
    if isinstance(a, Wire) and isinstance(b, Wire):
        if graph.shape(a.at) != graph.shape(b.at):
            raise RefusedError("adds values of different shapes")
        return Wire(graph.add(layers.Sum((a.at, b.at), graph.shape(a.at))))
    wire, constant = (a, b) if isinstance(a, Wire) else (b, a)
    return Wire(layers.add_scale(graph, wire.at, 1.0, _constant(graph, wire, constant)))


def _subtract(graph: Graph, a: Any, b: Any) -> Wire:
    return _add(graph, a, _multiply(graph, b, -1.0) if isinstance(b, Wire) else -b)


def _multiply(graph: Graph, a: Any, b: Any) -> Wire:
    if isinstance(a, Wire) and isinstance(b, Wire):
        raise RefusedError("multiplies two values that depend on the image")
    wire, constant = (a, b) if isinstance(a, Wire) else (b, a)
    return Wire(layers.add_scale(graph, wire.at, _constant(graph, wire, constant)))


def _divide(graph: Graph, a: Any, b: Any) -> Wire:
    if isinstance(b, Wire):
        raise RefusedError("divides by a value that depends on the image")
    return _multiply(graph, a, 1 / b)


def _constant(graph: Graph, wire: Wire, value: Any) -> Tensor:
    """Check that a constant has no batch and makes no shape larger."""
    constant, shape = torch.as_tensor(value, dtype=torch.float64), graph.shape(wire.at)
    if constant.dim() > len(shape) and constant.shape[0] == 1:
        constant = constant.squeeze(0)
    if constant.dim() > len(shape) or torch.empty(shape).add(constant).shape != torch.Size(shape):
        raise RefusedError(f"combines values of shape {shape} with a constant of shape {tuple(constant.shape)}")
    return constant


def _matmul(graph: Graph, a: Any, b: Any) -> Wire:
    if not isinstance(a, Wire) or not isinstance(b, Tensor) or b.dim() != 2:
        raise RefusedError("is not a product of values and a constant matrix")
    return _linear(graph, a, b.T)


def _same(graph: Graph, *args: Any, **kwargs: Any) -> Wire:
    wire: Wire = args[0]
    return wire


def _size(graph: Graph, x: Wire, dim: int | None = None) -> Any:
    shape = torch.Size((BATCH, *graph.shape(x.at)))
    return shape if dim is None else shape[dim]


def _getattr(graph: Graph, x: Wire, name: str) -> Any:
    if name != "shape":
        raise RefusedError(f"asks for {name}")
    return _size(graph, x)


def _negate(graph: Graph, x: Wire) -> Wire:
    return _multiply(graph, x, -1.0)


def _dropout(graph: Graph, x: Wire, p: float = 0.5, training: bool = True, inplace: bool = False) -> Wire:
    if training:
        raise RefusedError("drops values at random")
    return x


def _on(handler: Callable[..., Wire]) -> Callable[..., Wire]:
    """Make the handler of a layer without settings that matter."""
    return lambda graph, layer, x: handler(graph, x)


MODULES: dict[type, Callable[..., Wire]] = {
    nn.Linear: lambda graph, layer, x: _linear(graph, x, layer.weight, layer.bias),
    nn.Conv2d: _conv_layer,
    nn.ReLU: _on(_relu),
    nn.MaxPool2d: _max_pool_layer,
    nn.AvgPool2d: _avg_pool_layer,
    nn.AdaptiveAvgPool2d: lambda graph, layer, x: _adaptive_pool(graph, x, layer.output_size),
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.Flatten: _flatten_layer,
    nn.Unflatten: _unflatten_layer,
    nn.Identity: _on(_same),
    nn.Dropout: _on(_same),
    nn.Dropout1d: _on(_same),
    nn.Dropout2d: _on(_same),
    nn.ZeroPad2d: _pad_layer,
    nn.ConstantPad2d: _pad_layer,
    nn.AdaptiveMaxPool2d: lambda graph, layer, x: _adaptive_max_pool(graph, x, layer.output_size, layer.return_indices),
}
_SLICE = _rearrange(lambda x, at: x[at])
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear, F.conv2d: _conv, torch.conv2d: _conv, F.relu: _relu, torch.relu: _relu,
    torch.relu_: _relu,
    F.max_pool2d: _max_pool, F.avg_pool2d: _avg_pool, F.adaptive_avg_pool2d: _adaptive_pool,
    F.dropout: _dropout, torch.flatten: _reshape(torch.flatten), torch.reshape: _reshape(torch.reshape),
    torch.mean: _mean, torch.matmul: _matmul, operator.matmul: _matmul, getattr: _getattr,
    operator.getitem: _SLICE, operator.neg: _negate, torch.neg: _negate, torch.cat: _cat, torch.concat: _cat,
    torch.permute: _rearrange(torch.permute), torch.transpose: _rearrange(torch.transpose), F.pad: _pad,
    torch.squeeze: _reshape(torch.squeeze), torch.unsqueeze: _reshape(torch.unsqueeze), torch.mm: _matmul,
    F.adaptive_max_pool2d: _adaptive_max_pool,
    operator.add: _add, operator.iadd: _add, torch.add: _add, operator.sub: _subtract, torch.sub: _subtract,
    operator.mul: _multiply, torch.mul: _multiply, operator.truediv: _divide, torch.div: _divide,
}  # fmt: skip
METHODS: dict[str, Callable[..., Any]] = {
    "relu": _relu, "relu_": _relu, "flatten": _reshape(Tensor.flatten), "view": _reshape(Tensor.view),
    "reshape": _reshape(Tensor.reshape), "unflatten": _reshape(Tensor.unflatten), "mean": _mean, "size": _size,
    "permute": _rearrange(Tensor.permute), "transpose": _rearrange(Tensor.transpose), "neg": _negate,
    "squeeze": _reshape(Tensor.squeeze), "unsqueeze": _reshape(Tensor.unsqueeze), "clone": _same,
    "contiguous": _same, "add": _add, "sub": _subtract, "mul": _multiply, "div": _divide, "matmul": _matmul,
}  # fmt: skip
IN_PLACE = ("relu_", torch.relu_)
"""Calls of which the first argument becomes the answer. Others of this kind say `inplace=True`."""
