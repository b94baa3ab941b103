"""Train all models that have no weights or are partly trained, by priority.

A model whose weights are not shipped counts as trained: its card has a digest, and its results are of these weights.
`train` with its name makes weights here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from robbench.classifier.prepare import pick_device
from robbench.models.card import Entry, Registry
from robbench.training.options import BudgetName, Options, choose_recipe
from robbench.training.train import TrainingResult, train

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
    options: Options,
    *,
    begin: Callable[[Entry], None] = lambda _: None,
    done: Callable[[Entry, TrainingResult], None] = lambda _entry, _result: None,
) -> None:
    """Train the cards of `list_missing`, one after the other, until all are done or the time is up.

    The next call continues with the same card, from its checkpoint.

    Args:
        registry: the cards.
        options: how to train. Its `time_limit` is for all models together.
        begin: called with each card before its training.
        done: called with each card and the result of `train`.

    Raises:
        CardError, ModelError, DataError: see `train`. The weights of models trained before the error are kept.
    """
    end = None if options.time_limit is None else time.monotonic() + options.time_limit
    for i, entry in enumerate(list_missing(registry, device=options.device, budget=options.budget)):
        left = None if end is None else end - time.monotonic()
        if i and left is not None and left <= 0:
            return
        begin(entry)
        done(entry, train(entry, replace(options, budget=_budget(entry, options.budget), time_limit=left)))
