"""A run: computes the records of one suite on one model, stores and resumes them, and makes the result."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from robbench.classifier.prepare import Target
from robbench.core.chance import find_chance_flag
from robbench.core.errors import ResultError
from robbench.core.machine import keep_freed_memory
from robbench.core.threat import Ball
from robbench.core.types import Status
from robbench.engine.engine import Rows
from robbench.evaluation.flow import Flow
from robbench.evaluation.inputs import Images, make_probe, resolve
from robbench.evaluation.precision import explain_bfloat16_cost
from robbench.evaluation.progress import Reporter, Silent, check_reporter
from robbench.evaluation.request import RunFields, RunRequest
from robbench.evaluation.setup import Setup
from robbench.evaluation.shards import NOT_ATTACKED, Shards, order_rows
from robbench.evaluation.stages import ReadyStage
from robbench.evaluation.stored_answers import check_stored_answers
from robbench.evaluation.worker import CleanReport, Job, Place, Worker
from robbench.results.adversarials import Points
from robbench.results.judging_code import name_code
from robbench.results.locking import lock_result
from robbench.results.reader import read_vouched
from robbench.results.schema import ResultFile, read_result
from robbench.results.store import RunStore, make_empty_rows
from robbench.results.summary import MEASURED_FLAGS
from robbench.suite import Suite, SuiteSource, load_suite

__all__ = ["EvaluationRun", "Reporter", "Silent", "evaluate", "make_run", "run_here"]


_FOUND_BY_EVERY_RUN = {
    "batch_dependent", "bfloat16", "bounded_outputs", "clipped", "dark", "levels",
    "log_probabilities", "nonfinite_clean", "output_part", "peers_left_out", "probabilities", "rounded_outputs",
    "skipped_images", "transfer_left_out", "uint8", *MEASURED_FLAGS,
}  # fmt: skip
"""Flags that every run looks for again, so that those of an earlier run do not count. The judge finds more than a run
does that attacks nothing again: `randomized` and `gradient_mode` stay."""
_AGAIN = "To attack all the same, give a results tree of your own: --results DIR (in Python results=DIR)."


def evaluate(
    model: str | nn.Module,
    suite: SuiteSource = "whitebox",
    *,
    reporter: Reporter | None = None,
    **fields: Unpack[RunFields],
) -> ResultFile:
    """Measure the robust accuracy of a model.

    Args:
        model: a registered model's name (`digits/natural`), a source of models without a card (`file:PATH`, `hf:REPO`,
            `timm:NAME`, `robustbench:NAME`, `package.module:function`; see docs/models.md), or any module in eval mode
            that maps images [N, C, H, W] in [0, 1] to logits [N, K].
        suite: a suite's name, the path of a suite file, or a list of attacks: `[PGD(steps=40)]`.
        reporter: gets messages about the progress.
        **fields: x, y, dataset, name, architecture, mean and std describe the model (`models.spec.ModelSpec`). norm,
            eps, samples, sample_seed, seed, lanes, gradients, fast_layers, one_by_one, target, levels, device,
            data_dir, models, results, overwrite, save_adversarials and wait describe the run
            (`evaluation.options.Options`).

    Returns:
        The result. result.json stores the same content.

    Raises:
        RobbenchError: the model, the data or the options do not allow an honest measurement. The message says why.
    """
    return run_here(make_run(RunRequest.of(model, suite, **fields), reporter))


def make_run(
    request: RunRequest, reporter: Reporter | None = None, device: torch.device | None = None
) -> EvaluationRun:
    """Load the model, the images and the suite of a run. `device`: see `EvaluationRun`.

    Where gradients in bfloat16 cost more than they gain, the run is the one in float32, and the reporter hears of it. A
    run that must have a given identity keeps them.
    """
    began = time.monotonic()
    check_reporter(reporter)
    keep_freed_memory()
    suite = load_suite(request.suite)
    target, images = resolve(request.spec, request.options)
    if request.expected is None and (why := explain_bfloat16_cost(target, images, request.options, device)):
        (reporter or Silent()).note(f"{images.dataset}/{target.name}: {why}")
        request = replace(request, options=replace(request.options, gradients=None))
        target, images = resolve(request.spec, request.options)  # bfloat16 may have ruled out faster layers
    run = EvaluationRun(request, target, images, suite, reporter, device)
    run.began = began
    return run


def run_here(run: EvaluationRun) -> ResultFile:
    """Compute a run in this process, one stage after the other."""
    with run:
        if (known := run.open()) is not None:
            return known
        worker = Worker(run.make_job())
        run.begin(worker.look(run.positions), worker.points)
        for k, stage in enumerate(run.stages):
            at = run.flow.take(k)
            run.reporter.stage(stage.name, len(at), int((~run.lacking[k]).sum()), run.flow.count_standing(k))
            if len(at):
                worker.attack(k, run.positions[at], run)
                run.flow.finish(k, at)
            run.shards.flush()
        return run.finish(worker.end())


class EvaluationRun(Setup):
    """A setup and its records. A `Worker` calls the model; this class does everything else.

    Use it in this order, inside `with run:`:

    1. Call `open`. If it returns a result, the run is finished.
    2. Classify the clean images (`Worker.look`), and pass the report to `begin`.
    3. Take samples from `flow`, attack them (`Worker.attack`), and pass the records to `take`.
    4. Call `finish`. It returns the result.

    The end of the `with` block commits all records, also after an error.

    Args:
        request: what the user asked for.
        target: the model.
        images: the whole test set.
        suite: the attacks.
        reporter: gets messages about the progress.
        device: device of the workers; None means the device of the target.
    """

    def __init__(
        self,
        request: RunRequest,
        target: Target,
        images: Images,
        suite: Suite,
        reporter: Reporter | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(target, images, suite, request.options, device)
        self.request, self.reporter = request, reporter or Silent()
        self.date = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        self.began = time.monotonic()
        self.place = Place.of(target)
        self._flags: dict[str, str] = {}
        self._context = contextlib.ExitStack()
        self.store = None
        if self.options.results is not None:
            root, standard = Path(self.options.results), not self.overrides()
            self.store = RunStore(root, images.dataset, target.name, suite.name, self.identity(), standard)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.__exit__(kind, error, trace)

    def open(self) -> ResultFile | None:
        """Lock the folder of the result, and read the known rows. Return the result if no record is missing.

        Raises:
            ResultError: the folder holds a different run, or another process works on it.
        """
        options, store = self.options, self.store
        if store is not None:
            if self.request.expected is not None:
                store.require_identity(self.request.expected, self.title())
            lock = lock_result(Path(options.results or "."), store.folder, options.wait, self.reporter.note)
            self._context.enter_context(lock)
            self._context.push(store.forget_refused)
            probe = make_probe(self.target, self.images, self.lanes)
            self.answers = check_stored_answers(probe, store, options.overwrite, self.reporter.note)
        known = store.open(options.overwrite, self.reporter.note, self._suffices) if store else make_empty_rows()
        self.stored = None
        if store and store.result_path.exists() and store.outdated is None:
            self.stored = read_result(store.result_path, changed=True)
        self.saves_adversarials = bool(store and (options.save_adversarials or store.keeps_adversarials))
        if store and self.saves_adversarials:
            known = self._drop_unstored_breaks(known, store)
        self.lacking = self._find_lacking(known)
        # A run can extend a stored result. A kill between its two writes leaves new records beside the old summary.
        stored = self.stored
        sound = store is not None and stored is not None and self._is_sound(store)
        whole = stored is not None and stored.n == len(self._order_stored(known))
        if stored is not None and sound and whole and not self.lacking.any():
            # Nothing is computed now, so the stored hardware, date and flags stay.
            self.reporter.note(f"{self.title()}: known since {stored.date[:10]}, nothing to compute. {_AGAIN}")
            if store and stored.code != store.code:
                self.reporter.note(f"{self.title()}: {name_code(stored.code)} judged it. --overwrite measures it anew.")
            result = self.summarize(self.index, known, stored.flags, self.place, self.date)
            kept = ("hardware", "versions", "environment", "date", "wall_seconds", "lanes", "flags", "answers", "code")
            return result.model_copy(update={k: getattr(stored, k) for k in kept})
        if store is not None:
            now = {"n": len(self.positions), "stages": len(self.stages), "date": self.date}
            store.begin({**self.request.describe(), **now, "answers": self.answers, "code": store.code})
        self._known_rows = known
        return None

    def make_job(self) -> Job:
        """Return what a worker needs to compute this run."""
        keep = self.store.run_id if self.store and self.saves_adversarials else None
        ball = Ball.of(self.threat, self.options.levels)
        about = self.suite.judge, self.lanes, self.coarse, keep, self.targets
        return Job(self.target, self.stages, self.images, ball, *about)

    def forget_model(self) -> None:
        """Free the memory of the model after the workers have it. Many runs can be open at the same time."""
        self.target = replace(self.target, module=nn.Identity())

    def begin(self, report: CleanReport, take_points: Callable[[bool], list[Points]], workers: int = 1) -> None:
        """Record the misclassified samples, and make the `flow` of the others.

        Args:
            report: a worker's report on the clean images.
            take_points: returns the adversarial examples that were found since its last call (`Worker.points`).
            workers: number of workers.
        """
        label, known = self.images.y[self.positions].numpy(), self._known_rows
        self.shards = self._context.enter_context(Shards(self.store, known, take_points))
        correct = report.prediction == label
        self.place, self._prediction = report.place, report.prediction
        self.lanes = min(self.lanes, report.lanes)
        self._flags = self._keep_old_flags(self.stored) | dict(self.images.flags) | report.flags | self.find_gaps()
        seconds = 0.0
        if not math.isnan(report.seconds):
            batches = -(-(self.lacking & correct).sum(1) // self.lanes)
            seconds = float(sum(report.seconds * b * s.passes for b, s in zip(batches, self.stages, strict=True)))
        for note in (*report.notes, *find_chance_flag(label, report.prediction).values()):
            self.reporter.note(f"{self.title()}: {note}")
        names, device = [s.name for s in self.stages], str(self.target.device)
        self.reporter.plan(self.title(), names, len(label), int(correct.sum()), seconds / workers, device)
        for k in range(len(self.stages)):
            self._record_not_attacked(Status.MISCLASSIFIED, k, np.flatnonzero(self.lacking[k] & ~correct))
        broken = known[known["status"] == Status.BROKEN]
        broke = np.array([np.isin(self.index, self._select_samples(broken, s)) for s in self.stages])
        skip = functools.partial(self._record_not_attacked, Status.SKIPPED)
        self.flow = Flow(self.suite.mode, self.lacking, broke, correct, skip)

    def _record_not_attacked(self, status: Status, k: int, at: NDArray[np.int64]) -> None:
        """Record samples that stage k does not attack."""
        label = self.images.y[self.positions[at]].numpy()
        rows = {"sample": self.index[at], "label": label, "prediction": self._prediction[at]}
        self.shards.add(self.stages[k].name, status.value, {**NOT_ATTACKED, **rows})

    def take(self, k: int, rows: Rows) -> None:
        """Add records of stage k."""
        self.flow.broke[k] |= np.isin(self.index, rows.sample[rows.broken])
        status = np.where(rows.broken, Status.BROKEN.value, Status.ROBUST.value)
        self.shards.add(self.stages[k].name, status, vars(rows))
        self.reporter.progress(self.stages[k].name, len(rows.sample), int(rows.broken.sum()))

    def narrow(self, k: int, width: int, reason: str) -> None:
        """Store the smaller batch width after the memory ran out at stage k. `reason` is the allocator's message."""
        self.lanes = min(self.lanes, width)
        self.reporter.note(f"{self.stages[k].name}: out of memory ({reason}); going on with {width} lanes.")

    def finish(self, flags: dict[str, str]) -> ResultFile:
        """Store the result of all known samples. Return the result of the samples of this run.

        Args:
            flags: the flags that `Worker.end` returned.
        """
        self.shards.flush()
        flags = self._flags | flags
        rows = self.shards.collect_rows()
        wall = round(time.monotonic() - self.began, 3)
        if self.store is not None:
            order = self._order_stored(rows)
            merged = order_rows(rows, order, [s.name for s in self.stages])
            result = self.summarize(order, merged, flags, self.place, self.date, wall)
            leftover = rows[~rows["sample"].isin(order)]
            self.store.finish(merged, result, leftover, keep=self.saves_adversarials)
            if np.array_equal(order, self.index):
                return result
        return self.summarize(self.index, rows, flags, self.place, self.date, wall)

    def _suffices(self, rows: pd.DataFrame) -> bool:
        """Return whether rows that other code judged may be shown, because nothing else is to compute."""
        options, store = self.options, self.store
        if options.overwrite or self.request.same_code or store is None:
            return False
        if options.save_adversarials or store.keeps_adversarials:
            rows = rows[~store.find_unstored_breaks(rows)]
        return not self._find_lacking(rows).any()

    def _find_lacking(self, rows: pd.DataFrame) -> NDArray[np.bool_]:
        """Return a mask of the records of this run that are not among the rows, [stages, n]."""
        return np.array([~np.isin(self.index, self._select_samples(rows, s)) for s in self.stages])

    @staticmethod
    def _select_samples(rows: pd.DataFrame, stage: ReadyStage) -> NDArray[np.int64]:
        found: NDArray[np.int64] = rows.loc[rows["attack"] == stage.name, "sample"].to_numpy()
        return found

    @staticmethod
    def _keep_old_flags(stored: ResultFile | None) -> dict[str, str]:
        """Return the flags of the stored result that this run may not find again."""
        return {} if stored is None else {k: v for k, v in stored.flags.items() if k not in _FOUND_BY_EVERY_RUN}

    def _drop_unstored_breaks(self, known: pd.DataFrame, store: RunStore) -> pd.DataFrame:
        """Drop the known breaks that have no stored adversarial example. The run then computes them again.

        Only rows of the samples of this run are dropped. If later stages skipped such a sample, their rows are
        dropped too, and the run decides again whether these stages skip the sample.
        """
        asked = known["sample"].isin(self.index)
        lacking = asked & store.find_unstored_breaks(known)
        if not lacking.any():
            return known
        self.reporter.note(
            f"{int(lacking.sum())} breaks are known without their adversarial examples; they are computed again."
        )
        skipped = (known["status"] == Status.SKIPPED) & known["sample"].isin(known.loc[lacking, "sample"])
        return known[~(lacking | skipped)]

    def _order_stored(self, rows: pd.DataFrame) -> NDArray[np.int64]:
        """Return the samples that a result may hold: those up to the first that lacks a record of a stage."""
        stages = rows.groupby("sample").size()
        return self.order_samples(stages.index[stages == len(self.stages)].to_numpy())

    def _is_sound(self, store: RunStore) -> bool:
        """Return whether result.json follows from the records. If not, note why: the end of the run writes it again."""
        try:
            read_vouched(store.folder)
        except ResultError as error:
            self.reporter.note(f"{self.title()}: {error} {store.result_path.name} is made again from the records.")
            return False
        return True
