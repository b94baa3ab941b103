"""One model × one suite → one result: the run, its records, and how it resumes."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import math
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
from robbench.core.machine import keep_freed_memory
from robbench.core.threat import Ball
from robbench.core.types import Status
from robbench.engine.engine import Rows
from robbench.evaluation.flow import Flow
from robbench.evaluation.inputs import Images, resolve
from robbench.evaluation.progress import Reporter, Silent
from robbench.evaluation.request import RunFields, RunRequest
from robbench.evaluation.setup import Setup
from robbench.evaluation.shards import NOTHING, Shards, ordered
from robbench.evaluation.stages import ReadyStage
from robbench.evaluation.worker import First, Job, Place, Worker
from robbench.results.adversarials import Points
from robbench.results.locking import lock_result
from robbench.results.schema import ResultFile, read_result
from robbench.results.store import RunStore, make_empty_rows
from robbench.results.summary import MEASURED_FLAGS
from robbench.suite import Suite, SuiteSource, load_suite

__all__ = ["EvaluationRun", "Reporter", "Silent", "evaluate", "make_run", "run_here"]


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
        reporter: hears of progress.
        **fields: x, y, dataset, name, architecture, mean and std say more about the model (`models.spec.ModelSpec`).
            norm, eps, samples, sample_seed, seed, lanes, gradients, fast_layers, one_by_one, device, data_dir, models,
            results, overwrite, save_adversarials and wait say more about the run (`evaluation.options.Options`).

    Returns:
        The result, as it is stored in result.json.

    Raises:
        RobbenchError: the model, the data or the options do not allow an honest number; the sentence says why.
    """
    return run_here(make_run(RunRequest.of(model, suite, **fields), reporter or Silent()))


def make_run(
    request: RunRequest, reporter: Reporter | None = None, device: torch.device | None = None
) -> EvaluationRun:
    """Load what a run needs; `device` is where its workers are, if not here."""
    keep_freed_memory()
    suite = load_suite(request.suite)
    target, images = resolve(request.spec, request.options)
    return EvaluationRun(request, target, images, suite, reporter, device)


def run_here(run: EvaluationRun) -> ResultFile:
    """Do a run in this process, stage by stage."""
    with run:
        if (known := run.open()) is not None:
            return known
        worker = Worker(run.job())
        run.begin(worker.look(run.positions), worker.points)
        for k, stage in enumerate(run.stages):
            at = run.flow.take(k)
            run.reporter.stage(stage.name, len(at), int((~run.lacking[k]).sum()))
            if len(at):
                worker.attack(k, run.positions[at], run)
                run.flow.finish(k, at)
            run.shards.flush()
        return run.finish(worker.end())


