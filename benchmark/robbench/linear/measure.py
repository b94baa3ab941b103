"""Measures logits, their gradients, and the activations of the last two layers."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from robbench.classifier.answers import AnswerProbe, describe_other_answers
from robbench.classifier.batch_width import choose_lanes
from robbench.classifier.checks import classify
from robbench.classifier.prepare import Target
from robbench.core.errors import ModelError, ResultError
from robbench.core.files import digest
from robbench.core.machine import describe_device, versions
from robbench.core.words import format_count
from robbench.evaluation.inputs import Images, identify, make_probe, resolve, select
from robbench.evaluation.options import Options
from robbench.linear.record import (
    ACTIVATIONS,
    LINEAR_VERSION,
    LinearFile,
    linear_folder,
    read_linear,
    summarize_linear,
    write_linear,
)
from robbench.linear.theory import Linearization
from robbench.models.spec import ModelSpec
from robbench.results.differences import describe_other_run
from robbench.results.locking import lock_result

__all__ = ["linearize", "measure_linear"]


def measure_linear(
    model: str | nn.Module,
    *,
    x: Tensor | None = None,
    y: Tensor | None = None,
    dataset: str | None = None,
    name: str | None = None,
    architecture: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    samples: int | None = None,
    lanes: int | None = None,
    device: str = "auto",
    data_dir: str | Path | None = None,
    models: Sequence[str | Path] = (),
    results: str | Path | None = None,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> LinearFile:
    """Measure the linear model of robustness (Shafahi et al. 2019, Eq. 2-4) and store it.

    Costs a forward and K + 1 backward passes per image for K classes. The class of an image is that of the data set,
    whatever the model says.

    Args:
        model: as for `robbench.evaluate`.
        x: as for `robbench.evaluate`, like the next six.
        y: labels [N] of `x`.
        dataset: where the images come from, or what `x` is called.
        name: how the model is called in results.
        architecture: for `file:` and `hf:`.
        mean: for `file:` and `hf:`.
        std: goes with mean.
        samples: the first N test images; None means all.
        lanes: batch width; None chooses by image size and device.
        device: auto, cpu, cuda or cuda:i.
        data_dir: where the data sets are.
        models: further model registries.
        results: results tree; None keeps nothing on disk.
        overwrite: replace a measurement of something else instead of refusing.
        note: hears what happens.

    Returns:
        The summary, as it is stored in linear.json. Where more images are stored than were asked for, it is theirs.

    Raises:
        RobbenchError: the model, the data or the options do not allow an honest number; the sentence says why.
    """
    options = Options(
        samples=samples, lanes=lanes, device=device, data_dir=data_dir, models=models, results=results
    )  # fmt: skip
    target, images = resolve(ModelSpec(model, x, y, dataset, name, architecture, mean, std), options)
    at = select(len(images.y), options)
    identity = _identity(target, images)
    title = f"{images.dataset}/{target.name}"
    width = choose_lanes(lanes, len(at), images.x(np.arange(1)).shape[1:], target.device)
    told = f"{title}: logits and gradients of {format_count(len(at), 'image')}"
    if results is None:
        note(told)
        return _measure(target, images, at, width, identity)[0]
    folder = linear_folder(Path(results), images.dataset, target.name)
    probe = make_probe(target, images, width)
    with lock_result(Path(results), folder, wait=True, note=note):
        if (stored := _stored(folder, identity, len(at), probe, overwrite)) is not None:
            note(f"{title}: known since {stored.date[:10]} on {format_count(stored.n, 'image')}, nothing to compute.")
            return stored
        note(told)
        file, measured, activations = _measure(target, images, at, width, identity)
        file = file.model_copy(update={"answers": probe.record()})
        return write_linear(folder, file, measured, activations)


def _identity(target: Target, images: Images) -> dict[str, Any]:
    """Name everything that determines the numbers of an image."""
    return {
        "measure": "linear",
        "version": LINEAR_VERSION,
        **identify(target, images),
    }


def _stored(folder: Path, identity: dict[str, Any], n: int, probe: AnswerProbe, overwrite: bool) -> LinearFile | None:
    """Return the stored measurement if it is of this identity and these answers, and covers n images.

    Raises:
        ResultError: the folder holds a measurement of something else, which is not to be overwritten.
    """
    if not (folder / "linear.json").exists():
        return None
    try:
        stored = read_linear(folder)
    except ResultError:
        if overwrite:
            return None
        raise
    if stored.run_id != digest(identity):
        if not overwrite:
            raise ResultError(describe_other_run(folder, stored.identity, identity))
        return None
    if change := probe.describe_change(stored.answers):
        if not overwrite:
            raise ResultError(describe_other_answers(folder, change))
        return None
    return stored if stored.n >= n else None


def _measure(
    target: Target, images: Images, at: np.typing.NDArray[np.int64], lanes: int, identity: dict[str, Any]
) -> tuple[LinearFile, Linearization, pd.DataFrame]:
    """Measure images at these positions [n]; returns the summary, and what `linearize` returns."""
    begin = time.perf_counter()
    flags = classify(target, images.x(at), images.y[at], images.num_classes, lanes)[1]
    measured, activations = linearize(target, images, at, lanes)
    n, k = measured.logits.shape
    about = {
        "model": target.name,
        "dataset": images.dataset,
        "total": len(images.y),
        "forwards": n,
        "backwards": n * (k + 1),
        "seconds": round(time.perf_counter() - begin, 3),
        "lanes": lanes,
        "hardware": describe_device(target.device),
        "versions": versions(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }
    return summarize_linear(measured, identity, flags, about), measured, activations


def linearize(
    target: Target, images: Images, at: np.typing.NDArray[np.int64], lanes: int
) -> tuple[Linearization, pd.DataFrame]:
    """Measure logits, gradients and activations at test images.

    All batches are padded to the same width. The kernels then see one shape, and each number depends on its image only.

    Args:
        target: the model.
        images: the test images.
        at: positions of the images to measure, [n].
        lanes: batch width.

    Returns:
        The logits and gradients, and the rows of activations.parquet. There are no rows if the model does not end in a
        linear layer.

    Raises:
        ModelError: the model has no gradients, or memory runs out.
    """
    collected: dict[str, list[Tensor]] = {}
    with _LastLinear(target.module) as last:
        for start in range(0, len(at), lanes):
            batch = at[start : start + lanes]
            padded = np.resize(batch, lanes)  # repeats the batch; its extra rows are dropped below
            parts = _measure_batch(
                target.module, images.x(padded).to(target.device), images.y[padded].to(target.device)
            )
            parts |= last.take_activations(parts["logits"])
            for key, value in parts.items():
                collected.setdefault(key, []).append(value[: len(batch)].cpu())
    values = {key: torch.cat(parts).numpy() for key, parts in collected.items()}
    layers = {key: values.pop(key) for key in ("penultimate",) if key in values}
    measured = Linearization(
        sample=images.index[at],
        label=images.y[at].numpy(),
        **{key: value.astype(np.float32).astype(np.float64) for key, value in values.items()},
    )
    if layers:
        layers["logits"] = values["logits"]
    return measured, _summarize_activations(layers)


def _measure_batch(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Compute logits [L, K], and per class ‖∇z_k‖_1, ‖∇z_y − ∇z_k‖_1 and cos(∇z_y, ∇z_k), each [L, K]."""
    x = x.requires_grad_(True)
    try:
        with torch.enable_grad():
            logits = model(x)
        true_gradient = _compute_gradient(logits.gather(1, y[:, None]).sum(), x)
        rows = []
        for k in range(logits.shape[1]):
            gradient_k = _compute_gradient(logits[:, k].sum(), x)
            lengths = true_gradient.norm(dim=1) * gradient_k.norm(dim=1)
            # A zero vector has no direction. Its cosine is 0 / 0 = NaN.
            cosine = ((true_gradient * gradient_k).sum(1) / lengths).clamp(-1, 1)
            gap = torch.where(y == k, 0.0, (true_gradient - gradient_k).abs().sum(1))
            rows.append(torch.stack([gradient_k.abs().sum(1), gap, cosine]))
    except torch.OutOfMemoryError:
        raise ModelError(
            f"Out of memory with {len(x)} images in a batch. Use a smaller batch width: --lanes N."
        ) from None
    gradient, gap, cosine = torch.stack(rows, dim=2)
    return {"logits": logits.detach(), "gradient": gradient, "gradient_gap": gap, "cosine": cosine}


