"""Load a model that has no card. Only the package that the source names is imported."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from robbench.core.errors import ModelError
from robbench.core.files import read_bounded
from robbench.models import outside
from robbench.models.adapters import find_adapter
from robbench.models.architectures import ARCHITECTURES, Normalized, list_arguments
from robbench.models.architectures import build as build_architecture
from robbench.models.hub import load_hub_classifier
from robbench.models.load import MOST_WEIGHT_BYTES, describe_module, digest_module, fit_state, parse_state
from robbench.models.sources import ALLOWED, DEFAULT_HUB_FILE, ModelSource
from robbench.models.spec import ModelSpec

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
    spec: ModelSpec, in_shape: tuple[int, int, int], num_classes: int | None, x: Tensor | None = None
) -> LoadedSource:
    """Load a model that has no card. Nothing is downloaded but what the source names.

    Args:
        spec: its model is a source; architecture and normalization are those of bare weights.
        in_shape: (C, H, W) of the test images.
        num_classes: of the data set; None where it is not known.
        x: images to try a function on that is no module, [n, C, H, W]; None means gray ones.

    Raises:
        ModelError: a package, a file, a name or the network is missing, or the loaded object is not a fitting model.
    """
    source = spec.source
    if source is None:
        raise ModelError(f"{spec.model!r} given; expected: a source ({ALLOWED}).")
    if source.kind in ("onnx", "torchscript"):
        return _load_program(source, spec, in_shape)
    if source.kind == "file" and spec.architecture is None and Path(source.parts[0]).suffix == ".pt":
        return _load_program(source, spec, in_shape)
    if source.kind == "file" or (source.kind == "hf" and (spec.architecture or source.parts[2] != DEFAULT_HUB_FILE)):
        return _load_weights(source, spec, in_shape, num_classes)
    if spec.has_build:
        raise ModelError(
            f"{source.text}: architecture, mean or std given; they go with file: and hf:. This model brings its own."
        )
    origin = source.text
    module: nn.Module
    if source.kind == "hf":
        repo, revision, _ = source.parts
        module, commit = load_hub_classifier(source.text, repo, revision, in_shape)
        origin = f"hf:{source.parts[0]}" + (f"@{commit}" if commit else "")
    elif source.kind == "timm":
        return _load_timm(source, in_shape, num_classes)
    elif source.kind == "robustbench":
        module = outside.load_robustbench_model(source.text, *source.parts)
        # The long form of the name: both forms must give the same identity.
        origin = "robustbench:" + "/".join(source.parts)
    else:
        tried = torch.full((2, *in_shape), 0.5) if x is None else x
        where, name = source.parts
        module = outside.call_model_function(source.text, where, name, tried)
    adapter = find_adapter(module)
    weights = digest_module(module) if adapter is None else adapter.digest()
    return LoadedSource(module, weights, {"source": origin, **describe_module(module)})


def _load_timm(source: ModelSource, in_shape: tuple[int, int, int], num_classes: int | None) -> LoadedSource:
    """Load a pretrained model of timm, or an architecture of timm with the weights of a file."""
    name, file = source.parts
    state = None
    origin, digest = source.text, ""
    if file:
        data = _read_file(source, Path(file).expanduser())
        origin, digest = f"timm:{name}:{Path(file).name}", hashlib.sha256(data).hexdigest()
        with _prefix_errors(source.text):
            state = parse_state(data, Path(file).suffix)
    inner, mean, std = outside.load_timm_model(source.text, name, in_shape, state, num_classes)
    if state is not None:
        with _prefix_errors(source.text):
            inner.load_state_dict(fit_state(state, inner))
    module = _normalize(inner, mean, std, in_shape[0], source).eval()
    return LoadedSource(module, digest or digest_module(module), {"source": origin, **describe_module(module)})


def _load_program(source: ModelSource, spec: ModelSpec, in_shape: tuple[int, int, int]) -> LoadedSource:
    """Load a TorchScript archive or an ONNX graph. Both hold their network, so no architecture is needed."""
    path = Path(source.parts[-1]).expanduser()
    data = _read_file(source, path)
    if source.kind == "file" and not _is_torchscript(data):
        raise _word_missing_architecture(source)
    if spec.architecture is not None:
        raise ModelError(f"{source.text}: architecture given; {source.kind} holds its network. Leave it out.")
    module = (outside.load_onnx if source.kind == "onnx" else outside.load_torchscript)(source.text, data)
    kind = "onnx" if source.kind == "onnx" else "torchscript"
    identity: dict[str, object] = {"source": f"{kind}:{path.name}", **describe_module(module)}
    if spec.mean is not None or spec.std is not None:
        mean, std = list(spec.mean or ()), list(spec.std or ())
        module = _normalize(module, mean, std, in_shape[0], source).eval()
        identity["preprocess"] = {"mean": mean, "std": std}
    return LoadedSource(module, hashlib.sha256(data).hexdigest(), identity)


def _is_torchscript(data: bytes) -> bool:
    """Tell whether an archive holds code beside its tensors, as `torch.jit.save` writes it."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return False
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return any("/code/" in name for name in archive.namelist())


def _word_missing_architecture(source: ModelSource) -> ModelError:
    return ModelError(
        f"{source.text}: weights without an architecture are no model. Give --architecture NAME or "
        f"NAME:key=value,key=value (in Python: architecture=); known: {', '.join(ARCHITECTURES)}. For a network of "
        "your own, --model package.module:function, a function that builds it and loads the weights; of timm, "
        "--model timm:NAME:PATH."
    )


def _read_file(source: ModelSource, path: Path) -> bytes:
    try:
        return read_bounded(path, MOST_WEIGHT_BYTES)
    except OSError as error:
        raise ModelError(
            f"{source.text}: {path} cannot be read ({error.strerror}); expected: a weights file."
        ) from None


def _read(source: ModelSource) -> tuple[bytes, str]:
    """Return the bytes of a weights file, and the text that names their source in results."""
    if source.kind == "hf":
        repo, revision, file = source.parts
        path = outside.download_hub_file(source.text, repo, revision, file)
        # The path in the cache is snapshots/<commit>/<file>, with the commit of the branch or tag.
        commit = path.parts[-1 - len(PurePosixPath(file).parts)]
        return read_bounded(path, MOST_WEIGHT_BYTES), f"hf:{repo}@{commit}:{file}"
    path = Path(source.parts[0]).expanduser()
    # Not the whole path: results are published, and the digest identifies the file.
    return _read_file(source, path), f"file:{path.name}"


def _load_weights(
    source: ModelSource, spec: ModelSpec, in_shape: tuple[int, int, int], num_classes: int | None
) -> LoadedSource:
    """Put a weights file into one of our architectures."""
    if spec.architecture is None:
        raise _word_missing_architecture(source)
    with _prefix_errors(f"{source.text} as {spec.architecture}"):
        name, args = _parse_architecture(spec.architecture)
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
    with _prefix_errors(f"{source.text} as {spec.architecture}"):
        module.load_state_dict(fit_state(parse_state(data, Path(origin).suffix), module))
    identity: dict[str, object] = {
        "source": origin, "architecture": {"name": name, "args": args, "num_classes": classes}
    }  # fmt: skip
    if spec.mean is not None or spec.std is not None:
        mean, std = [float(v) for v in spec.mean or ()], [float(v) for v in spec.std or ()]
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
    if name not in ARCHITECTURES and rest.isidentifier():
        raise ModelError(
            f"architecture {text!r} given; allowed: {', '.join(ARCHITECTURES)}. A network of your own is a model by "
            f"itself: --model {text}, a function that builds the network and loads the weights."
        )
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
