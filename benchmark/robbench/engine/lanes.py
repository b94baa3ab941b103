"""The lanes of one batch: each at its own sample, trial and step. A lane gets the next trial when its trial ends.

Every round queries all lanes, has the judge decide (`judge`), counts what each trial cost, and lets the attack step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robbench.attacks.base import Searching, Sparing
from robbench.classifier.guard import list_flags
from robbench.core.errors import ModelError
from robbench.core.types import Problem, State
from robbench.engine.job import AttackJob
from robbench.engine.judge import Verdict, judge_points, read_answers
from robbench.engine.lookahead import MAX_QUERIES, look_ahead
from robbench.engine.query import name_failing_samples, query, take_lanes
from robbench.engine.targeted import as_attacked, two_classes
from robbench.engine.trials import Trial, TrialQueue

__all__ = ["Finished", "Lanes"]


class Finished(NamedTuple):
    """A sample whose attack is over: its position, its trials up to the one that counts, its share of the time."""

    position: int
    trials: list[Trial]
    seconds: float


_NONFINITE_GRADIENTS = (
    "The gradient of the loss holds NaN or infinity at some attacked images, though the logits are finite. Such "
    "entries are taken as 0, so attacks by gradients look weaker than they are. A gradient without any other entry "
    "counts as zero. Look for a square root, a norm, a logarithm or a division at 0 in the model."
)


def _max_slope(grad: Tensor) -> Tensor:
    """Find the largest slope along any pixel; NaN where the gradient has a NaN: [L, C, H, W] -> [L]."""
    return grad.abs().amax(tuple(range(1, grad.dim())))


class Lanes:
    """A batch. Tensors on the device belong to the attack, numpy arrays to the bookkeeping.

    Args:
        job: what to do.
        queue: which trials to run.
        finish: receives the samples whose attack is over.
    """

    def __init__(self, job: AttackJob, queue: TrialQueue, finish: Callable[[Sequence[Finished]], None]) -> None:
        self.job, self.queue, self.finish = job, queue, finish
        self.width = width = job.widths.lanes
        lane = np.zeros(width, np.int64)
        self.live = np.zeros(width, bool)  # holds a trial
        self.new = np.zeros(width, bool)  # holds a trial that has not begun
        self.closing = np.zeros(width, bool)  # the attack has ended the trial
        self.position, self.trial, self.t = lane.copy(), lane.copy(), lane.copy()
        self.forwards, self.backwards = lane.copy(), lane.copy()
        self.zero_gradients, self.nonfinite = lane.copy(), lane.copy()
        self.seconds = np.zeros(len(job.y))  # each sample's share of the time so far, by position
        device = job.device
        # A randomized model is asked step by step.
        self.search = job.attack if job.draws == 1 and isinstance(job.attack, Searching) else None
        self.sparing = job.attack if job.draws == 1 and isinstance(job.attack, Sparing) else None
        self.p = Problem(
            # Idle lanes hold a finite image. Nothing looks at their answers.
            x=torch.zeros((width, *job.x.shape[1:]), dtype=job.x.dtype, device=device),
            y=torch.zeros(width, dtype=torch.int64, device=device),
            sample=torch.zeros(width, dtype=torch.int64, device=device),
            trial=torch.zeros(width, dtype=torch.int64, device=device),
            key=job.key,
            logits=None if job.logits is None else job.logits.new_zeros((width, job.logits.shape[1])),
            target=None if job.target is None else torch.zeros(width, dtype=torch.int64, device=device),
        )
        self.state: State = {}
        self.before = torch.full_like(self.p.x, torch.nan)  # the point before the last, to find cycles

    def run(self) -> None:
        """Work until the queue is empty and all trials have ended."""
        while True:
            self.release_lost_trials()
            self.fill()
            if not self.live.any():
                return
            self.run_round()

    def release_lost_trials(self) -> None:
        """Stop trials that no longer count, because an earlier trial has broken the sample."""
        if self.queue.trials > 1:
            lost = self.live & (self.trial > self.queue.winner[self.position])
            self.live[lost] = self.new[lost] = False

    def fill(self) -> None:
        """Take trials from the queue, fit the width to the number of live lanes, and begin the new trials."""
        live, widths = int(self.live.sum()), self.job.widths
        taken = self.queue.take(widths.lanes - live)
        if live + len(taken):
            self.resize(widths.fit(live + len(taken)))
        if taken:
            free = np.flatnonzero(~self.live)[: len(taken)]
            self.position[free], self.trial[free] = zip(*taken, strict=True)
            self.live[free] = self.new[free] = True
        if self.new.any():
            self.begin(np.flatnonzero(self.new))
            self.new[:] = False

    def begin(self, lanes: NDArray[np.int64]) -> None:
        """Begin the trials that these lanes hold."""
        job, device = self.job, self.job.device
        for counter in (self.t, self.forwards, self.backwards, self.zero_gradients, self.nonfinite):
            counter[lanes] = 0
        self.closing[lanes] = False
        # The first trial of a sample pays for the clean logits.
        self.forwards[lanes] += (job.logits is not None) & (self.trial[lanes] == 0)
        at, position = torch.from_numpy(lanes).to(device), torch.from_numpy(self.position[lanes])
        new = Problem(
            x=job.x[position].to(device),
            y=job.y[position].to(device),
            sample=torch.from_numpy(job.sample[self.position[lanes]]).to(device),
            trial=torch.from_numpy(self.trial[lanes]).to(device),
            key=job.key,
            logits=None if job.logits is None else job.logits[position.to(device)],
            target=None if job.target is None else job.target[position].to(device),
        )
        started = job.attack.init(as_attacked(new), job.ball)
        if not self.state:
            self.state = {k: v.new_zeros((self.width, *v.shape[1:])) for k, v in started.items()}
        for name in ("x", "y", "sample", "trial"):
            getattr(self.p, name).index_copy_(0, at, getattr(new, name))
        for held, begun in ((self.p.logits, new.logits), (self.p.target, new.target)):
            if held is not None and begun is not None:
                held.index_copy_(0, at, begun)
        self.state = {k: v.index_copy(0, at, started[k]) if k in started else v for k, v in self.state.items()}
        if job.ends_cycles:
            self.before = self.before.index_fill(0, at, torch.nan)

    def run_round(self) -> None:
        """Query all lanes once, have the judge decide, let the attack step, and end the trials that are over."""
        begin = time.perf_counter()
        job, attack = self.job, self.job.attack
        found = None if self.search is None else self.query_ahead(self.search)  # moves `t` on
        last = self.closing | (self.t == attack.steps)
        more = self.live & ~last
        if self.sparing is not None:
            more = more & self.sparing.wants_gradient(self.state).cpu().numpy()
        with_grad = attack.needs_grad and bool(more.any())
        asked = self.round(self.p, self.state)
        if self.sparing is not None and with_grad:
            found = self.ask_in_two(asked, more)
        logits, loss, grad = found or self.ask(self.p, asked, np.flatnonzero(self.live), with_grad)
        x = self.state["x"]
        slope = _max_slope(grad) if with_grad else None
        more_flags = [] if slope is None else [slope == 0, slope.isfinite()]
        answers, flags = read_answers(logits, self.p.y, more_flags, self.p.target)
        if with_grad and not flags[1].all():  # a NaN in the gradient must not reach the next point
            grad = grad.nan_to_num(0.0, 0.0, 0.0)
            flags[0] = (_max_slope(grad) == 0).cpu().numpy()
            if (more & answers.is_finite & ~flags[1]).any():  # where the logits are not finite, the records say so
                list_flags(job.model).setdefault("nonfinite_gradients", _NONFINITE_GRADIENTS)

        verdict = judge_points(job, self.p, asked, answers, self.live, last, with_grad, self.ask_again, logits)
        if verdict.corrected is not None:  # the attack, too, steps from the corrected answers
            at, *corrected = verdict.corrected
            logits, loss = (a.index_copy(0, at, b) for a, b in zip((logits, loss), corrected, strict=True))
        self.forwards += self.live + verdict.forwards
        self.nonfinite += self.live & ~answers.is_finite
        if with_grad:
            self.backwards += more
            self.zero_gradients += more & flags[0] & ~verdict.is_break  # a broken sample needs no gradient

        ended = self.live & (verdict.is_break | last)
        if (self.live & ~ended).any():
            t = torch.tensor(self.t, device=job.device)  # a copy, because the attack may keep it
            seen = two_classes(logits, self.p.target)
            self.state = attack.step(as_attacked(self.p), job.ball, self.state, t, seen, loss, grad)
            if "done" in self.state:
                self.closing = self.state["done"].cpu().numpy()
            if job.ends_cycles:
                back = self.live & self.find_cycles(x)
                if job.bfloat16:  # the judge has not seen that point in full precision: it gets a last query
                    self.closing |= back
                else:
                    ended |= back
        spent = (time.perf_counter() - begin) / self.live.sum()
        np.add.at(self.seconds, self.position[self.live], spent)
        if ended.any():
            self.record_ends(np.flatnonzero(ended), verdict, answers.prediction, asked["x"])
        self.t += 1

    def round(self, p: Problem, s: State) -> State:
        """Return the state whose `x` the model is asked about: on the levels of the ball, if it has some.

        The attack keeps its own point, so steps of less than half a level add up.
        """
        return s if self.job.ball.levels is None else {**s, "x": self.job.ball.round(p.x, s["x"])}

    def ask(self, p: Problem, s: State, live: NDArray[np.int64], with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Query the model (`query.query`). An error names the samples of the rows `live` that the model fails on."""
        job, x, bfloat16 = self.job, s["x"], with_grad and self.job.bfloat16
        try:
            logits, loss, grad = query(job.model, job.attack, p, s, with_grad, bfloat16)
        except ModelError as error:
            raise ModelError(f"{error} {name_failing_samples(job.model, p, x, live, with_grad, bfloat16)}") from error
        if logits.dim() != 2 or len(logits) != len(x):
            raise ModelError(f"The model answered {tuple(logits.shape)} to {tuple(x.shape)}; expected [N, classes].")
        return logits, loss, grad

    def ask_in_two(self, s: State, wanted: NDArray[np.bool_]) -> tuple[Tensor, Tensor, Tensor] | None:
        """Query the lanes that want a gradient, and then the others without one. None if no live lane is of those."""
        groups = [(np.flatnonzero(self.live & wanted), True), (np.flatnonzero(self.live & ~wanted), False)]
        if not len(groups[1][0]):
            return None
        whole: list[Tensor] = []
        for lanes, with_grad in groups:
            n = len(lanes)
            at = torch.from_numpy(np.resize(lanes, self.job.widths.fit(n))).to(self.job.device)
            answers = self.ask(*take_lanes(self.p, s, at), np.arange(n), with_grad)
            whole = whole or [answer.new_zeros((self.width, *answer.shape[1:])) for answer in answers]
            whole = [into.index_copy(0, at[:n], answer[:n]) for into, answer in zip(whole, answers, strict=True)]
        return whole[0], whole[1], whole[2]

    def ask_again(self, p: Problem, s: State, n: int) -> tuple[Tensor, Tensor]:
        """Query the model without a gradient, so in the precision of the images. The first n rows are live."""
        return self.ask(p, s, np.arange(n), with_grad=False)[:2]

    def query_ahead(self, attack: Searching) -> tuple[Tensor, Tensor, Tensor]:
        """Query several steps of each search at once, and move each search to where it stops (`lookahead`).

        Returns:
            Logits [L, K], losses [L] and zeros in place of a gradient [L, C, H, W], as `ask` does.
        """
        job, lanes = self.job, np.flatnonzero(self.live)
        at = torch.from_numpy(lanes).to(job.device)
        width = job.widths.fit(min(MAX_QUERIES * len(lanes), job.widths.lanes))
        t = torch.from_numpy(self.t[lanes]).to(job.device)
        p, s = take_lanes(self.p, self.state, at)
        found = look_ahead(
            lambda p, s: self.ask_again(p, self.round(p, s), width),
            attack, p, s, job.ball, t, width=width, judge=job.judge,
        )  # fmt: skip
        self.state["x"] = self.state["x"].index_copy(0, at, found.x)
        passed, nonfinite = torch.stack([found.steps, found.nonfinite]).cpu().numpy()
        self.t[lanes] += passed
        self.forwards[lanes] += passed
        self.nonfinite[lanes] += nonfinite
        logits, loss = (
            answer.new_zeros((self.width, *answer.shape[1:])).index_copy(0, at, answer)
            for answer in (found.logits, found.loss)
        )
        return logits, loss, torch.zeros_like(self.state["x"])

    def record_ends(self, lanes: NDArray[np.int64], verdict: Verdict, prediction: NDArray[np.int64], x: Tensor) -> None:
        """Record the trials that are over, and give their lanes the next trial of the same sample."""
        is_break = verdict.is_break
        columns = (
            is_break, prediction, self.t, self.forwards, self.backwards, np.where(is_break, verdict.distance, np.nan),
            self.zero_gradients, self.nonfinite,
        )  # fmt: skip
        values = zip(*(column[lanes].tolist() for column in columns), strict=True)
        finished = []
        for lane, row in zip(lanes.tolist(), values, strict=True):
            position = int(self.position[lane])
            x_adv = x[lane].detach().cpu() if self.job.keep_adversarials and row[0] else None
            if trials := self.queue.record_end(position, int(self.trial[lane]), Trial._make((*row, x_adv))):
                finished.append(Finished(position, trials, float(self.seconds[position])))
            if (trial := self.queue.next_trial_of(position)) is None:
                self.live[lane] = False
            else:
                self.trial[lane], self.new[lane] = trial, True
        if finished:
            self.finish(finished)

    def find_cycles(self, x: Tensor) -> NDArray[np.bool_]:
        """Tell which lanes step from x back to x or to the point before x."""
        new, before = self.state["x"], self.before
        self.before = x
        back = (new == x).flatten(1).all(1) | (new == before).flatten(1).all(1)
        found: NDArray[np.bool_] = back.cpu().numpy()
        return found

    def resize(self, width: int) -> None:
        """Change the number of lanes: keep all live ones, and idle ones to fill up."""
        if width == self.width:
            return
        live = np.flatnonzero(self.live)
        keep = np.concatenate([live, np.flatnonzero(~self.live)])[:width]
        keep = np.concatenate([keep, np.zeros(width - len(keep), np.int64)])  # copies of a lane, which stay idle
        at = torch.from_numpy(keep).to(self.job.device)
        self.p, self.state = take_lanes(self.p, self.state, at)
        self.before = self.before[at]
        for name in (
            "new", "closing", "position", "trial", "t", "forwards", "backwards", "zero_gradients", "nonfinite",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name)[keep])
        self.live = np.arange(width) < len(live)
        self.new &= self.live
        self.width = width