def _compute_gradient(value: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of a sum over lanes as rows, [L, C · H · W].

    The rows are float64, so that sums over their entries are as precise as the float32 entries.
    """
    grad = torch.autograd.grad(value, x, retain_graph=True, allow_unused=True)[0] if value.requires_grad else None
    if grad is None:
        raise ModelError(
            "The model's output has no gradient with respect to its input (it is detached, or computed without "
            "autograd). The linear model of robustness needs it. `robbench eval --suite queries` does not."
        )
    return grad.double().flatten(1)


class _LastLinear:
    """Records the input of the linear layer that ran last."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.input, self.width = model, torch.empty(0), 0

    def __enter__(self) -> _LastLinear:
        def record(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.input, self.width = args[0].detach(), getattr(layer, "out_features", 0)

        layers = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        self.handles = [layer.register_forward_pre_hook(record) for layer in layers]
        return self

    def take_activations(self, logits: Tensor) -> dict[str, Tensor]:
        """Return the penultimate activations, [L, H], or nothing if a linear layer cannot have made these logits."""
        fits = self.input.dim() == 2 and self.input.shape[0] == len(logits) and self.width == logits.shape[1]
        return {"penultimate": self.input} if fits else {}

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def _summarize_activations(layers: dict[str, np.typing.NDArray[Any]]) -> pd.DataFrame:
    frames = [pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in ACTIVATIONS.items()})]
    for layer, values in layers.items():
        mean, active = np.abs(values.astype(np.float64)).mean(0), (values != 0).mean(0)
        frames.append(pd.DataFrame({"layer": layer, "neuron": range(len(mean)), "mean": mean, "active": active}))
    return pd.concat(frames[1:] or frames, ignore_index=True).astype(ACTIVATIONS)
