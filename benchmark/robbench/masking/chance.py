"""Dropout that was left on: a model to be examined, where any other run refuses one in training mode."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["LeftOn", "kept_on"]


class LeftOn(nn.Module):
    """Dropout that does not care for the mode of the model around it."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of x, of any shape, as training does."""
        return F.dropout(x, self.p, training=True)


def kept_on(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode that computes what the model does with its dropout left on.

    Only where dropout alone depends on the mode. A model in eval mode is returned as it is; so is one with batch
    statistics in training mode, or whose own code asks for the mode: a run then refuses it and says why.
    """
    on = [part for part in model.modules() if part.training]
    drops = [part for part in on if type(part) is nn.Dropout]
    others = (part for part in on if type(part) is not nn.Dropout)
    if not drops or any(_depends_on_mode(part) for part in others):
        return model
    try:
        ours = copy.deepcopy(model)
    except Exception:  # whatever a user's module raises: hooks, handles and generators do not copy
        return model
    for parent in list(ours.modules()):
        for name, part in list(parent.named_children()):
            if type(part) is nn.Dropout and part.training:
                setattr(parent, name, LeftOn(part.p))
    return ours.eval()


def _depends_on_mode(part: nn.Module) -> bool:
    """Tell whether a module computes something else in training mode."""
    if isinstance(part, _NormBase | _DropoutNd):
        return True
    if type(part).__module__.startswith("torch.nn."):
        return isinstance(part, nn.RReLU | nn.MultiheadAttention | nn.RNNBase | nn.Transformer)
    code = getattr(type(part).forward, "__code__", None)
    return code is None or "training" in code.co_names
