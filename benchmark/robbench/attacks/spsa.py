"""SPSA (Uesato et al. 2018, "Adversarial risk and the dangers of evaluating against weak attacks")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robbench.attacks.base import check_parameters
from robbench.core import rng
from robbench.core.errors import SuiteError, unknown_name
from robbench.core.losses import LOSSES
from robbench.core.threat import Ball
from robbench.core.types import Norm, Problem, State

__all__ = ["SPSA"]

_BETA1, _BETA2, _TINY = 0.9, 0.999, 1e-8  # Adam's usual constants, which the paper keeps


def _directions(p: Problem, pair: Tensor) -> Tensor:
    """Draw the ±1 direction of each lane's pair: [L] -> [L, C, H, W], one bit a pixel."""
    n = p.x[0].numel()
    words = rng.bits(p.key, p.sample, p.trial, pair, (n + 31) // 32)
    bits = (words[:, :, None] >> torch.arange(32, device=words.device)) & 1
    return (bits.flatten(1)[:, :n] * 2 - 1).to(p.x.dtype).view_as(p.x)


@dataclass(frozen=True, kw_only=True)
class SPSA:
    """Gradient ascent on an estimate from queries: simultaneous perturbation, Adam, projection (Algorithm 1).

    An iteration asks for the loss at x ± delta · v for `samples` random directions v in {−1, 1}^n, one query after
    the other, takes the mean of (loss₊ − loss₋) / (2 delta) · v for the gradient, steps and queries the new x. It
    costs 2 · samples + 1 queries: the defaults 6,500 an image, where the paper spends thousands an iteration.
    With n pixels the estimate's error is about √(n / samples) times its length, so images need many samples, and the
    same queries mostly break more with the Square Attack. Unlike the paper's, probes are projected onto ball and
    box, so that each may count as a break; at the border that halves a pixel's share and keeps its sign.

    Attributes:
        objective: which loss is increased: `margin` (the paper's), `ce` or `dlr`.
        iterations: updates of x.
        samples: number of pairs of queries for each estimate.
        delta: distance of the probes from x in every pixel.
        relative_step: Adam's learning rate as a share of eps (Linf), of eps / √n (L2).
        restarts: number of independent trials. All start at the image, with other random directions.
    """

    kind: ClassVar[str] = "spsa"
    version: ClassVar[int] = 1
    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2")
    needs_grad: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False
    memoryless: ClassVar[bool] = False

    objective: str = "margin"
    iterations: int = 100
    samples: int = 32
    delta: float = 0.01
    relative_step: float = 0.25
    restarts: int = 1

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        check_parameters(self)
        if self.objective not in LOSSES:
            raise SuiteError(unknown_name("objective", self.objective, LOSSES))
        for name in ("iterations", "samples", "restarts"):
            if getattr(self, name) < 1:
                raise SuiteError(f"{name} {getattr(self, name)} given; it must be at least 1")
        for name in ("delta", "relative_step"):
            if not 0 < getattr(self, name) <= 1:
                raise SuiteError(f"{name} {getattr(self, name)} given; allowed: above 0, at most 1")

    @property
    def trials(self) -> int:
        """One trial per restart."""
        return self.restarts

    @property
    def steps(self) -> int:
        """Two queries a sample and one at the new point, for each iteration."""
        return self.iterations * (2 * self.samples + 1)

    def init(self, p: Problem, ball: Ball) -> State:
        """Start at the image."""
        zeros = torch.zeros_like(p.x)
        return {
            "x": p.x.clone(),
            "center": p.x.clone(),  # the point that is moved; x is it or a probe beside it
            "v": zeros,
            "loss_plus": zeros[:, 0, 0, 0].clone(),
            "grad": zeros.clone(),  # the sum of the estimates of this iteration
            "mean": zeros.clone(),  # Adam's two moments
            "square": zeros.clone(),
        }

    def loss(self, logits: Tensor, p: Problem, s: State) -> Tensor:
        """Evaluate the objective."""
        return LOSSES[self.objective](logits, p.y)

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Add the answer to the estimate, move after the last query of an iteration, and propose the next query.

        In an iteration, query 0 is at the centre, queries 1, 3, … are at x + delta · v, and 2, 4, … at x − delta · v.
        """
        shape = (-1, 1, 1, 1)
        phase = t % (2 * self.samples + 1)
        minus = ((phase > 0) & (phase % 2 == 0)).view(shape)
        # A lost answer (NaN, infinity) must not poison the moments.
        rise = (s["loss_plus"] - loss).nan_to_num(0.0, 0.0, 0.0) / (2 * self.delta * self.samples)
        total = torch.where(minus, s["grad"] + rise.view(shape) * s["v"], s["grad"])

        moves = phase == 2 * self.samples
        at = moves.view(shape)
        count = (t // (2 * self.samples + 1) + 1).to(loss.dtype).view(shape)
        mean = torch.where(at, _BETA1 * s["mean"] + (1 - _BETA1) * total, s["mean"])
        square = torch.where(at, _BETA2 * s["square"] + (1 - _BETA2) * total.square(), s["square"])
        rate = self.relative_step * ball.radius(p.x) / (1 if ball.norm == "Linf" else p.x[0].numel() ** 0.5)
        change = mean / (1 - _BETA1**count) / ((square / (1 - _BETA2**count)).sqrt() + _TINY)
        center = torch.where(at, ball.project(p.x, s["center"] + rate * change), s["center"])

        probing = (phase < 2 * self.samples).view(shape)
        plus = (probing.view(-1) & (phase % 2 == 0)).view(shape)
        # The counter of a direction is the step of its plus: every pair has its own.
        v = torch.where(plus, _directions(p, t + 1), s["v"])
        sign = torch.where(plus, 1.0, -1.0).to(v.dtype)
        x = torch.where(probing, ball.project(p.x, center + self.delta * sign * v), center)
        return {
            "x": x,
            "center": center,
            "v": v,
            "loss_plus": loss,
            "grad": torch.where(at, torch.zeros_like(total), total),
            "mean": mean,
            "square": square,
        }
