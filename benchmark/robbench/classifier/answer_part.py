"""The logits in a model's answer: the answer itself, or a part of an object, a dictionary or a tuple."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robbench.core.errors import ModelError

__all__ = ["make_two_logits", "take_part"]


def take_part(answer: Any, output: str | int | None, n: int) -> tuple[Any, str]:
    """Take the logits out of an answer to n images.

    Args:
        answer: what the model returned.
        output: an attribute, a key or a position; None takes the answer itself if it is a tensor, or the part `logits`,
            or the only part that can hold logits.
        n: number of images.

    Returns:
        The part, and a sentence that says what was taken if nobody asked for it.

    Raises:
        ModelError: there is no such part, or none or several can hold logits.
    """
    if isinstance(answer, Tensor) and output is None:
        return answer, ""
    parts = _list_parts(answer)
    if output is not None:
        name = str(output)
        if name in parts:
            return parts[name], ""
        if hasattr(answer, name) and not isinstance(answer, Tensor):
            return getattr(answer, name), ""
        raise ModelError(f"--output {name} given; the model answers with {_describe(answer, parts)}.")
    fitting = [name for name, part in parts.items() if _can_be_logits(part, n)]
    chosen = "logits" if "logits" in parts else fitting[0] if len(fitting) == 1 else None
    if chosen is None:
        if not parts:
            return answer, ""  # the guard words what is wrong
        what = "none of them" if not fitting else f"each of {', '.join(fitting)}"
        raise ModelError(
            f"The model answers with {_describe(answer, parts)}; {what} can be the logits. Say which part is: --output "
            "NAME (in Python output=)."
        )
    return parts[chosen], (
        f"The model answers with {_describe(answer, parts)}; robbench took {chosen} as the logits. --output {chosen} "
        "says so beforehand."
    )


def make_two_logits(z: Any) -> Any:
    """Make logits [N, 2] of one logit an image, [N] or [N, 1], of class 1.

    Raises:
        ModelError: there is more than one logit an image.
    """
    if not isinstance(z, Tensor) or z.dim() not in (1, 2) or z[..., None].flatten(1).shape[1] != 1:
        given = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else f"a {type(z).__name__}"
        raise ModelError(f"--binary given; the model answers with {given}, expected one logit an image: [N] or [N, 1].")
    column = z.reshape(-1, 1)
    return torch.cat([torch.zeros_like(column), column], dim=1)


def _list_parts(answer: Any) -> dict[str, Any]:
    """List the parts of an answer by name: keys, fields, or positions."""
    if isinstance(answer, Mapping):
        return {str(key): part for key, part in answer.items()}
    if isinstance(answer, tuple | list):
        names = getattr(answer, "_fields", None) or range(len(answer))
        return dict(zip(map(str, names), answer, strict=True))
    held = getattr(answer, "__dict__", {}) if not isinstance(answer, Tensor) else {}
    return {name: part for name, part in held.items() if isinstance(part, Tensor)}


def _can_be_logits(part: object, n: int) -> bool:
    return isinstance(part, Tensor) and part.dim() == 2 and len(part) == n and part.is_floating_point()


def _describe(answer: object, parts: Mapping[str, Any]) -> str:
    shown = ", ".join(
        f"{name} {['N', *part.shape[1:]]}".replace("'", "")
        if isinstance(part, Tensor)
        else f"{name} ({type(part).__name__})"
        for name, part in parts.items()
    )
    return f"a {type(answer).__name__}" + (f" of {shown}" if shown else "")
