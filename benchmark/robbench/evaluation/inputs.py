"""What a run is given: options, test images, and the model: registered, from elsewhere, or a user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.classifier.checks import check_images
from robbench.classifier.prepare import Target, pick_device, prepare
from robbench.core import rng
from robbench.core.errors import DataError, RobbenchError
from robbench.core.files import digest
from robbench.core.types import Dataset
from robbench.data.sets import NAMES, load
from robbench.models.card import Registry, extract_identity
from robbench.models.load import describe_module, digest_module, load_model
from robbench.models.load_source import load_source
from robbench.models.sources import Build, ModelSource, parse_source

__all__ = ["Images", "Options", "own_images", "own_target", "registered", "resolve", "select", "sourced"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run may ask for beyond model and suite.

    Attributes:
        norm: overrides the suite's norm.
        eps: overrides the suite's radius ("8/255", 0.3), in [0, 1] pixel units.
        samples: the first N in official order; None means all.
        sample_seed: draw the N samples at random with this seed instead.
        seed: seed of the attacks' random numbers.
        lanes: batch width; None chooses by image size and device.
        gradients: "bfloat16" computes gradients, and the logits that come with them, in bfloat16, which is faster where
            the hardware has it. What is judged stays in the precision of the images.
        device: auto, cpu, cuda or cuda:i.
        data_dir: where the data sets are; None means ROBBENCH_DATA.
        models: further model registries.
        results: results tree; None keeps nothing on disk.
        overwrite: replace a stored result of a different run instead of refusing.
        save_adversarials: store the adversarial example of every break too, beside the result. It is not part of what
            was measured: a run goes on with it or without, and keeps saving once it has begun.
        wait: where another process works on the same result, wait for it instead of refusing.
    """

    norm: str | None = None
    eps: str | float | None = None
    samples: int | None = None
    sample_seed: int | None = None
    seed: int = 0
    lanes: int | None = None
    gradients: str | None = None
    device: str = "auto"
    data_dir: str | Path | None = None
    models: Sequence[str | Path] = ()
    results: str | Path | None = None
    overwrite: bool = False
    save_adversarials: bool = False
    wait: bool = False

    @classmethod
    def given(cls, options: Mapping[str, Any]) -> Self:
        """Take options by name.

        Raises:
            RobbenchError: one is unknown, or means nothing.
        """
        try:
            return cls(**options)
        except TypeError:
            allowed = ", ".join(cls.__dataclass_fields__)
            raise RobbenchError(f"Unknown option in {sorted(options)}; allowed: {allowed}.") from None

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        for name, least in (("samples", 1), ("lanes", 1), ("seed", 0), ("sample_seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RobbenchError(f"{name}: {value} given; it must be at least {least}.")
        if self.gradients not in (None, "bfloat16"):
            raise RobbenchError(f"gradients: {self.gradients!r} given; allowed: bfloat16, or None.")
        if self.save_adversarials and self.results is None:
            raise RobbenchError("save_adversarials given without results: say where to (results=DIR).")


@dataclass(frozen=True, eq=False)
class Images:
    """Test images as the run uses them: x(positions) -> float images in [0, 1]."""

    dataset: str
    x: Callable[[NDArray[np.int64]], Tensor]
    y: Tensor
    index: NDArray[np.int64]
    num_classes: int | None
    digest: str
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, data: Dataset) -> Self:
        """Take the images of a data set; they become float32 as they are used."""

        def images(at: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(data.x[at]).to(torch.float32) / data.scale

        return cls(data.name, images, torch.from_numpy(data.y), data.index, data.num_classes, data.digest)


def resolve(
    model: str | nn.Module,
    x: Tensor | None,
    y: Tensor | None,
    dataset: str | None,
    name: str | None,
    build: Build,
    options: Options,
) -> tuple[Target, Images]:
    """Bring model and test images together, whichever way they were given; see `evaluation.evaluate`.

    Raises:
        RobbenchError: what was given does not go together, or cannot be loaded.
    """
    device = pick_device(options.device)
    source = parse_source(model) if isinstance(model, str) else None
    if isinstance(model, str) and source is None:
        if build.given or any(v is not None for v in (x, y, dataset, name)):
            raise RobbenchError(
                "x, y, dataset, name, architecture, mean and std go with a source or a module of your own, not with a "
                "registered name."
            )
        target, data = registered(model, device, options)
        return target, Images.of(data)
    if source is not None:
        images = own_images(x, y, source.test_set(dataset), options)
        return sourced(source, name, device, images, build), images
    assert isinstance(model, nn.Module)
    if build.given:
        raise RobbenchError("architecture, mean and std go with file: and hf:; a module of your own is complete.")
    images = own_images(x, y, dataset, options)
    return own_target(model, name, device, images), images


def registered(name: str, device: torch.device, options: Options) -> tuple[Target, Dataset]:
    """Load a registered model and the test set that its card names."""
    entry = Registry.default([Path(m) for m in options.models]).find(name)
    loaded = load_model(entry)
    data = load(entry.dataset, "test", options.data_dir)
    first = torch.from_numpy(data.x[:2]).float() / data.scale
    target = Target(
        module=prepare(loaded.module, device, first),
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
        if dataset is None:
            raise DataError(
                f"Give images and labels (x=, y=), or the name of a data set (dataset=, --dataset): {', '.join(NAMES)}."
            )
        return Images.of(load(dataset, "test", options.data_dir))
    x, y = x.detach().cpu(), y.detach().cpu().long()
    check_images(x, y)
    content = digest([list(x.shape), str(x.dtype), _bytes_digest(x), _bytes_digest(y)])
    return Images(dataset or "custom", lambda at: x[at], y, np.arange(len(y)), None, content, x.dtype)


def _bytes_digest(t: Tensor) -> str:
    return hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()


def own_target(model: nn.Module, name: str | None, device: torch.device, images: Images) -> Target:
    """Take a user's module; its identity is its class, its structure and its tensors."""
    return Target(
        module=prepare(model, device, images.x(np.arange(min(2, len(images.y))))),
        name=name or type(model).__name__,
        device=device,
        weights=digest_module(model),
        identity=describe_module(model),
    )


def sourced(source: ModelSource, name: str | None, device: torch.device, images: Images, build: Build) -> Target:
    """Load a model that has no card; its identity names the source."""
    first = images.x(np.arange(min(2, len(images.y))))
    _, channels, rows, columns = first.shape
    found = load_source(source, (channels, rows, columns), images.num_classes, build)
    return Target(
        module=prepare(found.module, device, first),
        name=name or source.name,
        device=device,
        weights=found.weights,
        identity=found.identity,
    )


def select(total: int, options: Options, everything: bool = False) -> NDArray[np.int64]:
    """Positions of the samples: the first N, or the first N of a seeded permutation."""
    count = total if everything or options.samples is None else min(options.samples, total)
    if options.sample_seed is None:
        return np.arange(count)
    position = torch.arange(total)
    order = rng.bits(rng.make_key(options.sample_seed, "samples"), position, torch.zeros_like(position), 0, 2)
    # Two words make a tie, which position would break, as good as impossible.
    shuffled: NDArray[np.int64] = np.lexsort((order[:, 1].numpy(), order[:, 0].numpy()))[:count]
    return shuffled
