"""Measures the geometry of the manifolds around images, layer by layer, with and without an attack."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.linalg import qr
from torch import Tensor, nn

from robbench.analysis.logits import Integers
from robbench.analysis.manifold_record import (
    COLUMNS,
    KINDS,
    MANIFOLDS_VERSION,
    LayerGeometry,
    ManifoldsFile,
    manifolds_folder,
    read_manifolds,
    summarize_manifolds,
    write_manifolds,
)
from robbench.analysis.manifolds import analyze_manifolds, simulate_capacity
from robbench.analysis.measure import describe_run, find_threat, identify_attack, read_known, run_batches
from robbench.attacks.pgd import PGD
from robbench.classifier.batch_width import choose_lanes
from robbench.classifier.checks import classify
from robbench.classifier.prepare import Target
from robbench.core import rng
from robbench.core.errors import ModelError
from robbench.core.threat import Ball
from robbench.core.types import Problem, Threat
from robbench.engine.engine import perturb
from robbench.evaluation.inputs import Images, identify, make_probe, resolve, select
from robbench.evaluation.options import Options
from robbench.linear.theory import Values
from robbench.models.spec import ModelSpec
from robbench.results.locking import lock_result

__all__ = ["measure_manifolds"]

_ATTACK = PGD(objective="ce_scaled", steps=20)
_IMAGES = 30  # of the test set, if their number is not given
_POINTS = 20  # of each manifold
_DRAWS = 200  # random directions per manifold
_TRIALS = 10  # of each number of features of the simulated capacity
_SEED = 0
_MOST_LAYERS = 24  # a deeper network is measured at this many of its layers
_NO_LAYERS = (nn.Flatten, nn.Identity, nn.Dropout)  # their output has the same values as their input


def measure_manifolds(
    spec: ModelSpec,
    options: Options,
    results: Path,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> ManifoldsFile:
    """Measure and store the geometry (MFTMA) of the manifolds around the first test images in each layer of a model.

    The manifold of an image is a cloud of points of the ball around it. The clean ones are random points. The
    adversarial ones are the final points of PGD from random points, without an early stop.

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
    if len(at) < 2:
        raise ModelError(f"--samples {len(at)} given; expected: 2 or more images, because capacity compares manifolds.")
    threat = find_threat(images.dataset)
    identity = {
        "measure": "manifolds",
        "version": MANIFOLDS_VERSION,
        **identify(target, images),
        "threat": {"norm": threat.norm, "eps": threat.exact_eps},
        "attack": identify_attack(_ATTACK),
        "points": _POINTS,
        "draws": _DRAWS,
        "trials": _TRIALS,
        "seed": _SEED,
    }
    width = choose_lanes(options.lanes, len(at) * _POINTS, images.x(np.arange(1)).shape[1:], target.device)
    title, folder = f"{images.dataset}/{target.name}", manifolds_folder(results, images.dataset, target.name)
    probe = make_probe(target, images, width)
    with lock_result(results, folder, wait=True, note=note):
        stored = read_known(folder / "manifolds.json", read_manifolds, identity, probe, overwrite)
        # The common directions of the centres, and with them all numbers, depend on the number of images.
        if stored is not None and stored.n == len(at):
            note(f"{title}: known since {stored.date[:10]} on {stored.n} images, nothing to compute.")
            return stored
        note(f"{title}: manifolds of {len(at)} images, {_POINTS} points each, clean and under {_ATTACK.kind}")
        begin = time.perf_counter()
        flags = classify(target, images.x(at), images.y[at], images.num_classes, width, images.index[at])[1]
        layers, rows = _measure(target, images, at, width, threat, lambda text: note(f"{title}: {text}"))
        about = describe_run(target, images, flags, begin, width, probe)
        return write_manifolds(folder, summarize_manifolds(rows, layers, identity, about), rows)


