"""Measures logits on clean images and at the points where a fixed PGD breaks them."""

from __future__ import annotations

import dataclasses
import datetime as dt
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from robbench.analysis.logits import Integers
from robbench.analysis.record import (
    LOGITS_VERSION,
    LogitsFile,
    StoredLogits,
    logits_folder,
    read_logits,
    summarize_logits,
    write_logits,
)
from robbench.attacks.pgd import PGD
from robbench.classifier.answers import AnswerProbe, describe_other_answers
from robbench.classifier.batch_width import BatchWidths, choose_lanes
from robbench.classifier.checks import classify
from robbench.classifier.prepare import Target
from robbench.core import rng
from robbench.core.errors import ModelError, ResultError
from robbench.core.files import digest
from robbench.core.machine import describe_device, versions
from robbench.core.threat import Ball
from robbench.core.types import Threat
from robbench.core.words import format_count
from robbench.engine.engine import attack_samples
from robbench.evaluation.inputs import Images, identify, make_probe, resolve, select
from robbench.evaluation.options import Options
from robbench.linear.theory import Values
from robbench.models.spec import ModelSpec
from robbench.results.differences import describe_other_run
from robbench.results.locking import lock_result
from robbench.results.measurement import MeasurementFile
from robbench.suite import load_suite

__all__ = [
    "ATTACK",
    "SEED",
    "describe_run",
    "find_threat",
    "identify_attack",
    "measure_logits",
    "read_known",
    "run_batches",
]

ATTACK = PGD(objective="ce_scaled", steps=20, restarts=2)
"""20 steps of eps/4 from two random points, on the rescaled cross-entropy: logits of any scale have its gradient."""

SEED = 0

_File = TypeVar("_File", bound=MeasurementFile)


def find_threat(dataset: str) -> Threat:
    """Return the usual threat of a data set.

    Raises:
        RobbenchError: the data set has none.
    """
    return load_suite("sanity").threat(dataset)


