"""The lane scheduler: the only loop that queries a model for a result.

The engine holds a fixed number of lanes (the batch). Each lane is at its own sample, trial and step; lanes that
finish are refilled with the next samples at once, and once none waits, with further trials of samples that withstand
(`ledger`). Every answer is judged (`lanes`); attacks propose, and nothing they claim is believed.

A sample's verdict does not depend on its neighbours: the batch is as wide as can be while samples wait. Once there is
work for fewer lanes, the engine may go on with fewer, but only at widths at which this model, on this machine, was seen
to return the same bits as at full width (`widths.Widths`). On a CPU several such batches run beside each other, one a
core (`crews`); work goes to whichever has a lane free.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.attacks.base import Attack
from robbench.classifier.batch_width import Widths, device_of
from robbench.classifier.guard import out_of_memory
from robbench.core.errors import ModelError
from robbench.core.threat import Ball
from robbench.core.types import Judge, Problem
from robbench.engine.lanes import Lanes, Order
from robbench.engine.query import Classifier, query
from robbench.engine.threads import muster, work
from robbench.engine.trials import Ledger, Trial

__all__ = ["Rows", "attack_samples", "perturb", "query"]


@dataclass(frozen=True, eq=False)
class Rows:
    """What the engine recorded, one row per sample, in the order in which samples finished.

    Attributes:
        sample: official indices, [n] int64.
        label: true classes, [n] int64.
        claimed: whether the attack itself says that it broke the sample; what is judged, where it says nothing, [n]
            bool.
        broken: whether the judge confirmed an adversarial example, [n] bool.
        prediction: the class predicted at the break, or at the last queried point, [n] int64.
        trial: the trial that broke the sample, or the last one, [n] int64.
        step: how many steps that trial had taken, [n] int64.
        forwards: forward passes of its trials up to that one, [n] int64.
        backwards: backward passes of the same, [n] int64.
        distance: ‖x_adv − x‖ at the break (nan where robust), [n] float64.
        zero_gradients: unsuccessful queries whose loss gradient was exactly zero everywhere, [n] int64.
        nonfinite: queries answered with NaN or infinity (never a break), [n] int64.
        seconds: this sample's share of the wall time, [n] float64.
        x_adv: adversarial examples [n, C, H, W] (the clean image where robust), if asked for.
    """

    sample: NDArray[np.int64]
    label: NDArray[np.int64]
    claimed: NDArray[np.bool_]
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
    claims: Mapping[int, bool] = MappingProxyType({}),
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
        widths: the width of the batch; its halves are used when memory runs out, and later calls keep to that. It also
            says whether gradients, and the logits that come with them, are computed in bfloat16. What these claim to
            break is then asked about again in the precision of the images, and so is the last point of each trial:
            the answers to that are what is judged.
        judge: `any` queried point may break a sample, or the `final` point of a trial only.
        detect_cycles: end a trial of a memoryless attack when it comes back to one of its last two points: with a
            deterministic model and judge `any`, everything from there on has been judged before.
        draws: for models that answer at random: a break counts if more than half of so many answers are wrong.
        on_rows: called with the rows of samples as they finish, so that nothing is lost by an interrupt.
        on_narrow: called with (new width, reason) when memory ran out and the lanes were halved.
        keep_adversarials: fill `Rows.x_adv`.
        claims: official index -> whether the attack says that it broke the sample, where points are another program's.

    Returns:
        All rows, in the order in which samples finished.

    Raises:
        ModelError: the output is not [L, K], or memory runs out at width 1.
    """
    cycles = detect_cycles and attack.memoryless and judge == "any"
    order = Order(
        attack, x, y, sample, ball, key, judge, widths, draws, keep_adversarials, device_of(model), cycles
    )  # fmt: skip
    run = _Run(model, order, on_rows, claims)
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
    order: Order
    on_rows: Callable[[Rows], None] | None
    claims: Mapping[int, bool]
    done: list[Rows] = field(default_factory=list)
    finished: set[int] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ledger: Ledger = field(init=False)

    def go(self, waiting: list[int]) -> str | None:
        """Work through the waiting samples; returns what the allocator said if memory ran out."""
        try:
            if self.order.attack.needs_logits and self.order.logits is None:
                self.order = replace(self.order, logits=self.clean_logits())
            order = self.order
            # What answers at random is asked in one order, by one crew and by one trial of a sample after another.
            alone = order.draws > 1
            self.ledger = Ledger(waiting, len(order.y), order.attack.trials, ahead=not alone)
            crews, threads = muster(self.model, order.widths, len(waiting), alone=alone)
            work([Lanes(order, crew, self.ledger, self.finish).loop for crew in crews], threads, self.ledger)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            failure = (str(error).splitlines() or ["MemoryError"])[0]
        else:
            return None
        # Outside the except block, so that the traceback no longer holds the tensors.
        if self.order.device.type == "cuda":
            torch.cuda.empty_cache()
        return failure

    def clean_logits(self) -> Tensor:
        """Ask the model about the clean images, in batches of the full width."""
        answers, lanes = [], self.order.widths.lanes
        with torch.no_grad():
            for x in self.order.x.split(lanes):  # type: ignore[no-untyped-call]  # torch's annotation is missing
                padded = torch.zeros((lanes, *x.shape[1:]), dtype=x.dtype)
                padded[: len(x)] = x
                answers.append(self.model(padded.to(self.order.device))[: len(x)])
        return torch.cat(answers)

    def finish(self, done: Sequence[tuple[int, list[Trial]]]) -> None:
        """Keep what came of samples, by their positions, and hand it on, one crew at a time."""
        positions = np.array([position for position, _ in done])
        last = [trials[-1] for _, trials in done]
        spent = {
            name: np.array([sum(getattr(trial, name) for trial in trials) for _, trials in done])
            for name in ("forwards", "backwards", "zero_gradients", "nonfinite")
        }
        x_adv = None
        if self.order.keep:
            pairs = zip(positions.tolist(), last, strict=True)
            x_adv = torch.stack([self.order.x[at] if end.x_adv is None else end.x_adv for at, end in pairs])
        sample, broken = self.order.sample[positions], np.array([end.broken for end in last])
        judgements = zip(sample.tolist(), broken.tolist(), strict=True)
        rows = Rows(
            sample=sample,
            label=self.order.y[torch.from_numpy(positions)].numpy(),
            claimed=np.array([self.claims.get(i, judged) for i, judged in judgements]),
            broken=broken,
            prediction=np.array([end.prediction for end in last]),
            trial=np.array([len(trials) - 1 for _, trials in done]),
            step=np.array([end.step for end in last]),
            distance=np.array([end.distance for end in last]),
            seconds=self.ledger.seconds[positions],
            x_adv=x_adv,
            **spent,
        )
        with self.lock:
            self.done.append(rows)
            self.finished.update(positions.tolist())
            if self.on_rows is not None:
                self.on_rows(rows)

    def collect(self) -> Rows:
        """Join all rows."""
        if not self.done:
            none = np.zeros(0, np.int64)
            no, zero = none > 0, none / 1.0
            return Rows(none, none, no, no, none, none, none, none, none, zero, none, none, zero)
        columns = {
            name: np.concatenate([getattr(r, name) for r in self.done])
            for name in Rows.__dataclass_fields__
            if name != "x_adv"
        }
        kept = [r.x_adv for r in self.done if r.x_adv is not None]
        return Rows(**columns, x_adv=torch.cat(kept) if kept else None)
