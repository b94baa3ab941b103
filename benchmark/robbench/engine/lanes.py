"""The lanes of one batch: each at its own sample, trial and step, and refilled as soon as its trial is over.

Every round queries all lanes, judges every answer (prediction, ball, box, finiteness), counts what each trial cost,
and has the attack step from the answers. Attacks propose; nothing they claim is believed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robbench.attacks.base import Attack, Searching
from robbench.classifier.batch_width import Widths
from robbench.core.errors import ModelError
from robbench.core.threat import Ball
from robbench.core.types import Judge, Problem, State
from robbench.engine.lookahead import MOST, leap, rows
from robbench.engine.query import blame, query
from robbench.engine.threads import Crew
from robbench.engine.trials import Ledger, Trial

__all__ = ["Lanes", "Order"]


@dataclass(frozen=True, eq=False)
class Order:
    """What the lanes are to do: arguments of `engine.attack_samples`, and some things more.

    Attributes:
        device: the model's.
        cycles: whether going in circles ends a trial.
        logits: the model's answers to the clean images [N, K], where the attack wants them.
    """

    attack: Attack
    x: Tensor
    y: Tensor
    sample: NDArray[np.int64]
    ball: Ball
    key: tuple[int, int]
    judge: Judge
    widths: Widths
    draws: int
    keep: bool
    device: torch.device
    cycles: bool
    logits: Tensor | None = None


Finish = Callable[[Sequence[tuple[int, list[Trial]]]], None]
"""Is told the positions of samples that are done, and the trials of each that count."""


def _read(logits: Tensor, y: Tensor) -> list[Tensor]:
    """Read answers [L, K]: the classes, whether they are wrong (NaN and infinity never are), whether all is finite."""
    finite, prediction = logits.isfinite().all(1), logits.argmax(1)
    return [prediction, finite & (prediction != y), finite]


def _fetch(told: list[Tensor]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Bring classes [L], and m answers of yes or no [m, L], to the CPU at once: each time, a GPU waits."""
    values = torch.stack([t.long() for t in told]).cpu().numpy()
    return values[0], values[1:] == 1


def _steepest(grad: Tensor) -> Tensor:
    """Find the largest slope along any pixel, NaN where there is one: [L, C, H, W] -> [L]."""
    return grad.abs().amax(tuple(range(1, grad.dim())))


