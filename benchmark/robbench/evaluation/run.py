"""One model × one suite → one result: the run, its records, and how it resumes."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.classifier.batch_width import default_lanes
from robbench.classifier.prepare import Target
from robbench.core.errors import DataError, SuiteError
from robbench.core.machine import keep_freed_memory
from robbench.core.numbers import parse_threat
from robbench.core.threat import Ball
from robbench.core.types import Status, Threat
from robbench.evaluation.describe import describe_run
from robbench.evaluation.flow import Flow
from robbench.evaluation.inputs import Images, Options, resolve, select
from robbench.evaluation.progress import Reporter, Silent
from robbench.evaluation.shards import NOTHING, Shards, ordered
from robbench.evaluation.stages import ReadyStage, ready_stages
from robbench.evaluation.worker import Columns, First, Job, Place, Worker
from robbench.models.sources import Build
from robbench.results.adversarials import Points
from robbench.results.locking import lock_result
from robbench.results.schema import SCHEMA_VERSION, ResultFile, read_result
from robbench.results.store import RunStore, make_empty_rows
from robbench.results.summary import MEASURED_FLAGS, summarize
from robbench.suite import Suite, load_suite

__all__ = ["Reporter", "Run", "Silent", "evaluate", "ready", "run_here", "run_suite"]

ENGINE_VERSION = 1  # raised when the judge, the random numbers or the meaning of a record change


def evaluate(
    model: str | nn.Module,
    suite: str = "whitebox",
    *,
    x: Tensor | None = None,
    y: Tensor | None = None,
    dataset: str | None = None,
    name: str | None = None,
    architecture: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    reporter: Reporter | None = None,
    expected: dict[str, Any] | None = None,
    **options: Any,
) -> ResultFile:
    """Measure the robust accuracy of a model.

    Args:
        model: a registered model's name (`digits/natural`), a source of models without a card (`file:PATH`, `hf:REPO`,
            `timm:NAME`, `robustbench:NAME`, `package.module:function`; see docs/models.md), or any module in eval mode
            that maps images [N, C, H, W] in [0, 1] to logits [N, K].
        suite: a suite's name, or the path of a suite file.
        x: images [N, C, H, W] in [0, 1] for a source or a module of your own; sample ids are their positions.
        y: labels [N] of `x`.
        dataset: for a source or a module of your own, a known data set to test on (instead of x and y), or the name
            under which x and y are reported ("custom"). A robustbench source names its own.
        name: how it is called in results; by default the module's class name, or a name made of the source.
        architecture: for the weights of `file:` and `hf:`, the network: "wide_resnet:depth=28,widen_factor=10".
        mean: for `file:` and `hf:`, per channel of x in [0, 1]; normalization goes inside the module.
        std: goes with mean.
        reporter: hears of progress.
        expected: the identity that the run must have; one that differs is refused, with the fields named.
        **options: see `inputs.Options`.

    Returns:
        The result, as it is stored in result.json.

    Raises:
        RobbenchError: the model, the data or the options do not allow an honest number; the sentence says why.
    """
    keep_freed_memory()
    build = Build(architecture, mean, std)
    chosen = Options.given(options)
    return run_here(ready(model, suite, build, chosen, x, y, dataset, name, reporter or Silent(), expected))


def ready(
    model: str | nn.Module,
    suite: str,
    build: Build,
    options: Options,
    x: Tensor | None = None,
    y: Tensor | None = None,
    dataset: str | None = None,
    name: str | None = None,
    reporter: Reporter = Silent(),  # noqa: B008  # it holds nothing
    expected: dict[str, Any] | None = None,
    device: torch.device | None = None,
) -> Run:
    """Make a run of what `evaluate` was given; `device` is where its workers are, if not here."""
    loaded = load_suite(suite)
    target, images = resolve(model, x, y, dataset, name, build, options)
    description = describe_run(model, suite, dataset, name, build, options, own_images=x is not None)
    return Run(target, images, loaded, options, reporter, description, expected, device)


def run_suite(
    target: Target,
    images: Images,
    suite: Suite,
    options: Options,
    reporter: Reporter,
    description: dict[str, Any],
    expected: dict[str, Any] | None = None,
) -> ResultFile:
    """Run a suite on a model that is ready, in this process; see `evaluate`, and `runs.describe_run`."""
    return run_here(Run(target, images, suite, options, reporter, description, expected))


def run_here(run: Run) -> ResultFile:
    """Do a run in this process, stage by stage."""
    with run:
        if (known := run.open()) is not None:
            return known
        worker = Worker(run.job())
        run.points = worker.points
        run.begin(worker.look(run.positions))
        for k, stage in enumerate(run.stages):
            at = run.flow.take(k)
            run.reporter.stage(stage.name, len(at), int((~run.lacking[k]).sum()))
            if len(at):
                worker.attack(k, run.positions[at], functools.partial(run.take, k), functools.partial(run.narrowed, k))
                run.flow.finish(k, at)
            run.shards.flush()
        return run.finish(worker.end())


class Run:
    """A model, images, a suite and options, brought together: everything about a run but asking the model.

    Within `with run:`, first `open`; unless that returns the result, a worker's look goes into `begin`, records of the
    samples that `flow` hands out into `take`, and `finish` makes the result. Leaving keeps all records that came.

    Args:
        target: the model.
        images: the whole test set.
        suite: the attacks.
        options: what else was asked for.
        reporter: hears of progress.
        description: of the run, as it is written into its folder (`runs.describe_run`).
        expected: the identity that it must have.
        device: where the workers are, if not where the target is.
    """

    def __init__(
        self,
        target: Target,
        images: Images,
        suite: Suite,
        options: Options,
        reporter: Reporter,
        description: dict[str, Any],
        expected: dict[str, Any] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.target, self.images, self.suite, self.options, self.reporter = target, images, suite, options, reporter
        self.description, self.expected = description, expected
        self.coarse = options.gradients is not None
        if self.coarse and images.dtype != torch.float32:
            raise DataError(f"gradients in {options.gradients} given with images in {images.dtype}; allowed: float32.")
        self.threat = _threat(suite, images.dataset, options)
        self.stages = ready_stages(suite, self.threat, target, images, options)
        self.positions = select(len(images.y), options)
        self.index = images.index[self.positions]
        self.lanes = options.lanes or default_lanes(images.x(np.arange(1)).shape[1:], device or target.device)
        self.points: Callable[[bool], list[Points]] = lambda exact: []
        self.date = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        self.place = Place.of(target.device)
        self._flags: dict[str, str] = {}
        self._context = contextlib.ExitStack()
        self._overrides = {
            key: str(value)
            for key in ("norm", "eps", "sample_seed", "gradients")
            if (value := getattr(options, key)) is not None
        } | ({"seed": str(options.seed)} if options.seed else {})
        self._described = {s.name: s.describe() for s in self.stages}
        self.store = self._store(standard=not self._overrides)

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
            if self.expected is not None:
                store.require_identity(self.expected, self.title())
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
            result = self._summary(self.index, known, before.flags)
            kept = ("hardware", "versions", "environment", "date", "lanes", "flags")
            return result.model_copy(update={k: getattr(before, k) for k in kept})
        if store is not None:
            store.begin({**self.description, "n": len(self.positions), "stages": len(self.stages), "date": self.date})
        self.shards = self._context.enter_context(Shards(store, known, lambda exact: self.points(exact)))
        return None

    def job(self) -> Job:
        """Put together what a worker needs."""
        keep = self.store.run_id if self.store and self.keep else None
        ball = Ball.of(self.threat)
        return Job(self.target, self.stages, self.images, ball, self.suite.judge, self.lanes, self.coarse, keep)

    def forget_model(self) -> None:
        """Let go of the model once the workers have it: many runs may be under way."""
        self.target = replace(self.target, module=nn.Identity())

    def begin(self, first: First, workers: int = 1) -> None:
        """Take what the model answers to the clean images; from now on `flow` hands out samples."""
        label, known = self.images.y[self.positions].numpy(), self.shards.known
        correct = first.prediction == label
        self.place, self._prediction = first.place, first.prediction
        self._flags = self._noticed(self.before) | first.flags
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

    def take(self, k: int, rows: Columns) -> None:
        """Take records of stage k as they finish."""
        broken = rows["sample"][rows["status"] == Status.BROKEN]
        self.flow.broke[k] |= np.isin(self.index, broken)
        self.shards.add(self.stages[k].name, rows["status"], rows)
        self.reporter.progress(self.stages[k].name, len(rows["sample"]), len(broken))

    def narrowed(self, k: int, width: int, reason: str) -> None:
        """Hear that memory ran out at stage k."""
        self.lanes = min(self.lanes, width)
        self.reporter.note(f"{self.stages[k].name}: out of memory ({reason}); going on with {width} lanes.")

    def finish(self, flags: dict[str, str]) -> ResultFile:
        """Store the result, and return it for the samples that were asked for; `flags` are those of `Worker.end`."""
        self.shards.flush()
        flags = self._flags | flags
        rows = self.shards.rows()
        if self.store is not None:
            complete = self._complete(rows)
            order = self._official(rows.loc[complete, "sample"].unique())
            merged = ordered(rows[complete], order, [s.name for s in self.stages])
            result = self._summary(order, merged, flags)
            self.store.finish(merged, result, leftover=rows[~complete], keep=self.keep)
            if np.array_equal(order, self.index):
                return result
        return self._summary(self.index, rows, flags)

    @staticmethod
    def _samples(rows: pd.DataFrame, stage: ReadyStage) -> NDArray[np.int64]:
        found: NDArray[np.int64] = rows.loc[rows["attack"] == stage.name, "sample"].to_numpy()
        return found

    @staticmethod
    def _noticed(before: ResultFile | None) -> dict[str, str]:
        """Take over what earlier runs noticed about the model and this one may not meet again."""
        passing = {"randomized", "probabilities", "nonfinite_clean", "bfloat16", *MEASURED_FLAGS}
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

    def title(self) -> str:
        """Name the run as people speak of it."""
        return f"{self.images.dataset}/{self.target.name} · {self.suite.name} · {self.threat}"

    def _store(self, standard: bool) -> RunStore | None:
        if self.options.results is None:
            return None
        root, run = Path(self.options.results), self.identity()
        return RunStore(root, self.images.dataset, self.target.name, self.suite.name, run, standard)

    def identity(self) -> dict[str, Any]:
        """Name everything that determines a verdict; batch width, device and number of samples do not."""
        return {
            "schema": SCHEMA_VERSION,
            "engine": ENGINE_VERSION,
            "model": self.target.identity,
            "weights": self.target.weights,
            "data": self.images.digest,
            "dtype": str(self.images.dtype),
            "suite": {"name": self.suite.name, "judge": self.suite.judge, "mode": self.suite.mode},
            "attacks": [{"name": name, **about} for name, about in self._described.items()],
            "threat": {"norm": self.threat.norm, "eps": str(self.threat.eps)},
            "seed": self.options.seed,
            "sample_seed": self.options.sample_seed,
        } | ({"gradients": self.options.gradients} if self.coarse else {})

    def _official(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Order sample ids as the run selects them: officially, or as they were drawn."""
        order = self.images.index[select(len(self.images.y), self.options, everything=True)]
        kept: NDArray[np.int64] = order[np.isin(order, samples)]
        return kept

    def _summary(self, samples: NDArray[np.int64], rows: pd.DataFrame, flags: dict[str, str]) -> ResultFile:
        """Make the result for these samples."""
        total, options = len(self.images.y), self.options
        if options.sample_seed is not None:
            selection = f"{len(samples)} of {total} drawn with sample seed {options.sample_seed}"
        else:
            selection = f"all {total}" if len(samples) == total else f"first {len(samples)} of {total}"
        return summarize(
            rows[rows["sample"].isin(samples)],
            attacks=self._described,
            flags=flags,
            identity=self.identity(),
            model=self.target.name,
            dataset=self.images.dataset,
            threat=self.threat,
            suite=self.suite,
            seed=options.seed,
            overrides=self._overrides,
            selection=selection,
            lanes=self.lanes,
            hardware=self.place.hardware,
            versions=self.place.versions,
            environment=self.place.environment,
            date=self.date,
            paper=dict(self.target.paper),
        )


def _threat(suite: Suite, dataset: str, options: Options) -> Threat:
    if options.eps is None and options.norm is None:
        return suite.threat(dataset)
    if options.eps is None:
        raise SuiteError(f"--norm {options.norm} given without --eps: a radius of one norm means nothing in another.")
    norm = options.norm or (suite.threats[dataset].norm if dataset in suite.threats else "Linf")
    try:
        return parse_threat(norm, options.eps)
    except ValueError as error:
        raise SuiteError(str(error)) from None
