"""One attack on a batch of images, in memory: what `robbench.attack` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from robbench.attacks import Attack
from robbench.classifier.batch_width import BatchWidths, choose_lanes
from robbench.classifier.checks import (
    choose_width,
    classify,
    compute_logits,
    find_bfloat16_flag,
    find_state_change_flag,
)  # fmt: skip
from robbench.classifier.guard import list_flags
from robbench.classifier.prepare import Target
from robbench.core.chance import find_chance_flag
from robbench.core.errors import RobbenchError
from robbench.core.machine import keep_freed_memory
from robbench.core.threat import Ball
from robbench.core.types import JUDGES, Judge, Status
from robbench.core.words import format_count
from robbench.engine.engine import Rows
from robbench.evaluation.inputs import Images, resolve
from robbench.evaluation.options import Options, check_names
from robbench.evaluation.precision import explain_bfloat16_cost
from robbench.evaluation.setup import Setup
from robbench.evaluation.shards import NOT_ATTACKED, Shards
from robbench.evaluation.stages import ReadyStage, run_stage
from robbench.models.spec import ModelSpec
from robbench.results.grid import Grid
from robbench.results.store import make_empty_rows
from robbench.results.summary import find_measured_flags, summarize_attacks
from robbench.suite import Suite

__all__ = ["AttackFields", "AttackOutcome", "attack_images", "compute_clean_accuracy"]


class AttackFields(TypedDict, total=False):
    """The options of an attack on images in memory; `Options` says what they mean."""

    norm: str
    seed: int
    lanes: int | None
    gradients: str | None
    fast_layers: bool
    one_by_one: bool
    target: str | int | Sequence[int] | None
    levels: int | None
    device: str | torch.device


@dataclass(frozen=True, eq=False)
class AttackOutcome:
    """What one attack did to N images. Tensors are on the CPU.

    Attributes:
        x_adv: an adversarial example of every broken image, and the clean image of every other one, [N, C, H, W].
        broken: whether the judge confirmed an adversarial example, [N] bool.
        misclassified: whether the model errs on the clean image, which is not attacked then, [N] bool.
        prediction: the class at `x_adv` of broken and misclassified images; of robust ones the class at the last point
            that was queried, [N] int64.
        distance: ‖x_adv − x‖ in the attack's norm, NaN where the image is not broken, [N] float64.
        forwards: forward passes of each image, [N] int64.
        backwards: backward passes of each image, [N] int64.
        flags: what to know before the numbers are trusted: name of a problem -> sentence.
    """

    x_adv: Tensor
    broken: Tensor
    misclassified: Tensor
    prediction: Tensor
    distance: Tensor
    forwards: Tensor
    backwards: Tensor
    flags: dict[str, str]

    @property
    def robust(self) -> Tensor:
        """Whether the image is classified correctly and withstood the attack, [N] bool."""
        return ~(self.broken | self.misclassified)

    @property
    def clean_accuracy(self) -> float:
        """Share of images that the model classifies correctly, in [0, 1]."""
        return float((~self.misclassified).double().mean())

    @property
    def robust_accuracy(self) -> float:
        """Share of images that are robust, in [0, 1]: an upper bound, because a stronger attack may break more."""
        return float(self.robust.double().mean())

    def __repr__(self) -> str:
        """Print the accuracies, not the tensors."""
        clean, robust = 100 * self.clean_accuracy, 100 * self.robust_accuracy
        flags = f", flags: {', '.join(self.flags)}" if self.flags else ""
        size = format_count(len(self.broken), "image")
        return f"AttackOutcome({size}: {clean:.1f} % clean, {robust:.1f} % robust{flags})"


def compute_clean_accuracy(
    model: str | nn.Module, x: Tensor, y: Tensor, options: Options
) -> tuple[float, dict[str, str]]:
    """Compute the share of images that a model classifies correctly, and the flags of the model.

    Raises:
        RobbenchError: the model or the images do not allow an honest number; the sentence says why.
    """
    target, images = _resolve_images(model, x, y, options)
    at = np.arange(len(images.y))
    shape = tuple(images.x(at[:1]).shape[1:])
    lanes = choose_lanes(options.lanes, len(at), shape, target.device)
    lanes = choose_width(BatchWidths(target.module, shape, lanes, images.dtype), len(at))
    prediction, flags = classify(target, images.x(at), images.y, images.num_classes, lanes)
    flags = {**images.flags, **flags, **find_chance_flag(images.y.numpy(), prediction)}
    return float((prediction == images.y.numpy()).mean()), flags


def _resolve_images(model: str | nn.Module, x: Tensor, y: Tensor, options: Options) -> tuple[Target, Images]:
    if isinstance(model, str) and ":" not in model:
        raise RobbenchError(
            f"model: {model!r} given with images; allowed: a module, or a source. A module of a registered model: "
            f"robbench.load_model({model!r})."
        )
    return resolve(ModelSpec.take(model, {"x": x, "y": y}), options)


def attack_images(
    model: str | nn.Module,
    attack: Attack,
    x: Tensor,
    y: Tensor,
    *,
    eps: str | float,
    judge: Judge = "any",
    **fields: Unpack[AttackFields],
) -> AttackOutcome:
    """Run one attack on images, and judge every point that it proposes.

    Nothing is written to disk. The verdicts are those of `evaluate(model, [attack], x=x, y=y, eps=eps)`.

    Args:
        model: a module in eval mode that maps images [N, C, H, W] in [0, 1] to logits [N, K], or a source.
        attack: one of `robbench.attacks`, such as PGD(steps=40).
        x: images [N, C, H, W] in [0, 1].
        y: labels [N], integers.
        eps: radius in [0, 1] pixel units, "8/255" or 0.3.
        judge: "any" point that is queried may break an image, or only the "final" one of each restart.
        **fields: norm (Linf, L2 or L1), seed, lanes, gradients, fast_layers, one_by_one, target, levels and device, as
            for `evaluate`.

    Raises:
        RobbenchError: the model, the images or an option do not allow an honest number; the sentence says why.
    """
    keep_freed_memory()
    check_names(fields, AttackFields)
    allowed = [rule for rule in JUDGES if rule != "nearest"]  # which takes no radius
    if judge not in allowed:
        raise RobbenchError(f"judge: {judge!r} given; allowed: {', '.join(allowed)}.")
    options = Options.take({"norm": "Linf", **fields, "eps": eps})
    target, images = _resolve_images(model, x, y, options)
    if why := explain_bfloat16_cost(target, images, options):
        fields["gradients"] = None
        outcome = attack_images(model, attack, x, y, eps=eps, judge=judge, **fields)
        return replace(outcome, flags={"gradients": why, **outcome.flags})
    setup = Setup(target, images, replace(Suite.of([attack]), judge=judge), options, None)
    all_x, labels = images.x(np.arange(len(images.y))), images.y
    widths = BatchWidths(target.module, all_x.shape[1:], setup.lanes, images.dtype, setup.coarse)
    first, flags = classify(target, all_x, labels, images.num_classes, lanes := choose_width(widths, len(all_x)))
    if setup.coarse:
        flags |= find_bfloat16_flag(target, all_x[:lanes], lanes)
    misclassified, prediction = torch.from_numpy(first) != labels, torch.from_numpy(first)
    stage, wrong, right = setup.stages[0], np.flatnonzero(misclassified), np.flatnonzero(~misclassified)
    records = Shards(None, make_empty_rows(), lambda exact: [])
    lost = {"sample": images.index[wrong], "label": labels.numpy()[wrong], "prediction": first[wrong]}
    records.add(stage.name, Status.MISCLASSIFIED.value, {**NOT_ATTACKED, **lost})
    outcome = _make_outcome(all_x, misclassified, prediction, {**images.flags, **flags, **setup.find_gaps()})

    def take(rows: Rows) -> None:
        records.add(stage.name, np.where(rows.broken, Status.BROKEN.value, Status.ROBUST.value), vars(rows))
        at = torch.from_numpy(rows.sample)
        for name in ("broken", "prediction", "distance", "forwards", "backwards"):
            getattr(outcome, name)[at] = torch.from_numpy(getattr(rows, name))
        assert rows.x_adv is not None
        outcome.x_adv[at] = rows.x_adv.cpu()

    if len(right):
        some = all_x[right[: setup.lanes]]
        before = compute_logits(target, some, lanes)
        run_stage(
            stage,
            target,
            images,
            *(all_x[right], labels[right], images.index[right], Ball.of(setup.threat, options.levels)),
            widths=widths,
            judge=judge,
            deterministic="randomized" not in flags,
            on_rows=take,
            on_narrow=lambda width, reason: None,
            keep_adversarials=True,
            targets=setup.targets,
        )
        outcome.flags.update(list_flags(target.module) | outcome.flags)
        if "randomized" not in outcome.flags:  # the judge sees what the clean images do not show
            outcome.flags.update(find_state_change_flag(target, some, labels[right[: setup.lanes]], before, lanes))
    outcome.flags.update(_find_flags_of_records(records, stage))
    return outcome


def _make_outcome(x: Tensor, misclassified: Tensor, prediction: Tensor, flags: dict[str, str]) -> AttackOutcome:
    """Make the outcome of images that nobody has attacked yet."""
    return AttackOutcome(
        x_adv=x.clone(),
        broken=torch.zeros(len(x), dtype=torch.bool),
        misclassified=misclassified,
        prediction=prediction.clone(),
        distance=torch.full((len(x),), torch.nan, dtype=torch.float64),
        forwards=torch.zeros(len(x), dtype=torch.int64),
        backwards=torch.zeros(len(x), dtype=torch.int64),
        flags=flags,
    )


def _find_flags_of_records(records: Shards, stage: ReadyStage) -> dict[str, str]:
    """Find the flags that `evaluate` would find in the same records."""
    records.flush()
    rows, attacks = records.collect_rows(), {stage.name: stage.describe()}
    return find_measured_flags(rows, summarize_attacks(Grid.of(rows, list(attacks)), rows, attacks, "full"))
