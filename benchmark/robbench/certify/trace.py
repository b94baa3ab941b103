"""A module becomes a graph of known layers, or is refused in a sentence that names the layer."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from robbench.certify import layers
from robbench.certify.handlers import BATCH, FUNCTIONS, IN_PLACE, KNOWN, METHODS, MODULES, RefusedError, Wire
from robbench.certify.layers import Graph, Input
from robbench.classifier.answer_part import make_two_logits, take_part
from robbench.core.errors import ModelError

__all__ = ["trace_graph"]

_ROUNDING = 1e-9  # share of the logits' size by which graph and module may differ in float64
_CODE = (
    "Give the network as torch.nn.Modules whose forward has no conditions on values: as weights with --architecture, "
    "or as MODULE:FUNCTION. The method smoothing takes any model."
)
_WHAT_IS_KNOWN = f"Known: {KNOWN}. The method smoothing takes any layer."


def trace_graph(module: nn.Module, x: Tensor, output: str | int | None = None, binary: bool = False) -> Graph:
    """Turn a module into a graph that computes the same logits.

    Args:
        module: in eval mode, images [N, C, H, W] to logits [N, K].
        x: a few images to compare both on, [n, C, H, W].
        output: which part of the module's answer holds the logits, see `take_part`.
        binary: whether it answers with one logit, see `make_two_logits`.

    Raises:
        ModelError: a layer is not understood, or the graph computes something else. The sentence names the layer.
    """
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            what = f"layer {name}" if name else "it"
            raise ModelError(f"The model cannot be certified: {what} is TorchScript, which hides its layers. {_CODE}")
    shape = tuple(x.shape[1:])
    try:
        twin = _unwrap(copy.deepcopy(module)).to("cpu", memory_format=torch.contiguous_format).double()  # type: ignore[call-overload]
        root = _Root(twin.eval().requires_grad_(False))
        tracer = _Tracer(torch.full((BATCH, *shape), 0.5, dtype=torch.float64))
        traced = fx.GraphModule(root, tracer.trace(root))
    except Exception as error:  # code of the user
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"The model cannot be certified: its layers cannot be listed ({reason}). {_CODE}") from None
    graph = _Builder(traced, shape).build(output, binary)
    # Both must agree on all images, also on those far outside of [0, 1], where other ReLUs are active.
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(8, *shape, dtype=torch.float64, generator=generator)
    near, far = (torch.randn(8, *shape, dtype=torch.float64, generator=generator) for _ in range(2))
    for probes in (torch.cat([x.detach().cpu().double(), noise]), near, 10 * far):
        ours, theirs = graph.run(probes), _ask(twin, probes, output, binary)
        size = float(theirs.abs().max()) + 1e-300
        if ours.shape != theirs.shape or not float((ours - theirs).abs().max()) <= _ROUNDING * size:
            raise ModelError(
                "The model cannot be certified: its layers, read one by one, do not give its logits. Look for hooks, "
                "for control flow that depends on values, for layers that change a value in place which another layer "
                "uses, and for numbers kept outside of parameters and buffers."
            )
    return graph


def _ask(twin: nn.Module, probes: Tensor, output: str | int | None, binary: bool) -> Tensor:
    """Return the logits of the module's copy in float64."""
    try:
        with torch.no_grad():
            answer, _ = take_part(twin(probes.clone()), output, len(probes))
            logits: Tensor = make_two_logits(answer) if binary else answer
            return logits.double()
    except Exception as error:  # code of the user
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"The model cannot be certified: it cannot be run in float64, on {len(probes)} images ({reason}). Keep "
            "weights and constants as parameters or buffers (register_buffer), and leave the batch size open."
        ) from None