class Lanes:
    """A batch: device tensors for the attack, numpy arrays for the bookkeeping."""

    def __init__(self, order: Order, crew: Crew, ledger: Ledger, finish: Finish) -> None:
        self.order, self.crew, self.ledger, self.finish = order, crew, ledger, finish
        self.width = width = order.widths.lanes
        lane = np.zeros(width, np.int64)
        self.live = np.zeros(width, bool)
        self.fresh = np.zeros(width, bool)  # whose trial has not begun
        self.closing = np.zeros(width, bool)  # whose trial said that it is done
        self.position, self.trial, self.t = lane.copy(), lane.copy(), lane.copy()
        self.forwards, self.backwards = lane.copy(), lane.copy()
        self.zero_gradients, self.nonfinite = lane.copy(), lane.copy()
        device = order.device
        self.coarse = order.widths.coarse and not getattr(order.attack, "precise", False)
        # What answers at random is asked step by step.
        self.search = order.attack if order.draws == 1 and isinstance(order.attack, Searching) else None
        self.p = Problem(
            # Padding lanes hold a finite image; what they answer is never looked at.
            x=torch.zeros((width, *order.x.shape[1:]), dtype=order.x.dtype, device=device),
            y=torch.zeros(width, dtype=torch.int64, device=device),
            sample=torch.zeros(width, dtype=torch.int64, device=device),
            trial=torch.zeros(width, dtype=torch.int64, device=device),
            key=order.key,
            logits=None if order.logits is None else order.logits.new_zeros((width, order.logits.shape[1])),
        )
        self.state: State = {}
        self.before = torch.full_like(self.p.x, torch.nan)  # the point before the last, where cycles are looked for

    def loop(self) -> None:
        """Refill, query, judge, step, until there is nothing more to do for any crew."""
        while not self.ledger.closed:
            self.give_up()
            self.fill()
            if self.live.any():
                self.round()
            elif not self.ledger.rest():
                return

    def give_up(self) -> None:
        """Let go of trials that no longer count, because an earlier one has broken the sample meanwhile."""
        if self.ledger.trials == 1:
            return
        late = self.live & (self.trial > self.ledger.winner[self.position])
        if late.any():
            self.ledger.drop(int(late.sum()))
            self.live[late] = self.fresh[late] = False

    def fill(self) -> None:
        """Take what the ledger hands out, on as many lanes as that needs, and start what is new."""
        live, widths = int(self.live.sum()), self.order.widths
        share = min(-(-self.ledger.wanted() // self.crew.crews), widths.lanes)
        taken = self.ledger.take(share - live)
        busy = live + len(taken)
        if busy:
            self.resize(widths.fit(busy))
        if taken:
            free = np.flatnonzero(~self.live)[: len(taken)]
            self.position[free], self.trial[free] = zip(*taken, strict=True)
            self.live[free] = self.fresh[free] = True
        if self.fresh.any():
            self.begin(np.flatnonzero(self.fresh))
            self.fresh[:] = False

    def begin(self, lanes: NDArray[np.int64]) -> None:
        """Start the trials that these lanes were given."""
        order, device = self.order, self.order.device
        for counter in (self.t, self.forwards, self.backwards, self.zero_gradients, self.nonfinite):
            counter[lanes] = 0
        self.closing[lanes] = False
        self.forwards[lanes] += (order.logits is not None) & (self.trial[lanes] == 0)
        at, position = torch.from_numpy(lanes).to(device), torch.from_numpy(self.position[lanes])
        new = Problem(
            x=order.x[position].to(device),
            y=order.y[position].to(device),
            sample=torch.from_numpy(order.sample[self.position[lanes]]).to(device),
            trial=torch.from_numpy(self.trial[lanes]).to(device),
            key=order.key,
            logits=None if order.logits is None else order.logits[position.to(device)],
        )
        started = order.attack.init(new, order.ball)
        if not self.state:
            self.state = {k: v.new_zeros((self.width, *v.shape[1:])) for k, v in started.items()}
        for name in ("x", "y", "sample", "trial"):
            getattr(self.p, name).index_copy_(0, at, getattr(new, name))
        if self.p.logits is not None and new.logits is not None:
            self.p.logits.index_copy_(0, at, new.logits)
        self.state = {k: v.index_copy(0, at, started[k]) if k in started else v for k, v in self.state.items()}
        if order.cycles:
            self.before = self.before.index_fill(0, at, torch.nan)

    def round(self) -> None:
        """Query all lanes once, and end the trials that are over."""
        begin = time.perf_counter()
        order, attack = self.order, self.order.attack
        leapt = None if self.search is None else self.leap(self.search)  # which moves `t` on
        last = self.closing | (self.t == attack.steps)
        more = self.live & ~last
        with_grad = attack.needs_grad and bool(more.any())
        logits, loss, grad = leapt or self.ask(self.p, self.state, np.flatnonzero(self.live), with_grad)
        x = self.state["x"]
        seen = _read(logits, self.p.y)
        if with_grad:
            steepest = _steepest(grad)
            seen += [steepest == 0, steepest.isfinite()]
        predicted, answers = _fetch(seen)
        if with_grad and not answers[3].all():  # a broken gradient must not carry NaN into the next point
            grad = grad.nan_to_num(0.0, 0.0, 0.0)
            answers[2] = (_steepest(grad) == 0).cpu().numpy()

        coarse = with_grad and self.coarse
        judged = self.live & (last | (order.judge == "any")) & (answers[0] | (last & coarse))
        inside, distance = judged.copy(), np.full(len(x), np.nan)
        if judged.any():  # the geometry is checked where it matters: at every claimed break
            hit = torch.from_numpy(np.flatnonzero(judged)).to(order.device)
            inside[judged] = order.ball.contains(self.p.x[hit], x[hit]).cpu().numpy()
            distance[judged] = order.ball.distance(self.p.x[hit], x[hit]).cpu().numpy()
        if coarse and (doubted := judged & (inside | last)).any():  # the attack, too, is told what is so
            at, *told = self.ask_again(doubted, predicted, answers)
            logits, loss = (a.index_copy(0, at, b) for a, b in zip((logits, loss), told, strict=True))
            self.forwards += doubted & ~last  # a last point had no need of bfloat16; its batch had
        success = inside & answers[0]
        if order.draws > 1 and success.any():
            success = self.outvoted(x, answers[0], success)
        self.forwards += self.live
        self.nonfinite += self.live & ~answers[1]
        if with_grad:
            self.backwards += more
            # Where the point is a break already, the gradient is not needed any more.
            self.zero_gradients += more & answers[2] & ~success

        ended = self.live & (success | last)
        if (self.live & ~ended).any():
            t = torch.tensor(self.t, device=order.device)  # a copy, which the attack may keep
            self.state = attack.step(self.p, order.ball, self.state, t, logits, loss, grad)
            if "done" in self.state:
                self.closing = self.state["done"].cpu().numpy()
            if order.cycles:
                back = self.live & self.cycled(x)
                if self.coarse:  # not judged yet: a last query judges the point that it goes back to
                    self.closing |= back
                else:
                    ended |= back
        spent = (time.perf_counter() - begin) / self.live.sum() / self.crew.crews
        np.add.at(self.ledger.seconds, self.position[self.live], spent)
        if ended.any():
            self.end(np.flatnonzero(ended), success, predicted, distance, x)
        self.t += 1

    def ask(self, p: Problem, s: State, live: NDArray[np.int64], with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Query the model (`queries.query`); its errors name the samples of the rows that are live."""
        x, model, coarse = s["x"], self.crew.model, with_grad and self.coarse
        try:
            logits, loss, grad = query(model, self.order.attack, p, s, with_grad, coarse)
        except ModelError as error:
            raise ModelError(f"{error} {blame(model, p, x, live, with_grad, coarse)}") from error
        if logits.dim() != 2 or len(logits) != len(x):
            raise ModelError(f"The model answered {tuple(logits.shape)} to {tuple(x.shape)}; expected [N, classes].")
        return logits, loss, grad

    def leap(self, attack: Searching) -> tuple[Tensor, Tensor, Tensor]:
        """Query several steps of each search at once, and go to where it stops (`leaps`)."""
        order, lanes = self.order, np.flatnonzero(self.live)
        at = torch.from_numpy(lanes).to(order.device)
        width = order.widths.fit(min(MOST * len(lanes), order.widths.lanes))
        t = torch.from_numpy(self.t[lanes]).to(order.device)

        def ask(p: Problem, s: State) -> tuple[Tensor, Tensor]:
            return self.ask(p, s, np.arange(width), with_grad=False)[:2]

        p, s = rows(self.p, self.state, at)
        gone = leap(ask, attack, p, s, order.ball, t, width=width, judge=order.judge)
        self.state["x"] = self.state["x"].index_copy(0, at, gone.x)
        passed, nonfinite = torch.stack([gone.steps, gone.nonfinite]).cpu().numpy()
        self.t[lanes] += passed
        self.forwards[lanes] += passed
        self.nonfinite[lanes] += nonfinite
        logits, loss = (
            answer.new_zeros((self.width, *answer.shape[1:])).index_copy(0, at, answer)
            for answer in (gone.logits, gone.loss)
        )
        return logits, loss, torch.zeros_like(self.state["x"])

    def end(
        self,
        lanes: NDArray[np.int64],
        success: NDArray[np.bool_],
        prediction: NDArray[np.int64],
        distance: NDArray[np.float64],
        x: Tensor,
    ) -> None:
        """File trials that are over, and give their lanes the next one of the same sample."""
        columns = (
            success, prediction, self.t, self.forwards, self.backwards, np.where(success, distance, np.nan),
            self.zero_gradients, self.nonfinite,
        )  # fmt: skip
        values = zip(*(column[lanes].tolist() for column in columns), strict=True)
        done = []
        for lane, row in zip(lanes.tolist(), values, strict=True):
            position = int(self.position[lane])
            x_adv = x[lane].detach().cpu() if self.order.keep and row[0] else None
            if trials := self.ledger.file(position, int(self.trial[lane]), Trial._make((*row, x_adv))):
                done.append((position, trials))
            if (trial := self.ledger.go_on(position)) is None:
                self.live[lane] = False
            else:
                self.trial[lane], self.fresh[lane] = trial, True
        if done:
            self.finish(done)

    def ask_again(
        self, doubted: NDArray[np.bool_], predicted: NDArray[np.int64], answers: NDArray[np.bool_]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where a verdict hangs on what was said in bfloat16, put what the images' own precision says in its place.

        Args:
            doubted: which lanes.
            predicted: the class of each lane.
            answers: whether it is wrong, whether its logits are finite, and more that stays.

        Returns:
            The lanes [n], their logits [n, K], and the attack's loss there [n].
        """
        lanes = np.flatnonzero(doubted)
        n = len(lanes)
        at = torch.from_numpy(np.resize(lanes, self.order.widths.fit(n))).to(self.order.device)
        p, s = rows(self.p, self.state, at)
        logits, loss = (answer[:n] for answer in self.ask(p, s, np.arange(n), with_grad=False)[:2])
        predicted[lanes], answers[:2, lanes] = _fetch(_read(logits, p.y[:n]))
        return at[:n], logits, loss

    def outvoted(self, x: Tensor, wrong: NDArray[np.bool_], claims: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Tell which claimed breaks hold in more than half of `draws` answers, the first of which was `wrong`."""
        order, votes = self.order, torch.from_numpy(wrong).to(x.device).long()
        for _ in range(order.draws - 1):
            with torch.no_grad():
                logits = self.crew.model(x)
            votes = votes + _read(logits, self.p.y)[1]
        self.forwards += claims * (order.draws - 1)
        held: NDArray[np.bool_] = claims & (2 * votes > order.draws).cpu().numpy()
        return held

    def cycled(self, x: Tensor) -> NDArray[np.bool_]:
        """Tell which lanes step from x back to x or to the point before it."""
        new, before = self.state["x"], self.before
        self.before = x
        back = (new == x).flatten(1).all(1) | (new == before).flatten(1).all(1)
        cycled: NDArray[np.bool_] = back.cpu().numpy()
        return cycled

    def resize(self, width: int) -> None:
        """Go on with so many lanes: those that are live, and as many idle ones as it takes."""
        if width == self.width:
            return
        live = np.flatnonzero(self.live)
        keep = np.concatenate([live, np.flatnonzero(~self.live)])[:width]
        keep = np.concatenate([keep, np.zeros(width - len(keep), np.int64)])  # copies of a lane, which stay idle
        at = torch.from_numpy(keep).to(self.order.device)
        self.p, self.state = rows(self.p, self.state, at)
        self.before = self.before[at]
        for name in (
            "fresh", "closing", "position", "trial", "t", "forwards", "backwards", "zero_gradients", "nonfinite",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name)[keep])
        self.live = np.arange(width) < len(live)
        self.fresh &= self.live
        self.width = width
