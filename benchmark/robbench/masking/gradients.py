"""Measurements of a model's answers and gradients, without an attack: chance, scale, quality, the linear estimate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from robbench.core.losses import cross_entropy
from robbench.core.threat import DUAL, Ball, length
from robbench.masking.measurements import Gradients, Linear, Randomness, Scale
from robbench.masking.probe import Probe, cosine

__all__ = ["autograd_calls", "gradient_quality", "linear_estimate", "loss_scale", "randomness"]

_DRAWS = 5  # forward passes over the same images, as AutoAttack's check
_TINY = 1e-20  # a cross-entropy gradient below this is one that single precision is about to lose
_DIRECTIONS = 32
_LEVEL = 1 / 255  # half of a difference quotient spans one of the 256 levels: 8 bits are no mask, coarser steps are
_SHARE = 1 / 8  # of eps, within which gradients are to agree
_NEIGHBOURS = 4
_CLASSES = 10  # wrong classes that the linear estimate looks at, from the likeliest


def randomness(probe: Probe) -> Randomness:
    """Ask five times about the same images (AutoAttack's check of randomized defences)."""
    x = probe.x.to(probe.target.device)
    answers = torch.stack([probe.logits(x) for _ in range(_DRAWS)])
    scale = answers[0].norm(dim=1).clamp(min=1e-12)
    return Randomness(
        draws=_DRAWS,
        images=len(probe),
        flips=int((answers.argmax(2) != answers[0].argmax(1)).any(0).sum()),
        change=float(((answers - answers[0]).norm(dim=2) / scale).nan_to_num(torch.inf).amax().clamp(max=1e9)),
    )


@contextmanager
def _counted() -> Iterator[list[str]]:
    """Note every call of autograd's entry points within."""
    calls: list[str] = []
    kept = torch.autograd.grad, torch.autograd.backward

    def noting(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return real(*args, **kwargs)

        return call

    torch.autograd.grad = noting("grad", kept[0])
    torch.autograd.backward = noting("backward", kept[1])
    try:
        yield calls
    finally:
        torch.autograd.grad, torch.autograd.backward = kept


def autograd_calls(probe: Probe) -> int:
    """Count calls of autograd inside one forward pass: a model that optimizes while it answers."""
    x = probe.x[:2].to(probe.target.device)
    with _counted() as calls, torch.no_grad():
        probe.target.module(x)
    return len(calls)


def loss_scale(probe: Probe) -> Scale:
    """Look at logits and cross-entropy gradients at the clean images."""
    x, y = probe.x.to(probe.target.device), probe.y.to(probe.target.device)
    _, grad = probe.gradient(x, y, cross_entropy)
    size = grad.abs().flatten(1).amax(1)
    logits = probe.logits(x).double()
    top = logits.amax(1)
    others = logits.scatter(1, logits.argmax(1, keepdim=True), torch.nan)
    mean = others.nanmean(1)
    odds = top - mean
    spread = (others - mean[:, None]).square().nanmean(1).sqrt() / odds.clamp(min=1e-12)
    return Scale(
        images=len(probe),
        unavailable=float((size == 0).double().mean()),
        underflow=float(((size > 0) & (size < _TINY)).double().mean()),
        logit_range=float((top - logits.amin(1)).median()),
        log_odds=float(odds.median()),
        wrong_spread=float(spread.median()) if logits.shape[1] > 2 else None,
        confidence=float(logits.softmax(1).amax(1).mean()),
    )


def gradient_quality(probe: Probe) -> Gradients:
    """Hold the margin's gradient against central differences, its neighbours, and the change over the whole ball."""
    p, ball = probe.problem("gradient"), probe.ball
    radius = _SHARE * ball.eps
    x = ball.random(p).clamp(_LEVEL, 1 - _LEVEL)  # so that differences stay in the box
    value, grad = probe.margin_gradient(x, p.y)
    quotients, slopes = [], []
    for step in range(_DIRECTIONS):
        half = _LEVEL * probe.signs("directions", step)
        ahead, behind = (probe.margins(x + sign * half, p.y) for sign in (1, -1))
        quotients.append(ahead - behind)
        slopes.append((2 * half * grad).flatten(1).double().sum(1))
    near, small = [], Ball(ball.norm, radius)
    for step in range(_NEIGHBOURS):
        point = small.random(probe.problem("nearby", step))
        moved = (x + (point - p.x)).clamp(0, 1)
        near.append(cosine(grad.flatten(1), probe.margin_gradient(moved, p.y)[1].flatten(1)))
    errors = []
    for step in range(_NEIGHBOURS):
        far = ball.random(probe.problem("nonlinear", step), surface=True)
        change = probe.margins(far, p.y) - value.double()
        error = (change - ((far - x) * grad).flatten(1).double().sum(1)).abs()
        errors.append((error / change.abs()).nan_to_num(0.0, 1.0, 1.0).clamp(max=1))
    return Gradients(
        images=len(probe),
        directions=_DIRECTIONS,
        radius=radius,
        cosine=_median(cosine(torch.stack(slopes, 1), torch.stack(quotients, 1))),
        nearby=_median(torch.stack(near).flatten()),
        nonlinearity=_median(torch.stack(errors).flatten()),
        flat=int((grad == 0).flatten(1).all(1).sum()),
    )


def _median(values: Tensor) -> float | None:
    kept = values[~values.isnan()]
    return float(kept.median()) if len(kept) else None


def linear_estimate(probe: Probe, standing: Tensor) -> Linear:
    """Estimate each image's distance to the boundary: logit gap over gradient gap (Shafahi et al. 2019, Eq. 4).

    Args:
        probe: the images.
        standing: which of them the usual PGD left standing, [N] bool.
    """
    radii = []
    for at in probe.batches():
        x = probe.x[at].to(probe.target.device).requires_grad_(True)
        y = probe.y[at].to(probe.target.device)
        with torch.enable_grad():
            logits = probe.target.module(x)
        wrong = logits.detach().scatter(1, y[:, None], -torch.inf).topk(min(_CLASSES, logits.shape[1] - 1), dim=1)
        found = []
        for target in wrong.indices.T:
            with torch.enable_grad():
                gap = (logits.gather(1, y[:, None]) - logits.gather(1, target[:, None])).squeeze(1)
            (grad,) = torch.autograd.grad(gap.sum(), x, retain_graph=True, allow_unused=True)
            slope = torch.zeros_like(x) if grad is None else grad.nan_to_num(0.0, 0.0, 0.0)
            found.append(gap.detach().double() / length(DUAL[probe.ball.norm], slope.double()))
        radii.append(torch.stack(found).amin(0).cpu())
    radius = torch.cat(radii)
    defined = radius.isfinite()
    return Linear(
        images=len(probe),
        defined=int(defined.sum()),
        radius=_median(radius[defined]),
        predicted=int((radius[defined] > probe.ball.eps).sum()),
        standing=int(standing[defined].sum()),
    )
