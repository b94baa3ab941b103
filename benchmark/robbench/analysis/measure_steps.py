"""Measures PGD of several step sizes: after how many steps each of them breaks each image (Mosbach et al. 2018)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from robbench.analysis.measure import describe_run, find_threat, identify_attack, read_known
from robbench.analysis.series_record import SeriesFile, read_series, series_folder, summarize_series, write_series
from robbench.attacks.pgd import PGD
from robbench.classifier.batch_width import BatchWidths, choose_lanes
from robbench.classifier.checks import classify
from robbench.core import rng
from robbench.core.threat import Ball
from robbench.engine.engine import attack_samples
from robbench.evaluation.inputs import identify, make_probe, resolve, select
from robbench.evaluation.options import Options
from robbench.models.spec import ModelSpec
from robbench.results.locking import lock_result

__all__ = ["measure_steps"]

_ATTACK = PGD(steps=100)  # cross-entropy, one random start
_STEP_SIZES = (0.01, 0.03, 0.1, 0.25, 0.5, 1.0)  # as shares of eps
_IMAGES = 300  # of the test set, if their number is not given
_SEED = 0


def measure_steps(
    spec: ModelSpec,
    options: Options,
    results: Path,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> SeriesFile:
    """Measure and store after how many steps PGD breaks the first test images, for each of several step sizes.

    Args:
        spec: the model and its images.
        options: the number of images, batch width, device and folders.
        results: the results tree.
        overwrite: replace a measurement of something else instead of refusing.
        note: hears what happens.

    Returns:
        The summary, as it is stored. Where it is of more images than were asked for, it is theirs.

    Raises:
        RobbenchError: the model, the data or the options do not allow an honest number; the sentence says why.
    """
    target, images = resolve(spec, options)
    at = select(len(images.y), options)
    at = at[:_IMAGES] if options.samples is None else at
    threat = find_threat(images.dataset)
    identity = {
        "measure": "steps",
        "version": 1,
        **identify(target, images),
        "threat": {"norm": threat.norm, "eps": threat.exact_eps},
        "attack": identify_attack(_ATTACK),
        "step_sizes": list(_STEP_SIZES),
        "seed": _SEED,
    }
    x, y, sample = images.x(at), images.y[at], images.index[at]
    width = choose_lanes(options.lanes, len(at), x.shape[1:], target.device)
    title, folder = f"{images.dataset}/{target.name}", series_folder(results, images.dataset, target.name, "steps")
    probe = make_probe(target, images, width)
    with lock_result(results, folder, wait=True, note=note):
        stored = read_known(folder / "steps.json", read_series, identity, probe, overwrite)
        if stored is not None and stored.n >= len(at):
            note(f"{title}: steps known since {stored.date[:10]} on {stored.n} images, nothing to compute.")
            return stored
        note(f"{title}: {_ATTACK.steps} steps of {len(_STEP_SIZES)} sizes on {len(at)} images")
        begin = time.perf_counter()
        predicted, flags = classify(target, x, y, images.num_classes, width, sample)
        correct = predicted == y.numpy()
        right = np.flatnonzero(correct)
        place = {int(s): i for i, s in enumerate(sample)}
        frames = []
        for size in _STEP_SIZES:
            rows = attack_samples(
                target.module,
                dataclasses.replace(_ATTACK, relative_step=size),
                x[right],
                y[right],
                sample[right],
                Ball.of(threat),
                key=rng.make_key(_SEED, "steps"),
                widths=BatchWidths(target.module, x.shape[1:], width, x.dtype),
            )
            step = np.full(len(at), -1)
            step[[place[int(s)] for s in rows.sample[rows.broken]]] = rows.step[rows.broken]
            columns = {"sample": sample, "label": y.numpy(), "correct": correct, "step": step}
            frames.append(pd.DataFrame({"step_size": size, **columns}))
        with torch.no_grad():
            classes = target.module(x[:1].to(target.device)).shape[1]
        table = pd.concat(frames, ignore_index=True)
        about = describe_run(target, images, flags, begin, width, probe) | {"measure": "steps", "classes": classes}
        return write_series(folder, summarize_series(table, identity, about), table)
