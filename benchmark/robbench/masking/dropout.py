"""Models with dropout in training mode. The sanity run measures them; all other runs refuse training mode."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["AlwaysDropout", "keep_dropout_on"]


class AlwaysDropout(nn.Module):
    """Dropout that is active in training mode and in eval mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of x, of any shape, as in training mode."""
        return F.dropout(x, self.p, training=True)


def keep_dropout_on(model: nn.Module) -> nn.Module:
    """Return a copy of a model in eval mode that keeps the dropout of training mode active.

    The model itself is returned if it has no dropout in training mode, or if another part depends on the mode (batch
    statistics, or own code that reads the mode). A run then refuses a model in training mode and says why.
    """
    training = [part for part in model.modules() if part.training]
    has_dropout = any(type(part) is nn.Dropout for part in training)
    if not has_dropout or any(_depends_on_mode(part) for part in training if type(part) is not nn.Dropout):
        return model
    try:
        copied = copy.deepcopy(model)
    except Exception:  # a user's module may raise anything, because hooks, handles and generators cannot be copied
        return model
    for parent in list(copied.modules()):
        for name, part in list(parent.named_children()):
            if type(part) is nn.Dropout and part.training:
                setattr(parent, name, AlwaysDropout(part.p))
    return copied.eval()


def _depends_on_mode(part: nn.Module) -> bool:
    """Return whether a module may compute something else in training mode than in eval mode."""
    if isinstance(part, _NormBase | _DropoutNd):
        return True
    if type(part).__module__.startswith("torch.nn."):
        return isinstance(part, nn.RReLU | nn.MultiheadAttention | nn.RNNBase | nn.Transformer)
    code = getattr(type(part).forward, "__code__", None)
    return code is None or "training" in code.co_names
