"""Runs from diversified starts, cycles towards targets that may leave the ball, and a search from the best point."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from robbench.attacks.base import check_parameters, clean_logits, may_hold
from robbench.attacks.odi import weighted
from robbench.attacks.square import Square
from robbench.core.errors import SuiteError
from robbench.core.losses import cross_entropy_scaled, dlr, margin, margin_targeted
from robbench.core.threat import Ball, per_lane
from robbench.core.types import NORMS, Norm, Problem, State

__all__ = ["Relax"]

_NOISE = 1 << 29  # step counter of the noise, away from those of the starts
_LONGER = 2  # how often a restart takes the steps of a cycle
_RIVALS = 3  # the targets that restarts take by turns
_LOOK = 4  # points of the second part after which a target may be left
_CREDIT = 2  # the runs from starts count as so many cycles when the trial asks whether to end
_AWAY = 0.3  # every second restart begins so far on the way from the best point to a random one
_CAREFUL = 0.5  # and takes steps of this share
_RUNS = 3  # runs after which an image may be given up because they agree
_SURE = 0.28  # if they leave more than this share of `patience`, added to how far apart they end
_STUCK = 0.6  # a run that leaves more than this may have met masked gradients
_APART = 0.4  # runs that end farther apart than this, too,
_CHANCES = 4  # and then no fewer cycles follow
_CLOSE = 0.15  # an image of which less is left is not given up before a search
_FIRST = 50  # squares of the first round of the search
_SQUARES = 100  # and of every further one
_CLIMB = 10  # steps along the gradient after the squares of a round
_FALL = 0.95  # the search ends if a round leaves more than this share of what was left
_NEARLY = 0.02  # but not before so many queries where less is left
_QUERIES = 300
_SCHEDULE = 5000  # steps over which the squares shrink as in `Square`, or longer if the search is
_SHARE = 0.15  # share of the pixels in the first squares


Parts = tuple[Tensor, Tensor, Tensor]
"""How many steps a cycle has taken after each of its parts, [L] each."""


def _anneal(share: Tensor) -> Tensor:
    """Return the size of a step after this share of them, along half a cosine from 2 to 0."""
    return (share.clamp(0, 1) * math.pi).cos() + 1


def _place(taken: Tensor) -> Tensor:
    """Return the place in the round of the search: below 0 among the squares, then the steps taken since: [L]."""
    first, further = _FIRST + _CLIMB + 1, _SQUARES + _CLIMB + 1
    return torch.where(taken < first, taken - _FIRST, (taken - first) % further - _SQUARES)


@dataclass(frozen=True, kw_only=True)
class Relax:
    """One trial of many short parts. What each of them leaves of the clean margin decides whether another follows.

    1. A run of `probe` steps climbs the rescaled cross-entropy.
    2. `starts` runs of `run` steps climb the ratio of logits (DLR; Croce & Hein 2020, Eq. 6), each from an
       output-diversified start (Tashiro et al. 2020, Eq. 2).
    3. One cycle climbs the margin of each of the `targets` classes, that which any point came closest to first. A cycle
       has three parts. Points of the first part may lie outside the ball: in a ball whose radius shrinks from
       1 + `widen` times ε to ε. Such a point breaks nothing. Where the model errs on one, its projection is the next
       query, and the second part begins. Points of the second part lie in the ball. The third part begins halfway
       between the best point of the cycle and a random point of the ball.
    4. Up to `restarts` cycles, twice as long, climb by turns the margins of the three classes that came closest. Every
       second one begins near the best point of all, and takes half as large steps.
    5. A search of up to `search` queries goes on from the best point, in rounds. A round changes random squares, as
       `Square` does: 50 in the first round, 100 in the others. Then ten steps climb the margin from the best point.
       After each round the search goes on only if the margin has shrunk by 5 % in it. Where less than 0.02 of the clean
       margin is left, it goes on for 300 queries in any case.

    The cycles follow the idea of Pan et al. 2025 ("Constraint relaxation attack", AAAI). The rules are different. What
    is left of an image or a target is its best margin so far, as a share of the margin of the clean image. So no rule
    depends on the scale of the logits:

    - The image is given up k cycles after the starts if more than `patience` / (k + 2) is left. So the images that
      came closest get the most cycles. If less than 0.15 is left, the search comes before the end: on some networks
      gradients alone lead nowhere, and squares and gradients by turns break what is left.
    - It ends after three or more runs if all of them agree: each took more than 0.4 of the margin, and the best left
      more than 0.28 of `patience` (a fifth), added to how much more the worst left.
    - Where gradients are masked, one run leaves nine tenths of the margin and the next one none. So an image gets
      `least` cycles if a run left 0.6 or more, and four if two runs ended more than 0.4 apart.
    - A cycle ends after four points of its second part, or after the whole part, if its target is behind: more is left
      of the target than `hopeless`, and than `lag` times what is left of the image.

    Attributes:
        probe: steps of the first run.
        starts: number of runs from output-diversified starts.
        run: steps of each of them. The first step goes towards a random weighting of the logits.
        targets: number of target classes.
        restarts: most cycles after those of the targets.
        search: most queries of the search; 0 for none.
        outside: steps of the first part of a cycle.
        inside: steps of the second part.
        again: steps of the third part.
        widen: how far points of the first part may leave the ball, as a share of ε.
        patience: twice the share of the clean margin that may be left after the starts.
        least: cycles before an image is given up of which a run left 0.6 of the clean margin or more.
        lag: how many times what is left of the image may be left of a target.
        hopeless: what may be left of a target in any case.
    """

    kind: ClassVar[str] = "relax"
    version: ClassVar[int] = 7
    memoryless: ClassVar[bool] = False
    norms: ClassVar[tuple[Norm, ...]] = NORMS
    needs_grad: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    trials: ClassVar[int] = 1

    probe: int = 12
    starts: int = 4
    run: int = 8
    targets: int = 9
    restarts: int = 10
    search: int = 2000
    outside: int = 3
    inside: int = 9
    again: int = 4
    widen: float = 0.5
    patience: float = 0.75
    least: int = 2
    lag: float = 2.5
    hopeless: float = 0.2

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        check_parameters(self)
        for name, least in (("probe", 1), ("run", 2), ("targets", 1), ("outside", 1), ("inside", 1), ("again", 1)):
            if getattr(self, name) < least:
                raise SuiteError(f"{name} {getattr(self, name)} given; allowed: at least {least}")
        for name in ("starts", "restarts", "search", "widen", "least"):
            if getattr(self, name) < 0:
                raise SuiteError(f"{name} {getattr(self, name)} given; allowed: at least 0")
        for name in ("patience", "hopeless"):
            if getattr(self, name) <= 0:
                raise SuiteError(f"{name} {getattr(self, name)} given; it must be above 0")
        if self.lag < 1:
            raise SuiteError(f"lag {self.lag} given; allowed: at least 1")

    @property
    def cycle(self) -> int:
        """The steps of a cycle."""
        return self.outside + self.inside + self.again

    @property
    def steps(self) -> int:
        """The steps of all parts, and one step between each and the next."""
        cycles = self.targets * (self.cycle + 1) + self.restarts * (_LONGER * self.cycle + 1)
        return self.probe + self.starts * (self.run + 1) + cycles + self.search

    def init(self, p: Problem, ball: Ball) -> State:
        """Begin the first run."""
        count, lanes = torch.zeros_like(p.y), torch.zeros_like(p.x.flatten(1)[:, 0])
        classes = torch.full_like(clean_logits(p), -torch.inf)
        return {
            "x": ball.random(p),
            "at": count,  # 0 for the first run, then the number of the run or cycle; the search is the last
            "taken": count.clone(),  # steps of it
            "came": classes,  # best margin of each class at any point in the ball
            "tried": torch.zeros_like(classes, dtype=torch.bool),  # classes that were targets
            "target": count.clone(),
            "near": lanes - torch.inf,  # best margin of this run or cycle, in a cycle towards its target
            "top": p.x.clone(),  # its point
            "peak": p.x.clone(),  # the point in the ball where any class came closest
            "worst": lanes.clone(),  # largest share of the clean margin that a run left
            "was": lanes.clone(),  # share of the clean margin that was left when the search was last looked at
            "done": torch.zeros_like(p.y, dtype=torch.bool),
        }

    def loss(self, logits: Tensor, p: Problem, s: State) -> Tensor:
        """Evaluate what the run climbs: cross-entropy, a random weighting, the ratio, or the margin of the target."""
        at = s["at"]
        climbed = torch.where(at == 0, cross_entropy_scaled(logits, p.y), margin_targeted(logits, p.y, s["target"]))
        started = (at > 0) & (at <= self.starts)
        if may_hold(started):  # the rest takes time
            # Divided by a power of two, which rounds nothing, so that the 1e-12 in the ratio is small at any scale.
            spread = (logits.amax(1) - logits.amin(1)).detach()
            free = dlr(logits / torch.ldexp(torch.ones_like(spread), torch.frexp(spread).exponent)[:, None], p.y)
            aimless = started & (s["taken"] == 0)
            if may_hold(aimless):
                free = torch.where(aimless, weighted(logits, p, at), free)
            climbed = torch.where(started, free, climbed)
        searching = self._searching(s)
        return torch.where(searching, margin(logits, p.y), climbed) if may_hold(searching) else climbed

    def wants_gradient(self, s: State) -> Tensor:
        """Tell where the next step climbs: not after the last step of a run, from a new point, or among squares."""
        at, taken, (_, turn, cycle) = s["at"], s["taken"], self._parts(s)
        stays = torch.where(at <= self.starts, taken == self._length(at), (taken == turn) | (taken == cycle))
        since = _place(taken)
        return torch.where(self._searching(s), (since >= 0) & (since < _CLIMB), ~stays)

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Take a step, begin the next run, cycle or search, or end the trial."""
        at, taken, lead = s["at"], s["taken"], margin(clean_logits(p), p.y)
        gaps = (logits - logits.gather(1, p.y[:, None])).scatter(1, p.y[:, None], -torch.inf)
        gap = gaps.amax(1)
        parts, searching = self._parts(s), self._searching(s)
        outside = parts[0]
        inside = (at <= self.starts) | (taken >= outside) | searching
        best = s["came"].amax(1)
        higher = inside & (gap > best)
        mine = torch.where(at <= self.starts, gap, loss)
        better = inside & (mine > s["near"])
        now = s | {
            "came": torch.where(inside[:, None], torch.fmax(s["came"], gaps), s["came"]),  # a NaN counts for nothing
            "peak": torch.where(per_lane(higher, grad), s["x"], s["peak"]),
            "near": torch.where(better, mine, s["near"]),
            "top": torch.where(per_lane(better, grad), s["x"], s["top"]),
        }
        left = torch.where(higher, gap, best) / lead  # both are negative
        over = self._is_over(now, parts, lead, left)
        ran = over & (at <= self.starts)
        now["worst"] = torch.where(ran, torch.maximum(s["worst"], now["near"] / lead), s["worst"])
        given_up = over & ~searching & self._gives_up(now, left)
        saved = given_up & (left < _CLOSE) & (self.search > 0)
        done = s["done"] | (given_up & ~saved) | (over & searching)
        jump = over & ~done
        target, tried = self._choose(now, jump) if may_hold(jump) else (s["target"], s["tried"])

        x = self._move(p, ball, now, parts, grad)
        caught = ~inside & (gap > 0)  # the model errs on a point outside the ball
        if may_hold(caught):
            x = torch.where(per_lane(caught, grad), ball.project(p.x, s["x"]), x)
        if may_hold(jump):
            x = torch.where(per_lane(jump, grad), self._begin(p, ball, now), x)
        after = now | {
            "at": torch.where(saved, self._last(s), at + jump.long()),
            "taken": torch.where(jump, 0, torch.where(caught, outside, taken + 1)),
        }
        seeking = self._searching(after) & ~done
        if self.search and may_hold(seeking):
            x = torch.where(per_lane(seeking, grad), self._seek(p, ball, after, grad), x)
        looked = searching & (_place(taken) == _CLIMB)
        return after | {
            "x": torch.where(per_lane(done, grad), now["peak"], x),  # so that a judge of final points sees it
            "tried": tried,
            "target": target,
            "near": now["near"].masked_fill(jump, -torch.inf),
            "was": torch.where(looked | jump, left, s["was"]),
            "done": done,
        }

    def _length(self, at: Tensor) -> Tensor:
        """Return the steps of the run of this number: [L]."""
        return torch.where(at == 0, self.probe, self.run)

    def _number(self, s: State) -> int:
        """Return how many targets there are."""
        return min(self.targets, s["came"].shape[1] - 1)

    def _restart(self, s: State, at: Tensor) -> Tensor:
        """Return the number of the restart, from 1 on; below that for all that comes before: [L]."""
        return at - self.starts - self._number(s)

    def _last(self, s: State) -> int:
        """Return the number of the search."""
        return self.starts + self._number(s) + self.restarts + 1

    def _searching(self, s: State) -> Tensor:
        return s["at"] == self._last(s)

    def _parts(self, s: State) -> Parts:
        longer = torch.where(self._restart(s, s["at"]) > 0, _LONGER, 1)
        return longer * self.outside, longer * (self.outside + self.inside), longer * self.cycle

    def _is_over(self, s: State, parts: Parts, lead: Tensor, left: Tensor) -> Tensor:
        """Tell where the last step of this run, cycle or search is taken: [L] bool."""
        at, taken, (outside, turn, cycle) = s["at"], s["taken"], parts
        look = (taken == turn) | (taken == outside + _LOOK - 1)
        behind = look & (s["near"] / lead > (self.lag * left).clamp(min=self.hopeless))
        over = torch.where(at <= self.starts, taken == self._length(at), behind | (taken == cycle))
        nearly = (left < _NEARLY) & (taken < _QUERIES)
        stuck = (_place(taken) == _CLIMB) & ~(left < _FALL * s["was"]) & ~nearly
        return torch.where(self._searching(s), stuck | (taken + 1 >= self.search), over)

    def _gives_up(self, s: State, left: Tensor) -> Tensor:
        """Tell where the image is given up after this run or cycle, with this share of the margin left: [L] bool."""
        at, worst, apart = s["at"], s["worst"], s["worst"] - left
        ended = (self._restart(s, at) >= self.restarts) & (self.search == 0)
        # Up to the last run, no point but theirs has been judged, so what is left is what the best of them left.
        agree = (at >= _RUNS - 1) & (at <= self.starts) & (worst < _STUCK) & (left > _SURE * self.patience + apart)
        cycles = at - self.starts
        least = torch.where(worst < _STUCK, 0, self.least)
        least = torch.where(apart > _APART, least.clamp(min=_CHANCES), least)
        return agree | ((cycles >= least) & (left * (cycles + _CREDIT) > self.patience)) | ended

    def _choose(self, s: State, jump: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the target of the next cycle, and note it as tried: [L] and [L, K]."""
        fresh = s["came"].masked_fill(s["tried"], -torch.inf).argmax(1)
        closest = s["came"].argsort(dim=1, descending=True, stable=True)
        again = self._restart(s, s["at"] + 1)
        turns = (again - 1).clamp(min=0) % min(_RIVALS, self._number(s))
        target = torch.where(again > 0, closest.gather(1, turns[:, None]).squeeze(1), fresh)
        chosen = jump & (s["at"] >= self.starts)
        target = torch.where(chosen, target, s["target"])
        mine = torch.arange(s["came"].shape[1], device=target.device) == target[:, None]
        return target, s["tried"] | (mine & chosen[:, None])

    def _careful(self, s: State, at: Tensor) -> Tensor:
        """Tell where restart number `at` begins near the best point: [L] bool."""
        number = self._restart(s, at)
        return (number > 0) & (number % 2 == 0)

    def _begin(self, p: Problem, ball: Ball, s: State) -> Tensor:
        """Return where the next run or cycle begins: at a random point of the ball, or near the best one."""
        at = s["at"] + 1
        x = ball.random(p, step=at)
        return torch.where(per_lane(self._careful(s, at), x), s["peak"] + _AWAY * (x - s["peak"]), x)

    def _seek(self, p: Problem, ball: Ball, s: State, grad: Tensor) -> Tensor:
        """Return the next query of the search: the best point with another square, or a step along the gradient."""
        since, draws = _place(s["taken"]), replace(p, trial=p.trial + 1)
        square = Square(steps=max(_SCHEDULE, self.search + 1), p_init=_SHARE)
        size = _CAREFUL * _anneal(((since - 1) / _CLIMB).to(grad.dtype))
        climbed = ball.project(p.x, s["x"] + ball.climb(s["x"], grad, per_lane(size * ball.eps, grad)))
        x = torch.where(per_lane(since > 0, grad), climbed, s["peak"])
        return torch.where(per_lane(since < 0, grad), square.propose(draws, ball, s["peak"], s["taken"]), x)

    def _move(self, p: Problem, ball: Ball, s: State, parts: Parts, grad: Tensor) -> Tensor:
        """Follow the gradient by steps whose size falls along half a cosine, in the ball of this step."""
        at, taken, (first, turn, cycle) = s["at"], s["taken"], parts
        free = at <= self.starts
        third = ~free & (taken >= turn)
        share = torch.where(third, (taken - turn) / (cycle - turn), taken / turn)
        share = torch.where(free, (taken - 1) / (self.run - 1), share)
        share = torch.where(at == 0, taken / self.probe, share).to(grad.dtype)
        size = _anneal(share)
        size = torch.where(third | self._careful(s, at), _CAREFUL * size, size)
        size = torch.where(free & (at > 0) & (taken == 0), 1.0, size) * ball.eps
        x = s["x"]
        begins = third & (taken == turn)
        if may_hold(begins):  # the draw takes time
            halfway = (s["top"] + ball.random(p, step=at + _NOISE)) / 2
            x = torch.where(per_lane(begins, grad), halfway, x)  # the gradient is that of another point
        x = x + ball.climb(x, grad, per_lane(size.masked_fill(begins, 0), grad))
        # The wider ball is the ball, stretched around the image and cut at the box.
        outside = self.widen * (1 - (taken + 1).to(grad.dtype) / first).clamp(min=0)
        wide = per_lane(torch.where(free, 0.0, outside) + 1, grad)
        stretched = (p.x + wide * (ball.project(p.x, p.x + (x - p.x) / wide) - p.x)).clamp(0, 1)
        return torch.where(wide > 1, stretched, ball.project(p.x, x))
