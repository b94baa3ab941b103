"""Loading what a run is given: the test images, and the model, which is registered, from elsewhere, or a module."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.classifier.answers import FIRST_IMAGES, AnswerProbe
from robbench.classifier.guard import Guarded, out_of_memory
from robbench.classifier.own_images import check_own_images
from robbench.classifier.prepare import Target, pick_device, prepare
from robbench.core.errors import DataError, ModelError, RobbenchError
from robbench.core.files import digest
from robbench.core.types import Dataset
from robbench.core.user_code import contain_exits
from robbench.data.sets import load
from robbench.evaluation.arguments import require_dataset
from robbench.evaluation.options import Options
from robbench.models.card import Registry, extract_identity
from robbench.models.load import describe_module, digest_module, load_model
from robbench.models.load_source import load_source
from robbench.models.spec import ModelSpec
from robbench.results.selection import order_positions

__all__ = ["Images", "make_probe", "own_images", "own_target", "registered", "resolve", "select", "sourced"]


@dataclass(frozen=True, eq=False)
class Images:
    """Test images as the run uses them: x(positions) -> float images in [0, 1].

    `flags` says what was changed about images that a user brought: name of a problem -> sentence.
    """

    dataset: str
    x: Callable[[NDArray[np.int64]], Tensor]
    y: Tensor
    index: NDArray[np.int64]
    num_classes: int | None
    digest: str
    dtype: torch.dtype = torch.float32
    flags: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Dataset) -> Self:
        """Take the images of a data set; they become float32 as they are used."""

        def images(at: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(data.x[at]).to(torch.float32) / data.scale

        return cls(data.name, images, torch.from_numpy(data.y), data.index, data.num_classes, data.digest)


def resolve(spec: ModelSpec, options: Options) -> tuple[Target, Images]:
    """Load a model and its test images.

    Raises:
        RobbenchError: they cannot be loaded, or do not fit each other.
    """
    _check_modes()
    device, source = pick_device(options.device), spec.source
    if source is not None:
        images = own_images(spec.x, spec.y, source.test_set(spec.dataset), options)
        return sourced(spec, device, images, options), images
    if isinstance(spec.model, str):
        target, data = registered(spec.model, device, options)
        return target, Images.of(data)
    images = own_images(spec.x, spec.y, spec.dataset, options)
    return own_target(spec.model, spec.name, device, images, options), images


def _check_modes() -> None:
    """Refuse modes of torch in which the caller runs us and which would change what is measured.

    Raises:
        RobbenchError: inference mode forbids gradients, and autocast rounds the model's answers.
    """
    autocast = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    if mode := "inference_mode" if torch.is_inference_mode_enabled() else "autocast" if autocast else "":
        why = "gradients cannot be computed there" if mode == "inference_mode" else "it would round the model's answers"
        raise RobbenchError(
            f"Called inside torch.{mode}; {why}. Call robbench outside of it (robbench runs the model in the precision "
            f"of the images; gradients='bfloat16' asks for faster gradients)."
        )


@contextlib.contextmanager
def _reading(device: torch.device) -> Iterator[None]:
    """Word what a user's module raises while it is read, copied and moved: `.to`, `__repr__`, `named_modules`."""
    try:
        with contain_exits():
            yield
    except RobbenchError:
        raise
    except Exception as error:  # a user's module may raise anything
        if out_of_memory(error):
            raise
        raise ModelError(
            f"The model cannot be read, or moved to {device}: {type(error).__name__}: {error}. Expected: a "
            "torch.nn.Module whose repr(), named_modules(), named_parameters() and .to(device) work."
        ) from error


def _prepare(module: nn.Module, device: torch.device, x: Tensor, options: Options) -> Guarded:
    return prepare(
        module,
        device,
        x,
        fast_layers=options.fast_layers,
        bfloat16=options.gradients is not None,
        one_by_one=options.one_by_one,
    )


def registered(name: str, device: torch.device, options: Options) -> tuple[Target, Dataset]:
    """Load a registered model and the test set that its card names."""
    entry = Registry.default([Path(m) for m in options.models]).find(name)
    loaded = load_model(entry)
    data = load(entry.dataset, "test", options.data_dir)
    first = torch.from_numpy(data.x[:2]).float() / data.scale
    target = Target(
        module=_prepare(loaded.module, device, first, options),
        name=entry.name,
        device=device,
        weights=loaded.weights_sha256,
        identity=extract_identity(loaded.card),
        paper=loaded.card.paper.model_dump(mode="json") if loaded.card.paper else {},
    )
    return target, data


def own_images(x: Tensor | None, y: Tensor | None, dataset: str | None, options: Options) -> Images:
    """Take a user's images, or a named data set for a user's model.

    Raises:
        DataError: neither or half of it was given, or the images are not fit for use.
    """
    if (x is None) != (y is None):
        raise DataError("x and y go together.")
    if x is None or y is None:
        return Images.of(load(require_dataset(dataset), "test", options.data_dir))
    x, y, flags = check_own_images(x, y)
    content = digest([list(x.shape), str(x.dtype), _bytes_digest(x), _bytes_digest(y)])
    return Images(dataset or "custom", lambda at: x[at], y, np.arange(len(y)), None, content, x.dtype, flags)


def _bytes_digest(t: Tensor) -> str:
    return hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()


def own_target(model: nn.Module, name: str | None, device: torch.device, images: Images, options: Options) -> Target:
    """Take a user's module; its identity is its class, its structure and its tensors."""
    with _reading(device):
        return Target(
            module=_prepare(model, device, images.x(np.arange(min(2, len(images.y)))), options),
            name=name or type(model).__name__,
            device=device,
            weights=digest_module(model),
            identity=describe_module(model),
        )


def sourced(spec: ModelSpec, device: torch.device, images: Images, options: Options) -> Target:
    """Load a model that has no card; its identity names the source."""
    source = spec.source
    assert source is not None
    first = images.x(np.arange(min(2, len(images.y))))
    _, channels, rows, columns = first.shape
    found = load_source(spec, (channels, rows, columns), images.num_classes)
    with _reading(device):
        module = _prepare(found.module, device, first, options)
    return Target(
        module=module,
        name=spec.name or source.name,
        device=device,
        weights=found.weights,
        identity=found.identity,
    )


def make_probe(target: Target, images: Images, lanes: int) -> AnswerProbe:
    """Make the probe that compares the model's answers with stored ones. `lanes` is the batch width of the run."""
    return AnswerProbe(target, images.x(np.arange(min(FIRST_IMAGES, len(images.y)))), lanes)


def select(total: int, options: Options, everything: bool = False) -> NDArray[np.int64]:
    """Positions of the samples: the first N, or the first N of a seeded permutation."""
    count = total if everything or options.samples is None else min(options.samples, total)
    return order_positions(total, options.sample_seed)[:count]
