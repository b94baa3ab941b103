"""`robbench sanity`: the suite's attacks, the measurements, the checks and the verdict on one model."""

from __future__ import annotations

import contextlib
import datetime as dt
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import pandas as pd
import torch
from torch import nn

from robbench.attacks import PGD
from robbench.classifier.batch_width import BatchWidths, choose_lanes
from robbench.classifier.checks import RANDOMIZED_DRAWS
from robbench.classifier.prepare import Target
from robbench.core.errors import ModelError, ResultError, RobbenchError
from robbench.core.files import write_atomically
from robbench.core.machine import describe_device, keep_freed_memory, versions
from robbench.core.numbers import parse_threat
from robbench.core.parquet import encode_rows
from robbench.core.threat import Ball
from robbench.core.types import Status
from robbench.evaluation.inputs import Images, resolve, select
from robbench.evaluation.options import Options, check_names
from robbench.evaluation.progress import check_reporter
from robbench.evaluation.request import RunFields, RunRequest
from robbench.evaluation.run import EvaluationRun, Reporter, Silent, run_here
from robbench.evaluation.stages import ready_stages
from robbench.evaluation.transfer import Transfer
from robbench.masking.dropout import keep_dropout_on
from robbench.masking.gradient_probe import GradientProbe, ZeroGradientModel
from robbench.masking.landscape import compute_landscape
from robbench.masking.measure import run_measurements
from robbench.masking.measurements import Measurements
from robbench.masking.record import (
    FILE,
    LANDSCAPE,
    FollowUpResult,
    SanityFile,
    digest_landscape,
    read_sanity,
)
from robbench.masking.stored import describe_subject, find_foreign_facts, judge_measurements
from robbench.models.spec import ModelSpec
from robbench.results.locking import lock_result
from robbench.results.places import locate_result
from robbench.results.schema import ResultFile, dump_sealed
from robbench.results.store import read_rows
from robbench.suite import load_suite

__all__ = ["SAMPLES", "SUITE", "Examined", "examine", "run_sanity"]

SUITE = "sanity"
SAMPLES = 200
_SHOWN = 8  # images with a drawn loss landscape


class Examined(NamedTuple):
    """What a sanity run found: the result of its suite for the images that were asked for, and the verdict."""

    result: ResultFile
    sanity: SanityFile


def examine(
    model: str | nn.Module,
    *,
    act: bool = False,
    reporter: Reporter | None = None,
    **fields: Unpack[RunFields],
) -> SanityFile:
    """Check whether a robust accuracy of this model can be trusted: `robbench.sanity`, which says what is given."""
    check_names(fields, RunFields)
    request = RunRequest(ModelSpec.take(model, fields), SUITE, Options.take({"samples": SAMPLES, **fields}))
    return run_sanity(request, reporter, act=act).sanity


def run_sanity(request: RunRequest, reporter: Reporter | None = None, *, act: bool = False) -> Examined:
    """Run the sanity suite, measure, and judge; see `examine`.

    Args:
        request: what to examine; its suite does not count.
        reporter: hears of progress.
        act: run the suite that is advised, too.

    Raises:
        RobbenchError: the model, the data or the options do not allow it; the sentence says why.
    """
    check_reporter(reporter)
    keep_freed_memory()
    if request.options.target is not None:
        raise RobbenchError("--target given with the sanity checks, which ask whether any other class can be reached.")
    if request.options.gradients is not None:
        raise RobbenchError(
            f"--gradients {request.options.gradients} given with the sanity checks, which look at the gradients "
            "themselves."
        )
    request = replace(request, suite=SUITE)
    if isinstance(request.spec.model, nn.Module):
        request = replace(request, spec=replace(request.spec, model=keep_dropout_on(request.spec.model)))
    target, images = resolve(request.spec, request.options)
    _check_memory(images, len(select(len(images.y), request.options)))
    with contextlib.ExitStack() as stack:
        if request.options.results is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="robbench-"))
            request = replace(request, options=replace(request.options, results=folder))
        return _Examination(request, target, images, reporter or Silent()).run(act)


