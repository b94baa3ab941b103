"""Finds the model and the images of a stored result."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robbench.core.errors import ResultError
from robbench.core.types import IMAGENET
from robbench.data.sets import NAMES
from robbench.evaluation.options import is_list, name_target
from robbench.models.spec import ModelSpec, RecalledFields
from robbench.results.reader import name_near_results
from robbench.results.schema import ResultFile
from robbench.results.trust import require_registered_name

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "ReproduceFields",
    "VerifyFields",
    "find_result",
    "recall_spec",
    "recall_target",
]


class ReproduceFields(RecalledFields, total=False):
    """The keyword arguments of `reproduce` that `evaluate` has too."""

    target: Sequence[int] | None
    device: str | torch.device
    data_dir: str | Path | None
    models: Sequence[str | Path]


class VerifyFields(ReproduceFields, total=False):
    """The keyword arguments of `verify` that `evaluate` has too."""

    lanes: int | None


def find_result(result: str | Path) -> Path:
    """Return the path of a result.json, which is given itself or by its folder.

    Raises:
        ResultError: it is no path, or there is no finished result.
    """
    if not isinstance(result, str | os.PathLike) or not isinstance(os.fspath(result), str):
        raise ResultError(
            f"result: {_describe(result)} given; allowed: the path of a folder of a result, or of its result.json."
        )
    path = Path(result)
    path = path / "result.json" if os.path.isdir(path) else path
    for needed in (path, path.with_name("outcomes.parquet")):
        if not os.path.isfile(needed):  # unlike Path.is_file, it raises nothing where a path is too long
            near = name_near_results(path if path.name != "result.json" else path.parent)
            raise ResultError(f"No {needed}; expected: the folder of a finished result, or its result.json.{near}")
    return path


def _describe(value: object) -> str:
    is_short = value is None or isinstance(value, bool | int | float)
    return repr(value) if is_short else f"an object of type {type(value).__name__}"


def recall_spec(stored: ResultFile, model: str | nn.Module | None, fields: Mapping[str, Any]) -> ModelSpec:
    """Return the spec of the model of a result, and of its images.

    Args:
        stored: the result.
        model: the model, given as for `evaluate`; None means the registered model that the result names.
        fields: those of `ModelSpec`. How images are read, and which part of an answer holds the logits, is taken from
            the result where it is not given.

    Raises:
        ResultError: the model is not given, and the result does not name a registered one. A source is loaded only if
            the user gives it. Or the result is on images that were given in Python, and they are not given now.
        RobbenchError: the fields do not fit the model.
    """
    if model is None:
        return ModelSpec.take(require_registered_name(stored), fields)
    fields = _recall(stored, fields)
    is_registered = isinstance(model, str) and ":" not in model
    spec = ModelSpec.take(
        model, fields if is_registered else {**fields, "dataset": stored.dataset, "name": stored.model}
    )
    if stored.dataset not in (*NAMES, IMAGENET) and not spec.has_own_images:
        raise ResultError(
            f"The result is on images of your own (data set {stored.dataset!r}). A result does not hold its images. "
            "Give them: --data PATH; in Python data=, or x= and y=."
        )
    return spec


def recall_target(stored: ResultFile, given: str | tuple[int, ...] | None) -> str | tuple[int, ...] | None:
    """Return the targets of a result; None where every other class is a break.

    Args:
        stored: the result.
        given: a class for each image, which a result does not hold; None where the result has no such list.

    Raises:
        ResultError: the list is missing, or another one, or given without need.
    """
    rule = stored.identity.get("target")
    if rule == (None if given is None else name_target(given)) or (given is None and not is_list(rule)):
        return given if given is not None else rule
    if is_list(rule):
        raise ResultError(f"The result has a target for each image ({rule}). Give the same list in Python: target=.")
    raise ResultError(f"target given; the result has {'no target' if rule is None else f'the target {rule}'}.")


def _recall(stored: ResultFile, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the fields by what the identity of the result says about its images and its model's outputs."""
    images, model = (stored.identity.get(part) for part in ("images", "model"))
    known: dict[str, Any] = {}
    if stored.dataset == IMAGENET and isinstance(images, dict):
        known |= {name: images.get(name) for name in ("resize", "crop")}
    if fields.get("data") is not None and isinstance(images, dict):
        known |= {name: images.get(name) for name in ("resize", "crop", "channels", "classes")}
        known |= {"on_broken": "skip"} if "skipped" in images else {}
    if isinstance(model, dict):
        known |= {name: model[name] for name in ("output", "binary") if name in model}
    return known | {name: value for name, value in fields.items() if value is not None}
