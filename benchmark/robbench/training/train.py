"""The training loop for all cards."""

from __future__ import annotations

import datetime as dt
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robbench.classifier.prepare import pick_device
from robbench.core.machine import describe_device, keep_freed_memory, versions
from robbench.data.sets import load
from robbench.models.card import WEIGHTS_FOLDER, Entry, write_training
from robbench.models.load import save_weights
from robbench.training.options import Options, choose_recipe
from robbench.training.run import Run

__all__ = ["TrainingResult", "train"]


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
    began = time.monotonic() if options.began is None else options.began
    keep_freed_memory()
    run = Run(entry, options, load(entry.dataset, "train", options.data_dir), pick_device(options.device))
    begin = clock = time.monotonic()
    run.start_clock(begin - began)
    while not run.is_done:
        run.advance()
        now = time.monotonic()
        stop = options.time_limit is not None and now - begin > options.time_limit
        run.settle(now - clock, now - begin, stop)
        clock = time.monotonic()
        if stop:
            break
    return _write(run, options)


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
        table["fit"] = options.fit
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
