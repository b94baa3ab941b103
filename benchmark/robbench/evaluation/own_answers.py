"""Whether an adapted model answers what the model itself says, on a few images, before any number is believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robbench.classifier.guard import Guarded
from robbench.core.errors import ModelError
from robbench.core.user_code import contain_exits
from robbench.models.adapters import find_adapter
from robbench.models.architectures import Normalized

__all__ = ["COMPARED", "compare_with_own"]

COMPARED = 16
"""Number of images on which an adapted model is compared with the model itself."""
_ROUNDING = 1e-4  # of the logits' length: classes that are closer are ties


def compare_with_own(model: Guarded, x: Tensor) -> None:
    """Compare the predictions of an adapted model with those of the model itself. A plain network is not compared.

    Args:
        model: the prepared model.
        x: images [n, C, H, W] on its device.

    Raises:
        ModelError: they differ by more than ties, so that a number would be one of another model; or the model fails
            on single images.
    """
    with torch.no_grad():
        try:
            with contain_exits():
                first = model.inner(x[:1].clone())
        except Exception:  # a user's module may raise anything about its input; the first query words it
            return
        adapter = find_adapter(model.inner)
        if adapter is None and isinstance(first, Tensor) and model.output is None and not model.binary:
            return
        logits = model(x)
        try:
            with contain_exits():
                own = None if adapter is None else adapter.predict(_normalize(model, x))
                if own is None:  # each image alone
                    own = torch.stack([_predict(model, x[i : i + 1]) for i in range(len(x))])
        except Exception as error:  # a user's module may raise anything
            raise ModelError(f"The model cannot be asked for classes: {type(error).__name__}: {error}.") from error
    own = own.to(logits.device)
    lead = logits.amax(1) - logits.gather(1, own[:, None])[:, 0]
    wrong = lead > _ROUNDING * logits.norm(dim=1)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ModelError(
            f"The adapted model and the model itself disagree on {int(wrong.sum())} of {len(x)} images (image {at}: "
            f"{int(logits[at].argmax())} by the scores, {int(own[at])} by the model). A number would be one of another "
            "model. Look at --output and --binary, and at whether the model answers an image alone as in a batch."
        )


def _normalize(model: Guarded, x: Tensor) -> Tensor:
    """Return what the adapter inside a normalization is given."""
    inner = model.inner
    return (x - inner.mean) / inner.std if isinstance(inner, Normalized) else x


def _predict(model: Guarded, x: Tensor) -> Tensor:
    """Return the class that a model itself predicts for one image."""
    answer: Any = model.inner(x.clone())
    predicted: Tensor
    if model.output is not None:
        answer = _take_named(answer, model.output)
    elif not isinstance(answer, Tensor):
        answer = _take_only(answer)
    flat = answer.flatten()
    predicted = (flat[0] > 0).long() if model.binary else flat.argmax()
    return predicted


def _take_named(answer: Any, output: str | int) -> Any:
    if isinstance(answer, Mapping):
        return answer[output]
    if isinstance(answer, tuple | list) and str(output).isdecimal():
        return answer[int(output)]
    return getattr(answer, str(output))


def _take_only(answer: Any) -> Any:
    """Take `logits`, or the only part that is a table of numbers."""
    if isinstance(answer, Mapping):
        return answer.get("logits", next((v for v in answer.values() if _is_table(v)), None))
    if hasattr(answer, "logits"):
        return answer.logits
    parts = answer if isinstance(answer, tuple | list) else vars(answer).values()
    return next(part for part in parts if _is_table(part))


def _is_table(part: object) -> bool:
    return isinstance(part, Tensor) and part.dim() == 2 and part.is_floating_point()
