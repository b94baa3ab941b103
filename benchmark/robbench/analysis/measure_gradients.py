"""Measures the loss gradient at images, and what large perturbations of them look like."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from robbench.analysis.gradients import (
    align,
    clip_gradients,
    compute_contrasts,
    find_nearest,
    measure_roughness,
    measure_sparsity,
)
from robbench.analysis.gradients_record import (
    COLUMNS,
    GRADIENTS_VERSION,
    STEPS,
    GradientsFile,
    Pictures,
    gradients_folder,
    read_gradients,
    summarize_gradients,
    write_gradients,
)
from robbench.analysis.logits import Integers
from robbench.analysis.measure import compute_logits, describe_run, identify_attack, read_known
from robbench.attacks.pgd import PGD
from robbench.classifier.batch_width import choose_lanes
from robbench.classifier.checks import classify
from robbench.classifier.prepare import Target
from robbench.core import rng
from robbench.core.errors import ModelError
from robbench.core.threat import Ball
from robbench.core.types import Dataset, Norm, Problem
from robbench.core.words import format_count
from robbench.data.sets import NAMES, load
from robbench.engine.engine import perturb
from robbench.evaluation.inputs import Images, identify, make_probe, resolve, select
from robbench.evaluation.options import Options
from robbench.linear.theory import Values
from robbench.models.spec import ModelSpec
from robbench.results.locking import lock_result

__all__ = ["measure_gradients"]

_ATTACK = PGD(objective="ce_scaled", steps=40, relative_step=1 / 16, random_start=False)
"""40 steps, 2.5 times the radius together, from the image itself: logits of any scale have this gradient."""
_IMAGES = 1000  # of the test set, if their number is not given
_KNOWN = 10_000  # training images that the nearest one is looked for in
_SEED = 0
_NORMS: tuple[Norm, ...] = ("L2", "Linf")


def _choose_radius(norm: Norm, pixels: int) -> float:
    """Choose a large radius: half of the box in Linf, and 0.3 √d in L2, about the distance between two classes."""
    return 0.5 if norm == "Linf" else 0.3 * math.sqrt(pixels)


def measure_gradients(
    spec: ModelSpec,
    options: Options,
    results: Path,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> GradientsFile:
    """Measure and store the loss gradients of a model at the first test images, and large perturbations of them.

    What a perturbed image looks like is judged without the model: by the training image that is nearest in L2.

    Args:
        spec: the model and its images, of a data set with training images.
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
    if images.dataset not in NAMES:
        raise ModelError(f"Images of {images.dataset!r} given; allowed: a data set with training images, {NAMES}.")
    known = load(images.dataset, "train", options.data_dir)
    at = select(len(images.y), options)
    at = at[:_IMAGES] if options.samples is None else at
    pixels = math.prod(images.shape)
    identity = {
        "measure": "gradients",
        "version": GRADIENTS_VERSION,
        **identify(target, images),
        "train": known.digest,
        "known": _KNOWN,
        "eps": {norm: _choose_radius(norm, pixels) for norm in _NORMS},
        "attack": identify_attack(_ATTACK),
    }
    width = choose_lanes(options.lanes, len(at), images.shape, target.device)
    title, folder = f"{images.dataset}/{target.name}", gradients_folder(results, images.dataset, target.name)
    probe = make_probe(target, images, width)
    with lock_result(results, folder, wait=True, note=note):
        stored = read_known(folder / "gradients.json", read_gradients, identity, probe, overwrite)
        if stored is not None and stored.n >= len(at):
            note(f"{title}: known since {stored.date[:10]} on {format_count(stored.n, 'image')}, nothing to compute.")
            return stored
        note(f"{title}: gradients and large perturbations of {format_count(len(at), 'image')}")
        begin = time.perf_counter()
        y = images.y[at]
        flags = classify(target, images.x(at), y, images.num_classes, width, images.index[at])[1]
        shown = np.unique(y.numpy(), return_index=True)[1]
        rows, pictures = _measure(target, images, at, known, shown, width)
        about: dict[str, Any] = describe_run(target, images, flags, begin, width, probe)
        about |= {"shape": list(images.shape), "shown": images.index[at[shown]].tolist()}
        return write_gradients(folder, summarize_gradients(rows, identity, about), rows, pictures)


