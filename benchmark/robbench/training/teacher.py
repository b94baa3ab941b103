"""The target logits of a student: one target per training image, computed before training begins."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from robbench.core import rng
from robbench.core.errors import ModelError
from robbench.core.files import digest, open_regular, write_atomically
from robbench.core.types import Dataset
from robbench.models.card import Entry, Recipe, Registry
from robbench.models.load import load_model
from robbench.training.recipe import augment
from robbench.training.targets import correct, fix, hybrid

__all__ = ["compute_targets", "list_teacher_digests"]

_CHUNK = 250


def _find_teachers(entry: Entry, recipe: Recipe) -> list[Entry]:
    if recipe.distillation is None:
        return []
    registry = Registry.default([entry.root])
    names = (recipe.distillation.teacher, recipe.distillation.ranks_from)
    found = [registry.find(name) for name in names if name is not None]
    for teacher in found:
        if teacher.dataset != entry.dataset:
            raise ModelError(f"{entry.full_name}: teacher {teacher.full_name} given; expected: one for {entry.dataset}")
    return found


def list_teacher_digests(entry: Entry, recipe: Recipe) -> list[str]:
    """List the SHA-256 of the weights of a recipe's teachers, from their cards.

    Raises:
        ModelError: a teacher is a model of another data set, or is not trained yet.
    """
    digests = []
    for teacher in _find_teachers(entry, recipe):
        if teacher.card.weights is None:
            raise ModelError(
                f"{entry.full_name}: its teacher {teacher.full_name} is not trained yet: robbench train "
                f"{teacher.full_name}"
            )
        digests.append(teacher.card.weights.sha256)
    return digests


def compute_targets(entry: Entry, recipe: Recipe, data: Dataset, device: torch.device, folder: Path) -> Tensor | None:
    """Compute the target logits of all training images [n, K], or read those that an earlier call left in `folder`.

    A target is the mean of the teacher's logits over `views` augmented views (Seguin et al. 2021, App. A). The recipe's
    distillation table says how to change it. The teacher is in evaluation mode. In the paper it was in training mode,
    so that a target depended on its batch.

    Raises:
        ModelError: a teacher is missing or is not trained.
    """
    distillation = recipe.distillation
    if distillation is None:
        return None
    wanted = digest(
        [distillation.model_dump(), recipe.augment, recipe.seed, data.digest, list_teacher_digests(entry, recipe)]
    )
    path = folder / "targets.safetensors"
    if path.exists():
        open_regular(path, 2**36).close()  # the library takes a path only, and would wait for a pipe
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("digest") == wanted:
                known: Tensor = file.get_tensor("target").to(device)
                return known
    logits = [_mean_logits(teacher, recipe, data, device) for teacher in _find_teachers(entry, recipe)]
    sample = torch.arange(len(data), device=device)
    target = logits[0]
    if distillation.ranks_from is not None:
        target = hybrid(target, logits[1])
    if distillation.fix is not None:
        target = fix(target, distillation.fix, distillation.rest, sample, rng.make_key(recipe.seed, "teacher-fix"))
    if distillation.correct:
        target = correct(target, torch.from_numpy(data.y).to(device))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.torch.save({"target": target.cpu()}, {"digest": wanted}))
    return target


@torch.no_grad()
def _mean_logits(teacher: Entry, recipe: Recipe, data: Dataset, device: torch.device) -> Tensor:
    assert recipe.distillation is not None
    module = load_model(teacher, device).module.to(memory_format=torch.channels_last)
    key = rng.make_key(recipe.seed, "teacher-views")
    views = 1 if recipe.augment == "none" else recipe.distillation.views
    rows = []
    for sample in torch.split(torch.arange(len(data), device=device), _CHUNK):
        x = torch.from_numpy(data.x[sample.cpu().numpy()]).to(device, torch.float32) / data.scale
        x = x.contiguous(memory_format=torch.channels_last)
        total = torch.zeros(())
        for view in range(views):
            seen = x if views == 1 else augment(x, recipe.augment, sample, torch.full_like(sample, view), key)
            total = total.to(device) + module(seen)
        rows.append(total / views)
    return torch.cat(rows)
