"""Which model is measured, and on which images. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, Self, TypedDict

from robbench.core.errors import RobbenchError
from robbench.core.files import check_path_component
from robbench.models.sources import ALLOWED, ModelSource, parse_source

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ModelSpec", "SpecFields"]


class SpecFields(TypedDict, total=False):
    """The fields of `ModelSpec` besides the model, for the signatures of public functions."""

    x: Tensor | None
    y: Tensor | None
    dataset: str | None
    name: str | None
    architecture: str | None
    mean: Sequence[float] | None
    std: Sequence[float] | None


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """A model as the user gives it, with everything that is needed to load it and its test images.

    Attributes:
        model: a registered model's name (`digits/natural`), a source of models without a card (`file:PATH`, `hf:REPO`,
            `timm:NAME`, `robustbench:NAME`, `package.module:function`; see docs/models.md), or any module in eval mode
            that maps images [N, C, H, W] in [0, 1] to logits [N, K].
        x: images [N, C, H, W] in [0, 1] for a source or a module; sample ids are their positions.
        y: labels [N] of `x`.
        dataset: for a source or a module, a known data set to test on (instead of x and y), or the name under which x
            and y are reported ("custom"). A robustbench source names its own.
        name: what a source or a module is called in results; by default the module's class name, or a name made of the
            source.
        architecture: for the weights of `file:` and `hf:`, a name of `ARCHITECTURES` with arguments,
            `wide_resnet:depth=28,widen_factor=10`. `num_classes=K` is one more argument, which is needed where the
            images are not those of a known data set.
        mean: for `file:` and `hf:`, per channel of x in [0, 1]; the normalization becomes a part of the module.
        std: per channel; goes with mean.

    Raises:
        RobbenchError: a field has the wrong type, or the fields do not go together.
    """

    model: str | nn.Module
    x: Tensor | None = None
    y: Tensor | None = None
    dataset: str | None = None
    name: str | None = None
    architecture: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check every field before anything is loaded."""
        if not isinstance(self.model, str) and not _is_torch(self.model, "nn.Module"):
            raise RobbenchError(
                f"model: {_kind(self.model)} given; allowed: a torch.nn.Module, a registered name (`robbench list "
                f"models`), or a source ({ALLOWED}).{_suggest_module(self.model)}"
            )
        for field, tensor in (("x", self.x), ("y", self.y)):
            if tensor is not None and not _is_torch(tensor, "Tensor"):
                raise RobbenchError(
                    f"{field}: {_kind(tensor)} given; allowed: a torch.Tensor. {_suggest_tensor(field, tensor)}"
                )
        for field in ("dataset", "name", "architecture"):
            text = getattr(self, field)
            if text is not None and not isinstance(text, str):
                raise RobbenchError(f"{field}: {text!r} given; allowed: text, or None.")
        for field, text in (("dataset", self.dataset), ("name", self.name)):
            _check_folder(field, text)
        for field in ("mean", "std"):
            object.__setattr__(self, field, _read_numbers(field, getattr(self, field)))
        self._check_combination()

    def _check_combination(self) -> None:
        given = [f.name for f in fields(self)[1:] if getattr(self, f.name) is not None]
        if isinstance(self.model, str) and self.source is None and given:
            raise RobbenchError(
                "x, y, dataset, name, architecture, mean and std go with a source or a module of your own, not with a "
                f"registered name ({self.model!r} given with {', '.join(given)})."
            )
        if not isinstance(self.model, str) and self.has_build:
            raise RobbenchError("architecture, mean and std go with file: and hf:; a module of your own is complete.")

    @classmethod
    def take(cls, model: str | nn.Module, given: Mapping[str, Any]) -> Self:
        """Make a spec of the fields among these keyword arguments that belong to it."""
        return cls(model, **{key: given[key] for key in SpecFields.__annotations__ if key in given})

    @property
    def source(self) -> ModelSource | None:
        """The source; None for a registered name or a module."""
        return parse_source(self.model) if isinstance(self.model, str) else None

    @property
    def has_build(self) -> bool:
        """Whether the spec says how to turn bare weights into a model."""
        return any(v is not None for v in (self.architecture, self.mean, self.std))


def _is_torch(value: object, kind: str) -> bool:
    """Tell whether a value is of a class of torch, without importing torch: its objects exist only after an import."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    cls = torch.nn.Module if kind == "nn.Module" else torch.Tensor
    return isinstance(value, cls)


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _suggest_module(given: object) -> str:
    """Say how to make a module of what was given as the model; "" if there is no way."""
    if isinstance(given, type):
        return " This is a class: give an object of it, in eval mode."
    if hasattr(given, "predict"):
        return " The attacks need logits from torch: write the model's function as the forward of a torch.nn.Module."
    if callable(given):
        return " A function becomes a module as the forward of a class that inherits from torch.nn.Module."
    return " A state dict goes into a module: model.load_state_dict(...)." if isinstance(given, Mapping) else ""


def _suggest_tensor(field: str, given: object) -> str:
    """Say how to make a tensor of what was given as x or y."""
    if hasattr(given, "__array__"):
        return f"torch.from_numpy({field}) makes one of a NumPy array."
    if hasattr(given, "__iter__") and not isinstance(given, str | Sequence):
        at = 0 if field == "x" else 1
        return f"Of a loader, torch.cat([batch[{at}] for batch in loader]) makes one. Give x and y."
    return f"torch.tensor({field}) makes one of a list of numbers."


def _check_folder(field: str, text: str | None) -> None:
    """Refuse what cannot be the name of a folder: results lie under DATASET/NAME."""
    try:
        if text is not None:
            check_path_component(text, field)
    except ValueError as error:
        raise RobbenchError(f"{error}.") from None


def _read_numbers(field: str, values: Any) -> tuple[float, ...] | None:
    if values is None:
        return None
    numbers = [] if isinstance(values, str) or not hasattr(values, "__iter__") else list(values)
    numbers = [v.item() if hasattr(v, "item") else v for v in numbers]
    if not numbers or not all(isinstance(v, Real) and not isinstance(v, bool) for v in numbers):
        raise RobbenchError(f"{field}: {values!r} given; allowed: a list with one number per channel, or None.")
    return tuple(map(float, numbers))
