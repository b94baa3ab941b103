"""The lane scheduler: the only loop that queries a model for a result.

The engine holds a fixed number of lanes (the batch). Each lane is at its own sample, trial and step; lanes that
finish are refilled with the next samples at once. Every round queries all lanes, judges every answer itself
(prediction, ball, box, finiteness), counts what each sample cost, and latches the first success. Attacks propose;
nothing they claim is believed.

The width of the batch never changes while samples are waiting, so a sample's verdict does not depend on its
neighbours. Once fewer samples than lanes are left, the engine may go on with fewer lanes, but only to widths at
which this model, on this machine, was seen to return the same bits as at full width (`widths.Widths`). On a CPU several
such batches run beside each other, one a core (`crews`); samples go to whichever has a lane free.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.attacks.base import Attack
from robbench.crews import Crew, Waiting, muster, work
from robbench.errors import ModelError
from robbench.guard import out_of_memory
from robbench.threat import Ball
from robbench.types import Judge, Problem, State, some_ids
from robbench.widths import Widths, device_of

__all__ = ["Rows", "attack_samples", "perturb", "query"]

Classifier = Callable[[Tensor], Tensor]
"""Images [L, C, H, W] in [0, 1] -> logits [L, K]: a module, or what wraps one."""


@dataclass(frozen=True, eq=False)
class Rows:
    """What the engine recorded, one row per sample, in the order in which samples finished.

    Attributes:
        sample: official indices, [n] int64.
        broken: whether the judge confirmed an adversarial example, [n] bool.
        prediction: the class predicted at the break, or at the last queried point, [n] int64.
        trial: the trial that broke the sample, or the last one, [n] int64.
        step: how many steps that trial had taken, [n] int64.
        forwards: forward passes this sample cost, [n] int64.
        backwards: backward passes this sample cost, [n] int64.
        distance: ‖x_adv − x‖ at the break (nan where robust), [n] float64.
        zero_gradients: unsuccessful queries whose loss gradient was exactly zero everywhere, [n] int64.
        nonfinite: queries answered with NaN or infinity (never a break), [n] int64.
        seconds: this sample's share of the wall time, [n] float64.
        x_adv: adversarial examples [n, C, H, W] (the clean image where robust), if asked for.
    """

    sample: NDArray[np.int64]
    broken: NDArray[np.bool_]
    prediction: NDArray[np.int64]
    trial: NDArray[np.int64]
    step: NDArray[np.int64]
    forwards: NDArray[np.int64]
    backwards: NDArray[np.int64]
    distance: NDArray[np.float64]
    zero_gradients: NDArray[np.int64]
    nonfinite: NDArray[np.int64]
    seconds: NDArray[np.float64]
    x_adv: Tensor | None = None


def query(model: Classifier, attack: Attack, p: Problem, s: State, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ask the model at `s["x"]`: logits [L, K], the attack's loss [L] and its gradient (zeros without `with_grad`)."""
    x = s["x"]
    if not with_grad:
        with torch.no_grad():
            logits = model(x)
            return logits, attack.loss(logits, p, s), torch.zeros_like(x)
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = model(x)
        loss = attack.loss(logits, p, s)
        if not loss.requires_grad:
            raise ModelError(
                "The model's output does not depend on its input through autograd (was it computed under no_grad, "
                "through numpy, or after detach?), so gradient attacks cannot run. Make it differentiable, or attack "
                "it by queries alone: --suite blackbox."
            )
        try:
            (grad,) = torch.autograd.grad(loss.sum(), x, allow_unused=True)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise ModelError(f"The gradient of the model's answer cannot be computed: {error}.") from error
    return logits.detach(), loss.detach(), torch.zeros_like(x) if grad is None else grad