def _unwrap(module: nn.Module) -> nn.Module:
    """Take networks out of the wrappers of parallel training."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(module, wrappers):
        module = module.module
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, wrappers):
                setattr(parent, name, _unwrap(child))
    return module


class _Root(nn.Module):
    """Calls a module with images alone, so that its other arguments have their defaults."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class _Tracer(fx.Tracer):
    """Lists the layers. Questions about shapes are answered with numbers, for a batch of `BATCH` images."""

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.example, self.known = example, dict[fx.Node, Any]()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in MODULES or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if all(part is not m for part in self.root.modules()):  # made in the forward of another
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def find_value(self, node: fx.Node) -> Any:
        """Compute the value of a node for the example."""
        for n in self.graph.nodes:
            if n not in self.known:
                self.known[n] = self.compute(n)
            if n is node:
                break
        return self.known[node]

    def compute(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.known[n])
        args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)  # it may be changed in place
        if node.op == "placeholder":
            return self.example
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


class _Value(fx.Proxy):
    """A value whose shape is known."""

    tracer: _Tracer

    @property
    def shape(self) -> Any:
        return self.tracer.find_value(self.node).shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return int(self.shape[0])


class _Builder:
    """Walks through the nodes of a traced module."""

    def __init__(self, traced: fx.GraphModule, in_shape: layers.Shape) -> None:
        self.traced, self.graph = traced, Graph()
        self.graph.add(Input(in_shape))
        self.values: dict[fx.Node, Any] = {}

    def build(self, output: str | int | None, binary: bool) -> Graph:
        for node in self.traced.graph.nodes:
            if node.op == "output":
                break
            try:
                self.values[node] = self.visit(node)
            except RefusedError as refused:
                raise ModelError(
                    f"The model cannot be certified: {self.name(node)} {refused}. {_WHAT_IS_KNOWN}"
                ) from None
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise ModelError(
                    f"The model cannot be certified: {self.name(node)} is not understood ({reason}). {_WHAT_IS_KNOWN}"
                ) from None
        result = self.take_part(self.look_up(node.args[0]), output)
        if binary and isinstance(result, Wire) and self.graph.shape(result.at) in ((), (1,)):
            column = layers.add_move(self.graph, result.at, (1,))
            result = Wire(layers.add_linear(self.graph, column, torch.tensor([[0.0], [1.0]]), None))
        if not isinstance(result, Wire) or len(self.graph.shape(result.at)) != 1:
            raise ModelError("The model cannot be certified: its output is not one row of logits for an image.")
        return self.graph.cut(result.at)

    def take_part(self, answer: Any, output: str | int | None) -> Any:
        """Take the logits out of an answer, as `take_part` of the guard does."""
        if not isinstance(answer, Mapping | tuple | list):
            return answer
        names = getattr(answer, "_fields", None) or range(len(answer))
        parts = answer if isinstance(answer, Mapping) else dict(zip(map(str, names), answer, strict=True))
        rows = [k for k, v in parts.items() if isinstance(v, Wire) and len(self.graph.shape(v.at)) == 1]
        chosen = str(output) if output is not None else "logits" if "logits" in parts else rows[0] if rows else ""
        return parts.get(chosen)

    def name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            module = self.traced.get_submodule(str(node.target))
            return f"layer {str(node.target).removeprefix('inner.')} ({type(module).__name__})"
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
            result = MODULES[type(module)](self.graph, module, *args, **kwargs)
            return self.change(args[0], result) if getattr(module, "inplace", False) else result
        if not depends:
            call = node.target if node.op == "call_function" else getattr(args[0], str(node.target))
            assert callable(call)
            return call(*(args if node.op == "call_function" else args[1:]), **kwargs)
        handler = METHODS.get(str(node.target)) if node.op == "call_method" else FUNCTIONS.get(node.target)
        if handler is None:
            raise RefusedError("is not understood")
        result = handler(self.graph, *args, **kwargs)
        return self.change(args[0], result) if kwargs.get("inplace") or node.target in IN_PLACE else result

    def change(self, old: Any, new: Any) -> Any:
        """Note that a layer worked in place: whoever uses the old value from now on gets the new one."""
        self.values |= {node: new for node, value in self.values.items() if value == old and isinstance(value, Wire)}
        return new


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for v in value for leaf in _leaves(v)] if isinstance(value, list | tuple) else [value]