class _Examination:
    """A model, images and options; its results tree is there."""

    def __init__(self, request: RunRequest, target: Target, images: Images, reporter: Reporter) -> None:
        self.differentiable = _differentiable(target, images)
        self.target = target if self.differentiable else replace(target, module=ZeroGradientModel(target.module).eval())
        self.request, self.images, self.options, self.reporter = request, images, request.options, reporter
        self.suite = load_suite(SUITE)

    def run(self, act: bool) -> Examined:
        """Attack, measure what is not known, judge, and store."""
        assert self.options.results is not None
        root = Path(self.options.results)
        begin = time.perf_counter()
        result = run_here(EvaluationRun(self.request, self.target, self.images, self.suite, self.reporter))
        folder = locate_result(root, result)
        # An evaluation of the suite writes here, too. If another process has come between, this one waits for it.
        with lock_result(root, folder, wait=True, note=self.reporter.note):
            return Examined(result, self._judge(result, folder, begin, act))

    def _judge(self, result: ResultFile, folder: Path, begin: float, act: bool) -> SanityFile:
        """Measure what is not known, judge, and write sanity.json. The folder is locked."""
        known = self._known(folder / FILE, result)
        if known is None:
            rows = read_rows(folder / "outcomes.parquet")
            taken = self.images.index[select(len(self.images.y), self.options)]
            measurements = self._measure(result, rows[rows["sample"].isin(taken)], folder)
            found = self._describe(result, folder, measurements, time.perf_counter() - begin)
        else:
            # What was measured stands; the checks are made again, by the thresholds of today.
            described = {name: getattr(known, name) for name in _DESCRIBED}
            if not known.landscape:
                self.reporter.note(
                    f"{folder / FILE} has no digest of {LANDSCAPE}. The losses in it are measured again."
                )
                self._measure_landscape(result, folder)
                described["landscape"] = digest_landscape(folder)
            found = judge_measurements(described, known.measurements)
        acted = found.acted
        if act and found.advice.suite and acted is None:
            acted = self._act(found.advice.suite)
        if acted is not None:  # both are upper bounds on the same images
            lower = min(acted.robust_accuracy, found.measurements.best, key=lambda accuracy: accuracy.value)
            found = found.model_copy(update={"acted": acted.model_copy(update={"robust_accuracy": lower})})
        write_atomically(folder / FILE, dump_sealed(found))
        return found

    def _known(self, path: Path, result: ResultFile) -> SanityFile | None:
        if not path.exists() or not path.with_name(LANDSCAPE).exists():
            return None
        try:
            stored = read_sanity(path)
            if stored.identity != describe_subject(result, result.n, path.parent.name)["identity"]:
                return None
            problem = find_foreign_facts(stored, path.parent)
        except ResultError as error:
            problem = str(error)
        if problem:
            self.reporter.note(f"{path}: {problem} The model is measured again.")
            return None
        return stored

    def _measure(self, result: ResultFile, rows: pd.DataFrame, folder: Path) -> Measurements:
        first = rows[rows["attack"] == result.attacks[0].name]
        right = first.loc[first["status"] != Status.MISCLASSIFIED, "sample"].to_numpy()
        if not len(right):
            raise ModelError(
                f"The model gets none of {result.n} images right, so there is nothing to attack. Check labels and "
                "normalization, or take more --samples."
            )
        flags = result.flags
        probe = self._probe(np.isin(self.images.index, right), result, RANDOMIZED_DRAWS if "randomized" in flags else 1)
        threat = parse_threat(result.threat.norm, result.threat.eps)
        stages = ready_stages(self.suite, threat, self.target, self.images, self.options)
        self.reporter.note(f"{self.images.dataset}/{self.target.name}: measuring gradients, radii, step sizes, curves.")
        measurements = run_measurements(
            probe,
            result,
            rows,
            [s for s in stages if isinstance(s.attack, Transfer)],
            differentiable=self.differentiable,
            probabilities="probabilities" in flags,
        )
        return measurements.model_copy(update={"cost": measurements.cost | self._measure_landscape(result, folder)})

    def _measure_landscape(self, result: ResultFile, folder: Path) -> dict[str, Any]:
        """Write landscape.parquet, and return the cost of it."""
        shown = np.zeros(len(self.images.y), bool)
        shown[select(len(self.images.y), self.options)[:_SHOWN]] = True
        probe = self._probe(shown, result, 1)
        with probe.count_cost("landscape"):
            frame = compute_landscape(probe, PGD(objective="ce_scaled", steps=20))
        write_atomically(folder / LANDSCAPE, encode_rows(frame))
        return probe.costs

    def _probe(self, where: np.ndarray[Any, np.dtype[np.bool_]], result: ResultFile, draws: int) -> GradientProbe:
        at = np.flatnonzero(where)
        x = self.images.x(at)
        shape, device = tuple(x.shape[1:]), self.target.device
        lanes = choose_lanes(self.options.lanes, len(at), shape, device)
        return GradientProbe(
            target=self.target,
            x=x,
            y=self.images.y[torch.from_numpy(at)],
            sample=self.images.index[at],
            ball=Ball.of(parse_threat(result.threat.norm, result.threat.eps), self.options.levels),
            seed=self.options.seed,
            widths=BatchWidths(self.target.module, shape, lanes, self.images.dtype),
            draws=draws,
        )

    def _describe(self, result: ResultFile, folder: Path, measurements: Measurements, seconds: float) -> SanityFile:
        described = describe_subject(result, result.n, folder.name) | {
            "seconds": round(seconds, 1),
            "hardware": describe_device(self.target.device),
            "versions": versions(),
            "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "landscape": digest_landscape(folder),
        }
        return judge_measurements(described | {"acted": None}, measurements)

    def _act(self, suite: str) -> FollowUpResult:
        """Run the advised suite on the same images."""
        loaded, options = load_suite(suite), self.options
        if self.images.dataset not in loaded.threats and options.eps is None:
            threat = self.suite.threat(self.images.dataset)
            options = replace(options, norm=threat.norm, eps=threat.eps_text)
        if all(stage.kind != Transfer.kind for stage in loaded.stages(self.images.dataset)):
            options = replace(options, surrogate=None)
        request = replace(self.request, suite=suite, options=options)
        result = run_here(EvaluationRun(request, self.target, self.images, loaded, self.reporter))
        return FollowUpResult(suite=suite, run_id=result.run_id, robust_accuracy=result.robust_accuracy)


_DESCRIBED = (
    "identity", "run_id", "folder", "measured", "model", "dataset", "threat", "n", "seed", "seconds", "hardware",
    "versions", "date", "acted", "landscape",
)  # fmt: skip


_MOST_BYTES = 2**31  # of images that the measurements hold in memory at once


def _check_memory(images: Images, n: int) -> None:
    """Refuse more images than the measurements may hold in memory, before anything is attacked.

    Raises:
        RobbenchError: the message names the number of images that is allowed.
    """
    each = math.prod(images.shape) * images.dtype.itemsize
    if n > max(1, _MOST_BYTES // each):
        raise RobbenchError(
            f"{n} images of {' × '.join(map(str, images.shape))} given to the sanity checks, which hold all of them in "
            f"memory ({n * each / 2**30:.1f} GiB); allowed: --samples {max(1, _MOST_BYTES // each)} or fewer."
        )


def _differentiable(target: Target, images: Images) -> bool:
    """Return whether autograd connects the model's output to its input."""
    x = images.x(np.arange(min(2, len(images.y)))).to(target.device).requires_grad_(True)
    with torch.enable_grad():
        answer = target.module(x)
    return bool(answer.requires_grad)
