"""Whether a model answers as the first batch that it was ever given tells it to.

Two copies are made before either is asked anything. They get different first batches, and then the same images.
"""

from __future__ import annotations

import contextlib
import copy
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from robbench.classifier.batch_dependence import answers_differ
from robbench.classifier.guard import Guarded
from robbench.classifier.moved_images import measure_change
from robbench.core.errors import ModelError
from robbench.core.user_code import contain_exits

__all__ = ["copy_module", "find_changed", "list_state", "refuse_memory_of_first_batch"]

# Of the logits' length: what another layout of the weights, or a faster layer, may change.
_ROUNDING = 2e-2


def copy_module(module: nn.Module, functions: bool = False) -> nn.Module | None:
    """Copy a module; None if it does not copy.

    Args:
        module: what to copy.
        functions: whether to copy functions too, which `deepcopy` shares: those in attributes and hooks, and the
            forward of a class that is made in a function. A copied function closes over copies of its variables.
    """
    try:
        with torch.no_grad(), contain_exits():  # the copy of a TorchScript module would have parameters with a history
            ours = copy.deepcopy(module)
            for part in ours.modules() if functions else ():
                _copy_functions(part)
    except Exception:  # a user's module may raise anything: hooks, handles and generators do not copy
        return None
    return ours


def _copy_functions(part: nn.Module) -> None:
    if isinstance(part, torch.jit.ScriptModule):
        return
    held, seen = vars(part), dict[int, object]()
    for name, value in list(held.items()):
        if isinstance(value, FunctionType):
            held[name] = _copy_value(value, seen)
        elif isinstance(value, dict):  # hooks, too
            value.update({k: _copy_value(v, seen) for k, v in value.items() if isinstance(v, FunctionType)})
    forward = type(part).forward
    if "forward" not in held and isinstance(forward, FunctionType):
        held["forward"] = MethodType(_copy_value(forward, seen), part)


def _copy_value(value: Any, seen: dict[int, object]) -> Any:
    """Copy a value, and a function with its defaults and what it closes over. What does not copy is shared."""
    if id(value) in seen:
        return seen[id(value)]
    if not isinstance(value, FunctionType):
        try:
            seen[id(value)] = copy.deepcopy(value)
        except Exception:  # a user's object may raise anything
            seen[id(value)] = value
        return seen[id(value)]
    if value.__closure__ is None and value.__defaults__ is None and value.__kwdefaults__ is None:
        return value
    cells = tuple(CellType() for _ in value.__closure__ or ())
    ours = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells or None)
    seen[id(value)] = ours
    for cell, theirs in zip(cells, value.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # an empty cell
            cell.cell_contents = _copy_value(theirs.cell_contents, seen)
    ours.__defaults__ = _copy_value(value.__defaults__, seen)
    ours.__kwdefaults__ = _copy_value(value.__kwdefaults__, seen)
    ours.__dict__.update(value.__dict__)
    return ours


_NOTHING = object()
_State = dict[nn.Module, dict[str, tuple[object, object, object]]]


def list_state(module: nn.Module) -> _State:
    """List what the modules hold beside parameters: value, version of a tensor, and length of a container."""
    return {
        part: {
            name: (
                value,
                getattr(value, "_version", None),
                len(value) if isinstance(value, list | dict | set) else None,
            )
            for name, value in (_python_state(part) | dict(part.named_buffers(recurse=False))).items()
        }
        for part in module.modules()
    }


def _python_state(part: nn.Module) -> dict[str, object]:
    # A TorchScript module makes new Python objects for its parameters whenever it is asked for them.
    return {} if isinstance(part, torch.jit.ScriptModule) else vars(part)


def find_changed(before: _State, module: nn.Module) -> list[str]:
    """Name what the modules have come to hold, or have changed, since `before`."""
    names = {part: name for name, part in module.named_modules()}

    def is_new(part: nn.Module, name: str) -> bool:
        (value, *details), (was, *known) = now[part][name], before[part].get(name, (_NOTHING, None, 0))
        return value is not was or details != known

    now = list_state(module)
    return [
        f"{names[part]}.{name}".removeprefix(".")
        for part, held in now.items()
        if part in before  # a faster layer is no state
        for name in held
        if is_new(part, name)
    ]


def refuse_memory_of_first_batch(fresh: nn.Module, used: Guarded, x: Tensor, changed: list[str]) -> None:
    """Refuse a model that answers otherwise when the first batch of its life was another one.

    Args:
        fresh: a copy that was never asked anything.
        used: the copy whose first batch was x.
        x: images [n, C, H, W] on the device of `used`.
        changed: what the used copy has come to hold.

    Raises:
        ModelError: the copies answer x differently.
    """
    try:
        other = Guarded(fresh.to(x.device), output=used.output, binary=used.binary).eval()
        with torch.no_grad():
            other(0.9 - 0.3 * x)  # another mean, least and largest pixel
            answers = used.ask_together(x), other(x)
            if not bool((measure_change(answers[1], answers[0]) > _ROUNDING).any()):
                return
            if not answers_differ(lambda: used.ask_together(x), lambda: other(x), _ROUNDING):
                return
    except (ModelError, RuntimeError, MemoryError):  # `classify` words it
        return
    where = ", ".join(changed[:3]) or "objects in its attributes, and variables of its functions"
    raise ModelError(
        "The model's answers depend on the first batch that it was ever given: it keeps something of it (look at "
        f"{where}). Compute what it keeps before the run, from training images."
    )
