"""Finds the model and the images of a stored result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from robbench.models.spec import ModelSpec
from robbench.results.schema import ResultFile
from robbench.results.trust import require_registered_name

__all__ = ["ReproduceFields", "VerifyFields", "recall_spec"]


class ReproduceFields(TypedDict, total=False):
    """The keyword arguments of `reproduce` that `evaluate` has too."""

    x: Tensor | None
    y: Tensor | None
    architecture: str | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    device: str | torch.device
    data_dir: str | Path | None
    models: Sequence[str | Path]


class VerifyFields(ReproduceFields, total=False):
    """The keyword arguments of `verify` that `evaluate` has too."""

    lanes: int | None


def recall_spec(stored: ResultFile, model: str | nn.Module | None, fields: Mapping[str, Any]) -> ModelSpec:
    """Return the spec of the model of a result, and of its images.

    Args:
        stored: the result.
        model: the model, given as for `evaluate`; None means the registered model that the result names.
        fields: x, y, architecture, mean and std of `ModelSpec`.

    Raises:
        ResultError: the model is not given, and the result does not name a registered one. A source is loaded only if
            the user gives it.
        RobbenchError: the fields do not fit the model.
    """
    if model is None:
        return ModelSpec.take(require_registered_name(stored), fields)
    if isinstance(model, str) and ":" not in model:
        return ModelSpec.take(model, fields)
    return ModelSpec.take(model, {**fields, "dataset": stored.dataset, "name": stored.model})
