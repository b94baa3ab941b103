"""Which model is measured, and on which images. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict

from robbench.core.errors import RobbenchError
from robbench.core.files import check_path_component
from robbench.core.types import IMAGENET
from robbench.models.sources import ALLOWED, ModelSource, parse_source

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["IMAGE_FIELDS", "ModelSpec", "RecalledFields", "SpecFields"]


class RecalledFields(TypedDict, total=False):
    """The fields of `ModelSpec` that a result does not name."""

    x: Tensor | None
    y: Tensor | None
    architecture: str | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    data: object
    resize: int | None
    crop: int | None
    channels: int | None
    classes: str | Path | Mapping[str, int] | None
    on_broken: str | None
    output: str | int | None
    binary: bool | None


class SpecFields(RecalledFields, total=False):
    """The fields of `ModelSpec` besides the model, for the signatures of public functions."""

    dataset: str | None
    name: str | None


IMAGE_FIELDS = ("resize", "crop", "channels", "classes", "on_broken")
"""The fields that say how encoded images are read."""


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
        mean: for weights, TorchScript and ONNX, per channel of x in [0, 1]; the normalization becomes a part of the
            module.
        std: per channel; goes with mean.
        data: images and labels instead of x and y: a path, a pair (x, y), a torch Dataset or a DataLoader
            (`data.own.open_images`, which also says what the next five fields mean).
        resize: length of the shorter side.
        crop: side of the square from the centre.
        channels: 3 or 1.
        classes: which output of the model each class is.
        on_broken: "stop" or "skip".
        output: which part of the model's answer holds the logits: an attribute, a key or a position. None takes the
            answer itself, or the only part that can hold logits.
        binary: whether the model answers with one logit, of class 1 against class 0.

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
    data: object = None
    resize: int | None = None
    crop: int | None = None
    channels: int | None = None
    classes: str | Path | Mapping[str, int] | None = None
    on_broken: str | None = None
    output: str | int | None = None
    binary: bool | None = None

    def __post_init__(self) -> None:
        """Check every field before anything is loaded."""
        if not isinstance(self.model, str) and not _is_model(self.model):
            raise RobbenchError(
                f"model: {_kind(self.model)} given; allowed: a torch.nn.Module, a function of arrays of images, an "
                f"estimator of scikit-learn, a registered name (`robbench list models`), or a source ({ALLOWED})."
                f"{_suggest_module(self.model)}"
            )
        for field, tensor in (("x", self.x), ("y", self.y)):
            if tensor is not None and not _is_torch(tensor, "Tensor") and _kind(tensor) != "numpy.ndarray":
                raise RobbenchError(
                    f"{field}: {_kind(tensor)} given; allowed: a torch.Tensor or a NumPy array. "
                    f"{_suggest_tensor(field)}"
                )
        for field in ("dataset", "name", "architecture"):
            text = getattr(self, field)
            if text is not None and not isinstance(text, str):
                raise RobbenchError(f"{field}: {text!r} given; allowed: text, or None.")
        for field, text in (("dataset", self.dataset), ("name", self.name)):
            _check_folder(field, text)
        for field in ("mean", "std"):
            object.__setattr__(self, field, _read_numbers(field, getattr(self, field)))
        for field in ("resize", "crop", "channels"):
            _check_size(field, getattr(self, field))
        if self.on_broken not in (None, "stop", "skip"):
            raise RobbenchError(f"on_broken: {self.on_broken!r} given; allowed: stop, skip.")
        if isinstance(self.data, os.PathLike):
            object.__setattr__(self, "data", os.fspath(self.data))
        object.__setattr__(self, "binary", self.binary or None)
        self._check_combination()

    def _check_combination(self) -> None:
        given = [f.name for f in fields(self)[1:] if getattr(self, f.name) is not None]
        if isinstance(self.model, str) and self.source is None and given:
            raise RobbenchError(
                "x, y, dataset, name, architecture, mean and std go with a source or a module of your own, as all that "
                "is said about images and outputs does, not with a registered name "
                f"({self.model!r} given with {', '.join(given)})."
            )
        if self.data is not None and (self.x is not None or self.y is not None):
            raise RobbenchError("data given with x or y; give the images once: data=, or x= and y=.")
        is_known = self.source is not None and (self.dataset or self.source.test_set(None)) == IMAGENET
        if self.data is None and not is_known and (lone := [name for name in IMAGE_FIELDS if name in given]):
            raise RobbenchError(f"{', '.join(lone)} given without data; they say how the images of --data are read.")
        if not isinstance(self.model, str) and self.has_build:
            raise RobbenchError(
                "architecture, mean and std go with a file or a hub; a model of your own is complete. Put "
                "normalization inside it."
            )

    @classmethod
    def take(cls, model: str | nn.Module, given: Mapping[str, Any]) -> Self:
        """Make a spec of the fields among these keyword arguments that belong to it."""
        return cls(model, **{key: given[key] for key in SpecFields.__annotations__ if key in given})

    def describe(self) -> dict[str, Any]:
        """Return all fields that a JSON file can hold. x, y and data that is no path are left out."""
        held = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("model", "x", "y")}
        for name in ("mean", "std"):
            held[name] = None if held[name] is None else list(held[name])
        held["data"] = self.data if isinstance(self.data, str) else None
        classes = self.classes
        held["classes"] = str(classes) if isinstance(classes, Path) else classes
        return {"model": self.model if isinstance(self.model, str) else None, **held}

    @property
    def source(self) -> ModelSource | None:
        """The source; None for a registered name or a module."""
        return parse_source(self.model) if isinstance(self.model, str) else None

    @property
    def has_own_images(self) -> bool:
        """Whether the images are the user's own, instead of those of a known data set."""
        return self.x is not None or self.data is not None

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


def _is_model(value: object) -> bool:
    """Tell whether a value that is no text can be a model: a module, a function, or a fitted estimator."""
    if isinstance(value, type):
        return False
    return _is_torch(value, "nn.Module") or callable(value) or hasattr(value, "predict")


def _suggest_module(given: object) -> str:
    """Say how to make a model of what was given; "" if there is no way."""
    if isinstance(given, type):
        return " This is a class: give an object of it, in eval mode."
    return " A state dict goes into a module: model.load_state_dict(...)." if isinstance(given, Mapping) else ""


def _suggest_tensor(field: str) -> str:
    return (
        f"torch.tensor({field}) makes one of a list of numbers. A Dataset, a DataLoader or a path goes into data=, "
        "without x and y."
    )


def _check_size(field: str, value: object) -> None:
    allowed = "1 or 3" if field == "channels" else "a whole number from 1 on"
    is_size = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value is not None and not (is_size and (field != "channels" or value in (1, 3))):
        raise RobbenchError(f"{field}: {value!r} given; allowed: {allowed}.")


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
