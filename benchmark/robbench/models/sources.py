"""Models without a card: a file, a hub, a zoo, or a function of the user's own.

`parse_source` tells a source from a card's name and imports nothing heavy; `load_source` imports the package that
the user named by naming the source, and no other.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from robbench.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ALLOWED", "FORMS", "Build", "Found", "Source", "load_source", "parse_source"]

FORMS = {
    "robustbench": "robustbench:NAME or robustbench:DATASET/THREAT/NAME",
    "hf": "hf:OWNER/REPO or hf:OWNER/REPO@REVISION:FILE.safetensors",
    "timm": "timm:NAME",
    "file": "file:PATH.safetensors (or .pt, .pth)",
}
ALLOWED = "; ".join([*FORMS.values(), "package.module:function"])
_ZOO = {"dataset": ("cifar10", "cifar100"), "threat": ("Linf", "L2", "corruptions")}


@dataclass(frozen=True)
class Source:
    """Where a model without a card comes from.

    Attributes:
        text: as the user gave it.
        kind: a key of `FORMS`, or "function".
        parts: of "robustbench" data set, threat, name; of "hf" repository, revision (may be empty), file; of
            "function" module, function; else the rest of the text.
        name: what the model is called in results: one safe path component.
    """

    text: str
    kind: str
    parts: tuple[str, ...]
    name: str

    def test_set(self, given: str | None) -> str | None:
        """Return the data set to test on: the one that was asked for, or the one that the source implies.

        Raises:
            ModelError: the two differ.
        """
        implied = self.parts[0] if self.kind == "robustbench" else None
        if given is not None and implied is not None and given != implied:
            raise ModelError(
                f"{self.text}: data set {given!r} given; this source means {implied}. Leave the data set out, or name "
                f"the other one in the source: {FORMS[self.kind]}, DATASET one of {', '.join(_ZOO['dataset'])}."
            )
        return given or implied


@dataclass(frozen=True)
class Build:
    """How to turn bare weights into a model; for `file:` and `hf:` only.

    Attributes:
        architecture: a name of `ARCHITECTURES` with arguments, `wide_resnet:depth=28,widen_factor=10`.
            `num_classes=K` is one more, needed where the images are not those of a known data set.
        mean: per channel, of x in [0, 1]; goes with std.
        std: per channel.
    """

    architecture: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    @property
    def given(self) -> bool:
        """Whether anything of it was asked for."""
        return any(v is not None for v in (self.architecture, self.mean, self.std))


@dataclass(frozen=True, eq=False)
class Found:
    """A loaded model: images [N, C, H, W] in [0, 1] -> logits [N, K].

    Attributes:
        module: as it came; only a function's module may still be in training mode.
        weights: SHA-256 of the weights file, or of the module's tensors where there is no one file.
        identity: what else determines the function it computes, as JSON values.
    """

    module: nn.Module
    weights: str
    identity: dict[str, object]


def parse_source(text: str) -> Source | None:
    """Read what `--model` was given; None means the name of a registered card, which has no colon.

    Raises:
        ModelError: it has a colon and is no source that is known here.
    """
    kind, colon, rest = text.partition(":")
    if not colon:
        return None
    if kind == "robustbench":
        *where, name = rest.split("/")
        dataset, threat = where or ("cifar10", "Linf") if len(where) in (0, 2) else ("", "")
        for what, value in (("dataset", dataset), ("threat", threat)):
            if value not in _ZOO[what] or not name:
                allowed = ", ".join(_ZOO[what])
                raise ModelError(f"{text!r}: expected {FORMS[kind]}; {what}s allowed: {allowed}.")
        return Source(text, kind, (dataset, threat, name), _folder(kind, threat if threat != "Linf" else "", name))
    if kind == "hf":
        match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([^:\s]+))?(?::([^:]+))?", rest)
        if match is None:
            raise ModelError(f"{text!r}: expected {FORMS[kind]}.")
        repo, revision, file = match[1], match[2] or "", match[3] or "model.safetensors"
        if not file.endswith(".safetensors") or file.startswith("/") or ".." in PurePosixPath(file).parts:
            raise ModelError(
                f"{text!r}: file {file!r} given; allowed from a hub: a .safetensors file, which cannot run code, "
                "by its path in the repository."
            )
        own = file.removesuffix(".safetensors").removesuffix("model")
        return Source(text, kind, (repo, revision, file), _folder(kind, *repo.split("/"), revision, own))
    if kind in FORMS:
        if not rest:
            raise ModelError(f"{text!r}: expected {FORMS[kind]}.")
        return Source(text, kind, (rest,), _folder(kind, Path(rest).stem if kind == "file" else rest))
    if all(part.isidentifier() for part in [*kind.split("."), rest]):
        return Source(text, "function", (kind, rest), _folder(kind, rest))
    raise ModelError(f"Unknown source {text!r}. Allowed: {ALLOWED}; or the name of a card (`robbench list models`).")


def _folder(*parts: str) -> str:
    clean = (re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-.") for part in parts)
    return "-".join(part for part in clean if part)[:120]


def load_source(source: Source, in_shape: tuple[int, int, int], num_classes: int | None, build: Build) -> Found:
    """Load a model that has no card. Nothing is downloaded but what the source names.

    Args:
        source: from `parse_source`.
        in_shape: (C, H, W) of the test images.
        num_classes: of the data set; None where it is not known.
        build: architecture and normalization of bare weights.

    Raises:
        ModelError: a package, a file, a name or the network is missing, or what came is not a model that fits.
    """
    if source.kind in ("file", "hf"):
        return _built(source, in_shape, num_classes, build)
    if build.given:
        raise ModelError(
            f"{source.text}: architecture, mean or std given; they go with file: and hf:. This model brings its own."
        )
    from robbench.models import outside
    from robbench.models.load import module_digest, module_identity

    origin = source.text
    if source.kind == "timm":
        inner, mean, std = outside.timm_module(source.text, source.parts[0], in_shape)
        module = _normalized(inner, mean, std, in_shape[0], source).eval()
    elif source.kind == "robustbench":
        module = outside.robustbench_module(source.text, *source.parts)
        origin = "robustbench:" + "/".join(source.parts)  # the short form is the same model
    else:
        module = outside.function_module(source.text, *source.parts)
    return Found(module, module_digest(module), {"source": origin, **module_identity(module)})


def _read(source: Source) -> tuple[bytes, str]:
    """Return the bytes of a weights file, and where they are from as it goes into results."""
    if source.kind == "hf":
        from robbench.models.outside import hub_file

        repo, revision, file = source.parts
        path = hub_file(source.text, repo, revision, file)
        # The cache is laid out as snapshots/<commit>/<file>: the commit is what a branch or a tag stood for.
        return path.read_bytes(), f"hf:{repo}@{path.parts[-1 - len(PurePosixPath(file).parts)]}:{file}"
    path = Path(source.parts[0]).expanduser()
    try:
        # Not the whole path: results are passed on, and the digest says which file it was.
        return path.read_bytes(), f"file:{path.name}"
    except OSError as error:
        raise ModelError(
            f"{source.text}: {path} cannot be read ({error.strerror}); expected: a weights file."
        ) from None


def _built(source: Source, in_shape: tuple[int, int, int], num_classes: int | None, build: Build) -> Found:
    """Put a weights file into one of our architectures."""
    import torch

    from robbench.models import architectures
    from robbench.models.load import fitted, parse_state

    if build.architecture is None:
        raise ModelError(
            f"{source.text}: weights alone are no model. Give --architecture NAME or NAME:key=value,key=value "
            f"(in Python: architecture=); known: {', '.join(architectures.ARCHITECTURES)}."
        )
    with _named(f"{source.text} as {build.architecture}"):
        name, args = _architecture(build.architecture)
        classes = args.pop("num_classes", num_classes)
        if num_classes not in (None, classes):
            raise ModelError(f"num_classes {classes!r} given; the data set has {num_classes}.")
        if type(classes) is not int or classes < 2:
            raise ModelError(
                f"num_classes {classes!r} given; for images of your own {name}:num_classes=K, K at least 2."
            )
        # Building draws initial weights; whoever loads a model does not expect the global generator to move.
        with torch.random.fork_rng(devices=[]):
            module = architectures.build(name, args, classes, in_shape)
    data, origin = _read(source)
    with _named(f"{source.text} as {build.architecture}"):
        module.load_state_dict(fitted(parse_state(data, Path(origin).suffix), module))
    identity: dict[str, object] = {
        "source": origin, "architecture": {"name": name, "args": args, "num_classes": classes}
    }  # fmt: skip
    if build.mean is not None or build.std is not None:
        mean, std = [float(v) for v in build.mean or ()], [float(v) for v in build.std or ()]
        module = _normalized(module, mean, std, in_shape[0], source)
        identity["preprocess"] = {"mean": mean, "std": std}
    return Found(module.eval(), hashlib.sha256(data).hexdigest(), identity)


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{what}: {error}") from error


def _architecture(text: str) -> tuple[str, dict[str, Any]]:
    """Read `name:key=value,key=value`; `build` words what is wrong with a key or a value."""
    from robbench.models.architectures import arguments

    name, _, rest = text.partition(":")
    kinds: dict[str, type] = {key: type(value) for key, value in arguments(name).items()} | {"num_classes": int}
    args: dict[str, Any] = {}
    for item in rest.split(",") if rest else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key in args:
            raise ModelError(f"{item!r} given; expected: name:key=value,key=value, each key once")
        args[key] = _typed(value, kinds.get(key, str))
    return name, args


def _typed(value: str, kind: type) -> object:
    if kind is bool:
        return {"true": True, "false": False}.get(value.lower(), value)
    try:
        return kind(value)
    except ValueError:
        return value


def _normalized(
    module: nn.Module, mean: Sequence[float], std: Sequence[float], channels: int, source: Source
) -> nn.Module:
    """Put normalization inside. Broadcasting would make three channels of one, so the counts are checked."""
    from robbench.models.architectures import Normalized

    numbers = [*mean, *std]
    if not len(mean) == len(std) == channels or not all(map(math.isfinite, numbers)) or not all(s > 0 for s in std):
        raise ModelError(
            f"{source.text}: normalization by mean {list(mean)} and std {list(std)}; expected: one finite number per "
            f"channel in each, std above 0, and the images have {channels} channel{'s' if channels > 1 else ''}."
        )
    return Normalized(module, mean, std)
