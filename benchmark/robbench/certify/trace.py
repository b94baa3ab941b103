"""A module becomes a graph of known layers, or is refused in a sentence that names the layer."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from robbench.certify import layers
from robbench.certify.handlers import FUNCTIONS, KNOWN, METHODS, MODULES, RefusedError, Wire
from robbench.certify.layers import Graph, Input
from robbench.core.errors import ModelError

__all__ = ["trace_graph"]

_ROUNDING = 1e-9  # share of the logits' size by which graph and module may differ in float64


def trace_graph(module: nn.Module, x: Tensor) -> Graph:
    """Turn a module into a graph that computes the same logits.

    Args:
        module: in eval mode, images [N, C, H, W] to logits [N, K].
        x: a few images to compare both on, [n, C, H, W].

    Raises:
        ModelError: a layer is not understood, or the graph computes something else. The sentence names the layer.
    """
    try:
        twin = copy.deepcopy(module).to("cpu").double().eval().requires_grad_(False)
        traced = fx.symbolic_trace(twin)
    except Exception as error:  # code of the user
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"The model cannot be certified: its layers cannot be listed ({reason}).") from None
    graph = _Builder(traced, tuple(x.shape[1:])).build()
    noise = torch.rand(8, *x.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probes = torch.cat([x.detach().cpu().double(), noise])
    with torch.no_grad():
        ours, theirs = graph.run(probes), twin(probes)
    size = float(theirs.abs().max()) + 1e-300
    if ours.shape != theirs.shape or not float((ours - theirs).abs().max()) <= _ROUNDING * size:
        raise ModelError(
            "The model cannot be certified: its layers, read one by one, do not give its logits. Look for hooks, for "
            "control flow that depends on values, and for numbers kept outside of parameters and buffers."
        )
    return graph


class _Builder:
    """Walks through the nodes of a traced module."""

    def __init__(self, traced: fx.GraphModule, in_shape: layers.Shape) -> None:
        self.traced, self.graph = traced, Graph()
        self.graph.add(Input(in_shape))
        self.values: dict[fx.Node, Any] = {}

    def build(self) -> Graph:
        for node in self.traced.graph.nodes:
            if node.op == "output":
                break
            try:
                self.values[node] = self.visit(node)
            except RefusedError as refused:
                raise ModelError(
                    f"The model cannot be certified: {self.name(node)} {refused}. Known: {KNOWN}."
                ) from None
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise ModelError(
                    f"The model cannot be certified: {self.name(node)} is not understood ({reason}). Known: {KNOWN}."
                ) from None
        result = self.look_up(node.args[0])
        if not isinstance(result, Wire) or len(self.graph.shape(result.at)) != 1:
            raise ModelError("The model cannot be certified: its output is not one row of logits for an image.")
        if result.at != len(self.graph.nodes) - 1:
            layers.add_move(self.graph, result.at, self.graph.shape(result.at))
        return self.graph

    def name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            module = self.traced.get_submodule(str(node.target))
            return f"layer {node.target} ({type(module).__name__})"
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        return f"layer {node.name} (a call of {target})"

    def look_up(self, value: Any) -> Any:
        return fx.node.map_arg(value, lambda n: self.values[n])

    def visit(self, node: fx.Node) -> Any:
        """Return the value of a node: a wire if it depends on the image, else the value itself."""
        if node.op == "placeholder":
            if self.values:
                raise RefusedError("is a second input")
            return Wire(0)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.traced)
        args, kwargs = self.look_up(node.args), self.look_up(node.kwargs)
        depends = any(isinstance(v, Wire) for v in _leaves([args, kwargs]))
        if node.op == "call_module":
            module = self.traced.get_submodule(str(node.target))
            if not depends or type(module) not in MODULES:
                raise RefusedError("is not understood")
            return MODULES[type(module)](self.graph, module, *args, **kwargs)
        if not depends:
            call = node.target if node.op == "call_function" else getattr(args[0], str(node.target))
            assert callable(call)
            return call(*(args if node.op == "call_function" else args[1:]), **kwargs)
        handler = METHODS.get(str(node.target)) if node.op == "call_method" else FUNCTIONS.get(node.target)
        if handler is None:
            raise RefusedError("is not understood")
        return handler(self.graph, *args, **kwargs)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for v in value for leaf in _leaves(v)] if isinstance(value, list | tuple) else [value]
