"""Trains a card's recipe in short and keeps logits at some iterations, and trains students on these logits.

The weights are not kept. Adversarial training uses fewer steps than the card: 3 of half the radius.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from robbench.analysis.measure import ATTACK, SEED, find_threat, identify_attack, read_known
from robbench.analysis.series_record import SeriesFile, read_series, series_folder, summarize_series, write_series
from robbench.classifier.batch_width import BatchWidths
from robbench.classifier.prepare import pick_device
from robbench.core import rng
from robbench.core.errors import ModelError, ResultError
from robbench.core.machine import describe_device, versions
from robbench.core.threat import Ball
from robbench.core.types import Dataset
from robbench.data.sets import load
from robbench.engine.engine import attack_samples
from robbench.evaluation.options import Options
from robbench.models.card import DATASETS, CpuOverrides, Entry, Recipe, Registry
from robbench.models.spec import ModelSpec
from robbench.results.locking import lock_result
from robbench.training.draws import Batch, Draws
from robbench.training.recipe import divergence, learning_rate
from robbench.training.run import build_network
from robbench.training.step import Step

__all__ = ["measure_students", "measure_training"]

_ITERATIONS, _CHECKPOINTS = 400, (25, 50, 100, 200, 400)
_SEEDS = (0, 1, 2)
_STEPS = 3  # of the inner attack, each half the radius
_STUDENT_ITERATIONS = 250
_STUDENT_CHECKPOINTS = (50, 200, 400)
_LOSSES = ("logits", "softmax")
_IMAGES = 300  # of the test set, if their number is not given
_LANES = 256


def measure_training(
    spec: ModelSpec,
    options: Options,
    results: Path,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> SeriesFile:
    """Train a card's recipe in short with several seeds, and store logits of test images at the end.

    Of the first seed, those on the way are stored too, and the logits of all training images.

    Args:
        spec: a registered model with a recipe.
        options: the number of test images, device and folders.
        results: the results tree.
        overwrite: replace a measurement of something else instead of refusing.
        note: hears what happens.

    Returns:
        The summary, as it is stored.

    Raises:
        RobbenchError: the model has no recipe, or what is stored is of something else.
    """
    series = _Series(spec, options, results, "training")
    recipe = _shorten(series.entry)
    identity = series.identify(recipe, iterations=_ITERATIONS, checkpoints=list(_CHECKPOINTS), seeds=list(_SEEDS))

    def measure() -> pd.DataFrame:
        frames = []
        for seed in _SEEDS:
            mine = recipe.model_copy(update={"seed": seed})
            module = build_network(series.entry, mine.seed, series.device)
            step = Step(module, mine, Draws(series.train, mine, series.device))
            for i in range(_ITERATIONS):
                step(i, learning_rate(mine, i / _ITERATIONS))
                if i + 1 in (_CHECKPOINTS if seed == SEED else _CHECKPOINTS[-1:]):
                    key = {"seed": seed, "iteration": i + 1}
                    splits = ("train", "test") if seed == SEED else ("test",)
                    frames += [_look(series, module, split).assign(**key) for split in splits]
            note(f"{series.title}: seed {seed}, {_ITERATIONS} iterations")
        return pd.concat(frames, ignore_index=True)

    return series.run(identity, measure, overwrite, note)


def measure_students(
    spec: ModelSpec,
    options: Options,
    results: Path,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> SeriesFile:
    """Train students on the logits that `measure_training` stored, and store which images they get right.

    There is a student for each of some iterations of the teacher and for each loss: `logits` is the mean absolute
    difference of the logits, `softmax` the divergence of the softmax (Seguin et al. 2021, App. A.3).

    Args:
        spec: the teacher, a registered model.
        options: as for `measure_training`, which comes first.
        results: the results tree.
        overwrite: replace a measurement of something else instead of refusing.
        note: hears what happens.

    Returns:
        The summary, as it is stored.

    Raises:
        RobbenchError: no training of the teacher is stored, or what is stored is of something else.
    """
    series = _Series(spec, options, results, "students")
    file, teacher = read_series(series_folder(results, series.entry.dataset, series.entry.name, "training"))
    if file.identity["train"] != series.train.digest or file.identity["recipe"] != _dump(series.entry):
        raise ResultError(
            f"{series.title}: the stored training is of another recipe or other images; measure it again."
        )
    update = {"adversary": None, "pairing": None, "seed": SEED, "iterations": _STUDENT_ITERATIONS}
    recipe = _shorten(series.entry).model_copy(update=update)
    identity = series.identify(
        recipe, teacher=file.run_id, checkpoints=list(_STUDENT_CHECKPOINTS), losses=list(_LOSSES)
    )
    teacher = teacher[(teacher["split"] == "train") & (teacher["seed"] == SEED)]

    def measure() -> pd.DataFrame:
        frames = []
        for iteration in _STUDENT_CHECKPOINTS:
            logits = teacher[teacher["iteration"] == iteration].filter(like="logit_").to_numpy(np.float32).copy()
            for loss in _LOSSES:
                module = build_network(series.entry, recipe.seed, series.device)
                kind = Step if loss == "logits" else _SoftmaxStep
                draws = Draws(series.train, recipe, series.device)
                step = kind(module, recipe, draws, target=torch.from_numpy(logits).to(series.device))
                for i in range(_STUDENT_ITERATIONS):
                    step(i, learning_rate(recipe, i / _STUDENT_ITERATIONS))
                rows = _look(series, module, "test")
                correct = rows.filter(like="logit_").to_numpy().argmax(1) == rows["label"]
                found = rows[["sample", "label"]].assign(correct=correct, robust=correct & ~rows["broken"])
                frames.append(found.assign(loss=loss, iteration=iteration))
                note(f"{series.title}: student of iteration {iteration}, {loss}")
        return pd.concat(frames, ignore_index=True)

    return series.run(identity, measure, overwrite, note)


class _SoftmaxStep(Step):
    """An iteration of a student that fits the softmax of its teacher."""

    def compute_loss(self, batch: Batch, z: Tensor | None = None) -> Tensor:
        assert self.target is not None, "a student has a teacher"
        z = self.logits(batch.x) if z is None else z
        return divergence(z, self.target[batch.sample]).mean()


class _Series:
    """What both series share: the card, its data, and the stored measurement."""

    def __init__(self, spec: ModelSpec, options: Options, results: Path, kind: str) -> None:
        if not isinstance(spec.model, str) or spec.source is not None:
            raise ModelError(f"{spec.model} given; {kind} is measured for registered models, which have a recipe.")
        self.entry, self.results, self.kind = (
            Registry.default([Path(p) for p in options.models]).find(spec.model),
            results,
            kind,
        )
        self.title = self.entry.full_name
        if self.entry.card.recipe is None:
            raise ModelError(f"{self.title} has no recipe to train by; {kind} needs one.")
        self.device = pick_device(options.device)
        self.train = load(self.entry.dataset, "train", options.data_dir)
        self.test = load(self.entry.dataset, "test", options.data_dir)
        self.n = min(options.samples or _IMAGES, len(self.test))
        self.threat = find_threat(self.entry.dataset)

    def identify(self, recipe: Recipe, **about: object) -> dict[str, Any]:
        """Return the identity of the series."""
        return {
            "measure": self.kind,
            "version": 1,
            "architecture": self.entry.card.architecture.model_dump(mode="json"),
            "recipe": _dump(self.entry),
            "shortened": recipe.model_dump(mode="json"),
            "train": self.train.digest,
            "data": self.test.digest,
            "threat": {"norm": self.threat.norm, "eps": self.threat.exact_eps},
            "attack": identify_attack(ATTACK),
            **about,
        }

    def run(
        self,
        identity: dict[str, Any],
        measure: Callable[[], pd.DataFrame],
        overwrite: bool,
        note: Callable[[str], None],
    ) -> SeriesFile:
        """Measure and store, or return what is stored."""
        folder = series_folder(self.results, self.entry.dataset, self.entry.name, self.kind)
        with lock_result(self.results, folder, wait=True, note=note):
            stored = read_known(folder / f"{self.kind}.json", read_series, identity, None, overwrite)
            if stored is not None and stored.n >= self.n:
                note(f"{self.title}: {self.kind} known since {stored.date[:10]}, nothing to compute.")
                return stored
            note(f"{self.title}: {self.kind}")
            begin = time.perf_counter()
            rows = measure()
            about: dict[str, Any] = {
                "measure": self.kind,
                "model": self.entry.name,
                "dataset": self.entry.dataset,
                "total": len(self.test),
                "classes": DATASETS[self.entry.dataset].num_classes,
                "flags": {},
                "seconds": round(time.perf_counter() - begin, 3),
                "lanes": _LANES,
                "hardware": describe_device(self.device),
                "versions": versions(),
                "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
                "answers": None,
                "files": {},
            }
            return write_series(folder, summarize_series(rows, identity, about), rows)


def _dump(entry: Entry) -> dict[str, Any]:
    assert entry.card.recipe is not None, "checked before"
    return entry.card.recipe.model_dump(mode="json")


def _shorten(entry: Entry) -> Recipe:
    """Return the card's recipe with fewer iterations, and with fewer steps of its adversary."""
    recipe = entry.card.recipe
    assert recipe is not None, "checked before"
    inner = {"steps": _STEPS, "step_size": recipe.adversary.eps / 2} if recipe.adversary else {}
    return CpuOverrides.model_validate({"iterations": _ITERATIONS, **inner}).apply(recipe)


