"""The binarization test (Zimmermann, Brendel, Tramèr & Carlini 2022): an attack that must succeed, because it can.

For each image the model's features are frozen and a linear readout is fitted that tells one point on the surface of the
ball from many inside it. On this two-class problem an adversarial example exists for certain: the boundary point. An
attack that does not find one says nothing about the model's robustness when it fails on the real problem either.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from robbench.attacks import Attack
from robbench.core import rng
from robbench.core.threat import Ball
from robbench.masking.measurements import Binarization
from robbench.masking.probe import Connected, Probe, trace

__all__ = ["Features", "binarization"]

_INNER = 192  # points of class 0; the authors take 999
_CLOSE = 0.95  # of eps: inner points lie within it, the boundary point at eps
_RANDOM = 100  # points of random sampling
_MARGIN = 0.05  # the readout's boundary lies so close to the boundary point, as a share of its gap to the inner ones


class Features(nn.Module):
    """What the last linear layer of a model is given, or the logits where the answer is no linear layer's output."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.model = model
        self.layer = _last_linear(model, x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, H, W] to features [N, D]."""
        if self.layer is None:
            logits: Tensor = self.model(x)
            return logits
        with _inputs(self.layer) as seen:
            self.model(x)
        return seen[-1].flatten(1)


@contextmanager
def _inputs(layer: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        hook.remove()


def _last_linear(model: nn.Module, x: Tensor) -> nn.Module | None:
    """Find the linear layer whose output is the model's answer, bit for bit."""
    outputs: list[tuple[nn.Module, Tensor]] = []
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_hook(lambda m, _, out: outputs.append((m, out))) for m in layers]
    try:
        with torch.no_grad():
            answer = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return next((m for m, out in reversed(outputs) if torch.equal(out, answer)), None)


class _Readouts(nn.Module):
    """Two logits (0, w·features + b) with a readout of its own for each row of the batch."""

    def __init__(self, features: Features, w: Tensor, b: Tensor) -> None:
        super().__init__()
        self.features, self.w, self.b = features, w, b

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, H, W], the rows in the order of the readouts, to logits [N, 2]."""
        score = (self.features(x).double() * self.w).sum(1) + self.b
        return torch.stack([torch.zeros_like(score), score], dim=1)


def binarization(probe: Probe, attacks: Sequence[Attack]) -> Binarization:
    """Run the test on the probe's images, with the attacks that are to be judged together."""
    p = probe.problem("binarization")
    features = Features(probe.target.module, p.x[:2])
    fitted = [_readout(probe, features, i) for i in range(len(probe))]
    at = [i for i, readout in enumerate(fitted) if readout is not None]
    readouts = [readout for readout in fitted if readout is not None]
    broken = 0
    for start in range(0, len(at), probe.widths.lanes):
        batch = slice(start, start + probe.widths.lanes)
        found = [_broken(features, readouts[batch], probe, at[batch], attack) for attack in attacks]
        broken += int(np.any(found, axis=0).sum())
    return Binarization(
        images=len(probe),
        separable=len(at),
        attack=broken,
        random=sum(_by_chance(probe, features, i, readout) for i, readout in zip(at, readouts, strict=True)),
        features=len(readouts[0][0]) if readouts else 0,
    )


Readout = tuple[NDArray[np.float64], float]


def _points(probe: Probe, i: int, count: int, eps: float, name: str, surface: bool) -> Tensor:
    """Draw points around one image: inside a ball, or at its corners (Linf) or surface."""
    p = probe.problem(name)
    one = torch.full((count,), i, device=p.x.device)
    p = replace(p, x=p.x[one], y=p.y[one], sample=p.sample[one], trial=torch.arange(count, device=p.x.device))
    ball = Ball(probe.ball.norm, eps)
    if not surface:
        return ball.random(p)
    words = rng.bits(p.key, p.sample, p.trial, 0, p.x[0].numel())
    signs = ((words & 1) * 2 - 1).to(p.x.dtype).view_as(p.x)
    length = ball.distance(torch.zeros_like(signs), signs).to(signs.dtype).view(-1, 1, 1, 1)
    return (p.x + signs * (eps / length)).clamp(0, 1)


def _readout(probe: Probe, features: Features, i: int) -> Readout | None:
    """Fit the readout of one image; None where no linear one tells the points apart, or the answers change."""
    close = _CLOSE * probe.ball.eps
    inner = [_points(probe, i, _INNER // 2, close, f"inner/{surface}", surface) for surface in (False, True)]
    boundary = _points(probe, i, 1, probe.ball.eps, "boundary", surface=True)
    found = _features(probe, features, torch.cat([probe.x[i : i + 1].to(boundary.device), *inner, boundary]))
    centre, scale = found.mean(0), found.std(0)
    scale[scale < 1e-12] = 1.0
    label = np.zeros(len(found), int)
    label[-1] = 1
    # One point against hundreds: heavy weights and next to no regularization, so that separable data are separated.
    fit = LinearSVC(C=1e4, class_weight="balanced", dual=True, max_iter=20_000, random_state=0)
    normal = (found - centre) / scale
    w = _fitted(fit, normal, label) / scale
    score = found @ w
    gap = float(score[-1] - score[:-1].max())
    if not gap > 0:
        return None
    # Unit gap, and the boundary close to the point that proves that an adversarial example exists.
    return w / gap, -float(score[-1]) / gap + _MARGIN


def _fitted(fit: LinearSVC, x: NDArray[np.float64], label: NDArray[np.int64]) -> NDArray[np.float64]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged is no matter: the gap decides whether the readout is used
        fit.fit(x, label)
    w: NDArray[np.float64] = np.asarray(fit.coef_[0], dtype=np.float64)
    return w


def _features(probe: Probe, features: Features, x: Tensor) -> NDArray[np.float64]:
    with torch.no_grad():
        parts = [features(part) for part in x.split(probe.widths.lanes)]  # type: ignore[no-untyped-call]
    return torch.cat(parts).double().cpu().numpy()


def _broken(
    features: Features, readouts: list[Readout], probe: Probe, at: list[int], attack: Attack
) -> NDArray[np.bool_]:
    """Attack the two-class problems of some images, one in each row."""
    p = probe.problem("binarization")
    rows = torch.tensor(at, device=p.x.device)
    w = torch.from_numpy(np.stack([w for w, _ in readouts])).to(p.x.device)
    b = torch.tensor([b for _, b in readouts], dtype=torch.float64, device=p.x.device)
    p = replace(p, x=p.x[rows], y=torch.zeros_like(rows), sample=p.sample[rows], trial=p.trial[rows])
    # Features of a model without gradients have none either; the attack then sees zeros.
    found = trace(Connected(_Readouts(features, w, b)), attack, p, probe.ball)
    broken: NDArray[np.bool_] = (found.margin > 0).any(0).cpu().numpy()
    return broken


def _by_chance(probe: Probe, features: Features, i: int, readout: Readout) -> bool:
    """Tell whether random points of the ball, inside and on its surface, break the two-class problem of one image."""
    w, b = readout
    half = _RANDOM // 2
    points = [_points(probe, i, half, probe.ball.eps, f"chance/{surface}", surface) for surface in (False, True)]
    return bool((_features(probe, features, torch.cat(points)) @ w + b > 0).any())
