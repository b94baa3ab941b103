"""Sources of models without a card: a file, a hub, a zoo, or a user's function.

`parse_source` distinguishes a source from the name of a card. It imports nothing large. `load_source.py` loads the
model of a source.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from robbench.core.errors import ModelError

__all__ = ["ALLOWED", "DEFAULT_HUB_FILE", "FORMS", "ModelSource", "parse_source"]

FORMS = {
    "robustbench": "robustbench:NAME or robustbench:DATASET/THREAT/NAME",
    "hf": "hf:OWNER/REPO or hf:OWNER/REPO@REVISION:FILE.safetensors",
    "timm": "timm:NAME or timm:NAME:PATH.safetensors",
    "file": "file:PATH.safetensors (or .pt, .pth, .ckpt)",
    "torchscript": "torchscript:PATH.ts (or .pt)",
    "onnx": "onnx:PATH.onnx",
}
ALLOWED = "; ".join([*FORMS.values(), "package.module:function"])
DEFAULT_HUB_FILE = "model.safetensors"
_SUFFIXES = {
    ".safetensors": "file", ".pt": "file", ".pth": "file", ".ckpt": "file", ".ts": "torchscript", ".onnx": "onnx"
}  # fmt: skip
_ZOO = {"dataset": ("cifar10", "cifar100", "imagenet"), "threat": ("Linf", "L2", "corruptions")}


@dataclass(frozen=True)
class ModelSource:
    """The source of a model without a card.

    Attributes:
        text: the source as the user wrote it.
        kind: a key of `FORMS`, or "function".
        parts: for "robustbench": data set, threat, name. For "hf": repository, revision (may be empty), file. For
            "function": module, function. For "timm": name, path of a checkpoint (may be empty). For other kinds: the
            path of the file.
        name: the name of the model in results, a safe path component.
    """

    text: str
    kind: str
    parts: tuple[str, ...]
    name: str

    @property
    def has_code(self) -> bool:
        """Whether loading it may run code or start a download: anything but weights that a parser reads."""
        return self.kind != "file"

    def test_set(self, given: str | None) -> str | None:
        """Return the data set to test on: `given`, or the data set that the source implies.

        Raises:
            ModelError: both exist and differ.
        """
        implied = self.parts[0] if self.kind == "robustbench" else None
        if given is not None and implied is not None and given != implied:
            raise ModelError(
                f"{self.text}: data set {given!r} given; this source means {implied}. Leave the data set out, or name "
                f"the other one in the source: {FORMS[self.kind]}, DATASET one of {', '.join(_ZOO['dataset'])}."
            )
        return given or implied


def parse_source(text: str) -> ModelSource | None:
    """Read what `--model` was given; None means the name of a registered card, which has no colon.

    Raises:
        ModelError: the text has a colon and is not a known source.
    """
    kind, colon, rest = text.partition(":")
    if not colon and (suffix := Path(text).suffix) in _SUFFIXES:
        kind, rest = _SUFFIXES[suffix], text
    elif not colon:
        return None
    if kind == "file" and _SUFFIXES.get(Path(rest).suffix, kind) != kind:
        kind = _SUFFIXES[Path(rest).suffix]
    if kind == "robustbench":
        *where, name = rest.split("/")
        dataset, threat = where or ("cifar10", "Linf") if len(where) in (0, 2) else ("", "")
        for what, value in (("dataset", dataset), ("threat", threat)):
            if value not in _ZOO[what] or not name:
                allowed = ", ".join(_ZOO[what])
                raise ModelError(f"{text!r}: expected {FORMS[kind]}; {what}s allowed: {allowed}.")
        return ModelSource(
            text, kind, (dataset, threat, name), _join_name(kind, threat if threat != "Linf" else "", name)
        )
    if kind == "hf":
        match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([^:\s]+))?(?::([^:]+))?", rest)
        if match is None:
            raise ModelError(f"{text!r}: expected {FORMS[kind]}.")
        repo, revision, file = match[1], match[2] or "", match[3] or DEFAULT_HUB_FILE
        if not file.endswith(".safetensors") or file.startswith("/") or ".." in PurePosixPath(file).parts:
            raise ModelError(
                f"{text!r}: file {file!r} given; allowed from a hub: the path of a .safetensors file in the "
                "repository. Such a file cannot run code."
            )
        file_name = file.removesuffix(".safetensors").removesuffix("model")
        return ModelSource(text, kind, (repo, revision, file), _join_name(kind, *repo.split("/"), revision, file_name))
    if kind in FORMS:
        if not rest:
            raise ModelError(f"{text!r}: expected {FORMS[kind]}.")
        if kind == "timm":
            name, _, path = rest.rpartition(":") if Path(rest).suffix in _SUFFIXES and ":" in rest else (rest, "", "")
            return ModelSource(text, kind, (name, path), _join_name(kind, name, Path(path).stem))
        return ModelSource(text, kind, (rest,), _join_name(kind, Path(rest).stem))
    if all(part.isidentifier() for part in [*kind.split("."), rest]):
        return ModelSource(text, "function", (kind, rest), _join_name(kind, rest))
    raise ModelError(f"Unknown source {text!r}. Allowed: {ALLOWED}; or the name of a card (`robbench list models`).")


def _join_name(*parts: str) -> str:
    clean = (re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-.") for part in parts)
    return "-".join(part for part in clean if part)[:120]
