"""One model × one suite → one result: the run, its records, and how it resumes."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench import engine
from robbench.errors import SuiteError
from robbench.hardware import describe_device, environment, held_bytes, versions
from robbench.inputs import Images, Options, resolve, select
from robbench.keeping import Keeper
from robbench.locking import lock_result
from robbench.memory import Growth, keep_freed_memory
from robbench.models.sources import Build
from robbench.numbers import parse_threat
from robbench.reporting import Reporter, Silent
from robbench.runs import describe_run
from robbench.shards import NOTHING, Shards, ordered
from robbench.stages import ReadyStage, ready_stages, run_stage
from robbench.store import COLUMNS, SCHEMA_VERSION, ResultFile, RunStore, empty_rows, read_result
from robbench.suite import Suite, load_suite
from robbench.summary import MEASURED_FLAGS, summarize
from robbench.target import Target, answers, classify, drift, time_round
from robbench.threat import Ball
from robbench.types import Status, Threat
from robbench.widths import Widths, default_lanes

__all__ = ["Reporter", "Silent", "evaluate", "run_suite"]

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
    chosen = Options.given(options)
    keep_freed_memory()
    loaded = load_suite(suite)
    build = Build(architecture, mean, std)
    target, images = resolve(model, x, y, dataset, name, build, chosen)
    description = describe_run(model, suite, dataset, name, build, chosen, own_images=x is not None)
    return run_suite(target, images, loaded, chosen, reporter or Silent(), description, expected)


def run_suite(
    target: Target,
    images: Images,
    suite: Suite,
    options: Options,
    reporter: Reporter,
    description: dict[str, Any],
    expected: dict[str, Any] | None = None,
) -> ResultFile:
    """Run a suite on a model that is ready; see `evaluate`, and `runs.describe_run` for the description."""
    run = _Run(target, images, suite, options, reporter)
    run.description, run.expected = description, expected
    return run.go()


class _Run:
    """A model, images, a suite and options, brought together."""

    def __init__(self, target: Target, images: Images, suite: Suite, options: Options, reporter: Reporter) -> None:
        self.target, self.images, self.suite, self.options, self.reporter = target, images, suite, options, reporter
        self.threat = _threat(suite, images.dataset, options)
        self.stages = ready_stages(suite, self.threat, target, images, options)
        self.positions = select(len(images.y), options)
        self.shape = tuple(images.x(np.arange(1)).shape[1:])
        lanes = options.lanes or default_lanes(self.shape, target.device)
        self.widths = Widths(target.module, self.shape, lanes, images.dtype)
        self.deterministic = True
        self.growth = Growth()
        self.description: dict[str, Any] = {}
        self.expected: dict[str, Any] | None = None
        self.date = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")

    def go(self) -> ResultFile:
        """Compute what is missing, store it, and return the result for the samples that were asked for."""
        options = self.options
        overrides = {
            key: str(value)
            for key, value in (("norm", options.norm), ("eps", options.eps), ("sample_seed", options.sample_seed))
            if value is not None
        } | ({"seed": str(options.seed)} if options.seed else {})
        store = self._store(standard=not overrides)
        if store is None:
            return self._go(None, overrides)
        if self.expected is not None:
            store.expect(self.expected, self.title())
        with lock_result(Path(options.results or "."), store.folder, options.wait, self.reporter.note):
            return self._go(store, overrides)

    def _go(self, store: RunStore | None, overrides: dict[str, str]) -> ResultFile:
        images, options = self.images, self.options
        known = store.open(options.overwrite, self.reporter.note) if store else empty_rows()
        before = read_result(store.result_path) if store and store.result_path.exists() else None
        keeper = None
        if store and (options.save_adversarials or store.keeps_adversarials):
            keeper = Keeper(store.run_id, self.target, images, Ball.of(self.threat), self.widths)
            known = self._forget(known, store)
        missing = self._missing(known)
        # A kill between the records and the summary of an extension leaves a summary of too few samples.
        whole = before is not None and before.n == known.loc[self._complete(known), "sample"].nunique()
        if before is not None and whole and not any(m.any() for m in missing.values()):
            # Nothing to compute: hardware, date and flags stay those of the computation.
            self.reporter.note(f"{self.title()}: known since {before.date[:10]}, nothing to compute.")
            result = self._summary(images.index[self.positions], known, overrides, before.flags)
            kept = ("hardware", "versions", "environment", "date", "lanes", "flags")
            return result.model_copy(update={k: getattr(before, k) for k in kept})
        if store is not None:
            store.begin({**self.description, "n": len(self.positions), "stages": len(self.stages), "date": self.date})
        x, y = images.x(self.positions), images.y[self.positions]
        with Shards(store, [known], keeper) as shards:
            sample = images.index[self.positions]
            prediction, flags = classify(self.target, x, y, images.num_classes, self.widths.lanes, sample)
            self._announce(prediction == y.numpy(), missing)
            self.deterministic = "randomized" not in flags
            if keeper is not None:
                keeper.exact = not self.deterministic
            flags = self._noticed(before) | flags
            first, lanes = x[: self.widths.lanes], self.widths.lanes
            at_first = answers(self.target, first, lanes)
            self._attack(x, y, prediction, missing, shards)
            flags |= self._after(first, at_first, lanes)
        rows = pd.concat(shards.rows, ignore_index=True)
        if store is not None:
            complete = self._complete(rows)
            order = self._official(rows.loc[complete, "sample"].unique())
            merged = ordered(rows[complete], order, [s.name for s in self.stages])
            result = self._summary(order, merged, overrides, flags)
            store.finish(merged, result, leftover=rows[~complete], keep=keeper is not None)
        return self._summary(images.index[self.positions], rows, overrides, flags)

    @staticmethod
    def _noticed(before: ResultFile | None) -> dict[str, str]:
        """Take over what earlier runs noticed about the model and this one may not meet again."""
        passing = {"randomized", "probabilities", "nonfinite_clean", *MEASURED_FLAGS}
        return {} if before is None else {k: v for k, v in before.flags.items() if k not in passing}

    def _after(self, x: Tensor, at_first: Tensor, lanes: int) -> dict[str, str]:
        """Look at the model and the memory again when the attacks are over; returns flags."""
        flags = drift(self.target, x, at_first, lanes) if self.deterministic else {}
        if leaked := self.growth.leaked:
            flags["memory"] = (
                f"Memory in use grew steadily, by {leaked / 2**20:.0f} MiB after the first third of the run: something "
                "in the model keeps what it is given. A longer run may be killed; the same command then goes on."
            )
        return flags

    def _forget(self, known: pd.DataFrame, store: RunStore) -> pd.DataFrame:
        """Drop breaks that were found before adversarial examples were kept, so that they are computed again.

        Only among the samples that were asked for. In a cascade, what later stages skipped is decided again with them.
        """
        asked = known["sample"].isin(self.images.index[self.positions])
        lacking = asked & store.without_adversarials(known)
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

    def _missing(self, known: pd.DataFrame) -> dict[str, NDArray[np.bool_]]:
        """Tell for every stage which of the samples it has no record of."""
        index = self.images.index[self.positions]
        return {s.name: ~np.isin(index, known.loc[known["attack"] == s.name, "sample"]) for s in self.stages}

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
            "attacks": [{"name": s.name, **s.describe()} for s in self.stages],
            "threat": {"norm": self.threat.norm, "eps": str(self.threat.eps)},
            "seed": self.options.seed,
            "sample_seed": self.options.sample_seed,
        }

    def _official(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Order sample ids as the run selects them: officially, or as they were drawn."""
        order = self.images.index[select(len(self.images.y), self.options, everything=True)]
        kept: NDArray[np.int64] = order[np.isin(order, samples)]
        return kept

    def _attack(
        self,
        x: Tensor,
        y: Tensor,
        prediction: NDArray[np.int64],
        missing: dict[str, NDArray[np.bool_]],
        shards: Shards,
    ) -> None:
        """Run every stage on what it lacks."""
        index, label, known = self.images.index[self.positions], y.numpy(), shards.rows[0]
        deciding = [s.name for s in self.stages if self._decides(s)]
        broke = (known["status"] == Status.BROKEN) & known["attack"].isin(deciding)
        broken = np.isin(index, known.loc[broke, "sample"])
        for stage in self.stages:
            lacking = missing[stage.name]
            idle = {Status.MISCLASSIFIED: lacking & (prediction != label)}
            todo = lacking & (prediction == label)
            if self.suite.mode != "full":
                idle[Status.SKIPPED] = todo & broken
                todo &= ~broken
            for status, where in idle.items():
                rows = {"sample": index[where], "label": label[where], "prediction": prediction[where]}
                shards.add(stage.name, status.value, {**NOTHING, **rows})
            self.reporter.stage(stage.name, int(todo.sum()), int((~lacking).sum()))
            if todo.any():
                found = np.isin(index, self._run_stage(stage, x[todo], y[todo], index[todo], shards))
                if self._decides(stage):
                    broken |= found
            shards.flush()

    def _decides(self, stage: ReadyStage) -> bool:
        """Tell whether what this stage breaks is spared from later ones (where any is, in this mode)."""
        return self.suite.mode == "cascade" or stage is self.stages[0]

    def _run_stage(
        self, stage: ReadyStage, x: Tensor, y: Tensor, index: NDArray[np.int64], shards: Shards
    ) -> NDArray[np.int64]:
        """Run one attack; returns the samples that it broke."""
        labels = dict(zip(index.tolist(), y.tolist(), strict=True))

        def finished(rows: engine.Rows, claimed: NDArray[np.bool_]) -> None:
            columns = {name: getattr(rows, name) for name in COLUMNS if hasattr(rows, name)}
            columns["label"] = [labels[i] for i in rows.sample.tolist()]
            columns["claimed"] = claimed
            if shards.keeper is not None:  # before the rows, so that a shard has both
                shards.keeper.take(stage.name, rows)
            shards.add(stage.name, np.where(rows.broken, Status.BROKEN.value, Status.ROBUST.value), columns)
            kept = 0 if rows.x_adv is None else rows.x_adv.nbytes
            self.growth.look(held_bytes(self.target.device), kept + 200 * len(rows.sample))
            self.reporter.progress(stage.name, len(rows.sample), int(rows.broken.sum()))

        def narrowed(width: int, reason: str) -> None:
            self.reporter.note(f"{stage.name}: out of memory ({reason}); going on with {width} lanes.")

        return run_stage(
            stage,
            self.target,
            self.images,
            x,
            y,
            index,
            Ball.of(self.threat),
            widths=self.widths,
            judge=self.suite.judge,
            deterministic=self.deterministic,
            on_rows=finished,
            on_narrow=narrowed,
            keep_adversarials=shards.keeper is not None,
        )

    def _announce(self, correct: NDArray[np.bool_], missing: dict[str, NDArray[np.bool_]]) -> None:
        seconds = 0.0
        if any((m & correct).any() for m in missing.values()):
            one = time_round(self.target, self.shape, self.widths.lanes, self.images.dtype)
            for stage in self.stages:
                batches = -(-int((missing[stage.name] & correct).sum()) // self.widths.lanes)
                seconds += 0.0 if math.isnan(one) else one * batches * stage.passes
        names = [s.name for s in self.stages]
        self.reporter.plan(self.title(), names, len(correct), int(correct.sum()), seconds, str(self.target.device))

    def _summary(
        self, samples: NDArray[np.int64], rows: pd.DataFrame, overrides: dict[str, str], flags: dict[str, str]
    ) -> ResultFile:
        """Make the result for these samples."""
        total, options = len(self.images.y), self.options
        if options.sample_seed is not None:
            selection = f"{len(samples)} of {total} drawn with sample seed {options.sample_seed}"
        else:
            selection = f"all {total}" if len(samples) == total else f"first {len(samples)} of {total}"
        return summarize(
            rows[rows["sample"].isin(samples)],
            attacks={s.name: s.describe() for s in self.stages},
            flags=flags,
            identity=self.identity(),
            model=self.target.name,
            dataset=self.images.dataset,
            threat=self.threat,
            suite=self.suite,
            seed=options.seed,
            overrides=overrides,
            selection=selection,
            lanes=self.widths.lanes,
            hardware=describe_device(self.target.device),
            versions=versions(),
            environment=environment(self.target.device),
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
