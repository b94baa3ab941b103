"""`robbench sanity`: the suite's attacks, the measurements, the checks and the verdict on one model."""

from __future__ import annotations

import datetime as dt
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from robbench.attacks import PGD
from robbench.classifier.batch_width import Widths, default_lanes
from robbench.classifier.checks import RANDOMIZED_DRAWS
from robbench.classifier.prepare import Target
from robbench.core.errors import ModelError
from robbench.core.files import digest, write_atomically
from robbench.core.machine import describe_device, keep_freed_memory, versions
from robbench.core.numbers import parse_threat
from robbench.core.threat import Ball
from robbench.core.types import Status
from robbench.evaluation.describe import describe_run
from robbench.evaluation.inputs import Images, Options, resolve, select
from robbench.evaluation.run import Reporter, Silent, run_suite
from robbench.evaluation.stages import ready_stages
from robbench.evaluation.transfer import Transfer
from robbench.masking.checks import run_checks
from robbench.masking.dropout import keep_dropout_on
from robbench.masking.gradient_probe import GradientProbe, ZeroGradientModel
from robbench.masking.landscape import compute_landscape
from robbench.masking.measure import run_measurements
from robbench.masking.measurements import Measurements
from robbench.masking.record import (
    FILE,
    LANDSCAPE,
    PROBE_VERSION,
    FollowUpResult,
    SanityFile,
    dump_sanity,
    extract_subject,
    read_sanity,
)
from robbench.masking.verdict import advise_next_suite, decide_verdict
from robbench.models.sources import Build
from robbench.results.schema import ResultFile
from robbench.results.store import read_rows, result_folder
from robbench.suite import load_suite

__all__ = ["SAMPLES", "SUITE", "examine"]

SUITE = "sanity"
SAMPLES = 200
_SHOWN = 8  # images with a drawn loss landscape


