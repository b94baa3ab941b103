"""The contract of an attack: it proposes, the engine judges.

An attack is a frozen dataclass of keyword-only hyperparameters. It has no loop, never sees the model, a device, a
batch size or a global random generator. The engine queries `state["x"]`, hands back logits, loss and gradient, and
asks for the next state, `steps` times per trial; after step number `steps` the point is queried once more without a
gradient, and the trial is over. Restarts and target classes are trials.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

from torch import Tensor

from robbench.errors import SuiteError, unknown_name
from robbench.losses import LOSSES
from robbench.threat import Ball
from robbench.types import NORMS, Norm, Problem, State

__all__ = ["Attack", "Climbing", "describe"]


class Attack(Protocol):
    """What the engine needs of an attack. L is the number of lanes; lanes are independent of each other."""

    kind: ClassVar[str]
    version: ClassVar[int]
    norms: ClassVar[tuple[Norm, ...]]
    """The geometries it is made for."""
    needs_grad: ClassVar[bool]
    needs_logits: ClassVar[bool]
    """Whether `Problem.logits`, the model's answer to the clean image, is wanted; it costs one forward pass."""
    memoryless: ClassVar[bool]
    """Whether the next point depends on the last one alone, so that coming back to a point is going in circles."""

    @property
    def trials(self) -> int:
        """How many independent tries (restarts, targets) a sample gets."""

    @property
    def steps(self) -> int:
        """How many steps a trial takes: it costs steps + 1 forward and, with gradients, steps backward passes."""

    def init(self, p: Problem, ball: Ball) -> State:
        """Start the trials: tensors with the lane first; `x` [L, C, H, W] is the first point to query."""

    def loss(self, logits: Tensor, p: Problem, s: State) -> Tensor:
        """Compute the loss to be increased at `s["x"]`: [L, K] -> [L]."""

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Move on from the answers at `s["x"]`.

        Args:
            p: the problem, one row per lane.
            ball: where the points may lie.
            s: the state that was queried.
            t: the step each lane is at, [L] int64, counted from 0.
            logits: [L, K] at `s["x"]`.
            loss: [L] at `s["x"]`.
            grad: its gradient, [L, C, H, W] (zeros where the attack needs none).

        Returns:
            The next state; tensors that do not change are passed on.
        """


@dataclass(frozen=True, kw_only=True)
class Climbing:
    """What attacks share that climb one untargeted loss by its gradient, from `restarts` starts.

    Attributes:
        objective: which loss is increased: `ce`, `margin` (the papers' "CW") or `dlr`.
        steps: steps per trial.
        restarts: independent starts; the worst counts.
    """

    norms: ClassVar[tuple[Norm, ...]] = NORMS
    needs_grad: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False

    objective: str = "ce"
    steps: int = 20
    restarts: int = 1

    def __post_init__(self) -> None:
        """Refuse budgets that mean nothing."""
        if self.objective not in LOSSES:
            raise SuiteError(unknown_name("objective", self.objective, LOSSES))
        if self.steps < 1 or self.restarts < 1:
            raise SuiteError(f"steps {self.steps}, restarts {self.restarts} given; both must be at least 1")

    @property
    def trials(self) -> int:
        """One trial per restart."""
        return self.restarts

    def loss(self, logits: Tensor, p: Problem, s: State) -> Tensor:
        """Evaluate the objective."""
        return LOSSES[self.objective](logits, p.y)


def describe(attack: Attack) -> dict[str, Any]:
    """List what identifies an attack in a run: kind, version and every hyperparameter."""
    values = {f.name: getattr(attack, f.name) for f in fields(attack)}  # type: ignore[arg-type]
    return {"kind": attack.kind, "version": attack.version, **values}
