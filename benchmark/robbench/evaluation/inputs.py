"""Loading what a run is given: the test images, and the model, which is registered, from elsewhere, or a module."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robbench.classifier.answers import FIRST_IMAGES, AnswerProbe
from robbench.classifier.guard import out_of_memory
from robbench.classifier.own_images import check_own_images
from robbench.classifier.prepare import Target, pick_device, prepare
from robbench.core.errors import DataError, ModelError, RobbenchError
from robbench.core.files import digest
from robbench.core.types import IMAGENET, Dataset
from robbench.core.user_code import contain_exits
from robbench.data.own import digest_tensor, find_known_name, open_imagenet, open_images
from robbench.data.sets import find_index_bounds, load
from robbench.evaluation.arguments import require_dataset
from robbench.evaluation.options import Options
from robbench.evaluation.own_answers import COMPARED, compare_with_own
from robbench.models.adapters import adapt, find_adapter
from robbench.models.card import Registry, extract_identity
from robbench.models.load import describe_module, digest_module, load_model
from robbench.models.load_source import load_source
from robbench.models.spec import IMAGE_FIELDS, ModelSpec
from robbench.results.selection import order_positions

__all__ = ["Images", "identify", "make_probe", "own_images", "own_target", "registered", "resolve", "select"]


_MOST_BYTES = 2**29  # of images in memory at once


@dataclass(frozen=True, eq=False)
class LazyImages:
    """Images [N, C, H, W] that are read as they are sliced."""

    read: Callable[[NDArray[np.int64]], Tensor]
    positions: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.read(self.positions[rows])


@dataclass(frozen=True, eq=False)
class Images:
    """Test images as the run uses them: x(positions) -> float images in [0, 1].

    `flags` says what was changed about images that a user brought: name of a problem -> sentence. `about` identifies
    how they were read.
    """

    dataset: str
    x: Callable[[NDArray[np.int64]], Tensor]
    y: Tensor
    index: NDArray[np.int64]
    num_classes: int | None
    digest: str
    dtype: torch.dtype = torch.float32
    flags: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image, (C, H, W)."""
        return tuple(self.x(np.arange(1)).shape[1:])

    def take(self, positions: NDArray[np.int64]) -> LazyImages:
        """Return images that are read as they are sliced: few of them are in memory."""
        return LazyImages(self.x, positions)

    def split(self, positions: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Split positions into parts whose images take little memory at once."""
        most = max(1, _MOST_BYTES // (math.prod(self.shape) * self.dtype.itemsize))
        for begin in range(0, len(positions), most):
            yield positions[begin : begin + most]

    @classmethod
    def of(cls, data: Dataset) -> Self:
        """Take the images of a data set; they become float32 as they are used.

        Raises:
            DataError: the files in the data directory hold other images than those of the test set of this name.
        """
        find_index_bounds(data.name, data.digest, len(data.y))

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
    if isinstance(spec.model, str) and source is None:
        target, data = registered(spec.model, device, options)
        return target, Images.of(data)
    named = spec.dataset if source is None or spec.has_own_images else source.test_set(spec.dataset)
    images = own_images(spec, named, options)
    return own_target(spec, device, images, options), images


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


def registered(name: str, device: torch.device, options: Options) -> tuple[Target, Dataset]:
    """Load a registered model and the test set that its card names."""
    entry = Registry.default([Path(m) for m in options.models]).find(name)
    loaded = load_model(entry)
    data = load(entry.dataset, "test", options.data_dir)
    first = torch.from_numpy(data.x[:2]).float() / data.scale
    target = Target(
        module=prepare(
            loaded.module,
            device,
            first,
            fast_layers=options.fast_layers,
            bfloat16=options.gradients is not None,
            one_by_one=options.one_by_one,
        ),
        name=entry.name,
        device=device,
        weights=loaded.weights_sha256,
        identity=extract_identity(loaded.card),
        paper=loaded.card.paper.model_dump(mode="json") if loaded.card.paper else {},
    )
    return target, data


def own_images(spec: ModelSpec, dataset: str | None, options: Options) -> Images:
    """Take a user's images, or a named data set for a user's model.

    Args:
        spec: the model and its images.
        dataset: the data set that the spec or its source names.
        options: where data sets are.

    Raises:
        DataError: neither or half of it was given, or the images are not fit for use.
    """
    if (spec.x is None) != (spec.y is None):
        raise DataError("x and y go together.")
    if not spec.has_own_images and dataset != IMAGENET:
        return Images.of(load(require_dataset(dataset), "test", options.data_dir))
    how = {name: getattr(spec, name) for name in IMAGE_FIELDS}
    if spec.has_own_images:
        if known := find_known_name(dataset or ""):  # or tables would show these images as the known ones
            raise DataError(
                f"The name {dataset} given to images of your own; {known} is the name of a known test set. Give "
                f"another name, such as my-{known}, with norm and eps. To measure on the known test set, give its name "
                "alone."
            )
        own = open_images((spec.x, spec.y) if spec.data is None else spec.data, **how)
    else:
        own = open_imagenet(options.data_dir, resize=spec.resize, crop=spec.crop, on_broken=spec.on_broken)
    name, flags, about = dataset or "custom", dict(own.flags), dict(own.about)
    if own.read is not None:
        index, dtype = np.arange(len(own.y)), own.read(np.arange(1)).dtype
        return Images(name, own.read, own.y, index, own.num_classes, own.digest, dtype, flags, about)
    assert own.x is not None, "images are in memory, or are read"
    x, y, more = check_own_images(own.x, own.y)
    content = digest([list(x.shape), str(x.dtype), digest_tensor(x), digest_tensor(y)])
    read, dtype = _read_memory(x)
    return Images(name, read, y, np.arange(len(y)), own.num_classes, content, dtype, flags | more, about)


def _read_memory(x: Tensor) -> tuple[Callable[[NDArray[np.int64]], Tensor], torch.dtype]:
    """Return what takes images [n, C, H, W] in [0, 1] of a tensor, and their dtype."""
    if x.dtype == torch.uint8:
        return lambda at: x[at].to(torch.float32) / 255, torch.float32
    return lambda at: x[at], x.dtype


def own_target(spec: ModelSpec, device: torch.device, images: Images, options: Options) -> Target:
    """Load a source, or take a user's model. The model answers as the user's own, or it is refused.

    The identity of a source names the source. That of a module is its class, its structure and its tensors; that of
    another model is what it consists of (`adapters.digest_object`).
    """
    x = images.x(np.arange(min(COMPARED, len(images.y))))
    name = _choose_name(spec, images.dataset, options)
    if spec.source is not None:
        _, channels, rows, columns = x.shape
        found = load_source(spec, (channels, rows, columns), images.num_classes, x)
        module, weights, identity = found.module, found.weights, found.identity
    else:
        module = adapt(spec.model, x)
    with _reading(device):
        prepared = prepare(
            module,
            device,
            x[:2],
            fast_layers=options.fast_layers,
            bfloat16=options.gradients is not None,
            one_by_one=options.one_by_one,
            output=spec.output,
            binary=bool(spec.binary),
        )
        if spec.source is None:
            adapter = find_adapter(module)
            weights = digest_module(module) if adapter is None else adapter.digest()
            identity = describe_module(module)
    compare_with_own(prepared, x.to(device))
    answer = {"output": spec.output, "binary": spec.binary}
    identity = identity | {key: value for key, value in answer.items() if value is not None}
    return Target(prepared, name, device, weights, identity)


def _choose_name(spec: ModelSpec, dataset: str, options: Options) -> str:
    """Return what results call a user's model: the name that was given, or that of its source, function or class.

    Raises:
        ModelError: a registered model of the data set has this name. Tables would show the user's model in its place.
    """
    if spec.source is not None:
        default = spec.source.name
    else:  # such as `<lambda>`, which is no name of a folder
        default = re.sub(r"[^\w.-]+", "", getattr(spec.model, "__name__", type(spec.model).__name__)) or "model"
    name = spec.name or default
    if known := Registry.default([Path(m) for m in options.models]).find_alike(dataset, name):
        raise ModelError(
            f"The name {name} for a model of your own; {known} is a registered model. Give another name, such as "
            f"name='my-{name}'. To measure the registered model, give its name alone: {known}."
        )
    return name


def identify(target: Target, images: Images) -> dict[str, Any]:
    """Return the part of an identity that names the model's function and the images."""
    return {"model": target.identity, "weights": target.weights, "data": images.digest, "dtype": str(images.dtype)}


def make_probe(target: Target, images: Images, lanes: int) -> AnswerProbe:
    """Make the probe that compares the model's answers with stored ones. `lanes` is the batch width of the run."""
    return AnswerProbe(target, images.x(np.arange(min(FIRST_IMAGES, len(images.y)))), lanes)


def select(total: int, options: Options, everything: bool = False) -> NDArray[np.int64]:
    """Positions of the samples: the first N, or the first N of a seeded permutation."""
    count = total if everything or options.samples is None else min(options.samples, total)
    return order_positions(total, options.sample_seed)[:count]
