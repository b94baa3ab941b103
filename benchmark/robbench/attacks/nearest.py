"""The nearest break of an attack: its trials in a row, in a ball whose radius is bisected."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from robbench.attacks.base import Attack, check_parameters, clean_logits
from robbench.attacks.boundary import SEARCHES, between, bracket, is_wrong, narrowed
from robbench.core.errors import SuiteError
from robbench.core.losses import margin
from robbench.core.threat import Ball, per_lane
from robbench.core.types import Norm, Problem, State

__all__ = ["Nearest"]

_INNER = "inner:"  # prefix of the inner attack's tensors
_LEAD, _ROUNDINGS = 1e-4, 4
"""A point counts as misclassified from a margin of this share of y's clean lead, and so many roundings of z_y, on.

The judge asks again about the last point. Without a margin, rounding would decide."""


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """Run all trials of another attack one after the other, and end at the nearest misclassified point.

    After each trial, a few queries search the segment from the clean image to the nearest point, as FAB's final search
    does (Croce & Hein 2020). The first trial has the radius of the ball. The next radius is the middle between the
    largest radius at which a trial found nothing, and the distance of the nearest point. So restarts of PGD bisect the
    radius. A trial that finds nothing proves nothing: the distance at the end is an upper bound.

    Attributes:
        inner: the attack.
    """

    kind: ClassVar[str] = "nearest"
    version: ClassVar[int] = 1
    needs_logits: ClassVar[bool] = True
    memoryless: ClassVar[bool] = False
    precise: ClassVar[bool] = True  # the last queries are close to the boundary
    trials: ClassVar[int] = 1

    inner: Attack

    def __post_init__(self) -> None:
        """Check the inner attack."""
        check_parameters(self)
        if not hasattr(self.inner, "kind"):
            raise SuiteError(f"Nearest: inner: {self.inner!r} given; allowed: an attack, such as FAB()")

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Those of the inner attack."""
        return self.inner.norms

    @property
    def needs_grad(self) -> bool:
        """Whether the inner attack does."""
        return self.inner.needs_grad

    @property
    def can_target(self) -> bool:
        """Whether the inner attack can."""
        return getattr(self.inner, "can_target", True)

    @property
    def period(self) -> int:
        """Queries of a trial: those of the inner attack, and those of the search."""
        return self.inner.steps + 1 + SEARCHES

    @property
    def steps(self) -> int:
        """All trials of the inner attack."""
        return self.inner.trials * self.period

    def init(self, p: Problem, ball: Ball) -> State:
        """Start the first trial, in the whole ball."""
        lanes = torch.zeros(len(p.x), dtype=p.x.dtype, device=p.x.device)
        own = {
            "round": torch.zeros_like(p.y),
            "radius": lanes + ball.eps,
            "failed": lanes,  # the largest radius at which nothing was found
            "found": lanes.double() + torch.inf,  # distance of the nearest misclassified point
            **bracket(p),
        }
        return own | self._begin(p, ball, own)

    def _begin(self, p: Problem, ball: Ball, s: State) -> State:
        """Start a trial of the inner attack in every lane."""
        started = self.inner.init(replace(p, trial=s["round"]), Ball(ball.norm, s["radius"]))
        return {_name(key): value for key, value in started.items()}

    def loss(self, logits: Tensor, p: Problem, s: State) -> Tensor:
        """Evaluate the inner attack's loss."""
        return self.inner.loss(logits, replace(p, trial=s["round"]), _inner_state(s))

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Keep the nearest point. Then let the inner attack step, search the segment, or begin the next trial."""
        at = t % self.period
        searching, over = at > self.inner.steps, at == self.period - 1
        s = self._keep(p, ball, s, logits, searching)
        trial, near = replace(p, trial=s["round"]), Ball(ball.norm, s["radius"])
        moved = self.inner.step(trial, near, _inner_state(s), at, logits, loss, grad)
        s = _choose(at < self.inner.steps, {_name(key): value for key, value in moved.items()}, s)
        has_break = s["found"].isfinite()
        s = _choose((at >= self.inner.steps) & ~over & has_break, {"x": between(s)}, s)
        if bool(over.any()):
            following = s | _bisect(s, float(ball.eps))
            s = _choose(over, following | self._begin(p, ball, following), s)
        return _choose((t + 1 == self.steps) & has_break, {"x": s["outer"]}, s)

    def _keep(self, p: Problem, ball: Ball, s: State, logits: Tensor, searching: Tensor) -> State:
        """Keep the queried point where it is the nearest misclassified one, or the inner end of the search."""
        clean_margin = margin(clean_logits(p), p.y)
        rounding = torch.finfo(logits.dtype).eps * logits.gather(1, p.y[:, None]).squeeze(1).abs()
        value = margin(logits, p.y) - _LEAD * clean_margin.abs() - _ROUNDINGS * rounding
        wrong = is_wrong(logits, p.y) & (value > 0)
        distance = ball.distance(p.x, s["x"])
        closer = wrong & (distance < s["found"])
        s = s | narrowed(s, searching & ~wrong, closer, value) | {"found": torch.where(closer, distance, s["found"])}
        # A point of the attack lies on another segment, which begins at the clean image.
        clean = {"inner": p.x, "f_inner": clean_margin.to(p.x.dtype)}
        return _choose(closer & ~searching, clean, s)


def _name(key: str) -> str:
    return key if key == "x" else _INNER + key


def _inner_state(s: State) -> State:
    """Return the inner attack's tensors under its own names. The point to query belongs to both."""
    return {key.removeprefix(_INNER): value for key, value in s.items() if key == "x" or key.startswith(_INNER)}


def _choose(lanes: Tensor, new: State, s: State) -> State:
    """Replace tensors of the state in these lanes, [L] bool. A tensor that the state lacks is new in all lanes."""
    return s | {k: torch.where(per_lane(lanes, v), v, s[k]) if k in s else v for k, v in new.items()}


def _bisect(s: State, largest: float) -> State:
    """Go to the next round: [L] rounds and radii."""
    found = s["found"].to(s["radius"].dtype).clamp(max=largest)
    failed = torch.where(found > s["radius"], torch.maximum(s["failed"], s["radius"]), s["failed"])
    failed = torch.where(failed < found, failed, 0)  # a break nearer than that: the trial had missed it
    return {"round": s["round"] + 1, "radius": (failed + found) / 2, "failed": failed}
