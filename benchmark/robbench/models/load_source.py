"""Load a model that has no card. Only the package that the source names is imported."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from robbench.core.errors import ModelError
from robbench.models import outside
from robbench.models.architectures import ARCHITECTURES, Normalized, list_arguments
from robbench.models.architectures import build as build_architecture
from robbench.models.load import describe_module, digest_module, fit_state, parse_state
from robbench.models.sources import Build, ModelSource

__all__ = ["LoadedSource", "load_source"]


@dataclass(frozen=True, eq=False)
class LoadedSource:
    """A loaded model: images [N, C, H, W] in [0, 1] -> logits [N, K].

    Attributes:
        module: the unchanged module. A module from a user's function may be in training mode, all others are not.
        weights: SHA-256 of the weights file, or of the module's tensors if there is no single file.
        identity: everything else that determines the model's function, as JSON values.
    """

    module: nn.Module
    weights: str
    identity: dict[str, object]


def load_source(
    source: ModelSource, in_shape: tuple[int, int, int], num_classes: int | None, build: Build
) -> LoadedSource:
    """Load a model that has no card. Only what the source names is downloaded.

    Args:
        source: from `parse_source`.
        in_shape: (C, H, W) of the test images.
        num_classes: number of classes of the data set, or None if it is unknown.
        build: architecture and normalization, for sources that are weights only.

    Raises:
        ModelError: a package, a file, a name or the network is missing, or the loaded object is not a fitting model.
    """
    if source.kind in ("file", "hf"):
        return _load_weights(source, in_shape, num_classes, build)
    if build.given:
        raise ModelError(
            f"{source.text}: architecture, mean or std given; they go with file: and hf:. This model brings its own."
        )
    origin = source.text
    if source.kind == "timm":
        inner, mean, std = outside.load_timm_model(source.text, source.parts[0], in_shape)
        module = _normalize(inner, mean, std, in_shape[0], source).eval()
    elif source.kind == "robustbench":
        module = outside.load_robustbench_model(source.text, *source.parts)
        # The long form of the name: both forms must give the same identity.
        origin = "robustbench:" + "/".join(source.parts)
    else:
        module = outside.call_model_function(source.text, *source.parts)
    return LoadedSource(module, digest_module(module), {"source": origin, **describe_module(module)})


def _read(source: ModelSource) -> tuple[bytes, str]:
    """Return the bytes of a weights file, and the text that names their source in results."""
    if source.kind == "hf":
        repo, revision, file = source.parts
        path = outside.download_hub_file(source.text, repo, revision, file)
        # The path in the cache is snapshots/<commit>/<file>, with the commit of the branch or tag.
        return path.read_bytes(), f"hf:{repo}@{path.parts[-1 - len(PurePosixPath(file).parts)]}:{file}"
    path = Path(source.parts[0]).expanduser()
    try:
        # Not the whole path: results are published, and the digest identifies the file.
        return path.read_bytes(), f"file:{path.name}"
    except OSError as error:
        raise ModelError(
            f"{source.text}: {path} cannot be read ({error.strerror}); expected: a weights file."
        ) from None


def _load_weights(
    source: ModelSource, in_shape: tuple[int, int, int], num_classes: int | None, build: Build
) -> LoadedSource:
    """Load a weights file into one of robbench's architectures."""
    if build.architecture is None:
        raise ModelError(
            f"{source.text}: weights without an architecture are no model. Give --architecture NAME or "
            f"NAME:key=value,key=value (in Python: architecture=); known: {', '.join(ARCHITECTURES)}."
        )
    with _prefix_errors(f"{source.text} as {build.architecture}"):
        name, args = _parse_architecture(build.architecture)
        classes = args.pop("num_classes", num_classes)
        if num_classes not in (None, classes):
            raise ModelError(f"num_classes {classes!r} given; the data set has {num_classes}.")
        if type(classes) is not int or classes < 2:
            raise ModelError(
                f"num_classes {classes!r} given; for images of your own {name}:num_classes=K, K at least 2."
            )
        # Building draws initial weights. Loading a model must not change the state of the global generator.
        with torch.random.fork_rng(devices=[]):
            module = build_architecture(name, args, classes, in_shape)
    data, origin = _read(source)
    with _prefix_errors(f"{source.text} as {build.architecture}"):
        module.load_state_dict(fit_state(parse_state(data, Path(origin).suffix), module))
    identity: dict[str, object] = {
        "source": origin, "architecture": {"name": name, "args": args, "num_classes": classes}
    }  # fmt: skip
    if build.mean is not None or build.std is not None:
        mean, std = [float(v) for v in build.mean or ()], [float(v) for v in build.std or ()]
        module = _normalize(module, mean, std, in_shape[0], source)
        identity["preprocess"] = {"mean": mean, "std": std}
    return LoadedSource(module.eval(), hashlib.sha256(data).hexdigest(), identity)


@contextlib.contextmanager
def _prefix_errors(what: str) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{what}: {error}") from error


def _parse_architecture(text: str) -> tuple[str, dict[str, Any]]:
    """Parse `name:key=value,key=value`. `build` checks the keys and values later."""
    name, _, rest = text.partition(":")
    kinds: dict[str, type] = {key: type(value) for key, value in list_arguments(name).items()} | {"num_classes": int}
    args: dict[str, Any] = {}
    for item in rest.split(",") if rest else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key in args:
            raise ModelError(f"{item!r} given; expected: name:key=value,key=value, each key once")
        args[key] = _convert(value, kinds.get(key, str))
    return name, args


def _convert(value: str, kind: type) -> object:
    if kind is bool:
        return {"true": True, "false": False}.get(value.lower(), value)
    try:
        return kind(value)
    except ValueError:
        return value


def _normalize(
    module: nn.Module, mean: Sequence[float], std: Sequence[float], channels: int, source: ModelSource
) -> nn.Module:
    """Wrap a module with a normalization. The counts are checked, because broadcasting would accept wrong ones."""
    numbers = [*mean, *std]
    if not len(mean) == len(std) == channels or not all(map(math.isfinite, numbers)) or not all(s > 0 for s in std):
        raise ModelError(
            f"{source.text}: normalization by mean {list(mean)} and std {list(std)}; expected: one finite number per "
            f"channel in each, std above 0, and the images have {channels} channel{'s' if channels > 1 else ''}."
        )
    return Normalized(module, mean, std)