def examine(
    model: str | nn.Module,
    *,
    samples: int | None = SAMPLES,
    seed: int = 0,
    act: bool = False,
    x: Tensor | None = None,
    y: Tensor | None = None,
    dataset: str | None = None,
    name: str | None = None,
    architecture: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> SanityFile:
    """Check whether a robust accuracy of this model can be trusted (docs/sanity.md).

    Args:
        model: as for `robbench.evaluate`.
        samples: how many test images; None means all.
        seed: seed of all random numbers.
        act: also run the advised suite.
        x: as for `robbench.evaluate`, like everything that follows.
        y: labels of `x`.
        dataset: test set, or the name under which x and y are reported. With the name of a known one, transfer from
            its registered models is tried too.
        name: how the model is called in results.
        architecture: for `file:` and `hf:`.
        mean: for `file:` and `hf:`.
        std: goes with mean.
        reporter: receives progress.
        **options: see `inputs.Options`. With `results`, everything is stored and found again.

    Returns:
        Verdict, checks and measurements, as they are stored in sanity.json.

    Raises:
        RobbenchError: the model, the data or the options do not allow it; the sentence says why.
    """
    chosen = Options.given({"samples": samples, "seed": seed, **options})
    keep_freed_memory()
    if isinstance(model, nn.Module):
        model = keep_dropout_on(model)
    build = Build(architecture, mean, std)
    target, images = resolve(model, x, y, dataset, name, build, chosen)

    def describe(suite: str, options: Options) -> dict[str, Any]:
        return describe_run(model, suite, dataset, name, build, options, own_images=x is not None)

    if chosen.results is not None:
        return _Examination(target, images, chosen, reporter or Silent(), describe).go(act)
    with tempfile.TemporaryDirectory(prefix="robbench-") as folder:
        chosen = replace(chosen, results=folder)
        return _Examination(target, images, chosen, reporter or Silent(), describe).go(act)


Describe = Callable[[str, Options], dict[str, Any]]
"""What to put down of a run of a suite, so that it can be continued."""


class _Examination:
    """A model, images and options; its results tree is there."""

    def __init__(
        self, target: Target, images: Images, options: Options, reporter: Reporter, describe: Describe
    ) -> None:
        self.differentiable = _differentiable(target, images)
        self.target = target if self.differentiable else replace(target, module=ZeroGradientModel(target.module).eval())
        self.images, self.options, self.reporter, self.describe = images, options, reporter, describe
        self.suite = load_suite(SUITE)

    def go(self, act: bool) -> SanityFile:
        """Attack, measure what is not known, judge, and store."""
        assert self.options.results is not None
        root = Path(self.options.results)
        begin = time.perf_counter()
        description = self.describe(SUITE, self.options)
        result = run_suite(self.target, self.images, self.suite, self.options, self.reporter, description)
        folder = result_folder(root, result)
        known = self._known(folder / FILE, result)
        if known is None:
            rows = read_rows(folder / "outcomes.parquet")
            taken = self.images.index[select(len(self.images.y), self.options)]
            measurements = self._measure(result, rows[rows["sample"].isin(taken)], folder)
            found = self._file(result, measurements, time.perf_counter() - begin)
        else:
            # What was measured stands; the checks are made again, by the thresholds of today.
            found = _judged({k: getattr(known, k) for k in _DESCRIBED} | {"acted": known.acted}, known.measurements)
        if act and found.advice.suite and found.acted is None:
            found = found.model_copy(update={"acted": self._act(found.advice.suite)})
        write_atomically(folder / FILE, dump_sanity(found).encode())
        return found

    def _identity(self, result: ResultFile) -> dict[str, Any]:
        """Name what determines the measurements."""
        return {"suite": result.run_id, "n": result.n, "probes": PROBE_VERSION}

    def _known(self, path: Path, result: ResultFile) -> SanityFile | None:
        if not path.exists() or not path.with_name(LANDSCAPE).exists():
            return None
        stored = read_sanity(path)
        return stored if stored.identity == self._identity(result) else None

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
        shown = np.zeros(len(self.images.y), bool)
        shown[select(len(self.images.y), self.options)[:_SHOWN]] = True
        picture = self._probe(shown, result, 1)
        with picture.count_cost("landscape"):
            frame = compute_landscape(picture, PGD(objective="ce", steps=20))
        write_atomically(folder / LANDSCAPE, frame.to_parquet(index=False))
        return measurements.model_copy(update={"cost": measurements.cost | picture.costs})

    def _probe(self, where: np.ndarray[Any, np.dtype[np.bool_]], result: ResultFile, draws: int) -> GradientProbe:
        at = np.flatnonzero(where)
        x = self.images.x(at)
        shape, device = tuple(x.shape[1:]), self.target.device
        lanes = self.options.lanes or default_lanes(shape, device)
        return GradientProbe(
            target=self.target,
            x=x,
            y=self.images.y[torch.from_numpy(at)],
            sample=self.images.index[at],
            ball=Ball.of(parse_threat(result.threat.norm, result.threat.eps)),
            seed=self.options.seed,
            widths=Widths(self.target.module, shape, lanes, self.images.dtype),
            draws=draws,
        )

    def _file(self, result: ResultFile, measurements: Measurements, seconds: float) -> SanityFile:
        identity = self._identity(result)
        described = {
            "identity": identity,
            "run_id": digest(identity),
            "folder": result_folder(Path(), result).name,
            "measured": extract_subject(result.identity),
            "model": result.model,
            "dataset": result.dataset,
            "threat": result.threat,
            "n": result.n,
            "seed": self.options.seed,
            "seconds": round(seconds, 1),
            "hardware": describe_device(self.target.device),
            "versions": versions(),
            "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        }
        return _judged(described | {"acted": None}, measurements)

    def _act(self, suite: str) -> FollowUpResult:
        """Run the advised suite on the same images."""
        loaded, options = load_suite(suite), self.options
        # Images of one's own have no surrogate; the other attacks are still worth their time.
        spared = ({**a, "optional": True} if a.get("kind") == Transfer.kind else a for a in loaded.attacks)
        loaded = replace(loaded, attacks=tuple(spared))
        if self.images.dataset not in loaded.threats and options.eps is None:
            threat = self.suite.threat(self.images.dataset)
            options = replace(options, norm=threat.norm, eps=threat.eps_text)
        description = self.describe(suite, options)
        result = run_suite(self.target, self.images, loaded, options, self.reporter, description)
        return FollowUpResult(suite=suite, run_id=result.run_id, robust_accuracy=result.robust_accuracy)


_DESCRIBED = (
    "identity", "run_id", "folder", "measured", "model", "dataset", "threat", "n", "seed", "seconds", "hardware",
    "versions", "date",
)  # fmt: skip


def _judged(described: dict[str, Any], measurements: Measurements) -> SanityFile:
    """Add what follows from the measurements."""
    checks = run_checks(measurements)
    verdict, decided_by = decide_verdict(checks)
    return SanityFile(
        schema_version=1,
        **described,
        measurements=measurements,
        checks=checks,
        verdict=verdict,
        decided_by=decided_by,
        overestimation=round(100 * (measurements.pgd.value - measurements.best.value), 6),
        advice=advise_next_suite(verdict, decided_by, measurements),
    )


def _differentiable(target: Target, images: Images) -> bool:
    """Return whether autograd connects the model's output to its input."""
    x = images.x(np.arange(min(2, len(images.y)))).to(target.device).requires_grad_(True)
    with torch.enable_grad():
        answer = target.module(x)
    return bool(answer.requires_grad)
