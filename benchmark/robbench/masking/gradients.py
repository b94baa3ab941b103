"""Measurements of a model's logits and gradients that need no attack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from robbench.attacks import Attack
from robbench.core.losses import cross_entropy, cross_entropy_scaled, margin
from robbench.core.threat import DUAL, Ball, length
from robbench.masking.gradient_probe import GradientProbe, compute_cosines
from robbench.masking.measurements import GradientQuality, LinearEstimate, LogitScale, Randomness

__all__ = [
    "choose_points", "count_autograd_calls", "measure_gradient_quality", "measure_linear_estimate",
    "measure_logit_scale", "measure_randomness",
]  # fmt: skip

_DRAWS = 5  # forward passes over the same images, as in AutoAttack's check
_TINY = 1e-20  # cross-entropy gradients below this are close to underflow in single precision
_REPEATS = 4  # gradients at the same points
_MOVED = 1e-2  # share of its length by which a repeated gradient may differ: sums in another order differ by far less
_LOW = 0.05  # quantile of `cosine_low`
_DIRECTIONS = 32  # of the central differences, per image
_LEVEL = 1 / 255  # half step of a central difference: rounding to 256 levels is no masking, coarser rounding is
_SHARE = 1 / 8  # share of eps within which gradients should agree
_NEIGHBOURS = 4
_CLASSES = 10  # wrong classes of the linear estimate, those with the largest logits


def choose_points(probe: GradientProbe, attack: Attack) -> Tensor:
    """Choose points where a model that treats its test images well may treat attacks otherwise: [4, N, C, H, W].

    They are the images, random points of the ball, random points of its surface, and the end points of an attack.
    """
    p = probe.make_problem("points")
    inside, surface = probe.ball.random(p), probe.ball.random(p, surface=True)
    return torch.stack([p.x, inside, surface, probe.trace_attack("points", attack).x])


def measure_randomness(probe: GradientProbe, points: Tensor) -> Randomness:
    """Compute the logits of the same images five times and compare (AutoAttack's check of randomized defences).

    Args:
        probe: the model and images.
        points: further points, queried as often, [P, N, C, H, W].
    """
    x = probe.x.to(probe.target.device)
    flips, change = _compare_answers(probe, x)
    flips_off, change_off = _compare_answers(probe, points.flatten(0, 1))
    return Randomness(
        draws=_DRAWS,
        images=len(probe),
        flips=flips,
        change=change,
        points=points.shape[0] * points.shape[1],
        flips_off=flips_off,
        change_off=change_off,
    )


def _compare_answers(probe: GradientProbe, x: Tensor) -> tuple[int, float]:
    """Return the number of points [M, C, H, W] whose prediction changes, and the largest relative change of logits.

    The same answer again is no change, also where it holds NaN or infinity.
    """
    logits = torch.stack([probe.compute_logits(x) for _ in range(_DRAWS)])
    flips = int((logits.argmax(2) != logits[0].argmax(1)).any(0).sum())
    same = ((logits == logits[0]) | (logits.isnan() & logits[0].isnan())).all(2)
    logits = logits - logits.mean(2, keepdim=True)  # an offset of all logits must not hide a change
    length = logits[0].norm(dim=1).clamp(min=1e-12)
    change = ((logits - logits[0]).norm(dim=2) / length).masked_fill(same, 0.0).nan_to_num(torch.inf)
    change = change.amax().clamp(max=1e9)
    return flips, float(change)


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
    """Measure the size of logits and of the gradients of both cross-entropies at the clean images."""
    x, y = probe.x.to(probe.target.device), probe.y.to(probe.target.device)
    plain, rescaled = (
        probe.compute_gradient(x, y, loss)[1].abs().flatten(1).amax(1) for loss in (cross_entropy, cross_entropy_scaled)
    )
    logits = probe.compute_logits(x).double()
    top = logits.amax(1)
    others = logits.scatter(1, logits.argmax(1, keepdim=True), torch.nan)
    mean = others.nanmean(1)
    log_odds = top - mean
    spread = (others - mean[:, None]).square().nanmean(1).sqrt() / log_odds.clamp(min=1e-12)
    return LogitScale(
        images=len(probe),
        unavailable=float((rescaled == 0).double().mean()),
        underflow=float(((rescaled > 0) & (plain < _TINY)).double().mean()),
        logit_range=float((top - logits.amin(1)).median()),
        log_odds=float(log_odds.median()),
        wrong_spread=float(spread.median()) if logits.shape[1] > 2 else None,
        confidence=float(logits.softmax(1).amax(1).mean()),
    )


def measure_gradient_quality(probe: GradientProbe, points: Tensor) -> GradientQuality:
    """Compare the margin's gradient with differences, with nearby ones, with itself, and with changes across the ball.

    Args:
        probe: the model and images.
        points: where the gradient is queried repeatedly, [P, N, C, H, W]; the last ones are end points of an attack.
    """
    p, ball = probe.make_problem("gradient"), probe.ball
    radius = _SHARE * ball.eps
    x = ball.random(p).clamp(_LEVEL, 1 - _LEVEL)  # so that the points of the differences stay in the box
    value, grad = probe.compute_gradient(x, p.y, margin)
    inside, attacked = (_compare_with_differences(probe, at) for at in (x, points[-1].clamp(_LEVEL, 1 - _LEVEL)))
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
        cosine=_median(inside),
        nearby=_median(torch.stack(nearby).flatten()),
        nonlinearity=_median(torch.stack(errors).flatten()),
        flat=int((grad == 0).flatten(1).all(1).sum()),
        cosine_low=_quantile(torch.cat([inside, attacked]), _LOW),
        unrepeatable=float(torch.stack([_is_unrepeatable(probe, at) for at in points]).double().mean()),
    )


def _compare_with_differences(probe: GradientProbe, x: Tensor) -> Tensor:
    """Return the cosines [N] over directions between slopes and central differences of the margin at points x."""
    y = probe.y.to(x.device)
    grad = probe.compute_gradient(x, y, margin)[1]
    differences, slopes = [], []
    for step in range(_DIRECTIONS):
        half = _LEVEL * probe.draw_signs("directions", step)
        ahead, behind = (probe.compute_margins(x + sign * half, y) for sign in (1, -1))
        differences.append(ahead - behind)
        slopes.append((2 * half * grad).flatten(1).double().sum(1))
    return compute_cosines(torch.stack(slopes, 1), torch.stack(differences, 1))


def _is_unrepeatable(probe: GradientProbe, x: Tensor) -> Tensor:
    """Query the margin's gradient at points x repeatedly. Return whether it changes, [N] bool."""
    y = probe.y.to(x.device)
    first, *others = (probe.compute_gradient(x, y, margin)[1].flatten(1).double() for _ in range(_REPEATS))
    change = torch.stack([(other - first).norm(dim=1) for other in others]).amax(0)
    is_changed: Tensor = change > _MOVED * first.norm(dim=1)
    return is_changed


def _median(values: Tensor) -> float | None:
    return _quantile(values, 0.5)


def _quantile(values: Tensor, share: float) -> float | None:
    """Return a quantile of the defined values, rounded down to one of them; None if there are none."""
    defined = values[~values.isnan()].sort().values
    return float(defined[int(share * (len(defined) - 1))]) if len(defined) else None


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
