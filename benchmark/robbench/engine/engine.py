"""The only loop that queries a model for a result.

The engine holds a fixed number of lanes (the batch). Each lane is at its own sample, trial and step. A lane that is
free gets the next sample at once. Once no sample waits, it gets a further trial of a sample that withstands (`trials`).
The judge decides about every answer (`judge`). Attacks propose points, and the engine believes nothing that they claim.

A sample's verdict does not depend on its neighbours. While samples wait, the batch has its full width. When fewer lanes
have work, the engine may use a narrower batch. It uses only widths at which this model, on this machine, was seen to
give the same bits as at full width (`classifier.batch_width`). The same holds for the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.attacks.base import Attack, Searching, Sparing
from robbench.classifier.batch_width import BatchWidths, device_of, using_threads
from robbench.classifier.guard import out_of_memory
from robbench.core.errors import ModelError
from robbench.core.threat import Ball, per_lane
from robbench.core.types import Judge, Problem
from robbench.engine.job import AttackJob
from robbench.engine.lanes import Finished, Lanes
from robbench.engine.lookahead import MAX_QUERIES
from robbench.engine.query import Classifier, query
from robbench.engine.targeted import as_attacked, two_classes
from robbench.engine.trials import TrialQueue

__all__ = ["Rows", "attack_samples", "perturb", "query"]


@dataclass(frozen=True, eq=False)
class Rows:
    """What the engine recorded: one row per sample, in the order in which samples finished.

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
        nonfinite: queries whose logits held NaN or infinity (never a break), [n] int64.
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
    """Run one trial of an attack as a plain loop, without judge and early stop. Nonfinite gradients count as 0.

    Adversarial training and transfer use it. Tests compare the lanes with it.

    Args:
        model: what to query.
        attack: what to run.
        p: one row per lane.
        ball: where the points lie.

    Returns:
        The final point of each lane, [L, C, H, W].
    """
    if attack.needs_logits and p.logits is None:
        with torch.no_grad():
            p = replace(p, logits=two_classes(model(p.x), p.target))
    seen = as_attacked(p)
    s = attack.init(seen, ball)
    sparing = attack if isinstance(attack, Sparing) else None
    for step in range(attack.steps):
        t = torch.full_like(p.sample, step)
        logits, loss, grad = query(model, attack, p, s, attack.needs_grad)
        grad = grad.nan_to_num(0.0, 0.0, 0.0)  # as the lanes do; a NaN would reach every further point
        if sparing is not None:
            grad = torch.where(per_lane(sparing.wants_gradient(s), grad), grad, 0.0)
        s = attack.step(seen, ball, s, t, two_classes(logits, p.target), loss, grad)
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
    widths: BatchWidths,
    judge: Judge = "any",
    detect_cycles: bool = True,
    draws: int = 1,
    on_rows: Callable[[Rows], None] | None = None,
    on_narrow: Callable[[int, str], None] | None = None,
    keep_adversarials: bool = False,
    claims: Mapping[int, bool] = MappingProxyType({}),
    target: Tensor | None = None,
) -> Rows:
    """Run one attack on samples that the model classifies correctly.

    Args:
        model: in eval mode, [L, C, H, W] in [0, 1] -> logits [L, K], on the device to use.
        attack: what proposes the points.
        x: clean images [N, C, H, W] on the CPU. Lanes copy them to the model's device.
        y: labels [N] int64 on the CPU.
        sample: official indices [N]; they select the random numbers.
        ball: where adversarial examples must lie.
        key: from `rng.make_key(seed, stage)`.
        widths: the width of the batch. When memory runs out, the width is halved, for later calls too. It also says
            whether the model computes gradients, and the logits that come with them, in bfloat16. The judge asks about
            these breaks, and about the last point of each trial, again in the precision of the images.
        judge: `any` queried point may break a sample, or the `final` point of a trial only.
        detect_cycles: end a trial of a memoryless attack when it comes back to one of its last two points. With a
            deterministic model and judge `any`, all later points of the trial have been judged before.
        draws: for randomized models: a break counts if more than half of so many answers are wrong.
        on_rows: called with the rows of samples as they finish, so that an interrupt loses none of them.
        on_narrow: called with (new width, reason) when memory ran out and the lanes were halved.
        keep_adversarials: fill `Rows.x_adv`.
        claims: official index -> whether the attack says that it broke the sample, where points are another program's.
        target: the class that breaks each sample, [N] int64 on the CPU; None if every class but y does.

    Returns:
        All rows, in the order in which samples finished.

    Raises:
        ModelError: the output is not [L, K], or memory runs out at width 1.
    """
    job = AttackJob(
        model=model,
        attack=attack,
        x=x,
        y=y,
        sample=sample,
        ball=ball,
        key=key,
        judge=judge,
        widths=widths,
        draws=draws,
        keep_adversarials=keep_adversarials,
        device=device_of(model),
        ends_cycles=detect_cycles and attack.memoryless and judge == "any",
        target=target,
    )
    run = AttackRun(job, on_rows, claims)
    waiting = list(range(len(y)))
    while waiting:
        failure = run.work(waiting)
        if failure is None:
            break
        if widths.lanes == 1:
            raise ModelError(f"Out of memory with a single lane: {failure}")
        widths.halve()
        waiting = [i for i in waiting if i not in run.finished]  # unfinished samples begin again, with new counters
        if on_narrow is not None:
            on_narrow(widths.lanes, failure)
    return run.collect()


