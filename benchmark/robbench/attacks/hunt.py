"""Margin attacks from different starts and towards different classes, which stop early on very robust images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robbench.attacks.base import check_parameters, clean_logits, may_hold, other_at
from robbench.attacks.odi import weighted
from robbench.core.errors import SuiteError
from robbench.core.losses import margin, margin_targeted
from robbench.core.threat import Ball, per_lane
from robbench.core.types import NORMS, Norm, Problem, State

__all__ = ["Hunt"]


@dataclass(frozen=True, kw_only=True)
class Hunt:
    """One trial of many runs, each from a start of its own with a step size that falls from 2ε to zero.

    First, `starts` runs climb the margin from output-diversified starts (Tashiro et al. 2020, Eq. 2). Then one run
    climbs towards each of `targets` classes (Gowal et al. 2019). A run that is far behind after `probe` queries ends,
    because the best of nine targets hardly changes after that. Last, a run of `chase` steps climbs towards the target
    whose margin came closest to zero.

    If all margins so far stayed far from zero, the trial ends early: after the starts if more than `hopeless` of the
    clean margin is left, and after the targets if more than half of `hopeless` is left. An image that withstands the
    last run took `steps` + 1 queries. An image whose trial ends after the starts took `starts` · (`run` + 1) + 1.

    Attributes:
        starts: number of runs from output-diversified starts.
        targets: number of target classes, the likeliest on the clean image first.
        run: steps of each run but the last.
        chase: steps of the last run.
        odi_steps: how many first steps of a run from a start increase a random weighting of the logits.
        probe: number of queries for a target before it is compared with earlier ones.
        lag: how many times as far from zero its best margin may then be as that of the best earlier target.
        hopeless: if more than this share of the clean margin is left, the trial ends early.
    """

    kind: ClassVar[str] = "hunt"
    version: ClassVar[int] = 1
    memoryless: ClassVar[bool] = False
    norms: ClassVar[tuple[Norm, ...]] = NORMS
    needs_grad: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    trials: ClassVar[int] = 1

    starts: int = 6
    targets: int = 9
    run: int = 40
    chase: int = 160
    odi_steps: int = 2
    probe: int = 10
    lag: float = 2.0
    hopeless: float = 0.1

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        check_parameters(self)
        for name in ("starts", "targets", "chase"):
            if getattr(self, name) < 1:
                raise SuiteError(f"{name} {getattr(self, name)} given; allowed: at least 1")
        for name in ("odi_steps", "probe"):
            if not 1 <= getattr(self, name) < self.run:
                raise SuiteError(f"{name} {getattr(self, name)} given with run {self.run}; allowed: 1 to run − 1")
        if self.lag < 1:
            raise SuiteError(f"lag {self.lag} given; allowed: at least 1")
        if self.hopeless <= 0:
            raise SuiteError(f"hopeless {self.hopeless} given; it must be above 0")

    @property
    def steps(self) -> int:
        """The steps of all runs, and one step between each run and the next."""
        return (self.starts + self.targets) * (self.run + 1) + self.chase

    def init(self, p: Problem, ball: Ball) -> State:
        """Begin the first run."""
        count, lanes = torch.zeros_like(p.y), torch.zeros_like(p.x.flatten(1)[:, 0])
        return {
            "x": ball.random(p),
            "at": count,  # which run
            "taken": count.clone(),  # steps of it
            "best": lanes - torch.inf,  # margin of any run
            "near": lanes - torch.inf,  # margin that this run came to, towards its target
            "leader": lanes - torch.inf,  # that of the best target after `probe` queries
            "nearest": lanes - torch.inf,  # that of the best target in the end
            "prey": count.clone(),  # which one that was
            "done": torch.zeros_like(p.y, dtype=torch.bool),
        }

    def loss(self, logits: Tensor, p: Problem, s: State) -> Tensor:
        """Evaluate what the run climbs: a random weighting of the logits, the margin, or the margin of one class."""
        at = s["at"]
        aimless = torch.where(s["taken"] < self.odi_steps, weighted(logits, p, at), margin(logits, p.y))
        rank = torch.where(self._chasing(at), s["prey"], (at - self.starts).clamp(min=0))
        return torch.where(at < self.starts, aimless, margin_targeted(logits, p.y, other_at(p, rank)))

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Take a step of the run, begin the next run, or end the trial."""
        at, taken = s["at"], s["taken"]
        chasing, racing = self._chasing(at), (at >= self.starts) & ~self._chasing(at)
        best = torch.maximum(s["best"], margin(logits, p.y))
        near = torch.maximum(s["near"], loss)

        probed = racing & (taken + 1 == self.probe)
        behind = probed & (near < self.lag * s["leader"])
        over = behind | (taken == torch.where(chasing, self.chase, self.run))
        ahead = racing & over & (near > s["nearest"])
        left = best / margin(clean_logits(p), p.y)  # both negative
        hopeless = (at == self.starts - 1) & (left > self.hopeless)
        hopeless |= (at == self.starts + self.targets - 1) & (left > self.hopeless / 2)
        done = s["done"] | (over & (chasing | hopeless))
        jump = over & ~done

        x = torch.where(per_lane(done, grad), s["x"], ball.project(p.x, s["x"] + self._move(ball, s, grad)))
        if may_hold(jump):  # the draw takes time
            x = torch.where(per_lane(jump, grad), ball.random(p, step=at + 1), x)
        return {
            "x": x,
            "at": at + jump.long(),
            "taken": torch.where(jump, 0, taken + 1),
            "best": best,
            "near": near.masked_fill(jump, -torch.inf),
            "leader": torch.where(probed, torch.maximum(s["leader"], near), s["leader"]),
            "nearest": torch.where(ahead, near, s["nearest"]),
            "prey": torch.where(ahead, at - self.starts, s["prey"]),
            "done": done,
        }

    def _chasing(self, at: Tensor) -> Tensor:
        return at == self.starts + self.targets

    def _move(self, ball: Ball, s: State, grad: Tensor) -> Tensor:
        """Follow the gradient. Steps of a start have size ε; later step sizes fall from 2ε along half a cosine."""
        at, taken = s["at"], s["taken"]
        share = taken.to(grad.dtype) / torch.where(self._chasing(at), self.chase, self.run)
        size = torch.where((at < self.starts) & (taken < self.odi_steps), 1.0, (share * math.pi).cos() + 1) * ball.eps
        return ball.climb(s["x"], grad, per_lane(size, grad))
