"""Whether a model answers differently while gradients are on, or in torch.inference_mode()."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robbench.classifier.batch_dependence import answers_differ
from robbench.classifier.moved_images import Ask, AskWithGradient, MovedImages, measure_change
from robbench.core.errors import ModelError
from robbench.core.user_code import contain_exits

__all__ = ["MODE_NOISE", "find_gradient_mode_flag", "query_with_gradient"]

MODE_NOISE = 1e-3
"""Share of the logits' length that may change with the mode: with gradients on, torch may choose other kernels."""


def query_with_gradient(model: Ask, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Query a model while gradients are on.

    Args:
        model: what to query.
        x: images [L, C, H, W] on its device.

    Returns:
        Logits [L, K], and the gradient of the lead of the other classes over the predicted one, [L, C, H, W]; None if
        the model has no gradient.
    """
    x = x.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        logits = model(x)
        if not logits.requires_grad:
            return logits.detach(), None
        try:
            with contain_exits():
                lead = logits.logsumexp(1) - logits.amax(1)
                (slope,) = torch.autograd.grad(lead.sum(), x, allow_unused=True)
        except Exception:  # a user's hook may raise anything; an attack that meets the error words it
            return logits.detach(), None
    return logits.detach(), slope


def find_gradient_mode_flag(
    ask: Ask, ask_with_gradient: AskWithGradient, ask_in_inference_mode: Ask, moved: MovedImages
) -> dict[str, str]:
    """Compare the answers without gradients with those while gradients are on, and with those in inference mode.

    Costs one pass about the last batch, in inference mode.

    Args:
        ask: queries the model without gradients.
        ask_with_gradient: queries it while gradients are on.
        ask_in_inference_mode: queries it in torch.inference_mode().
        moved: images, and both answers to them.

    Returns:
        A flag if the answers differ by more than other kernels explain: name of the problem -> sentence.
    """
    modes: list[tuple[Tensor, Tensor, Ask, Tensor | None, str]] = [
        (x, logits, lambda x: ask_with_gradient(x)[0], now, "while gradients are on")
        for x, logits, now in zip(moved.batches, moved.logits, moved.with_gradient, strict=True)
        if now is not None
    ]
    modes.append((moved.batches[-1], moved.logits[-1], ask_in_inference_mode, None, "in torch.inference_mode()"))
    for x, logits, query, now, when in modes:
        try:
            change = measure_change(query(x) if now is None else now, logits, moved.least)
            differs = bool((change > MODE_NOISE).any()) and answers_differ(
                _bind(ask, x), _bind(query, x), MODE_NOISE, moved.least
            )
            if differs:
                flips = int((query(x).argmax(1) != logits.argmax(1)).sum())
                return {"gradient_mode": _describe(change, flips, when)}
        except (ModelError, RuntimeError, MemoryError):  # an attack that meets the error words it
            continue
    return {}


def _bind(ask: Ask, x: Tensor) -> Callable[[], Tensor]:
    return lambda: ask(x)


def _describe(change: Tensor, flips: int, when: str) -> str:
    size = f"up to {float(change.max()):.1e} of their length"
    return (
        f"The model answers differently {when} (logits of {int((change > MODE_NOISE).sum())} of {len(change)} clean "
        f"and moved images change by {size}, {flips} predictions change). A break counts only if it holds in "
        "torch.no_grad(). But attacks follow the gradients of another function, so the model looks more robust than "
        "it is. Look for torch.is_grad_enabled(), torch.is_inference_mode_enabled() and x.requires_grad in the model; "
        "attack it by queries too: --suite queries."
    )
