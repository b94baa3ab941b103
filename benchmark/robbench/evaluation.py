"""One model × one suite → one result: the run, its records, and how it resumes."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench import engine, rng
from robbench.attacks import Attack, describe
from robbench.errors import RobbenchError, SuiteError
from robbench.hardware import describe_device, versions
from robbench.inputs import Images, Options, own_images, own_target, registered, select
from robbench.memory import keep_freed_memory
from robbench.store import SCHEMA_VERSION, ResultFile, RunStore, empty_rows, read_result
from robbench.suite import Suite, build_attack, load_suite
from robbench.summary import summarize
from robbench.target import Target, classify, pick_device, time_round
from robbench.threat import Ball, parse_threat
from robbench.types import Status, Threat
from robbench.widths import Widths, default_lanes

__all__ = ["Reporter", "Silent", "evaluate"]

ENGINE_VERSION = 1  # raised when the judge, the random numbers or the meaning of a record change
_COMMIT_SECONDS = 5.0  # at most this much work is lost by a kill


class Reporter(Protocol):
    """Hears how a run goes; the command line draws bars from it."""

    def plan(self, title: str, stages: Sequence[str], n: int, clean: int, seconds: float, device: str) -> None:
        """Hear of a run before its first attack; `seconds` is what it takes if nothing breaks."""

    def stage(self, name: str, todo: int, done: int) -> None:
        """Hear of an attack's start: samples to attack, and how many are known from an earlier run."""

    def progress(self, name: str, finished: int, broken: int) -> None:
        """Hear of samples that just finished."""

    def note(self, text: str) -> None:
        """Hear of something a user should know at once."""


class Silent:
    """A reporter that says nothing."""

    def plan(self, title: str, stages: Sequence[str], n: int, clean: int, seconds: float, device: str) -> None:
        """Ignore it."""

    def stage(self, name: str, todo: int, done: int) -> None:
        """Ignore it."""

    def progress(self, name: str, finished: int, broken: int) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""


