"""Transfer: perturb images with a surrogate model, then judge them on the target (Papernot et al. 2017).

A suite gives `kind = "transfer"`, the name of the `surrogate`, and the attack on the surrogate:

```toml
[[attack]]
name = "BB-PGD-7-CW"
kind = "transfer"
surrogate = "natural"    # a model of the target's data set, or a full name: "mnist/natural"
attack = "pgd"           # its final points are tried on the target
objective = "margin"
steps = 7
```
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.attacks import Attack, describe
from robbench.classifier.batch_width import device_of
from robbench.classifier.prepare import prepare
from robbench.core.errors import ModelError, RobbenchError, SuiteError
from robbench.core.threat import Ball
from robbench.core.types import NORMS, Norm, Problem, State
from robbench.engine import engine
from robbench.evaluation.options import Options
from robbench.models.card import DATASETS, Registry
from robbench.models.load import load_model
from robbench.models.load_source import load_source
from robbench.models.spec import ModelSpec
from robbench.suite import Stage, build_attack

__all__ = ["FixedPoints", "Transfer", "build_inner_attack", "build_transfer", "load_surrogate"]


@dataclass(frozen=True, eq=False)
class FixedPoints:
    """An attack that queries fixed points: one per image and trial.

    Attributes:
        points: the points, [N · trials, C, H, W] on the CPU: those of the first image, of the second, and so on.
        sample: official indices of the images, [N], increasing.
        trials: number of points of each image.
    """

    kind: ClassVar[str] = "given"
    version: ClassVar[int] = 1
    memoryless: ClassVar[bool] = False
    norms: ClassVar[tuple[Norm, ...]] = NORMS
    needs_grad: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False
    steps: ClassVar[int] = 0

    points: Tensor
    sample: Tensor
    trials: int = 1

    def init(self, p: Problem, ball: Ball) -> State:
        """Look up the point of each lane."""
        at = torch.searchsorted(self.sample, p.sample.cpu()) * self.trials + p.trial.cpu()
        return {"x": self.points[at].to(p.x.device)}

    def loss(self, logits: Tensor, p: Problem, s: State) -> Tensor:
        """Return zeros: there is no loss to increase."""
        return torch.zeros_like(logits[:, 0])

    def step(self, p: Problem, ball: Ball, s: State, t: Tensor, logits: Tensor, loss: Tensor, grad: Tensor) -> State:
        """Return the state unchanged."""
        return s


@dataclass(frozen=True, eq=False)
class Transfer:
    """An attack on a surrogate. The final point of each of its trials (restarts, targets) is tried on the target.

    Only these queries of the target count. Queries of the surrogate do not count.

    Attributes:
        surrogate: the surrogate model.
        name: full name of the surrogate.
        weights: SHA-256 of the surrogate's weights.
        inner: the attack on the surrogate.
    """

    kind: ClassVar[str] = "transfer"
    version: ClassVar[int] = 1

    surrogate: nn.Module
    name: str
    weights: str
    inner: Attack

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms of the inner attack."""
        return self.inner.norms

    @property
    def passes(self) -> int:
        """Largest number of passes of an image, through surrogate and target together."""
        return self.inner.trials * (self.inner.steps + 2)

    def describe(self) -> dict[str, Any]:
        """Return the attack's part of a run's identity."""
        identity = {"surrogate": self.name, "surrogate_weights": self.weights, "attack": describe(self.inner)}
        # Without this key, earlier versions tried the point of the first trial alone.
        trials = {"trials": self.inner.trials} if self.inner.trials > 1 else {}
        return {"kind": self.kind, "version": self.version, **identity, **trials}

    def propose(
        self,
        x: Tensor,
        y: Tensor,
        sample: NDArray[np.int64],
        ball: Ball,
        key: tuple[int, int],
        lanes: int,
        target: Tensor | None = None,
    ) -> Iterator[tuple[NDArray[np.int64], FixedPoints]]:
        """Perturb images in batches of one width. Yield positions in `sample` and the attack that tries the points."""
        device = device_of(self.surrogate)
        for begin in range(0, len(y), lanes):
            at = np.arange(begin, min(begin + lanes, len(y)))
            p = Problem(
                x=x[at].to(device),
                y=y[at].to(device),
                sample=torch.from_numpy(sample[at]).to(device),
                trial=torch.zeros(len(at), dtype=torch.int64, device=device),
                key=key,
                target=None if target is None else target[at].to(device),
            )
            padded, trials, points = _pad(p, lanes), self.inner.trials, list[Tensor]()
            for trial in range(trials):
                p = replace(padded, trial=torch.full_like(padded.trial, trial))
                points.append(engine.perturb(self.surrogate, self.inner, p, ball)[: len(at)].cpu())
            order = np.argsort(sample[at])
            of_each = torch.stack(points, dim=1)[order].flatten(0, 1)
            yield at, FixedPoints(of_each, torch.from_numpy(sample[at][order]), trials)


