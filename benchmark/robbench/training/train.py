"""The training loop for all cards."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robbench.classifier.prepare import pick_device
from robbench.core.errors import ModelError
from robbench.core.machine import describe_device, keep_freed_memory, versions
from robbench.data.sets import load
from robbench.models.card import WEIGHTS_FOLDER, Entry, write_training
from robbench.models.load import save_weights
from robbench.training.draws import Draws
from robbench.training.options import Options, choose_recipe
from robbench.training.run import Run
from robbench.training.together import Team

__all__ = ["TrainingResult", "train", "train_together"]


@dataclass(frozen=True)
class TrainingResult:
    """The result of a call of `train`.

    Attributes:
        table: the `trained` table of these weights. It is written to the card only if the weights are.
        wanted: number of iterations that were planned.
        written: whether the weights were written to the registry and the card.
        log: the log of the run. The checkpoint is in the same folder.
    """

    table: dict[str, Any]
    wanted: int
    written: bool
    log: Path


def train(entry: Entry, options: Options) -> TrainingResult:
    """Train a card's model, or continue an earlier call, and write its weights and card.

    If the card already has weights of more iterations, these stay, unless `restart` is given or they are not here (see
    `shipped` of a card). The checkpoint of this call is written in all cases.

    Args:
        entry: the card. Its registry must be writable.
        options: how to train.

    Raises:
        CardError: the card has no recipe, or its weights come from a package.
        ModelError: the loss is NaN or infinite, the checkpoint belongs to another recipe, a teacher is not trained, or
            `fit` is too short to begin.
    """
    results: list[TrainingResult] = []
    train_together([entry], options, lambda _, result: results.append(result))
    return results[0]


def train_together(entries: Sequence[Entry], options: Options, done: Callable[[Entry, TrainingResult], None]) -> None:
    """Train models of one data set together, an iteration at a time, as `train` trains one.

    Each has the checkpoint and, up to rounding, the weights of its own training, and either goes on from the other.
    Models that are behind go first, until all are at the same iteration. Models with the same seed, batch size and
    augmentation share their batches.

    Args:
        entries: the cards.
        options: how to train.
        done: called with each card and its result, when its weights are written.

    Raises:
        CardError, ModelError: see `train`. A model whose loss is NaN or infinite stops none of the others before.
    """
    began = time.monotonic() if options.began is None else options.began
    keep_freed_memory()
    data, device = load(entries[0].dataset, "train", options.data_dir), pick_device(options.device)
    if options.fit is not None:
        options = replace(options, fit=options.fit / len(entries))
    shared: dict[tuple[object, ...], Draws] = {}
    runs = [Run(entry, options, data, device, shared) for entry in entries]
    begin = clock = time.monotonic()
    for run in runs:
        run.start_clock((begin - began) / len(runs))
        if run.is_done:
            done(run.entry, _write(run, options))
    active, errors, stop = [run for run in runs if not run.is_done], [], False
    with Team(runs) as team:
        while active and not stop:
            behind = min(run.iteration for run in active)
            turn = [run for run in active if run.iteration == behind]
            team.advance(turn)
            now = time.monotonic()
            stop = options.time_limit is not None and now - begin > options.time_limit
            for run in list(active) if stop else turn:
                worked = (now - clock) / len(turn) if run in turn else 0.0
                try:
                    run.settle(worked, now - begin, stop)
                except ModelError as error:
                    errors.append(error)
                    active.remove(run)
                    continue
                if stop or run.is_done:
                    done(run.entry, _write(run, options))
                    active.remove(run)
            clock = time.monotonic()
    if errors:
        raise ModelError("\n".join(map(str, errors))) from errors[0]


def _write(run: Run, options: Options) -> TrainingResult:
    """Write the weights of a run to the registry and its record to the card."""
    entry = run.entry
    chosen = run.wanted if options.fit or options.plan else None
    _, instead = choose_recipe(entry, run.device, options.budget, chosen)
    table = {
        "iterations": run.iteration,
        "seconds": round(run.seconds, 1),
        "hardware": describe_device(run.device),
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "seed": run.recipe.seed,
        "command": options.command or f"robbench train {entry.full_name}",
        "precision": run.precision,
    }
    if instead:
        table["instead"] = instead
    if options.fit is not None:
        table["fit"] = round(options.fit, 1)
    if chosen is not None and run.plan.pieces:
        table["plan"] = str(run.plan)
    earlier = None if entry.needs_training else entry.card.trained
    if earlier is not None and earlier.iterations > run.iteration and not options.restart:
        return TrainingResult(table, run.wanted, written=False, log=run.log)
    relative = f"{entry.dataset}/{entry.name}.safetensors"
    with run.step.use_average(run.iteration):
        sha256 = save_weights(run.module, entry.root / WEIGHTS_FOLDER / relative)
    write_training(entry.path, weights_path=relative, sha256=sha256, trained=table)
    return TrainingResult(table, run.wanted, written=True, log=run.log)
