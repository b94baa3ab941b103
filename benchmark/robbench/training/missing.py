"""Which models to train: all that have no weights or are partly trained, by priority, or a family of them.

A model whose weights are not shipped counts as trained: its card has a digest, and its results are of these weights.
`train` with its name makes weights here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from robbench.classifier.prepare import pick_device
from robbench.core.errors import CardError
from robbench.models.card import Entry, Registry, extract_identity
from robbench.training.options import BudgetName, Options, choose_recipe
from robbench.training.train import TrainingResult, train, train_together

__all__ = ["list_missing", "train_family", "train_missing"]


def list_missing(registry: Registry, *, device: str = "auto", budget: BudgetName = "auto") -> list[Entry]:
    """List the cards whose models are not fully trained for this device, by priority, then name.

    On a GPU, models that were trained with the card's CPU budget are included. On a CPU they are not. Fully trained
    models whose weights are not shipped are not included, wherever their weights are.
    """
    where = pick_device(device)
    found = [e for e in registry.entries() if e.card.is_trainable and not _is_finished(e, where, _budget(e, budget))]
    return sorted(found, key=lambda entry: -entry.card.priority)


def _is_finished(entry: Entry, device: torch.device, budget: BudgetName, iterations: int | None = None) -> bool:
    """Tell whether a card has weights of the whole recipe for a device, or of `iterations` of it."""
    card = entry.card
    recipe, instead = choose_recipe(entry, device, budget, iterations)
    done = card.trained if card.weights is not None else None
    if done is None or done.iterations < recipe.iterations:
        return False
    # A larger batch is another recipe: as many iterations of a smaller batch have seen fewer images.
    return done.instead in ("", instead) if budget == "gpu" else bool(instead) or not done.instead


def _budget(entry: Entry, budget: BudgetName) -> BudgetName:
    """Choose a card's budget: one that is asked of all cards means `auto` where a card has none."""
    missing = {"cpu": entry.card.cpu_budget is None, "gpu": entry.card.gpu_budget is None}
    return "auto" if missing.get(budget) else budget


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


def train_family(
    entries: Sequence[Entry],
    options: Options,
    *,
    skip: Callable[[Entry], None] = lambda _: None,
    done: Callable[[Entry, TrainingResult], None] = lambda _entry, _result: None,
) -> None:
    """Train models of one architecture and data set together. Without `restart`, leave out those that are trained.

    Args:
        entries: the cards.
        options: how to train. With `fit`, each of `entries` has an equal part of the time, also those left out.
        skip: called with each card that is left out.
        done: called with each card that was trained and its result.

    Raises:
        CardError: the models differ in architecture, normalization or data set, or one cannot be trained.
        ModelError, DataError: see `train_together`.
    """
    first, device = entries[0], pick_device(options.device)
    for entry in entries:
        if extract_identity(entry.card) != extract_identity(first.card):
            raise CardError(
                f"{first.full_name} ({_describe(first)}) and {entry.full_name} ({_describe(entry)}) given; models that "
                "train together have one architecture, normalization and data set. Name some of them: --family "
                "dataset/a,dataset/b"
            )
        choose_recipe(entry, device, options.budget)
    wanted = None if options.plan is None else options.plan.total
    trained = [] if options.restart else [e for e in entries if _is_finished(e, device, options.budget, wanted)]
    for entry in trained:
        skip(entry)
    if rest := [entry for entry in entries if entry not in trained]:
        share = None if options.fit is None else options.fit * len(rest) / len(entries)
        train_together(rest, replace(options, fit=share), done)


def _describe(entry: Entry) -> str:
    architecture = entry.card.architecture
    return ", ".join([architecture.name, *(f"{k} {v}" for k, v in architecture.args.items())])
