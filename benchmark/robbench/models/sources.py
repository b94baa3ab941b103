"""Models without a card: a file, a hub, a zoo, or a function of the user's own.

`parse_source` tells a source from a card's name and imports nothing heavy. `load_source.py` loads what a source names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from robbench.core.errors import ModelError

__all__ = ["ALLOWED", "FORMS", "Build", "ModelSource", "parse_source"]

FORMS = {
    "robustbench": "robustbench:NAME or robustbench:DATASET/THREAT/NAME",
    "hf": "hf:OWNER/REPO or hf:OWNER/REPO@REVISION:FILE.safetensors",
    "timm": "timm:NAME",
    "file": "file:PATH.safetensors (or .pt, .pth)",
}
ALLOWED = "; ".join([*FORMS.values(), "package.module:function"])
_ZOO = {"dataset": ("cifar10", "cifar100"), "threat": ("Linf", "L2", "corruptions")}


@dataclass(frozen=True)
class ModelSource:
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


def parse_source(text: str) -> ModelSource | None:
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
        return ModelSource(text, kind, (dataset, threat, name), _folder(kind, threat if threat != "Linf" else "", name))
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
        return ModelSource(text, kind, (repo, revision, file), _folder(kind, *repo.split("/"), revision, own))
    if kind in FORMS:
        if not rest:
            raise ModelError(f"{text!r}: expected {FORMS[kind]}.")
        return ModelSource(text, kind, (rest,), _folder(kind, Path(rest).stem if kind == "file" else rest))
    if all(part.isidentifier() for part in [*kind.split("."), rest]):
        return ModelSource(text, "function", (kind, rest), _folder(kind, rest))
    raise ModelError(f"Unknown source {text!r}. Allowed: {ALLOWED}; or the name of a card (`robbench list models`).")


def _folder(*parts: str) -> str:
    clean = (re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-.") for part in parts)
    return "-".join(part for part in clean if part)[:120]
