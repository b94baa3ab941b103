"""The classifier under test: a frozen, guarded copy on its device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from robbench.classifier.fast_layers import install_fast_layers
from robbench.classifier.first_batch import copy_module, find_changed, list_state, refuse_memory_of_first_batch
from robbench.classifier.guard import Guarded
from robbench.core.errors import ModelError
from robbench.core.user_code import contain_exits

__all__ = ["Target", "pick_device", "prepare"]


@dataclass(frozen=True, eq=False)
class Target:
    """A model ready to be attacked.

    Attributes:
        module: in eval mode, parameters frozen, on `device`; [L, C, H, W] in [0, 1] -> logits [L, K].
        name: as it appears in results.
        device: where it runs.
        weights: SHA-256 of the weights.
        identity: what else determines the function that it computes.
        paper: numbers that its card quotes from the paper.
    """

    module: nn.Module
    name: str
    device: torch.device
    weights: str
    identity: dict[str, object]
    paper: dict[str, object] = field(default_factory=dict)


def pick_device(name: str) -> torch.device:
    """Resolve `auto`, `cpu`, `cuda` or `cuda:i`.

    Raises:
        ModelError: there is no such device here. The message names the devices that there are.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    known = ["cpu", *(f"cuda:{i}" for i in range(count))]
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in known:
        raise ModelError(f"Device {name!r} given; available here: auto, {', '.join(known)}.")
    return torch.device(wanted)


def prepare(
    module: nn.Module,
    device: torch.device,
    x: Tensor,
    *,
    fast_layers: bool = True,
    bfloat16: bool = False,
    one_by_one: bool = False,
    output: str | int | None = None,
    binary: bool = False,
) -> Guarded:
    """Return a frozen, guarded copy of a model on the device. The caller's module stays as it is.

    Convolutions run in channels-last layout if the model works in that layout; a `.view` inside it may not.

    Args:
        module: in eval mode.
        device: where the copy will run.
        x: a few images to try it on, [n, C, H, W].
        fast_layers: whether layers may be replaced by faster ones on a CPU (`fast_layers`).
        bfloat16: whether gradients will run in bfloat16, in which faster layers are then compared, too.
        one_by_one: whether the model is given each image in a batch of its own.
        output: see `Guarded`, like binary.
        binary: see output.

    Raises:
        ModelError: the model is in training mode, has layers without weights, hides its weights in TorchScript code, or
            answers as the first batch that it was ever given tells it to.
    """
    _check_weights(module)
    training = [name or type(module).__name__ for name, part in module.named_modules() if part.training]
    if training:
        raise ModelError(
            f"The model is in training mode ({training[0]}{' and more' if training[1:] else ''}), so dropout and "
            "batch statistics would make its answers depend on chance and on the batch. Call model.eval() first."
        )
    copied = copy_module(module)
    ours = (module if copied is None else copied).to(device)
    fresh = copy_module(module, functions=True) if copied is not None else None  # nobody has asked it anything
    state = list_state(ours)
    if copied is not None:
        for parameter in ours.parameters():  # `requires_grad_` of a TorchScript module raises
            parameter.requires_grad_(False)
        if any(p.dim() == 4 for p in ours.parameters()):
            try:
                ours.to(memory_format=torch.channels_last)  # fails if a parameter has five dimensions
                state = list_state(ours)
                with torch.no_grad(), contain_exits():
                    ours(x.to(device, copy=True))
            except Exception:  # a user's module may raise anything about its input; `classify` words it
                ours.to(memory_format=torch.contiguous_format)
        if fast_layers and device.type == "cpu":
            install_fast_layers(ours, x, bfloat16)
    guarded = Guarded(ours, one_by_one, output, binary).eval()
    guarded.try_out(x.to(device))
    if fresh is not None:
        refuse_memory_of_first_batch(fresh, guarded, x.to(device), find_changed(state, ours))
    return guarded


def _check_weights(module: nn.Module) -> None:
    """Refuse a model whose weights cannot be read.

    Raises:
        ModelError: a lazy layer never ran, a weight has no values or is sparse, or a TorchScript module keeps tensors
            as constants of its code.
    """
    if lazy := [name for name, p in module.named_parameters() if is_lazy(p)]:
        raise ModelError(
            f"The model has layers that never ran and have no weights yet ({lazy[0]}). Load the weights, or call the "
            "model once on a batch of images."
        )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise ModelError(f"The model's weights have no values ({name} is on the device meta). Load the weights.")
        if tensor.layout != torch.strided:
            raise ModelError(
                f"The model has weights of layout {tensor.layout} ({name}); allowed: dense ones. Replace it by "
                "torch.nn.Parameter(weight.to_dense())."
            )
    if isinstance(module, torch.jit.ScriptModule) and (
        not hasattr(module, "training") or "<Tensor>" in str(module.inlined_graph)
    ):
        raise ModelError(
            "The TorchScript module keeps weights as constants of its code (was it frozen?), so its results could not "
            "be told from those of other weights. Give the module as it was before torch.jit.freeze, or the plain "
            "torch.nn.Module."
        )