def measure_logits(
    spec: ModelSpec,
    options: Options,
    results: Path,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> LogitsFile:
    """Measure and store the logits of a model on its first test images, and at their adversarial examples.

    Args:
        spec: the model and its images.
        options: the number of images, batch width, device and folders.
        results: the results tree.
        overwrite: replace a measurement of something else instead of refusing.
        note: hears what happens.

    Returns:
        The summary, as it is stored. Where more images are stored than were asked for, it is theirs.

    Raises:
        RobbenchError: the model, the data or the options do not allow an honest number; the sentence says why.
    """
    target, images = resolve(spec, options)
    at = select(len(images.y), options)
    threat = find_threat(images.dataset)
    identity = {
        "measure": "logits",
        "version": LOGITS_VERSION,
        **identify(target, images),
        "threat": {"norm": threat.norm, "eps": threat.exact_eps},
        "attack": identify_attack(ATTACK),
        "seed": SEED,
    }
    width = choose_lanes(options.lanes, len(at), images.x(np.arange(1)).shape[1:], target.device)
    title, folder = f"{images.dataset}/{target.name}", logits_folder(results, images.dataset, target.name)
    probe = make_probe(target, images, width)
    with lock_result(results, folder, wait=True, note=note):
        stored = read_known(folder / "logits.json", read_logits, identity, probe, overwrite)
        if stored is not None and stored.n >= len(at):
            note(f"{title}: known since {stored.date[:10]} on {format_count(stored.n, 'image')}, nothing to compute.")
            return stored
        note(f"{title}: logits of {format_count(len(at), 'image')}, clean and under {ATTACK.kind}-{ATTACK.steps}")
        begin = time.perf_counter()
        measured, flags = _measure(target, images, at, width, threat)
        about = describe_run(target, images, flags, begin, width, probe)
        return write_logits(folder, summarize_logits(measured, identity, about), measured)


def identify_attack(attack: PGD) -> dict[str, Any]:
    """Return the part of an identity that names an attack."""
    return {"kind": attack.kind, "version": attack.version, **dataclasses.asdict(attack)}


def read_known(
    summary: Path,
    read: Callable[[Path], tuple[_File, object]],
    identity: dict[str, Any],
    probe: AnswerProbe | None,
    overwrite: bool,
) -> _File | None:
    """Return the stored measurement of this identity. None if there is none, or if it is to be overwritten.

    Args:
        summary: path of the summary.
        read: reads the measurement in a folder.
        identity: the identity of this run.
        probe: the model's present answers; None where the measurement trains its own networks.
        overwrite: replace what is stored.

    Raises:
        ResultError: it is damaged or of another identity, or the model answers otherwise than it did.
    """
    if overwrite or not summary.exists():
        return None
    stored, _ = read(summary.parent)
    if stored.run_id != digest(identity):
        raise ResultError(describe_other_run(summary.parent, stored.identity, identity))
    if probe and stored.answers is not None and (change := probe.describe_change(stored.answers)):
        raise ResultError(describe_other_answers(summary.parent, change))
    return stored


def describe_run(
    target: Target, images: Images, flags: dict[str, str], begin: float, lanes: int, probe: AnswerProbe
) -> dict[str, Any]:
    """Return the fields of a summary that say how, when and where it was measured. `begin` is a `perf_counter`."""
    return {
        "model": target.name,
        "dataset": images.dataset,
        "total": len(images.y),
        "flags": flags,
        "seconds": round(time.perf_counter() - begin, 3),
        "lanes": lanes,
        "hardware": describe_device(target.device),
        "versions": versions(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "answers": probe.record(),
        "files": {},
    }


def _measure(
    target: Target, images: Images, at: Integers, lanes: int, threat: Threat
) -> tuple[StoredLogits, dict[str, str]]:
    x, y, sample = images.x(at), images.y[at], images.index[at]
    predicted, flags = classify(target, x, y, images.num_classes, lanes, sample)
    clean = compute_logits(target, x, lanes)
    right = np.flatnonzero(predicted == y.numpy())
    rows = attack_samples(
        target.module,
        ATTACK,
        x[right],
        y[right],
        sample[right],
        Ball.of(threat),
        key=rng.make_key(SEED, "logits"),
        widths=BatchWidths(target.module, x.shape[1:], lanes, x.dtype),
        keep_adversarials=True,
    )
    assert rows.x_adv is not None, "keep_adversarials asks for the points"
    place = {int(s): i for i, s in enumerate(sample)}
    hit = np.array([place[int(s)] for s in rows.sample[rows.broken]], np.int64)
    broken, adversarial = np.zeros(len(at), bool), clean.copy()
    broken[hit] = True
    if len(hit):
        adversarial[hit] = compute_logits(target, rows.x_adv[torch.from_numpy(rows.broken)], lanes)
    return StoredLogits(sample, y.numpy(), broken, clean, adversarial), flags


def run_batches(target: Target, x: Tensor, lanes: int) -> Iterator[Tensor]:
    """Run a model on batches of images, all padded to one width. Yield the logits of each batch without padding."""
    for start in range(0, len(x), lanes):
        batch = x[start : start + lanes]
        with torch.no_grad():
            logits = target.module(batch[torch.arange(lanes) % len(batch)].to(target.device))
        yield logits[: len(batch)]


def compute_logits(target: Target, x: Tensor, lanes: int) -> Values:
    """Return the logits of images, [N, K]. All batches are padded to one width, as when the attack was judged.

    Raises:
        ModelError: a logit is NaN or infinite.
    """
    logits: Values = torch.cat([z.float().cpu() for z in run_batches(target, x, lanes)]).double().numpy()
    if not np.isfinite(logits).all():
        raise ModelError("The model answers NaN or infinity for some images. Logits to compare must be finite.")
    return logits
