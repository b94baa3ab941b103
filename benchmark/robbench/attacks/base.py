"""The contract of an attack: it proposes, the engine judges.

An attack is a frozen dataclass of keyword-only hyperparameters. It has no loop, never sees the model, a device, a
batch size or a global random generator. The engine queries `state["x"]`, hands back logits, loss and gradient, and
asks for the next state, `steps` times per trial. After step number `steps` it queries the point once more without a
gradient, and the trial is over. Restarts and target classes are trials.

A trial can end early: where the state holds a tensor `done` [L] (bool) that is true, the engine goes to the last query
at once. From then on the state must not change, because `perturb` takes all steps.

With a target, the attack sees two classes: all others together, and the target (`engine.targeted`). An attack that this
does not suit has an attribute `can_target = False`.

Some attacks depend on small differences of logits or on small gradients. They have an attribute `precise = True`. Then
the engine computes their gradients in the precision of the images, even if bfloat16 was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from robbench.core.errors import SuiteError, unknown_name
from robbench.core.losses import LOSSES, TARGETED
from robbench.core.threat import Ball
from robbench.core.types import NORMS, Norm, Problem, State

__all__ = [
    "Attack", "Climbing", "Searching", "Sparing", "check_parameters", "clean_logits", "describe", "other_at",
    "others_by_rank", "parameters", "target_class",
]  # fmt: skip


class Attack(Protocol):
    """What the engine needs of an attack. L is the number of lanes; lanes are independent of each other."""

    kind: ClassVar[str]
    version: ClassVar[int]

    @property
    def memoryless(self) -> bool:
        """Whether the next point depends on the last point alone. Then coming back to a point starts a cycle."""

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms that it is made for."""

    @property
    def needs_grad(self) -> bool:
        """Whether it uses gradients."""

    @property
    def needs_logits(self) -> bool:
        """Whether it uses `Problem.logits`, the logits of the clean image, which cost one forward pass."""

    @property
    def trials(self) -> int:
        """Number of independent trials (restarts, targets) per sample."""

    @property
    def steps(self) -> int:
        """Number of steps per trial. A trial costs steps + 1 forward and, with gradients, steps backward passes."""

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
            The next state, with the tensors that did not change. When a new trial begins in a lane, only the tensors
            that `init` makes are set. A trial must not use what another trial left, because several may run at once.
        """


@runtime_checkable
class Sparing(Attack, Protocol):
    """An attack by gradients that does not use the gradient at every point. Then that point costs a forward pass."""

    def wants_gradient(self, s: State) -> Tensor:
        """Tell where the next step uses the gradient: [L] bool. Elsewhere it gets zeros."""


@runtime_checkable
class Searching(Attack, Protocol):
    """A random search: it uses no gradients and keeps few of its proposals, so the next proposals are known in advance.

    Its loss uses only `x` of the state.
    """

    def further(self, p: Problem, ball: Ball, s: State, t: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """List the points of the next steps, as they follow if the search keeps none of them.

        Args:
            p: the problem, one row per lane.
            ball: where the points may lie.
            s: the state, whose `x` is the first of them.
            t: the step each lane is at, [L].
            n: how many of them may be queried.

        Returns:
            Points [L, m, C, H, W], with m at least n, and [L, m] bool: whether the answer is known, because the point
            is the one that was kept last.
        """

    def keeps(self, s: State, loss: Tensor) -> Tensor:
        """Tell which points with these losses [L, m] the search would keep if it keeps none before: [L, m] bool."""


def may_hold(lanes: Tensor) -> bool:
    """Return whether a condition [L] may hold in a lane, so that work for it is not in vain.

    On a GPU the answer is always yes: to ask would make the CPU wait for all earlier work.
    """
    return lanes.device.type != "cpu" or bool(lanes.any())


@dataclass(frozen=True, kw_only=True)
class Climbing:
    """The shared part of attacks that climb a loss by its gradient, from `restarts` starts.

    Attributes:
        objective: which loss is increased: `ce`, `ce_scaled`, `margin` (the papers' "CW"), `dlr`, or a targeted one:
            `ce_targeted`, `margin_targeted`, `dlr_targeted`.
        targets: for a targeted loss, how many wrong classes are tried, from the likeliest on the clean image; with
            more than there are, the first come again, from other starts.
        steps: steps per trial.
        restarts: independent starts (for each target); the worst counts.
    """

    norms: ClassVar[tuple[Norm, ...]] = NORMS
    needs_grad: ClassVar[bool] = True

    objective: str = "ce"
    targets: int = 1
    steps: int = 20
    restarts: int = 1

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        check_parameters(self)
        if self.objective not in LOSSES | TARGETED:
            raise SuiteError(unknown_name("objective", self.objective, LOSSES | TARGETED))
        if self.steps < 1 or self.restarts < 1 or self.targets < 1:
            raise SuiteError(
                f"steps {self.steps}, restarts {self.restarts}, targets {self.targets} given; all must be at least 1"
            )
        if self.targets > 1 and self.objective in LOSSES:
            raise SuiteError(f"targets {self.targets} given with objective {self.objective!r}; it has no target")

    @property
    def needs_logits(self) -> bool:
        """The clean logits rank the targets."""
        return self.objective in TARGETED

    @property
    def trials(self) -> int:
        """One trial per restart and target."""
        return self.restarts * self.targets

    def loss(self, logits: Tensor, p: Problem, s: State) -> Tensor:
        """Evaluate the objective."""
        if self.objective in TARGETED:
            return TARGETED[self.objective](logits, p.y, target_class(p, self.targets))
        return LOSSES[self.objective](logits, p.y)


def clean_logits(p: Problem) -> Tensor:
    """Return the logits of the clean images, [L, K]."""
    assert p.logits is not None, "an attack that looks at the clean logits says needs_logits"
    return p.logits


def others_by_rank(p: Problem) -> Tensor:
    """List the classes other than y, the one with the largest clean logit first: [L, K - 1] int64."""
    others = clean_logits(p).scatter(1, p.y[:, None], -torch.inf)
    return others.argsort(dim=1, descending=True, stable=True)[:, :-1]


def target_class(p: Problem, targets: int) -> Tensor:
    """Choose each trial's target: the wrong classes in the order of the clean logits, [L] int64."""
    return other_at(p, p.trial % min(targets, clean_logits(p).shape[1] - 1))


def other_at(p: Problem, rank: Tensor) -> Tensor:
    """Choose each lane's wrong class of a rank, counted from 0 and again from the first after the last: [L] -> [L]."""
    others = others_by_rank(p)
    return others.gather(1, (rank % others.shape[1])[:, None]).squeeze(1)


def parameters(cls: type[Attack]) -> dict[str, Field[Any]]:
    """List the hyperparameters of a kind of attack, with their types and defaults."""
    return {f.name: f for f in fields(cls)}  # type: ignore[arg-type]  # a protocol cannot ask for a dataclass


def check_parameters(attack: Any) -> None:
    """Check the type of every hyperparameter. Numbers of NumPy become Python's own.

    Raises:
        SuiteError: a type is wrong, or a number is infinite, NaN, or too large for a float.
    """
    for name, field in parameters(type(attack)).items():
        kind = field.type if isinstance(field.type, str) else field.type.__name__
        allowed, _, optional = kind.partition(" | ")
        value = getattr(attack, name)
        if allowed not in _READERS or (value is None and optional == "None"):
            continue
        words, base, convert = _READERS[allowed]
        is_number = allowed in ("int", "float")
        wrong = not isinstance(value, base) or (is_number and isinstance(value, bool))
        if wrong or (is_number and not _is_finite(value)):
            raise SuiteError(f"{type(attack).__name__}: {name}: {value!r} given; allowed: {words}")
        object.__setattr__(attack, name, convert(value))


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # of an integer that is too large for a float
        return False


_READERS: dict[str, tuple[str, type, Callable[[Any], Any]]] = {
    "int": ("a whole number", Integral, int),
    "float": ("a finite number", Real, float),
    "bool": ("True or False", bool, bool),
    "str": ("text", str, str),
}
"""Type of a hyperparameter -> what is allowed in words, the class of its values, and its conversion."""


def describe(attack: Attack) -> dict[str, Any]:
    """List what identifies an attack in a run: kind, version and every hyperparameter."""
    values = {name: getattr(attack, name) for name in parameters(type(attack))}
    values = {name: describe(value) if hasattr(value, "kind") else value for name, value in values.items()}
    return {"kind": attack.kind, "version": attack.version, **values}
