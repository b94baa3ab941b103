"""Train all models that have no weights or are partly trained, by priority.

A model whose weights are not shipped counts as trained: its card has a digest, and its results are of these weights.
`train` with its name makes weights here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from robbench.classifier.prepare import pick_device
from robbench.models.card import Entry, Registry
from robbench.training.train import BudgetName, Precision, Progress, TrainingResult, choose_recipe, train

__all__ = ["list_missing", "train_missing"]


def list_missing(registry: Registry, *, device: str = "auto", budget: BudgetName = "auto") -> list[Entry]:
    """List the cards whose models are not fully trained for this device, by priority, then name.

    On a GPU, models that were trained with the card's CPU budget are included. On a CPU they are not. Fully trained
    models whose weights are not shipped are not included, wherever their weights are.
    """
    where = pick_device(device)
    found = []
    for entry in registry.entries():
        card = entry.card
        if not card.is_trainable:
            continue
        recipe, instead = choose_recipe(entry, where, _budget(entry, budget))
        done = card.trained if card.weights is not None else None
        finished = done is not None and done.iterations >= recipe.iterations and (bool(instead) or not done.instead)
        if not finished:
            found.append(entry)
    return sorted(found, key=lambda entry: -entry.card.priority)


def _budget(entry: Entry, budget: BudgetName) -> BudgetName:
    """Choose a card's budget: `cpu`, asked of all cards, means the recipe where a card has no CPU budget."""
    return "auto" if budget == "cpu" and entry.card.cpu_budget is None else budget


def train_missing(
    registry: Registry,
    *,
    data_dir: str | Path | None = None,
    runs: Path = Path("runs"),
    device: str = "auto",
    budget: BudgetName = "auto",
    precision: Precision = "auto",
    compiled: bool = False,
    time_limit: float | None = None,
    begin: Callable[[Entry], None] = lambda _: None,
    report: Callable[[Progress], None] = lambda _: None,
    done: Callable[[Entry, TrainingResult], None] = lambda _entry, _result: None,
) -> None:
    """Train the cards of `list_missing`, one after the other, until all are done or the time is up.

    The next call continues with the same card, from its checkpoint.

    Args:
        registry: the cards.
        data_dir: see `train`, also for `runs`, `device`, `budget`, `precision`, `compiled` and `report`.
        runs: folder of checkpoints and logs.
        device: device to train on.
        budget: which recipe to train.
        precision: precision of the network.
        compiled: whether to compile the network.
        report: called while a model is trained.
        time_limit: limit for all models together, in seconds.
        begin: called with each card before its training.
        done: called with each card and the result of `train`.

    Raises:
        CardError, ModelError, DataError: see `train`. The weights of models trained before the error are kept.
    """
    end = None if time_limit is None else time.monotonic() + time_limit
    for i, entry in enumerate(list_missing(registry, device=device, budget=budget)):
        left = None if end is None else end - time.monotonic()
        if i and left is not None and left <= 0:
            return
        begin(entry)
        result = train(
            entry,
            data_dir=data_dir,
            runs=runs,
            device=device,
            budget=_budget(entry, budget),
            precision=precision,
            compiled=compiled,
            time_limit=left,
            report=report,
        )
        done(entry, result)
