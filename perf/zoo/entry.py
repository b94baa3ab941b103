"""The class of zoo entries, and the trained networks in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from robbench.models.card import Registry, locate_builtin_cards
from robbench.models.load import load_model
from robbench.models.schema import DatasetName

__all__ = ["Half", "Label", "ZooEntry", "load_network", "open_zoo_registry"]

Label = Literal["masked", "honest"]
Half = Literal["calibration", "held-out"]


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """A model with a known label: its robust accuracy under the usual attack is masked or honest.

    Attributes:
        name: unique name.
        label: `masked` or `honest`. The docstring of `zoo` gives the rule.
        half: `calibration`, for choosing thresholds, or `held-out`, for reporting how often the checks are right.
        kind: name of a group of similar models. Both halves hold every kind.
        dataset: data set of the model.
        why: the reason for the label, in one sentence.
        source: source of the defense.
        build: makes the model. Call `build_model` instead.
        stand_in: makes a model with the same or similar answers and a usable gradient. Its adversarial examples are
            tried on the model. None if the model's own gradient is usable.
        own_gradient: False if the backward pass is that of another function (straight-through), but attacks succeed
            with it.
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

    def build_model(self) -> nn.Module:
        """Build the model in eval mode with frozen parameters. It maps [N, C, H, W] in [0, 1] to logits [N, K].

        Raises:
            ModelError: the weights of a network in it are missing or damaged.
        """
        return _frozen(self.build())

    def build_stand_in(self) -> nn.Module | None:
        """Build the stand-in in eval mode with frozen parameters; None if there is none.

        Raises:
            ModelError: the weights of a network in it are missing or damaged.
        """
        return None if self.stand_in is None else _frozen(self.stand_in())


def _frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def open_zoo_registry() -> Registry:
    """Return a registry of the built-in cards and the cards of the zoo's own networks."""
    return Registry([locate_builtin_cards(), Path(__file__).resolve().parent / "registry"])


def load_network(name: str) -> nn.Module:
    """Load a trained network by its full name, such as `digits/natural`.

    Raises:
        CardError, ModelError: there is no such card, or its weights are missing or damaged.
    """
    return load_model(open_zoo_registry().find(name)).module