class EvaluationRun(Setup):
    """A setup and the records of it: everything about a run but asking the model.

    Within `with run:`, first `open`; unless that returns the result, a worker's look goes into `begin`, records of the
    samples that `flow` hands out into `take`, and `finish` makes the result. Leaving keeps all records that came.

    Args:
        request: what was asked for.
        target: the model.
        images: the whole test set.
        suite: the attacks.
        reporter: hears of progress.
        device: where the workers are, if not where the target is.
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
        """Take the folder and see what is there; returns the result if nothing is missing.

        Raises:
            ResultError: the folder holds something else, or another process works on it.
        """
        options, store = self.options, self.store
        if store is not None:
            if self.request.expected is not None:
                store.require_identity(self.request.expected, self.title())
            lock = lock_result(Path(options.results or "."), store.folder, options.wait, self.reporter.note)
            self._context.enter_context(lock)
        known = store.open(options.overwrite, self.reporter.note) if store else make_empty_rows()
        self.before = read_result(store.result_path) if store and store.result_path.exists() else None
        self.keep = bool(store and (options.save_adversarials or store.keeps_adversarials))
        if store and self.keep:
            known = self._forget(known, store)
        self.lacking = np.array([~np.isin(self.index, self._samples(known, s)) for s in self.stages])
        # A kill between the records and the summary of an extension leaves a summary of too few samples.
        before = self.before
        whole = before is not None and before.n == known.loc[self._complete(known), "sample"].nunique()
        if before is not None and whole and not self.lacking.any():
            # Nothing to compute: hardware, date and flags stay those of the computation.
            self.reporter.note(f"{self.title()}: known since {before.date[:10]}, nothing to compute.")
            result = self.summarize(self.index, known, before.flags, self.place, self.date)
            kept = ("hardware", "versions", "environment", "date", "lanes", "flags")
            return result.model_copy(update={k: getattr(before, k) for k in kept})
        if store is not None:
            store.begin(
                {**self.request.describe(), "n": len(self.positions), "stages": len(self.stages), "date": self.date}
            )
        self._known = known
        return None

    def job(self) -> Job:
        """Put together what a worker needs."""
        keep = self.store.run_id if self.store and self.keep else None
        ball = Ball.of(self.threat)
        return Job(self.target, self.stages, self.images, ball, self.suite.judge, self.lanes, self.coarse, keep)

    def forget_model(self) -> None:
        """Let go of the model once the workers have it: many runs may be under way."""
        self.target = replace(self.target, module=nn.Identity())

    def begin(self, first: First, points: Callable[[bool], list[Points]], workers: int = 1) -> None:
        """Take what the model answers to the clean images; from now on `flow` hands out samples.

        Args:
            first: a worker's look.
            points: hands over the adversarial examples that came since the last time (`Worker.points`).
            workers: how many share the work.
        """
        label, known = self.images.y[self.positions].numpy(), self._known
        self.shards = self._context.enter_context(Shards(self.store, known, points))
        correct = first.prediction == label
        self.place, self._prediction = first.place, first.prediction
        self._flags = self._noticed(self.before) | dict(self.images.flags) | first.flags
        seconds = 0.0
        if not math.isnan(first.seconds):
            batches = -(-(self.lacking & correct).sum(1) // self.lanes)
            seconds = float(sum(first.seconds * b * s.passes for b, s in zip(batches, self.stages, strict=True)))
        for note in first.notes:
            self.reporter.note(f"{self.title()}: {note}")
        names, device = [s.name for s in self.stages], str(self.target.device)
        self.reporter.plan(self.title(), names, len(label), int(correct.sum()), seconds / workers, device)
        for k in range(len(self.stages)):
            self._idle(Status.MISCLASSIFIED, k, np.flatnonzero(self.lacking[k] & ~correct))
        broken = known[known["status"] == Status.BROKEN]
        broke = np.array([np.isin(self.index, self._samples(broken, s)) for s in self.stages])
        skip = functools.partial(self._idle, Status.SKIPPED)
        self.flow = Flow(self.suite.mode, self.lacking, broke, correct, skip)

    def _idle(self, status: Status, k: int, at: NDArray[np.int64]) -> None:
        """Record samples that a stage has nothing to do for."""
        label = self.images.y[self.positions[at]].numpy()
        rows = {"sample": self.index[at], "label": label, "prediction": self._prediction[at]}
        self.shards.add(self.stages[k].name, status.value, {**NOTHING, **rows})

    def take(self, k: int, rows: Rows) -> None:
        """Take records of stage k as they finish."""
        self.flow.broke[k] |= np.isin(self.index, rows.sample[rows.broken])
        status = np.where(rows.broken, Status.BROKEN.value, Status.ROBUST.value)
        self.shards.add(self.stages[k].name, status, vars(rows))
        self.reporter.progress(self.stages[k].name, len(rows.sample), int(rows.broken.sum()))

    def narrow(self, k: int, width: int, reason: str) -> None:
        """Hear that memory ran out at stage k: the width that is left, and what the allocator said."""
        self.lanes = min(self.lanes, width)
        self.reporter.note(f"{self.stages[k].name}: out of memory ({reason}); going on with {width} lanes.")

    def finish(self, flags: dict[str, str]) -> ResultFile:
        """Store the result, and return it for the samples that were asked for; `flags` are those of `Worker.end`."""
        self.shards.flush()
        flags = self._flags | flags
        rows = self.shards.rows()
        if self.store is not None:
            complete = self._complete(rows)
            order = self.order_samples(rows.loc[complete, "sample"].unique())
            merged = ordered(rows[complete], order, [s.name for s in self.stages])
            result = self.summarize(order, merged, flags, self.place, self.date)
            self.store.finish(merged, result, leftover=rows[~complete], keep=self.keep)
            if np.array_equal(order, self.index):
                return result
        return self.summarize(self.index, rows, flags, self.place, self.date)

    @staticmethod
    def _samples(rows: pd.DataFrame, stage: ReadyStage) -> NDArray[np.int64]:
        found: NDArray[np.int64] = rows.loc[rows["attack"] == stage.name, "sample"].to_numpy()
        return found

    @staticmethod
    def _noticed(before: ResultFile | None) -> dict[str, str]:
        """Take over what earlier runs noticed about the model and this one may not meet again."""
        passing = {
            "randomized",
            "probabilities",
            "nonfinite_clean",
            "bfloat16",
            "batch_dependent",
            "gradient_mode",
            *MEASURED_FLAGS,
        }
        return {} if before is None else {k: v for k, v in before.flags.items() if k not in passing}

    def _forget(self, known: pd.DataFrame, store: RunStore) -> pd.DataFrame:
        """Drop breaks that were found before adversarial examples were kept, so that they are computed again.

        Only among the samples that were asked for. In a cascade, what later stages skipped is decided again with them.
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

    def _complete(self, rows: pd.DataFrame) -> pd.Series[bool]:
        """Tell which rows are of samples that every stage has a record of."""
        stages = rows.groupby("sample").size()
        return rows["sample"].isin(stages.index[stages == len(self.stages)])