@dataclass(eq=False)
class AttackRun:
    """One call of `attack_samples`: the job, and the rows of finished samples."""

    job: AttackJob
    on_rows: Callable[[Rows], None] | None
    claims: Mapping[int, bool]
    done: list[Rows] = field(default_factory=list)
    finished: set[int] = field(default_factory=set)

    def work(self, waiting: list[int]) -> str | None:
        """Attack the waiting samples. Returns None, or the allocator's message if memory ran out."""
        try:
            if self.job.attack.needs_logits and self.job.logits is None:
                self.job = replace(self.job, logits=self.compute_clean_logits())
            job = self.job
            # A randomized model is asked in one order: one trial of a sample after another.
            queue = TrialQueue(waiting, len(job.y), job.attack.trials, ahead=job.draws == 1)
            ahead = MAX_QUERIES if isinstance(job.attack, Searching) else 1
            most = min(len(waiting) * job.attack.trials * ahead, job.widths.lanes)
            with using_threads(job.widths.choose_threads(most)):
                Lanes(job, queue, self.finish).run()
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            failure = (str(error).splitlines() or ["MemoryError"])[0]
        else:
            return None
        # Outside of the except block: there, the traceback still holds the tensors.
        if self.job.device.type == "cuda":
            torch.cuda.empty_cache()
        return failure

    def compute_clean_logits(self) -> Tensor:
        """Compute the logits of the clean images [N, K], in batches of one width."""
        answers, lanes = [], self.job.widths.fit(len(self.job.x))
        with torch.no_grad():
            for x in self.job.x.split(lanes):  # type: ignore[no-untyped-call]  # torch's annotation is missing
                padded = torch.zeros((lanes, *x.shape[1:]), dtype=x.dtype)
                padded[: len(x)] = x
                answers.append(self.job.model(padded.to(self.job.device))[: len(x)])
        logits, target = torch.cat(answers), self.job.target
        return two_classes(logits, None if target is None else target.to(logits.device))

    def finish(self, samples: Sequence[Finished]) -> None:
        """Keep the rows of finished samples, and hand them on."""
        positions = np.array([sample.position for sample in samples])
        last = [sample.trials[-1] for sample in samples]
        spent = {
            name: np.array([sum(getattr(trial, name) for trial in sample.trials) for sample in samples])
            for name in ("forwards", "backwards", "zero_gradients", "nonfinite")
        }
        x_adv = None
        if self.job.keep_adversarials:
            pairs = zip(positions.tolist(), last, strict=True)
            x_adv = torch.stack([self.job.x[at] if end.x_adv is None else end.x_adv for at, end in pairs])
        sample, broken = self.job.sample[positions], np.array([end.broken for end in last])
        judgements = zip(sample.tolist(), broken.tolist(), strict=True)
        rows = Rows(
            sample=sample,
            label=self.job.y[torch.from_numpy(positions)].numpy(),
            claimed=np.array([self.claims.get(i, judged) for i, judged in judgements]),
            broken=broken,
            prediction=np.array([end.prediction for end in last]),
            trial=np.array([len(sample.trials) - 1 for sample in samples]),
            step=np.array([end.step for end in last]),
            distance=np.array([end.distance for end in last]),
            seconds=np.array([sample.seconds for sample in samples]),
            x_adv=x_adv,
            **spent,
        )
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
