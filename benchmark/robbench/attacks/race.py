"""PGD towards one class after another that gives up early on classes that lag behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robbench.attacks.pgd import PGD
from robbench.errors import SuiteError
from robbench.losses import TARGETED
from robbench.threat import Ball
from robbench.types import Problem, State

__all__ = ["Race"]


@dataclass(frozen=True, kw_only=True)
class Race(PGD):
    """Targeted PGD with an annealed step size; a target that is far behind after a few steps is given up.

    How close a target comes in its first `probe` steps tells how close it gets in the end: which one of nine is best
    hardly changes any more. A target whose best margin then is more than `lag` times as far from zero as that of an
    earlier target at the same step has its trial ended there. (Multi-targeted PGD: Gowal et al. 2019.)

    Attributes:
        probe: how many queries a target has before it is compared.
        lag: by which factor it may be behind.
    """

    kind: ClassVar[str] = "race"
    version: ClassVar[int] = 1

    objective: str = "margin_targeted"
    targets: int = 9
    steps: int = 40
    relative_step: float = 2.0
    anneal: bool = True
    probe: int = 10
    lag: float = 2.0

    def __post_init__(self) -> None:
        """Refuse comparisons that mean nothing."""
        super().__post_init__()
        if self.objective not in TARGETED:
            raise SuiteError(f"objective {self.objective!r} given; allowed: {', '.join(TARGETED)}")
        if not 1 <= self.probe < self.steps:
            raise SuiteError(f"probe {self.probe} given with steps {self.steps}; allowed: 1 to steps − 1")
        if self.lag < 1:
            raise SuiteError(f"lag {self.lag} given; allowed: at least 1")

    @property
    def memoryless(self) -> bool:
        """Not: what earlier targets reached matters."""
        return False

    def init(self, p: Problem, ball: Ball) -> State:
        """Start like PGD."""
        state = super().init(p, ball)
        lanes = torch.zeros_like(state["x"].flatten(1)[:, 0])
        return state | {"best": lanes - torch.inf, "done": torch.zeros_like(p.y, dtype=torch.bool)}

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Take a step of PGD, unless the target was given up."""
        # `leader` is not made by `init`, so that it outlives the trials of a sample; the first one clears it.
        leader = torch.where((p.trial == 0) & (t == 0), -torch.inf, s.get("leader", torch.full_like(loss, -torch.inf)))
        best = torch.maximum(s["best"], loss)
        now = t + 1 == self.probe
        done = s["done"] | (now & (best < self.lag * leader))
        x = super().step(p, ball, s, t, logits, loss, grad)["x"]
        return {
            "x": torch.where(done.view(-1, *([1] * (x.dim() - 1))), s["x"], x),
            "best": best,
            "done": done,
            "leader": torch.where(now, torch.maximum(leader, best), leader),
        }
