"""What is trained, and how: the options of a training, and the recipe that they choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from robbench.core.errors import CardError
from robbench.models.card import Entry, Recipe
from robbench.models.recipes import describe_changes
from robbench.training.plan import Plan

__all__ = ["BudgetName", "Options", "Precision", "Progress", "choose_recipe"]

BudgetName = Literal["auto", "full", "cpu", "gpu"]
Precision = Literal["auto", "float32", "bfloat16", "float64"]


@dataclass(frozen=True)
class Progress:
    """One report of a training run.

    `loss` is the mean loss since the last report. `left` is the estimated remaining time in seconds. `clean` and
    `robust` are accuracies on a few test images, without and with a short attack. They are None in most reports.
    """

    model: str
    iteration: int
    iterations: int
    loss: float
    lr: float
    seconds: float
    left: float
    clean: float | None = None
    robust: float | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to train.

    Attributes:
        data_dir: folder of the data sets.
        runs: folder for checkpoints and logs.
        device: auto, cpu, cuda or cuda:i.
        budget: `full` trains the recipe, `cpu` the recipe with the card's CPU budget, `gpu` with its GPU budget. `auto`
            uses the CPU budget on a CPU if the card has one.
        precision: `auto` is bfloat16 on a GPU for images of 32 pixels and more, otherwise float32. (Smaller networks
            are limited by launches, not by arithmetic.) `float64` is for comparisons.
        compiled: use `torch.compile` (needs a C++ compiler; the first iterations take a minute).
        time_limit: stop all models after this many seconds, with a checkpoint and the present weights.
        restart: ignore the checkpoint of an earlier call.
        fit: choose the number of iterations so that the training takes this many seconds, all calls together. Models
            that train together get equal parts of it.
        plan: the iterations, instead of those of the recipe. Not together with `fit`.
        began: `time.monotonic()` at the begin of the call, for `fit`. The default is the begin of `train`.
        command: the command that repeats this call, for the card.
        report: called about a hundred times per model.
    """

    data_dir: str | Path | None = None
    runs: Path = Path("runs")
    device: str = "auto"
    budget: BudgetName = "auto"
    precision: Precision = "auto"
    compiled: bool = False
    time_limit: float | None = None
    restart: bool = False
    fit: float | None = None
    plan: Plan | None = None
    began: float | None = None
    command: str = ""
    report: Callable[[Progress], None] = lambda _: None


def choose_recipe(
    entry: Entry, device: torch.device, budget: BudgetName, iterations: int | None = None
) -> tuple[Recipe, str]:
    """Choose the recipe to train on a device. Return it and a text on its changes to the card's recipe (may be empty).

    `iterations` replaces the number of the recipe and of the budget.

    Raises:
        CardError: the card has no recipe, its weights come from a package, or it has no budget of the name in `budget`.
    """
    card = entry.card
    if card.recipe is None or not card.is_trainable:
        raise CardError(f"{entry.full_name} has no recipe of its own to train by (weights from elsewhere).")
    budgets = {"cpu": card.cpu_budget, "gpu": card.gpu_budget}
    if budget in budgets and budgets[budget] is None:
        others = ", ".join(["auto", "full", *(name for name, table in budgets.items() if table)])
        raise CardError(f"{entry.full_name} has no [{budget}_budget]; allowed here: budget {others}.")
    changes = budgets.get("cpu" if budget == "auto" and device.type == "cpu" else budget)
    recipe = card.recipe if changes is None else changes.apply(card.recipe)
    if iterations is not None:
        recipe = recipe.model_copy(update={"iterations": iterations})
    return recipe, describe_changes(card.recipe, recipe)
