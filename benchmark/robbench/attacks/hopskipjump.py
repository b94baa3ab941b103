"""HopSkipJump (Chen, Jordan & Wainwright 2020, "HopSkipJumpAttack: A Query-Efficient Decision-Based Attack"): L2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robbench.attacks.base import check_parameters
from robbench.attacks.boundary import is_wrong
from robbench.core import rng
from robbench.core.errors import SuiteError
from robbench.core.threat import Ball, length, per_lane
from robbench.core.types import Norm, Problem, State

__all__ = ["HopSkipJump"]

_START, _BISECT, _PROBE, _JUMP = range(4)
"""What a query is for: find a misclassified point, bisect a segment, estimate the boundary's normal, leave along it."""
_HALVINGS = 20  # of the jump; then the next estimate, which is larger, starts where this one did


@dataclass(frozen=True, kw_only=True)
class HopSkipJump:
    """Walk along the decision boundary to the point nearest to the image (Algorithm 2, for L2).

    It uses the predicted class of its queries and nothing else. An iteration starts at a misclassified point beside the
    boundary. It estimates the boundary's normal from the answers at random points of a small sphere around that point
    (Eq. 16, with the baseline that reduces the variance). It jumps along the normal, by the distance to the image over
    √i in iteration i, and by half of that until the end is misclassified. A bisection leads from there towards the
    image, back to the boundary.

    The paper starts at the first uniform noise that is misclassified. A network may give all such noise one class, and
    the walk hardly ever leaves the class where it starts. So here, the squares of the noise take sides of 1, 2, 4 and
    so on in turn, and the walk starts at the nearest point that `starts` of these directions lead to. Where boundaries
    to several classes are near, a walk may still end at one that is not the nearest: use restarts.

    Attributes:
        steps: queries after the first; the last one asks about the last point beside the boundary again.
        starts: number of directions of noise; more are tried while none leads to a misclassified point.
        probes: queries of the first estimate; the estimate of iteration i takes √i times as many.
        restarts: number of independent trials, from other noise.
    """

    kind: ClassVar[str] = "hopskipjump"
    version: ClassVar[int] = 1
    norms: ClassVar[tuple[Norm, ...]] = ("L2",)
    needs_grad: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False
    memoryless: ClassVar[bool] = False
    can_target: ClassVar[bool] = False  # noise is of some other class, hardly ever of a given one

    steps: int = 5000
    starts: int = 100
    probes: int = 100
    restarts: int = 1

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        check_parameters(self)
        if min(self.steps, self.starts, self.restarts) < 1 or self.probes < 2:
            raise SuiteError(
                f"steps {self.steps}, starts {self.starts}, probes {self.probes}, restarts {self.restarts} given; "
                "allowed: probes at least 2, the others at least 1"
            )

    @property
    def trials(self) -> int:
        """One trial per restart."""
        return self.restarts

    def init(self, p: Problem, ball: Ball) -> State:
        """Start at noise."""
        none, zeros = torch.zeros_like(p.y), torch.zeros_like(p.x)
        share = zeros.flatten(1)[:, 0]
        return {
            "x": self._noise(p, none),
            "phase": none + _START,
            "nearest": p.x.clone(),  # the misclassified point beside the boundary; the image while there is none
            "outer": p.x.clone(),  # the misclassified end of the segment to the image
            "low": share.clone(),  # the part of the segment whose end is classified correctly
            "high": share.clone(),  # the part whose end is misclassified
            "left": none.clone(),  # queries that are left of this phase
            "begun": none.clone(),  # number of directions of noise that were asked about
            "iteration": none.clone(),
            "probe": zeros.clone(),  # the direction of this query
            "wrong": share.clone(),  # number of misclassified probes of this estimate
            "total": zeros.clone(),  # the sum of their directions
            "total_wrong": zeros.clone(),  # the sum of the misclassified ones
        }

    def loss(self, logits: Tensor, p: Problem, s: State) -> Tensor:
        """Return zeros, because the search compares no losses."""
        return torch.zeros_like(logits[:, 0])

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Read the answer, and ask the next question of the phase or the first of the next one."""
        wrong = is_wrong(logits, p.y)
        s = self._read(p, s, wrong)
        phase, left = s["phase"], (s["left"] - 1).clamp(min=0)
        bisects = wrong & ((phase == _START) | (phase == _JUMP))
        over = ~bisects & (left == 0)
        found = (s["nearest"] != p.x).flatten(1).any(1)
        starts = over & (s["iteration"] == 0) & (~found | (s["begun"] < self.starts))
        probes = over & (phase != _PROBE) & ~starts
        jumps = over & (phase == _PROBE)
        iteration = s["iteration"] + probes.long()
        for begins, number, queries in (
            (starts, _START, torch.zeros_like(left)),
            (bisects, _BISECT, torch.full_like(left, self._bisections(p))),
            (probes, _PROBE, (self.probes * iteration.to(p.x.dtype).sqrt()).ceil().long()),
            (jumps, _JUMP, torch.full_like(left, _HALVINGS)),
        ):
            s["phase"] = torch.where(begins, number, s["phase"])
            left = torch.where(begins, queries, left)
        s |= {"left": left, "iteration": iteration}
        for name in ("wrong", "total", "total_wrong"):
            s[name] = torch.where(per_lane(probes, s[name]), 0, s[name])
        return self._ask(p, s, t)

    def _read(self, p: Problem, s: State, wrong: Tensor) -> State:
        """Take in the answer at `s["x"]`."""
        x, phase = s["x"], s["phase"]
        found = wrong & ((phase == _START) | (phase == _JUMP))  # a segment to bisect
        bisecting, probing = phase == _BISECT, phase == _PROBE
        middle = (s["low"] + s["high"]) / 2
        return s | {
            "outer": torch.where(per_lane(found, x), x, s["outer"]),
            "nearest": torch.where(per_lane(found | (bisecting & wrong), x), x, s["nearest"]),
            "begun": s["begun"] + (phase == _START),
            "low": torch.where(found, 0, torch.where(bisecting & ~wrong, middle, s["low"])),
            "high": torch.where(found, 1, torch.where(bisecting & wrong, middle, s["high"])),
            "wrong": s["wrong"] + (probing & wrong),
            "total": s["total"] + s["probe"] * per_lane(probing, x),
            "total_wrong": s["total_wrong"] + s["probe"] * per_lane(probing & wrong, x),
        }

    def _ask(self, p: Problem, s: State, t: Tensor) -> State:
        """Choose the next point of each lane's phase."""
        phase, nearest = s["phase"], s["nearest"]
        distance = length("L2", nearest - p.x)
        n = p.x[0].numel()
        size = (distance / n).clamp(min=torch.finfo(p.x.dtype).tiny)  # δ of Sec. III-C: √n · θ · distance, θ = n^(−3/2)
        probe = rng.normal(p.key, p.sample, p.trial, t + 1, n).to(p.x.dtype).view_as(p.x)
        probe = probe / per_lane(length("L2", probe).clamp(min=1e-12), probe)
        near = (nearest + per_lane(size, p.x) * probe).clamp(0, 1)
        count = (self.probes * s["iteration"].to(p.x.dtype).sqrt()).ceil().clamp(min=1)
        share = per_lane(s["wrong"] / count, p.x)  # of the answers, for the baseline
        # Σ (φ − mean φ) u with φ = ±1 is 2 (Σ_wrong u − share · Σ u). Where all answers agree, that is 0: take ± Σ u.
        differ = (share > 0) & (share < 1)
        normal = torch.where(differ, s["total_wrong"] - share * s["total"], s["total"] * (share - 0.5))
        normal = normal / per_lane(length("L2", normal).clamp(min=torch.finfo(p.x.dtype).tiny), normal)
        stride = distance / s["iteration"].clamp(min=1).to(p.x.dtype).sqrt() * 0.5 ** (_HALVINGS - s["left"])
        points = {
            _BISECT: p.x + per_lane((s["low"] + s["high"]) / 2, p.x) * (s["outer"] - p.x),
            _PROBE: near,
            _JUMP: (nearest + per_lane(stride, p.x) * normal).clamp(0, 1),
        }
        if bool((phase == _START).any()):  # the noise takes time to draw
            points[_START] = self._start(p, t + 1, distance)
        x = nearest
        for number, point in points.items():
            x = torch.where(per_lane((phase == number) & (t + 1 < self.steps), x), point, x)
        # The box may cut a probe short: the estimate takes the direction that was asked about.
        return s | {"x": x, "probe": (near - nearest) / per_lane(size, p.x)}

    def _bisections(self, p: Problem) -> int:
        """Count the halvings that leave a share of n^(−3/2) of the segment, as published."""
        return max(math.ceil(1.5 * math.log2(p.x[0].numel())), 1)

    def _start(self, p: Problem, step: Tensor, distance: Tensor) -> Tensor:
        """Go in the direction of noise, as far as the nearest point is; to the noise while there is none."""
        away = self._noise(p, step) - p.x
        share = distance / length("L2", away).clamp(min=torch.finfo(p.x.dtype).tiny)
        return (p.x + per_lane(torch.where(distance > 0, share.clamp(max=1), 1), p.x) * away).clamp(0, 1)

    def _noise(self, p: Problem, step: Tensor) -> Tensor:
        """Draw uniform noise whose squares have sides of 1, 2, 4 and so on, by the step: [L, C, H, W]."""
        _, _, h, w = p.x.shape
        noise = rng.uniform(p.key, p.sample, p.trial, step, p.x[0].numel()).to(p.x.dtype).view_as(p.x)
        side = 2 ** (step % (max(min(h, w).bit_length(), 1)))
        rows, columns = (torch.arange(k, device=p.x.device) // side[:, None] * side[:, None] for k in (h, w))
        lane = torch.arange(len(step), device=p.x.device)[:, None, None]
        return noise[lane, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