def perturb(model: Classifier, attack: Attack, p: Problem, ball: Ball) -> Tensor:
    """Run one trial of an attack as the plain loop, with no judge and no early stop: the final point of each lane.

    Adversarial training uses this; tests hold the scheduler against it.
    """
    if attack.needs_logits and p.logits is None:
        with torch.no_grad():
            p = replace(p, logits=model(p.x))
    s = attack.init(p, ball)
    for step in range(attack.steps):
        t = torch.full_like(p.sample, step)
        s = attack.step(p, ball, s, t, *query(model, attack, p, s, attack.needs_grad))
    return s["x"].detach()


def attack_samples(
    model: nn.Module,
    attack: Attack,
    x: Tensor,
    y: Tensor,
    sample: NDArray[np.int64],
    ball: Ball,
    *,
    key: tuple[int, int],
    widths: Widths,
    judge: Judge = "any",
    detect_cycles: bool = True,
    draws: int = 1,
    on_rows: Callable[[Rows], None] | None = None,
    on_narrow: Callable[[int, str], None] | None = None,
    keep_adversarials: bool = False,
) -> Rows:
    """Run one attack on samples that the model classifies correctly.

    Args:
        model: in eval mode, [L, C, H, W] in [0, 1] -> logits [L, K], on the device to use.
        attack: what to propose.
        x: clean images [N, C, H, W] on the CPU; they travel to the model's device lane by lane.
        y: labels [N] int64 on the CPU.
        sample: official indices [N]; they select the random numbers.
        ball: where adversarial examples must lie.
        key: from `rng.make_key(seed, stage)`.
        widths: the width of the batch; its halves are used when memory runs out, and later calls keep to that.
        judge: `any` queried point may break a sample, or the `final` point of a trial only.
        detect_cycles: end a trial of a memoryless attack when it comes back to one of its last two points: with a
            deterministic model and judge `any`, everything from there on has been judged before.
        draws: for models that answer at random: a break counts if more than half of so many answers are wrong.
        on_rows: called with the rows of samples as they finish, so that nothing is lost by an interrupt.
        on_narrow: called with (new width, reason) when memory ran out and the lanes were halved.
        keep_adversarials: fill `Rows.x_adv`.

    Returns:
        All rows, in the order in which samples finished.

    Raises:
        ModelError: the output is not [L, K], or memory runs out at width 1.
    """
    run = _Run(model, attack, x, y, sample, ball, key, judge, widths, on_rows, keep_adversarials, detect_cycles, draws)
    waiting = list(range(len(y)))
    while waiting:
        failure = run.go(waiting)
        if failure is None:
            break
        if widths.lanes == 1:
            raise ModelError(f"Out of memory with a single lane: {failure}")
        widths.halve()
        waiting = [i for i in waiting if i not in run.finished]  # samples in flight start again, from their counters
        if on_narrow is not None:
            on_narrow(widths.lanes, failure)
    return run.collect()