def _measure(
    target: Target, images: Images, at: Integers, lanes: int, threat: Threat, note: Callable[[str], None]
) -> tuple[list[LayerGeometry], pd.DataFrame]:
    clouds = dict(zip(KINDS, _make_clouds(target, images, at, lanes, threat), strict=True))
    layers, frames = [], []
    for i, (name, layer) in enumerate(_list_layers(target, clouds["clean"][:2])):
        for kind in KINDS:
            points = _represent(target, layer, clouds[kind], lanes)
            features = points.shape[1]
            if features > len(points):  # only the span of the points matters
                points = np.asarray(qr(points.T, mode="r", check_finite=False)[0][: len(points)].T, np.float64)
            manifolds = np.split(points, len(at))
            try:
                found = analyze_manifolds(manifolds, _DRAWS, seed=_SEED)
            except ValueError as error:
                raise ModelError(f"Layer {name}, {kind} manifolds: {error}.") from None
            if not np.isfinite(found.radius).all() or (found.capacity == 0).any():
                raise ModelError(f"Layer {name}, {kind} manifolds: a centre is the common one. Use more --samples.")
            simulated = simulate_capacity(manifolds, _TRIALS, _SEED)
            cost = 1 / found.capacity
            layers.append(
                LayerGeometry(
                    layer=name,
                    kind=kind,
                    features=features,
                    cost=cost.mean(),
                    radius=found.radius.mean(),
                    dimension=found.dimension.mean(),
                    correlation=found.correlation,
                    removed=found.removed,
                    simulated=None if np.isnan(simulated) else simulated,
                )
            )
            columns = (i, kind, images.index[at], cost, found.radius, found.dimension)
            frames.append(pd.DataFrame(dict(zip(COLUMNS, columns, strict=True))))
        note(f"layer {name}, {features} features")
    return layers, pd.concat(frames, ignore_index=True).astype(COLUMNS)


def _make_clouds(target: Target, images: Images, at: Integers, lanes: int, threat: Threat) -> tuple[Tensor, Tensor]:
    """Make the points of all manifolds, image by image: random and attacked, each [P · M, C, H, W] on the CPU."""
    ball = Ball.of(threat)
    parts: tuple[list[Tensor], list[Tensor]] = [], []
    everything = np.repeat(at, _POINTS)
    trials = torch.arange(_POINTS).repeat(len(at))
    for start in range(0, len(everything), lanes):
        batch = everything[start : start + lanes]
        padded = np.resize(batch, lanes)  # one width for all batches; the extra rows are dropped below
        sample = torch.from_numpy(images.index[padded]).to(target.device)
        trial = torch.from_numpy(np.resize(trials[start : start + lanes].numpy(), lanes)).to(target.device)
        x, y = images.x(padded).to(target.device), images.y[padded].to(target.device)
        clean = Problem(x=x, y=y, sample=sample, trial=trial, key=rng.make_key(_SEED, "manifolds"))
        attacked = dataclasses.replace(clean, key=rng.make_key(_SEED, "manifolds/attack"))
        for kept, points in zip(
            parts, (ball.random(clean), perturb(target.module, _ATTACK, attacked, ball)), strict=True
        ):
            kept.append(points[: len(batch)].cpu())
    return torch.cat(parts[0]), torch.cat(parts[1])


def _list_layers(target: Target, x: Tensor) -> Iterator[tuple[str, nn.Module | None]]:
    """List the pixels (None), the layers of the network in the order in which they run, and its answer, with names.

    The layers are the children of the first module with more than one child. Layers that change no value are left out,
    and of many layers some.
    """
    module = target.module
    while len(children := list(module.children())) == 1:
        module = children[0]
    ran: dict[nn.Module, Tensor] = {}

    def record(layer: nn.Module, _: object, out: object) -> None:
        if isinstance(out, Tensor) and out.is_floating_point() and out.shape[0] == len(x):
            ran[layer] = out

    hooks = [m.register_forward_hook(record) for m in children if not isinstance(m, _NO_LAYERS)]
    try:
        with torch.no_grad():
            logits = target.module(x.to(target.device))
    finally:
        for hook in hooks:
            hook.remove()
    layers = [m for m, out in ran.items() if out.shape != logits.shape or not torch.equal(out, logits)]
    chosen = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), _MOST_LAYERS)).round().astype(int))
    yield "0 pixels", None
    for i, k in enumerate(chosen):
        yield f"{i + 1} {type(layers[k]).__name__}", layers[k]
    yield f"{len(chosen) + 1} logits", target.module


def _represent(target: Target, layer: nn.Module | None, x: Tensor, lanes: int) -> Values:
    """Return what a layer makes of points [N, C, H, W], as rows [N, features]; None are the pixels themselves.

    Raises:
        ModelError: a value is NaN or infinite.
    """
    if layer is None:
        pixels: Values = x.flatten(1).double().numpy()
        return pixels
    outputs: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, args, out: outputs.append(out))
    rows = []
    try:
        for logits in run_batches(target, x, lanes):
            rows.append(outputs[-1][: len(logits)].flatten(1).double().cpu())
            outputs.clear()
    finally:
        hook.remove()
    values: Values = torch.cat(rows).numpy()
    if not np.isfinite(values).all():
        raise ModelError(f"A layer ({type(layer).__name__}) answers NaN or infinity for some images.")
    return values