def evaluate(
    model: str | nn.Module,
    suite: str = "whitebox",
    *,
    x: Tensor | None = None,
    y: Tensor | None = None,
    dataset: str | None = None,
    name: str | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> ResultFile:
    """Measure the robust accuracy of a model.

    Args:
        model: a registered model's name (`digits/natural`), or any module in eval mode that maps images
            [N, C, H, W] in [0, 1] to logits [N, K].
        suite: a suite's name, or the path of a suite file.
        x: images [N, C, H, W] in [0, 1] for a module of your own; sample ids are their positions.
        y: labels [N] of `x`.
        dataset: for a module of your own, a known data set to test on (instead of x and y), or the name under
            which x and y are reported ("custom").
        name: how a module of your own is called in results; its class name by default.
        reporter: hears of progress.
        **options: see `inputs.Options`.

    Returns:
        The result, as it is stored in result.json.

    Raises:
        RobbenchError: the model, the data or the options do not allow an honest number; the sentence says why.
    """
    try:
        chosen = Options(**options)
    except TypeError:
        allowed = ", ".join(Options.__dataclass_fields__)
        raise RobbenchError(f"Unknown option in {sorted(options)}; allowed: {allowed}.") from None
    device = pick_device(chosen.device)
    keep_freed_memory()
    loaded = load_suite(suite)
    if isinstance(model, str):
        if x is not None or y is not None or dataset is not None or name is not None:
            raise RobbenchError("x, y, dataset and name go with a module of your own, not with a registered name.")
        target, data = registered(model, device, chosen)
        images = Images.of(data)
    else:
        images = own_images(x, y, dataset, chosen)
        target = own_target(model, name, device, images)
    return _Run(target, images, loaded, chosen, reporter or Silent()).go()


@dataclass(frozen=True)
class _Stage:
    name: str
    attack: Attack
    key: tuple[int, int]


@dataclass(eq=False)
class _Shards:
    """Rows of the run: those known from disk, and new ones, committed every few seconds and on the way out."""

    store: RunStore | None
    rows: list[pd.DataFrame]
    fresh: list[pd.DataFrame] = field(default_factory=list)
    last: float = field(default_factory=time.monotonic)

    def add(self, rows: pd.DataFrame) -> None:
        if len(rows):
            self.rows.append(rows)
            self.fresh.append(rows)
        if time.monotonic() - self.last > _COMMIT_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.fresh and self.store is not None:
            for _, shard in pd.concat(self.fresh, ignore_index=True).groupby("attack", sort=False):
                self.store.commit(shard)
        self.fresh = []
        self.last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()


class _Run:
    """A model, images, a suite and options, brought together."""

    def __init__(self, target: Target, images: Images, suite: Suite, options: Options, reporter: Reporter) -> None:
        self.target, self.images, self.suite, self.options, self.reporter = target, images, suite, options, reporter
        self.threat = _threat(suite, images.dataset, options)
        self.stages = [
            _Stage(s.name, build_attack(s), rng.make_key(options.seed, s.name)) for s in suite.stages(images.dataset)
        ]
        self.positions = select(len(images.y), options)
        self.shape = tuple(images.x(np.arange(1)).shape[1:])
        lanes = options.lanes or default_lanes(self.shape, target.device)
        self.widths = Widths(target.module, self.shape, lanes, images.dtype)
        self.date = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")

    def go(self) -> ResultFile:
        """Compute what is missing, store it, and return the result for the samples that were asked for."""
        images, options = self.images, self.options
        overrides = {
            key: str(value)
            for key, value in (("norm", options.norm), ("eps", options.eps), ("sample_seed", options.sample_seed))
            if value is not None
        } | ({"seed": str(options.seed)} if options.seed else {})
        store = self._store(standard=not overrides)
        rows = store.open(options.overwrite) if store else empty_rows()
        x, y = images.x(self.positions), images.y[self.positions]
        with _Shards(store, [rows]) as shards:
            prediction, flags = classify(self.target, x, y, images.num_classes, self.widths.lanes)
            computed = self._attack(x, y, prediction, shards)
        everything = pd.concat(shards.rows, ignore_index=True)
        summary = _Summary(self, overrides, flags, store)
        result = summary.of(images.index[self.positions], everything)
        if store is None:
            return result
        before = summary.stored()
        if computed or before is None:
            known = everything.groupby("sample").size()
            complete = known.index[known == len(self.stages)].to_numpy()
            order = self._official(complete)
            merged = summary.of(order, everything)
            store.finish(_ordered(everything, order, [s.name for s in self.stages]), merged)
            leftover = everything[~everything["sample"].isin(complete)]
            if len(leftover):
                for _, shard in leftover.groupby("attack"):
                    store.commit(shard)
        else:  # nothing new: the hardware and the date are those of the computation, not of this look at it
            result = result.model_copy(
                update={k: getattr(before, k) for k in ("hardware", "versions", "date", "lanes", "flags")}
            )
        return result

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
            "attacks": [{"name": s.name, **describe(s.attack)} for s in self.stages],
            "threat": {"norm": self.threat.norm, "eps": str(self.threat.eps)},
            "seed": self.options.seed,
            "sample_seed": self.options.sample_seed,
        }

    def _official(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Order sample ids as the run selects them: officially, or as they were drawn."""
        order = self.images.index[select(len(self.images.y), self.options, everything=True)]
        kept: NDArray[np.int64] = order[np.isin(order, samples)]
        return kept

    def _attack(self, x: Tensor, y: Tensor, prediction: NDArray[np.int64], shards: _Shards) -> bool:
        """Run every stage on what it lacks; tells whether anything was computed."""
        index = self.images.index[self.positions]
        label = y.numpy()
        correct = prediction == label
        known = shards.rows[0]
        missing = {s.name: ~np.isin(index, known.loc[known["attack"] == s.name, "sample"]) for s in self.stages}
        self._announce(correct, missing)
        broken = np.zeros(len(index), bool)
        for stage in self.stages:
            lacking = missing[stage.name]
            shards.add(_unattacked(index, label, prediction, lacking & ~correct, stage.name, Status.MISCLASSIFIED))
            todo = lacking & correct
            if self.suite.mode == "cascade":
                shards.add(_unattacked(index, label, prediction, todo & broken, stage.name, Status.SKIPPED))
                todo &= ~broken
            self.reporter.stage(stage.name, int(todo.sum()), int((~lacking).sum()))
            if todo.any():
                self._run_stage(stage, x, y, index, np.flatnonzero(todo), shards)
            shards.flush()
            for rows in shards.rows:
                hit = rows.loc[(rows["attack"] == stage.name) & (rows["status"] == Status.BROKEN), "sample"]
                broken |= np.isin(index, hit)
        return any(m.any() for m in missing.values())

    def _run_stage(
        self,
        stage: _Stage,
        x: Tensor,
        y: Tensor,
        index: NDArray[np.int64],
        todo: NDArray[np.int64],
        shards: _Shards,
    ) -> None:
        labels = dict(zip(index.tolist(), y.tolist(), strict=True))

        def finished(rows: engine.Rows) -> None:
            shards.add(_frame(rows, stage.name, labels))
            self.reporter.progress(stage.name, len(rows.sample), int(rows.broken.sum()))

        def narrowed(width: int, reason: str) -> None:
            self.reporter.note(f"{stage.name}: out of memory ({reason}); going on with {width} lanes.")

        engine.attack_samples(
            self.target.module,
            stage.attack,
            x[todo],
            y[todo],
            index[todo],
            Ball.of(self.threat),
            key=stage.key,
            judge=self.suite.judge,
            widths=self.widths,
            on_rows=finished,
            on_narrow=narrowed,
        )

    def _announce(self, correct: NDArray[np.bool_], missing: dict[str, NDArray[np.bool_]]) -> None:
        seconds = 0.0
        if any((m & correct).any() for m in missing.values()):
            one = time_round(self.target, self.shape, self.widths.lanes, self.images.dtype)
            for stage in self.stages:
                batches = -(-int((missing[stage.name] & correct).sum()) // self.widths.lanes)
                seconds += one * batches * stage.attack.trials * (stage.attack.steps + 1)
        title = f"{self.images.dataset}/{self.target.name} · {self.suite.name} · {self.threat}"
        names = [s.name for s in self.stages]
        self.reporter.plan(title, names, len(correct), int(correct.sum()), seconds, str(self.target.device))


@dataclass(frozen=True, eq=False)
class _Summary:
    """Turns rows into results of this run."""

    run: _Run
    overrides: dict[str, str]
    flags: dict[str, str]
    store: RunStore | None

    def stored(self) -> ResultFile | None:
        """The result on disk, if this run has one."""
        if self.store is None or not self.store.result_path.exists():
            return None
        return read_result(self.store.result_path)

    def of(self, samples: NDArray[np.int64], rows: pd.DataFrame) -> ResultFile:
        run = self.run
        total = len(run.images.y)
        if run.options.sample_seed is not None:
            selection = f"{len(samples)} of {total} drawn with sample seed {run.options.sample_seed}"
        else:
            selection = f"all {total}" if len(samples) == total else f"first {len(samples)} of {total}"
        return summarize(
            rows[rows["sample"].isin(samples)],
            attacks={s.name: describe(s.attack) for s in run.stages},
            flags=self.flags,
            identity=run.identity(),
            model=run.target.name,
            dataset=run.images.dataset,
            threat=run.threat,
            suite=run.suite,
            seed=run.options.seed,
            overrides=self.overrides,
            selection=selection,
            lanes=run.widths.lanes,
            hardware=describe_device(run.target.device),
            versions=versions(),
            date=run.date,
            paper=dict(run.target.paper),
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


def _frame(rows: engine.Rows, attack: str, labels: dict[int, int]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "sample": rows.sample,
            "attack": attack,
            "status": np.where(rows.broken, Status.BROKEN.value, Status.ROBUST.value),
            "label": [labels[i] for i in rows.sample.tolist()],
            "prediction": rows.prediction,
            "trial": rows.trial,
            "step": rows.step,
            "forwards": rows.forwards,
            "backwards": rows.backwards,
            "distance": rows.distance,
            "zero_gradients": rows.zero_gradients,
            "nonfinite": rows.nonfinite,
            "seconds": rows.seconds,
        }
    )


def _unattacked(
    index: NDArray[np.int64],
    label: NDArray[np.int64],
    prediction: NDArray[np.int64],
    where: NDArray[np.bool_],
    attack: str,
    status: Status,
) -> pd.DataFrame:
    """Rows of samples that a stage has nothing to do for."""
    rows = pd.DataFrame({"sample": index[where], "attack": attack, "status": status.value})
    rows = rows.assign(label=label[where], prediction=prediction[where])
    rows = rows.assign(trial=0, step=0, forwards=0, backwards=0, distance=np.nan)
    return rows.assign(zero_gradients=0, nonfinite=0, seconds=0.0)


def _ordered(rows: pd.DataFrame, samples: NDArray[np.int64], stages: list[str]) -> pd.DataFrame:
    """Rows of complete samples, by sample and stage: the same file whatever the order of computation."""
    place = {int(s): i for i, s in enumerate(samples)}
    kept = rows[rows["sample"].isin(place)]
    by = pd.DataFrame({"s": kept["sample"].map(place), "a": kept["attack"].map({n: i for i, n in enumerate(stages)})})
    return kept.loc[by.sort_values(["s", "a"]).index].reset_index(drop=True)