@dataclass(eq=False)
class _Run:
    """One call of `attack_samples`: what it was given, and the rows of finished samples."""

    model: nn.Module
    attack: Attack
    x: Tensor
    y: Tensor
    sample: NDArray[np.int64]
    ball: Ball
    key: tuple[int, int]
    judge: Judge
    widths: Widths
    on_rows: Callable[[Rows], None] | None
    keep: bool
    detect_cycles: bool
    draws: int
    done: list[Rows] = field(default_factory=list)
    finished: set[int] = field(default_factory=set)
    logits: Tensor | None = None
    """The model's answers to the clean images [N, K], where the attack wants them."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.device = device_of(self.model)
        self.cycles = self.detect_cycles and self.attack.memoryless and self.judge == "any"

    def go(self, waiting: list[int]) -> str | None:
        """Work through the waiting samples; returns what the allocator said if memory ran out."""
        try:
            if self.attack.needs_logits and self.logits is None:
                self.logits = self.clean_logits()
            queue = Waiting(waiting)
            crews, threads = muster(self.model, self.widths, len(waiting), alone=self.draws > 1)
            work([_Lanes(self, crew, queue).loop for crew in crews], threads, queue)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            failure = (str(error).splitlines() or ["MemoryError"])[0]
        else:
            return None
        # Outside the except block, so that the traceback no longer holds the tensors.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return failure

    def clean_logits(self) -> Tensor:
        """Ask the model about the clean images, in batches of the full width."""
        answers = []
        with torch.no_grad():
            for x in self.x.split(self.widths.lanes):  # type: ignore[no-untyped-call]  # torch's annotation is missing
                padded = torch.zeros((self.widths.lanes, *x.shape[1:]), dtype=x.dtype)
                padded[: len(x)] = x
                answers.append(self.model(padded.to(self.device))[: len(x)])
        return torch.cat(answers)

    def finish(self, rows: Rows, positions: NDArray[np.int64]) -> None:
        """Keep rows and hand them on, one crew at a time."""
        with self.lock:
            self.done.append(rows)
            self.finished.update(positions.tolist())
            if self.on_rows is not None:
                self.on_rows(rows)

    def collect(self) -> Rows:
        """Join all rows."""
        if not self.done:
            none = np.zeros(0, np.int64)
            return Rows(none, none > 0, none, none, none, none, none, none / 1.0, none, none, none / 1.0)
        columns = {
            name: np.concatenate([getattr(r, name) for r in self.done])
            for name in Rows.__dataclass_fields__
            if name != "x_adv"
        }
        kept = [r.x_adv for r in self.done if r.x_adv is not None]
        return Rows(**columns, x_adv=torch.cat(kept) if kept else None)


class _Lanes:
    """The lanes: device tensors for the attack, numpy arrays for the bookkeeping."""

    def __init__(self, run: _Run, crew: Crew, queue: Waiting) -> None:
        self.run, self.crew, self.queue = run, crew, queue
        self.width = width = run.widths.lanes
        lane = np.zeros(width, np.int64)
        self.live = np.zeros(width, bool)
        self.closing = np.zeros(width, bool)  # whose trial said that it is done
        self.position, self.trial, self.t = lane.copy(), lane.copy(), lane.copy()
        self.forwards, self.backwards = lane.copy(), lane.copy()
        self.zero_gradients, self.nonfinite = lane.copy(), lane.copy()
        self.seconds = np.zeros(width)
        device = run.device
        self.p = Problem(
            # Padding lanes hold a finite image; what they answer is never looked at.
            x=torch.zeros((width, *run.x.shape[1:]), dtype=run.x.dtype, device=device),
            y=torch.zeros(width, dtype=torch.int64, device=device),
            sample=torch.zeros(width, dtype=torch.int64, device=device),
            trial=torch.zeros(width, dtype=torch.int64, device=device),
            key=run.key,
            logits=None if run.logits is None else run.logits.new_zeros((width, run.logits.shape[1])),
        )
        self.state: State = {}
        self.before = torch.full_like(self.p.x, torch.nan)  # the point before the last, where cycles are looked for

    def loop(self) -> None:
        """Refill, query, judge, step, until nothing waits and nothing is live."""
        fresh = np.zeros(0, np.int64)
        while not self.queue.stop.is_set():
            self.fill(fresh)
            if not self.live.any():
                return
            self.narrow()
            fresh = self.round()

    def fill(self, again: NDArray[np.int64]) -> None:
        """Start the next trial on the lanes `again`, and waiting samples on the free lanes."""
        free = np.flatnonzero(~self.live)
        taken = self.queue.take(min(len(free), self.crew.most - int(self.live.sum())))
        free = free[: len(taken)]
        self.position[free] = taken
        for counter in (self.trial, self.forwards, self.backwards, self.zero_gradients, self.nonfinite):
            counter[free] = 0
        self.forwards[free] += self.run.logits is not None
        self.seconds[free] = 0.0
        self.live[free] = True
        lanes = np.concatenate([again, free])
        if not len(lanes):
            return
        self.t[lanes] = 0
        self.closing[lanes] = False
        at, position = torch.from_numpy(lanes), torch.from_numpy(self.position[lanes])
        device = self.run.device
        new = Problem(
            x=self.run.x[position].to(device),
            y=self.run.y[position].to(device),
            sample=torch.from_numpy(self.run.sample[self.position[lanes]]).to(device),
            trial=torch.from_numpy(self.trial[lanes]).to(device),
            key=self.run.key,
            logits=None if self.run.logits is None else self.run.logits[position.to(device)],
        )
        started = self.run.attack.init(new, self.run.ball)
        if not self.state:
            self.state = {k: v.new_zeros((self.width, *v.shape[1:])) for k, v in started.items()}
        at = at.to(device)
        for name in ("x", "y", "sample", "trial"):
            getattr(self.p, name).index_copy_(0, at, getattr(new, name))
        if self.p.logits is not None and new.logits is not None:
            self.p.logits.index_copy_(0, at, new.logits)
        self.state = {k: v.index_copy(0, at, started[k]) if k in started else v for k, v in self.state.items()}
        if self.run.cycles:
            self.before = self.before.index_fill(0, at, torch.nan)

    def round(self) -> NDArray[np.int64]:
        """Query all lanes once; returns the lanes whose sample goes on with its next trial."""
        begin = time.perf_counter()
        run, attack = self.run, self.run.attack
        last = self.closing | (self.t == attack.steps)
        more = self.live & ~last
        with_grad = attack.needs_grad and bool(more.any())
        x = self.state["x"]
        try:
            logits, loss, grad = query(self.crew.model, attack, self.p, self.state, with_grad)
        except ModelError as error:
            raise ModelError(f"{error} {self.blame(x, with_grad)}") from error
        if logits.dim() != 2 or len(logits) != len(x):
            raise ModelError(f"The model answered {tuple(logits.shape)} to {tuple(x.shape)}; expected [N, classes].")
        finite = logits.isfinite().all(1)
        prediction = logits.argmax(1)
        wrong = finite & (prediction != self.p.y)
        # A dead or broken gradient must not carry NaN into the next point.
        grad = grad.nan_to_num(0.0, 0.0, 0.0)
        flat = (grad == 0).flatten(1).all(1)
        answers = torch.stack([wrong.long(), finite.long(), flat.long(), prediction]).cpu().numpy()

        success = self.live & (answers[0] == 1) & (last | (run.judge == "any"))
        distance = np.full(len(x), np.nan)
        if success.any():  # the geometry is checked where it matters: at every claimed break
            hit = torch.from_numpy(np.flatnonzero(success)).to(run.device)
            inside = run.ball.contains(self.p.x[hit], x[hit]).cpu().numpy()
            distance[success] = run.ball.distance(self.p.x[hit], x[hit]).cpu().numpy()
            success[success] = inside
        if run.draws > 1 and success.any():
            success = self.outvoted(x, wrong.long(), success)
        self.forwards += self.live
        self.backwards += more & with_grad
        self.nonfinite += self.live & (answers[1] == 0)
        # Where the point is a break already, the gradient is not needed any more.
        self.zero_gradients += more & with_grad & (answers[2] == 1) & ~success

        ended = self.live & (success | last)
        if (self.live & ~ended).any():
            t = torch.from_numpy(self.t).to(run.device)
            self.state = attack.step(self.p, run.ball, self.state, t, logits, loss, grad)
            if "done" in self.state:
                self.closing = self.state["done"].cpu().numpy()
            if run.cycles:
                ended |= self.live & self.cycled(x)
        retire = ended & (success | (self.trial + 1 >= attack.trials))
        self.seconds[self.live] += (time.perf_counter() - begin) / self.live.sum() / self.crew.crews
        if retire.any():
            self.retire(np.flatnonzero(retire), success, answers[3], distance, x)
        again = np.flatnonzero(ended & ~retire)
        self.trial[again] += 1
        self.t += 1
        return again

    def blame(self, x: Tensor, with_grad: bool) -> str:
        """Name the samples that a batch failed on, by asking about each alone at the same width."""
        live = np.flatnonzero(self.live)
        samples, failing = self.run.sample[self.position[live]], []
        for lane, sample in zip(live, samples, strict=True):
            alone = x.detach()[lane : lane + 1].expand_as(x).clone().requires_grad_(with_grad)
            try:
                with torch.set_grad_enabled(with_grad):
                    answer = self.crew.model(alone).sum()
                    if with_grad:
                        torch.autograd.grad(answer, alone, allow_unused=True)
            except (ModelError, RuntimeError):  # the latter from autograd
                failing.append(int(sample))
        alone_too = f"it fails on {some_ids(failing)}" if failing else "none of them fails alone"
        return (
            f"(while attacking {some_ids(samples)}: {alone_too}). Everything that was finished before is kept; mend "
            "the model, and the same command goes on if it still computes the same function."
        )

    def outvoted(self, x: Tensor, votes: Tensor, claims: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Tell which claimed breaks hold in more than half of `draws` answers, the first of which is `votes`."""
        run = self.run
        for _ in range(run.draws - 1):
            with torch.no_grad():
                logits = self.crew.model(x)
            votes = votes + (logits.isfinite().all(1) & (logits.argmax(1) != self.p.y))
        self.forwards += claims * (run.draws - 1)
        held: NDArray[np.bool_] = claims & (2 * votes > run.draws).cpu().numpy()
        return held

    def cycled(self, x: Tensor) -> NDArray[np.bool_]:
        """Tell which lanes step from x back to x or to the point before it."""
        new, before = self.state["x"], self.before
        self.before = x
        back = (new == x).flatten(1).all(1) | (new == before).flatten(1).all(1)
        cycled: NDArray[np.bool_] = back.cpu().numpy()
        return cycled

    def retire(
        self,
        lanes: NDArray[np.int64],
        success: NDArray[np.bool_],
        prediction: NDArray[np.int64],
        distance: NDArray[np.float64],
        x: Tensor,
    ) -> None:
        """Record finished samples and free their lanes."""
        run, x_adv = self.run, None
        if run.keep:
            broken = torch.from_numpy(success[lanes]).view(-1, *([1] * (x.dim() - 1)))
            at = torch.from_numpy(lanes).to(run.device)
            x_adv = torch.where(broken, x[at].detach().cpu(), self.p.x[at].cpu())
        self.live[lanes] = False
        position = self.position[lanes]
        rows = Rows(
            sample=run.sample[position],
            broken=success[lanes],
            prediction=prediction[lanes],
            trial=self.trial[lanes],
            step=self.t[lanes],
            forwards=self.forwards[lanes],
            backwards=self.backwards[lanes],
            distance=np.where(success[lanes], distance[lanes], np.nan),
            zero_gradients=self.zero_gradients[lanes],
            nonfinite=self.nonfinite[lanes],
            seconds=self.seconds[lanes],
            x_adv=x_adv,
        )
        run.finish(rows, position)

    def narrow(self) -> None:
        """Go on with fewer lanes when no sample waits and a narrower width of the same bits holds all that are left."""
        run, left = self.run, int(self.live.sum())
        if self.queue or left > 0.75 * self.width:
            return
        width = run.widths.fit(left)
        if width >= self.width:
            return
        keep = np.flatnonzero(self.live)
        keep = np.concatenate([keep, np.flatnonzero(~self.live)[: width - left]])
        at = torch.from_numpy(keep).to(run.device)
        kept = {name: getattr(self.p, name)[at] for name in ("x", "y", "sample", "trial")}
        self.p = replace(self.p, **kept, logits=None if self.p.logits is None else self.p.logits[at])
        self.state = {k: v[at] for k, v in self.state.items()}
        self.before = self.before[at]
        for name in (
            "live", "closing", "position", "trial", "t", "forwards", "backwards", "zero_gradients", "nonfinite",
            "seconds",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name)[keep])
        self.width = width
