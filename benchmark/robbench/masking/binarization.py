"""The binarization test (Zimmermann, Brendel, Tramèr & Carlini 2022). It tests an attack on solvable problems.

For each image, the test freezes the model's features. It fits a linear readout that separates one point on the surface
of the ball (the boundary point) from many inner points. The boundary point is an adversarial example of this two-class
problem, so one exists. If an attack fails on this problem, its failure on the real problem does not show robustness.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.attacks import Attack
from robbench.core import rng
from robbench.core.threat import Ball
from robbench.masking.gradient_probe import GradientProbe, ZeroGradientModel, trace_attack
from robbench.masking.measurements import Binarization

if TYPE_CHECKING:
    from sklearn.svm import LinearSVC

__all__ = ["FeatureExtractor", "run_binarization_test"]

_INNER = 192  # inner points; the authors take 999
_CLOSE = 0.95  # share of eps: inner points are within this radius, the boundary point is at eps
_RANDOM = 100  # points of random sampling
_ROUNDING = 1e-6  # 1 − cosine between the outputs of a layer and the same outputs with rounding errors
_MARGIN = 0.05  # distance of the readout's boundary to the boundary point, as a share of the gap to the inner points


class FeatureExtractor(nn.Module):
    """Computes the input of a model's last linear layer, or the logits if the output is not that of a linear layer.

    The output may be that of the layer times a positive factor, with an offset for each image.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.model = model
        self.layer = _find_last_linear(model, x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, H, W] to features [N, D]."""
        if self.layer is None:
            logits: Tensor = self.model(x)
            return logits
        with _record_inputs(self.layer) as inputs:
            self.model(x)
        return inputs[-1].flatten(1)


@contextmanager
def _record_inputs(layer: nn.Module) -> Iterator[list[Tensor]]:
    inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        hook.remove()


def _find_last_linear(model: nn.Module, x: Tensor) -> nn.Module | None:
    """Find the linear layer whose output equals the model's output, up to a positive factor and each image's offset."""
    outputs: list[tuple[nn.Module, Tensor]] = []
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_hook(lambda m, _, out: outputs.append((m, out))) for m in layers]
    try:
        with torch.no_grad():
            logits = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return next((m for m, out in reversed(outputs) if out.shape == logits.shape and _is_scaled(logits, out)), None)


def _is_scaled(logits: Tensor, out: Tensor) -> bool:
    a, b = (z.double() - z.double().mean(1, keepdim=True) for z in (logits, out))
    length = a.norm() * b.norm()
    return bool((length > 0) & ((a * b).sum() > (1 - _ROUNDING) * length))


class _Readouts(nn.Module):
    """Computes the two logits (0, w·features + b). Each row of the batch has its own readout (w, b)."""

    def __init__(self, features: FeatureExtractor, w: Tensor, b: Tensor) -> None:
        super().__init__()
        self.features, self.w, self.b = features, w, b

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, H, W], in the order of the readouts, to logits [N, 2]."""
        score = (self.features(x).double() * self.w).sum(1) + self.b
        return torch.stack([torch.zeros_like(score), score], dim=1)


def run_binarization_test(probe: GradientProbe, attacks: Sequence[Attack]) -> Binarization:
    """Run the test on the images of a probe. An image counts as broken if any of the attacks breaks it."""
    p = probe.make_problem("binarization")
    features = FeatureExtractor(probe.target.module, p.x[:8])
    fitted = [_fit_readout(probe, features, i) for i in range(len(probe))]
    separable = [i for i, readout in enumerate(fitted) if readout is not None]
    readouts = [readout for readout in fitted if readout is not None]
    broken = 0
    for start in range(0, len(separable), probe.widths.lanes):
        batch = slice(start, start + probe.widths.lanes)
        broken_by = [_attack_readouts(features, readouts[batch], probe, separable[batch], a) for a in attacks]
        broken += int(np.any(broken_by, axis=0).sum())
    return Binarization(
        images=len(probe),
        separable=len(separable),
        attack=broken,
        random=sum(_is_broken_by_chance(probe, features, i, r) for i, r in zip(separable, readouts, strict=True)),
        features=len(readouts[0][0]) if readouts else 0,
    )


Readout = tuple[NDArray[np.float64], float]
"""Weights w [D] and bias b."""