def _measure(
    target: Target, images: Images, at: Integers, known: Dataset, shown: Integers, lanes: int
) -> tuple[pd.DataFrame, Pictures]:
    x, y = images.x(at), images.y[at]
    gradients = _compute_gradients(target, x, y, lanes)
    flat = gradients.reshape(len(at), -1)
    train = known.x[:_KNOWN].reshape(min(len(known), _KNOWN), -1) / known.scale
    labels = known.y[:_KNOWN]
    contrasts = compute_contrasts(train, labels, known.num_classes)
    original = x.flatten(1).double().numpy()
    columns: dict[str, Values | Integers] = {
        "sample": images.index[at],
        "label": y.numpy(),
        "alignment": align(-flat, contrasts[y.numpy()]),
        "roughness": measure_roughness(gradients),
        "sparsity": measure_sparsity(flat),
    }
    pictures = [_to_levels(x[shown].double().numpy()), clip_gradients(gradients[shown])]
    for norm in _NORMS:
        moved = _perturb(target, x, y, images.index[at], Ball(norm, _choose_radius(norm, flat.shape[1])), lanes)
        columns[norm] = compute_logits(target, moved, lanes).argmax(1)
        pictures.append(_to_levels(moved[shown].double().numpy()))
        end = moved.flatten(1).double().numpy()
        if norm == "Linf":
            nearest, distance = find_nearest(end, train)
            columns |= {"near_Linf": labels[nearest], "distance_Linf": distance}
            continue
        for k in range(STEPS):
            share = k / (STEPS - 1)
            nearest, distance = find_nearest((1 - share) * original + share * end, train)
            columns |= {f"near_{k}": labels[nearest], f"distance_{k}": distance}
    return pd.DataFrame(columns)[list(COLUMNS)].astype(COLUMNS), np.stack(pictures, axis=1)


def _to_levels(x: Values) -> Pictures:
    return np.rint(255 * x).astype(np.uint8)


def _split(x: Tensor, y: Tensor, lanes: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield the place of each batch, and its images and labels, all padded to one width."""
    for start in range(0, len(x), lanes):
        place = slice(start, min(start + lanes, len(x)))
        padded = place.start + torch.arange(lanes) % (place.stop - place.start)
        yield place, x[padded], y[padded]


def _compute_gradients(target: Target, x: Tensor, y: Tensor, lanes: int) -> Values:
    """Return the gradient of the loss at images up to a positive factor, [N, C, H, W].

    The cross-entropy is a growing function of log Σ exp z_k − z_y, with k over the wrong classes. So both have
    gradients of one direction. That of the cross-entropy is rounded to 0 where the model is sure.

    Raises:
        ModelError: a gradient is 0, NaN or infinite.
    """
    parts = []
    for place, images, labels in _split(x, y, lanes):
        leaf = images.to(target.device).requires_grad_()
        logits, right = target.module(leaf).float(), labels.to(target.device)[:, None]
        wrong = logits.scatter(1, right, -math.inf).logsumexp(1)
        (found,) = torch.autograd.grad((wrong - logits.gather(1, right)[:, 0]).sum(), leaf)
        parts.append(found[: place.stop - place.start].double().cpu().numpy())
    gradients: Values = np.concatenate(parts)
    if not np.isfinite(gradients).all() or not (gradients != 0).any((1, 2, 3)).all():
        raise ModelError(
            "The gradient of the loss is 0, NaN or infinite at some images, so there is no direction to look at. "
            "`robbench sanity` says whether the model hides its gradients."
        )
    return gradients


def _perturb(target: Target, x: Tensor, y: Tensor, sample: Integers, ball: Ball, lanes: int) -> Tensor:
    """Return the final points of the attack in the ball around images, [N, C, H, W] on the CPU."""
    index = torch.from_numpy(sample)
    points = []
    for place, images, labels in _split(x, y, lanes):
        padded = place.start + torch.arange(lanes) % (place.stop - place.start)
        problem = Problem(
            x=images.to(target.device),
            y=labels.to(target.device),
            sample=index[padded].to(target.device),
            trial=torch.zeros(lanes, dtype=torch.int64, device=target.device),
            key=rng.make_key(_SEED, "gradients"),
        )
        points.append(perturb(target.module, _ATTACK, problem, ball)[: place.stop - place.start].cpu())
    return torch.cat(points)
