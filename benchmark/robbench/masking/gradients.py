"""Measurements of a model's logits and gradients that need no attack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from robbench.core.losses import cross_entropy, margin
from robbench.core.threat import DUAL, Ball, length
from robbench.masking.gradient_probe import GradientProbe, compute_cosines
from robbench.masking.measurements import GradientQuality, LinearEstimate, LogitScale, Randomness

__all__ = [
    "count_autograd_calls", "measure_gradient_quality", "measure_linear_estimate", "measure_logit_scale",
    "measure_randomness",
]  # fmt: skip

_DRAWS = 5  # forward passes over the same images, as in AutoAttack's check
_TINY = 1e-20  # cross-entropy gradients below this are close to underflow in single precision
_DIRECTIONS = 32  # of the central differences, per image
_LEVEL = 1 / 255  # half step of a central difference: rounding to 256 levels is no masking, coarser rounding is
_SHARE = 1 / 8  # share of eps within which gradients should agree
_NEIGHBOURS = 4
_CLASSES = 10  # wrong classes of the linear estimate, those with the largest logits


def measure_randomness(probe: GradientProbe) -> Randomness:
    """Compute the logits of the same images five times and compare (AutoAttack's check of randomized defences)."""
    x = probe.x.to(probe.target.device)
    logits = torch.stack([probe.compute_logits(x) for _ in range(_DRAWS)])
    length = logits[0].norm(dim=1).clamp(min=1e-12)
    return Randomness(
        draws=_DRAWS,
        images=len(probe),
        flips=int((logits.argmax(2) != logits[0].argmax(1)).any(0).sum()),
        change=float(((logits - logits[0]).norm(dim=2) / length).nan_to_num(torch.inf).amax().clamp(max=1e9)),
    )


@contextmanager
def _record_calls() -> Iterator[list[str]]:
    """Yield a list that receives the name of autograd's entry point at every call inside the `with` block."""
    calls: list[str] = []
    originals = torch.autograd.grad, torch.autograd.backward

    def wrap(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        return call

    torch.autograd.grad = wrap("grad", originals[0])
    torch.autograd.backward = wrap("backward", originals[1])
    try:
        yield calls
    finally:
        torch.autograd.grad, torch.autograd.backward = originals


def count_autograd_calls(probe: GradientProbe) -> int:
    """Count the calls of autograd inside one forward pass. A model that optimizes while it answers makes such calls."""
    x = probe.x[:2].to(probe.target.device)
    with _record_calls() as calls, torch.no_grad():
        probe.target.module(x)
    return len(calls)


def measure_logit_scale(probe: GradientProbe) -> LogitScale:
    """Measure the size of logits and of cross-entropy gradients at the clean images."""
    x, y = probe.x.to(probe.target.device), probe.y.to(probe.target.device)
    _, grad = probe.compute_gradient(x, y, cross_entropy)
    largest = grad.abs().flatten(1).amax(1)
    logits = probe.compute_logits(x).double()
    top = logits.amax(1)
    others = logits.scatter(1, logits.argmax(1, keepdim=True), torch.nan)
    mean = others.nanmean(1)
    log_odds = top - mean
    spread = (others - mean[:, None]).square().nanmean(1).sqrt() / log_odds.clamp(min=1e-12)
    return LogitScale(
        images=len(probe),
        unavailable=float((largest == 0).double().mean()),
        underflow=float(((largest > 0) & (largest < _TINY)).double().mean()),
        logit_range=float((top - logits.amin(1)).median()),
        log_odds=float(log_odds.median()),
        wrong_spread=float(spread.median()) if logits.shape[1] > 2 else None,
        confidence=float(logits.softmax(1).amax(1).mean()),
    )


def measure_gradient_quality(probe: GradientProbe) -> GradientQuality:
    """Compare the margin's gradient with central differences, nearby gradients, and changes across the whole ball."""
    p, ball = probe.make_problem("gradient"), probe.ball
    radius = _SHARE * ball.eps
    x = ball.random(p).clamp(_LEVEL, 1 - _LEVEL)  # so that the points of the differences stay in the box
    value, grad = probe.compute_gradient(x, p.y, margin)
    differences, slopes = [], []
    for step in range(_DIRECTIONS):
        half = _LEVEL * probe.draw_signs("directions", step)
        ahead, behind = (probe.compute_margins(x + sign * half, p.y) for sign in (1, -1))
        differences.append(ahead - behind)
        slopes.append((2 * half * grad).flatten(1).double().sum(1))
    nearby, small_ball = [], Ball(ball.norm, radius)
    for step in range(_NEIGHBOURS):
        point = small_ball.random(probe.make_problem("nearby", step))
        moved = (x + (point - p.x)).clamp(0, 1)
        nearby_grad = probe.compute_gradient(moved, p.y, margin)[1]
        nearby.append(compute_cosines(grad.flatten(1), nearby_grad.flatten(1)))
    errors = []
    for step in range(_NEIGHBOURS):
        far = ball.random(probe.make_problem("nonlinear", step), surface=True)
        change = probe.compute_margins(far, p.y) - value.double()
        error = (change - ((far - x) * grad).flatten(1).double().sum(1)).abs()
        errors.append((error / change.abs()).nan_to_num(0.0, 1.0, 1.0).clamp(max=1))
    return GradientQuality(
        images=len(probe),
        directions=_DIRECTIONS,
        radius=radius,
        cosine=_median(compute_cosines(torch.stack(slopes, 1), torch.stack(differences, 1))),
        nearby=_median(torch.stack(nearby).flatten()),
        nonlinearity=_median(torch.stack(errors).flatten()),
        flat=int((grad == 0).flatten(1).all(1).sum()),
    )


def _median(values: Tensor) -> float | None:
    defined = values[~values.isnan()]
    return float(defined.median()) if len(defined) else None


def measure_linear_estimate(probe: GradientProbe, robust: Tensor) -> LinearEstimate:
    """Estimate each image's distance to the boundary as logit gap / gradient gap (Shafahi et al. 2019, Eq. 4).

    Args:
        probe: the model and images.
        robust: whether the usual PGD did not break each image, [N] bool.
    """
    radii = []
    for at in probe.split_batches():
        x = probe.x[at].to(probe.target.device).requires_grad_(True)
        y = probe.y[at].to(probe.target.device)
        with torch.enable_grad():
            logits = probe.target.module(x)
        wrong = logits.detach().scatter(1, y[:, None], -torch.inf).topk(min(_CLASSES, logits.shape[1] - 1), dim=1)
        distances = []
        for target in wrong.indices.T:
            with torch.enable_grad():
                gap = (logits.gather(1, y[:, None]) - logits.gather(1, target[:, None])).squeeze(1)
            (grad,) = torch.autograd.grad(gap.sum(), x, retain_graph=True, allow_unused=True)
            slope = torch.zeros_like(x) if grad is None else grad.nan_to_num(0.0, 0.0, 0.0)
            distances.append(gap.detach().double() / length(DUAL[probe.ball.norm], slope.double()))
        radii.append(torch.stack(distances).amin(0).cpu())
    radius = torch.cat(radii)
    defined = radius.isfinite()
    return LinearEstimate(
        images=len(probe),
        defined=int(defined.sum()),
        radius=_median(radius[defined]),
        predicted=int((radius[defined] > probe.ball.eps).sum()),
        standing=int(robust[defined].sum()),
    )
