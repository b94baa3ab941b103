"""What an entry of the zoo says, and the networks that entries are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from robbench.models.card import Registry, locate_builtin_cards
from robbench.models.load import load_model
from robbench.models.schema import DatasetName

__all__ = ["Half", "Label", "ZooEntry", "network", "zoo_registry"]

Label = Literal["masked", "honest"]
Half = Literal["calibration", "held-out"]


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """A model of which it is known whether its robust accuracy under the usual attack can be trusted.

    Attributes:
        name: unique in the zoo.
        label: `masked` or `honest`; `zoo` says by which rule.
        half: `calibration`, on which thresholds may be chosen, or `held-out`, on which they are reported.
        kind: what it shares with others; both halves hold every kind.
        dataset: the data set it is for.
        why: what makes it masked or honest, in a sentence.
        source: where that comes from.
        build: makes the model; use `model`.
        stand_in: makes a model that answers alike and whose gradient can be used: its adversarial examples are tried on
            this one. None where the model's own gradient serves.
        own_gradient: False where the backward pass is written to be that of another function (straight-through), and
            attacks get past with it all the same.
    """

    name: str
    label: Label
    half: Half
    kind: str
    dataset: DatasetName
    why: str
    source: str
    build: Callable[[], nn.Module]
    stand_in: Callable[[], nn.Module] | None = None
    own_gradient: bool = True

    def model(self) -> nn.Module:
        """Build the model: in eval mode, parameters frozen; [N, C, H, W] in [0, 1] to logits [N, K].

        Raises:
            ModelError: the weights it is made of are missing or damaged.
        """
        return _frozen(self.build())

    def differentiable(self) -> nn.Module | None:
        """Build the stand-in, if there is one, like the model.

        Raises:
            ModelError: the weights it is made of are missing or damaged.
        """
        return None if self.stand_in is None else _frozen(self.stand_in())


def _frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def zoo_registry() -> Registry:
    """Index the built-in cards and those of the zoo's own networks."""
    return Registry([locate_builtin_cards(), Path(__file__).resolve().parent / "registry"])


def network(name: str) -> nn.Module:
    """Load a trained network by its full name, such as `digits/natural`.

    Raises:
        CardError, ModelError: there is no such card, or its weights are missing or damaged.
    """
    return load_model(zoo_registry().find(name)).module