def _pad(p: Problem, lanes: int) -> Problem:
    """Pad a batch with copies of the first image, so that all batches have the same shape."""
    more = lanes - len(p.y)

    def fill(v: Tensor) -> Tensor:
        return torch.cat([v, v[:1].expand(more, *v.shape[1:])])

    target = None if p.target is None else fill(p.target)
    return replace(p, x=fill(p.x), y=fill(p.y), sample=fill(p.sample), trial=fill(p.trial), target=target)


def build_inner_attack(stage: Stage) -> Attack:
    """Make the attack on the surrogate.

    Raises:
        SuiteError: a parameter is missing or unknown.
    """
    given = dict(stage.params)
    try:
        given.pop("surrogate")
        kind = str(given.pop("attack"))
    except KeyError as missing:
        raise SuiteError(
            f"Attack {stage.name!r} (transfer): no {missing.args[0]!r} given; needed: surrogate and attack. The "
            "parameters of the attack may follow."
        ) from None
    return build_attack(Stage(stage.name, kind, given))


def load_surrogate(
    name: str, dataset: str, num_classes: int, device: torch.device, first: Tensor, options: Options
) -> tuple[nn.Module, str, str]:
    """Load the surrogate that the user names.

    Args:
        name: a registered model, or a source.
        dataset: name of the data set of the images.
        num_classes: the number of logits that the surrogate must have.
        device: where the surrogate runs.
        first: a few images [n, C, H, W] to try it on.
        options: folders of registries, and whether layers may be replaced.

    Returns:
        The surrogate, its name for results, and the SHA-256 of its weights.

    Raises:
        RobbenchError: it cannot be loaded, does not fit the images, or has no gradient. The message names it.
    """
    try:
        return _load_surrogate(name, dataset, num_classes, device, first, options)
    except RobbenchError as error:
        raise type(error)(f"--surrogate {name}: {error}") from error


def _load_surrogate(
    name: str, dataset: str, num_classes: int, device: torch.device, first: Tensor, options: Options
) -> tuple[nn.Module, str, str]:
    spec = ModelSpec(name)
    if spec.source is None:
        entry = Registry.default([Path(m) for m in options.models]).find(name)
        if entry.dataset != dataset and dataset in DATASETS:
            raise ModelError(f"{entry.full_name} given; expected: a model of data set {dataset!r}.")
        loaded = load_model(entry)
        module, origin, weights = loaded.module, name, loaded.weights_sha256
    else:
        _, channels, rows, columns = first.shape
        found = load_source(spec, (channels, rows, columns), num_classes, first)
        module, origin, weights = found.module, str(found.identity["source"]), found.weights
    surrogate = prepare(module, device, first, fast_layers=options.fast_layers)
    with torch.enable_grad():
        logits = surrogate(first.to(device, copy=True).requires_grad_(True))
    if logits.shape[1] != num_classes:
        raise ModelError(f"The model has {logits.shape[1]} classes; the model that is attacked has {num_classes}.")
    if not logits.requires_grad:
        raise ModelError("The model has no gradient, so no image can be perturbed with it.")
    return surrogate, origin, weights


def build_transfer(
    stage: Stage, dataset: str, device: torch.device, first: Tensor, registry: Registry, fast_layers: bool = True
) -> Transfer:
    """Make the transfer attack of a stage; `first` are a few images [n, C, H, W] to try the surrogate on.

    `fast_layers`: see `classifier.prepare`.

    Raises:
        SuiteError: a parameter is missing or unknown.
        CardError, ModelError: the surrogate is unknown, is for another data set, or is not trained yet.
    """
    inner, name = build_inner_attack(stage), str(stage.params["surrogate"])
    entry = registry.find(name if "/" in name else f"{dataset}/{name}")
    if entry.dataset != dataset:
        raise ModelError(
            f"Attack {stage.name!r}: surrogate {entry.full_name} given; expected: a model of data set {dataset!r}"
        )
    loaded = load_model(entry)
    surrogate = prepare(loaded.module, device, first, fast_layers=fast_layers)
    return Transfer(surrogate, entry.full_name, loaded.weights_sha256, inner)