def _look(series: _Series, module: nn.Module, split: str) -> pd.DataFrame:
    """Look at a network in training: logits of all training or of some test images. The latter are also attacked."""
    data: Dataset = series.train if split == "train" else series.test
    n = len(data) if split == "train" else series.n
    x, y = torch.from_numpy(data.x[:n]).float() / data.scale, torch.from_numpy(data.y[:n])
    module.eval()
    with torch.no_grad():
        logits = torch.cat([module(part.to(series.device)).cpu() for part in torch.split(x, _LANES)])
    kept = logits.half()  # what is stored
    right = np.flatnonzero((kept.argmax(1) == y).numpy())
    broken = np.zeros(n, bool)
    if split == "test" and len(right):
        sample = data.index[:n]
        rows = attack_samples(
            module,
            ATTACK,
            x[right],
            y[right],
            sample[right],
            Ball.of(series.threat),
            key=rng.make_key(SEED, "training"),
            widths=BatchWidths(module, x.shape[1:], _LANES, x.dtype),
        )
        place = {int(s): i for i, s in enumerate(sample)}
        broken[[place[int(s)] for s in rows.sample[rows.broken]]] = True
    module.train()
    columns = {f"logit_{k}": column for k, column in enumerate(kept.numpy().T)}
    about = {"split": split, "sample": data.index[:n], "label": data.y[:n], "broken": broken}
    return pd.DataFrame(about | columns)