def _draw_points(probe: GradientProbe, i: int, count: int, eps: float | Tensor, name: str, surface: bool) -> Tensor:
    """Draw points inside a ball around one image, or on its surface (at its corners for Linf), [count, C, H, W]."""
    p = probe.make_problem(name)
    repeated = torch.full((count,), i, device=p.x.device)
    trial = torch.arange(count, device=p.x.device)
    p = replace(p, x=p.x[repeated], y=p.y[repeated], sample=p.sample[repeated], trial=trial)
    ball = Ball(probe.ball.norm, eps)
    if not surface:
        return ball.random(p)
    words = rng.bits(p.key, p.sample, p.trial, 0, p.x[0].numel())
    signs = ((words & 1) * 2 - 1).to(p.x.dtype).view_as(p.x)
    length = ball.distance(torch.zeros_like(signs), signs).to(signs.dtype).view(-1, 1, 1, 1)
    return (p.x + signs * (eps / length)).clamp(0, 1)


def _fit_readout(probe: GradientProbe, features: FeatureExtractor, i: int) -> Readout | None:
    """Fit the readout of one image. Return None if no linear readout separates the points."""
    from sklearn.svm import LinearSVC  # importing it takes seconds

    close = _CLOSE * probe.ball.eps
    inner = [_draw_points(probe, i, _INNER // 2, close, f"inner/{surface}", surface) for surface in (False, True)]
    boundary = _draw_points(probe, i, 1, probe.ball.eps, "boundary", surface=True)
    values = _compute_features(probe, features, torch.cat([probe.x[i : i + 1].to(boundary.device), *inner, boundary]))
    centre, scale = values.mean(0), values.std(0)
    scale[scale < 1e-12] = 1.0
    label = np.zeros(len(values), int)
    label[-1] = 1
    # One class has one point, the other has hundreds. Class weights and weak regularization make the readout separate
    # all separable points.
    svm = LinearSVC(C=1e4, class_weight="balanced", dual=True, max_iter=20_000, random_state=0)
    w = _fit_weights(svm, (values - centre) / scale, label) / scale
    score = values @ w
    gap = float(score[-1] - score[:-1].max())
    if not gap > 0:
        return None
    # Scale the gap to 1, and put the readout's boundary close to the boundary point.
    return w / gap, -float(score[-1]) / gap + _MARGIN


def _fit_weights(svm: LinearSVC, x: NDArray[np.float64], label: NDArray[np.int64]) -> NDArray[np.float64]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # convergence is not required, because the gap decides whether w is used
        svm.fit(x, label)
    w: NDArray[np.float64] = np.asarray(svm.coef_[0], dtype=np.float64)
    return w


def _compute_features(probe: GradientProbe, features: FeatureExtractor, x: Tensor) -> NDArray[np.float64]:
    with torch.no_grad():
        parts = [features(part) for part in x.split(probe.widths.lanes)]  # type: ignore[no-untyped-call]
    return torch.cat(parts).double().cpu().numpy()


def _attack_readouts(
    features: FeatureExtractor, readouts: list[Readout], probe: GradientProbe, at: list[int], attack: Attack
) -> NDArray[np.bool_]:
    """Attack the two-class problems of the images at these positions. Return which are broken."""
    p = probe.make_problem("binarization")
    rows = torch.tensor(at, device=p.x.device)
    w = torch.from_numpy(np.stack([w for w, _ in readouts])).to(p.x.device)
    b = torch.tensor([b for _, b in readouts], dtype=torch.float64, device=p.x.device)
    p = replace(p, x=p.x[rows], y=torch.zeros_like(rows), sample=p.sample[rows], trial=p.trial[rows])
    # If the model has no gradients, its features have none. The attack then gets gradients of zero.
    trace = trace_attack(ZeroGradientModel(_Readouts(features, w, b)), attack, p, probe.ball)
    broken: NDArray[np.bool_] = (trace.margin > 0).any(0).cpu().numpy()
    return broken


def _is_broken_by_chance(probe: GradientProbe, features: FeatureExtractor, i: int, readout: Readout) -> bool:
    """Return whether random points in the ball or on its surface break the two-class problem of one image."""
    w, b = readout
    half = _RANDOM // 2
    points = [_draw_points(probe, i, half, probe.ball.eps, f"chance/{surface}", surface) for surface in (False, True)]
    return bool((_compute_features(probe, features, torch.cat(points)) @ w + b > 0).any())
