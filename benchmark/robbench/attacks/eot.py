"""Expectation over transformation (Athalye et al. 2018): averaged gradients of randomized models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robbench.attacks.base import Attack, check_parameters
from robbench.core.errors import SuiteError
from robbench.core.threat import Ball, per_lane
from robbench.core.types import Norm, Problem, State

__all__ = ["EOT"]

_OWN = ("eot_logits", "eot_loss", "eot_grad")


@dataclass(frozen=True, kw_only=True)
class EOT:
    """Run another attack on the means of `draws` answers and gradients at each point (Athalye et al. 2018, Sec. 3).

    It queries each point `draws` times before the inner attack takes its step. So a step costs `draws` times as much. A
    suite asks for it with `eot = N` on any attack.

    Attributes:
        inner: the attack.
        draws: answers per step.
    """

    kind: ClassVar[str] = "eot"
    version: ClassVar[int] = 1
    memoryless: ClassVar[bool] = False

    inner: Attack
    draws: int = 20

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        check_parameters(self)
        if not hasattr(self.inner, "kind"):
            raise SuiteError(f"EOT: inner: {self.inner!r} given; allowed: an attack, such as PGD(steps=20)")
        if self.draws < 2:
            raise SuiteError(f"eot {self.draws} given; allowed: at least 2 answers to average")

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Those of the inner attack."""
        return self.inner.norms

    @property
    def needs_grad(self) -> bool:
        """Whether the inner attack does."""
        return self.inner.needs_grad

    @property
    def needs_logits(self) -> bool:
        """Whether the inner attack does."""
        return self.inner.needs_logits

    @property
    def precise(self) -> bool:
        """Whether the inner attack is."""
        return getattr(self.inner, "precise", False)

    @property
    def trials(self) -> int:
        """Those of the inner attack."""
        return self.inner.trials

    @property
    def steps(self) -> int:
        """The inner attack's, times the draws."""
        return self.inner.steps * self.draws

    def init(self, p: Problem, ball: Ball) -> State:
        """Start the inner attack with empty sums. The sums of logits and loss get their shape from the first answer."""
        return self.inner.init(p, ball) | {"eot_grad": torch.zeros_like(p.x)}

    def loss(self, logits: Tensor, p: Problem, s: State) -> Tensor:
        """Evaluate the inner attack's loss."""
        return self.inner.loss(logits, p, s)

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Add an answer to the sums. After the last answer, let the inner attack step from the means."""
        answers = {"eot_logits": logits, "eot_loss": loss, "eot_grad": grad}
        first, last = t % self.draws == 0, t % self.draws == self.draws - 1
        sums = {}
        for name, value in answers.items():
            kept = s[name] if name in s else torch.zeros_like(value)
            sums[name] = torch.where(per_lane(first, value), value, kept + value)
        mean = {name: value / self.draws for name, value in sums.items()}
        inner = {name: value for name, value in s.items() if name not in _OWN}
        moved = self.inner.step(p, ball, inner, t // self.draws, mean["eot_logits"], mean["eot_loss"], mean["eot_grad"])
        return {name: torch.where(per_lane(last, new), new, inner[name]) for name, new in moved.items()} | sums
