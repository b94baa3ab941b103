"""The training loop for all cards.

A run depends on its card only. A run that was killed and started again ends with the same weights as an uninterrupted
run (same hardware and thread count, float32). The reason: batches, noise and the starts of inner attacks are drawn by
counter, so there is no generator whose state could be lost.

```
runs/<dataset>/<name>/checkpoint.pt        model, optimizer, running average and position
runs/<dataset>/<name>/log.jsonl            one line per report: iteration, loss, lr, seconds; sometimes accuracies
runs/<dataset>/<name>/targets.safetensors  a teacher's logits, if the recipe has a teacher
```

A run with the card's CPU budget (`cpu_budget`) has a separate folder, `<name>.cpu`.
"""

from __future__ import annotations

import datetime as dt
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robbench.classifier.prepare import pick_device
from robbench.core import rng
from robbench.core.errors import CardError, ModelError
from robbench.core.files import digest, write_atomically
from robbench.core.machine import describe_device, keep_freed_memory, versions
from robbench.core.types import Dataset
from robbench.data.sets import load
from robbench.models.architectures import Normalized, build
from robbench.models.card import DATASETS, WEIGHTS_FOLDER, Entry, Recipe, extract_identity, write_training
from robbench.models.load import save_weights
from robbench.training.probe import TrainingProbe
from robbench.training.recipe import learning_rate
from robbench.training.step import Step
from robbench.training.teacher import compute_targets, list_teacher_digests

__all__ = ["BudgetName", "Precision", "Progress", "TrainingResult", "choose_recipe", "train"]

_CHECKPOINT_SECONDS = 20.0
_REPORTS = 100  # log lines of a run
_PROBES = 10  # log lines of a run with accuracies

BudgetName = Literal["auto", "full", "cpu"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Progress:
    """One report of a training run.

    `loss` is the mean loss since the last report. `left` is the estimated remaining time in seconds. `clean` and
    `robust` are accuracies on a few test images, without and with a short attack. They are None in most reports.
    """

    iteration: int
    iterations: int
    loss: float
    lr: float
    seconds: float
    left: float
    clean: float | None = None
    robust: float | None = None


@dataclass(frozen=True)
class TrainingResult:
    """The result of a call of `train`.

    Attributes:
        table: the `trained` table of these weights. It is written to the card only if the weights are.
        wanted: number of iterations of the recipe that was trained.
        written: whether the weights were written to the registry and the card.
        log: the log of the run. The checkpoint is in the same folder.
    """

    table: dict[str, Any]
    wanted: int
    written: bool
    log: Path


def choose_recipe(entry: Entry, device: torch.device, budget: BudgetName) -> tuple[Recipe, str]:
    """Choose the recipe to train on a device. Return it and a text on its changes to the card's recipe (may be empty).

    Raises:
        CardError: the card has no recipe, its weights come from a package, or it has no CPU budget for `budget="cpu"`.
    """
    card = entry.card
    if card.recipe is None or not card.is_trainable:
        raise CardError(f"{entry.full_name} has no recipe of its own to train by (weights from elsewhere).")
    if budget == "cpu" and card.cpu_budget is None:
        raise CardError(f"{entry.full_name} has no [cpu_budget]; allowed here: budget auto or full.")
    if card.cpu_budget is None or budget == "full" or (budget == "auto" and device.type != "cpu"):
        return card.recipe, ""
    return card.cpu_budget.apply(card.recipe), card.cpu_budget.describe(card.recipe)


def train(
    entry: Entry,
    *,
    data_dir: str | Path | None = None,
    runs: Path = Path("runs"),
    device: str = "auto",
    budget: BudgetName = "auto",
    precision: Precision = "auto",
    compiled: bool = False,
    time_limit: float | None = None,
    restart: bool = False,
    command: str = "",
    report: Callable[[Progress], None] = lambda _: None,
) -> TrainingResult:
    """Train a card's model, or continue an earlier call, and write its weights and card.

    If the card already has weights of more iterations, these stay, unless `restart` is given or they are not here (see
    `shipped` of a card). The checkpoint of this call is written in all cases.

    Args:
        entry: the card. Its registry must be writable.
        data_dir: folder of the data sets.
        runs: folder for checkpoints and logs.
        device: auto, cpu, cuda or cuda:i.
        budget: `full` trains the recipe, `cpu` the recipe with the card's CPU budget. `auto` uses the CPU budget on a
            CPU if the card has one.
        precision: `auto` is bfloat16 on a GPU for images of 32 pixels and more, otherwise float32. (Smaller networks
            are limited by launches, not by arithmetic.)
        compiled: use `torch.compile` (needs a C++ compiler; the first iterations take a minute).
        time_limit: stop after this many seconds, with a checkpoint and the present weights.
        restart: ignore the checkpoint of an earlier call.
        command: the command that repeats this call, for the card.
        report: called about a hundred times.

    Raises:
        CardError: the card has no recipe, or its weights come from a package.
        ModelError: the loss is NaN or infinite, the checkpoint belongs to another recipe, or a teacher is not trained.
    """
    keep_freed_memory()
    where = pick_device(device)
    recipe, instead = choose_recipe(entry, where, budget)
    data = load(entry.dataset, "train", data_dir)
    if precision == "auto":
        precision = "bfloat16" if where.type == "cuda" and data.x.shape[-1] >= 32 else "float32"
    folder = runs / entry.dataset / (f"{entry.name}.cpu" if instead else entry.name)
    run = _Training(entry, recipe, data, where, folder, precision, compiled, restart)
    run.train(time_limit, report, TrainingProbe(entry, data_dir, where, recipe.seed))
    table = {
        "iterations": run.iteration,
        "seconds": round(run.seconds, 1),
        "hardware": describe_device(run.device),
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "seed": recipe.seed,
        "command": command or f"robbench train {entry.full_name}",
        "precision": precision,
    } | ({"instead": instead} if instead else {})
    earlier = None if entry.needs_training else entry.card.trained
    if earlier is not None and earlier.iterations > run.iteration and not restart:
        return TrainingResult(table, recipe.iterations, written=False, log=run.log)
    relative = f"{entry.dataset}/{entry.name}.safetensors"
    with run.step.use_average(run.iteration):
        sha256 = save_weights(run.module, entry.root / WEIGHTS_FOLDER / relative)
    write_training(entry.path, weights_path=relative, sha256=sha256, trained=table)
    return TrainingResult(table, recipe.iterations, written=True, log=run.log)


class _Training:
    """The state of one training run, its checkpoint and its log."""

    def __init__(
        self,
        entry: Entry,
        recipe: Recipe,
        data: Dataset,
        device: torch.device,
        folder: Path,
        precision: str,
        compiled: bool,
        restart: bool,
    ) -> None:
        self.recipe, self.device, self.folder = recipe, device, folder
        self.log = folder / "log.jsonl"
        content = [
            extract_identity(entry.card),
            recipe.model_dump(mode="json"),
            data.digest,
            list_teacher_digests(entry, recipe),
        ]
        self.identity = digest(content)
        self.name = entry.full_name
        if recipe.batch_size > len(data):
            raise ModelError(
                f"{self.name}: batch_size {recipe.batch_size} given; the training set has {len(data)} images."
            )
        facts, card = DATASETS[entry.dataset], entry.card
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            bare = build(card.architecture.name, card.architecture.args, facts.num_classes, facts.in_shape)
        pre = card.preprocess
        module = Normalized(bare, pre.mean, pre.std) if pre else bare
        self.module: nn.Module = module.to(device).to(memory_format=torch.channels_last).train()
        target = compute_targets(entry, recipe, data, device, folder)
        self.step = Step(self.module, recipe, data, precision=precision, target=target, compiled=compiled)
        self.iteration, self.seconds = 0, 0.0
        self.order_key = rng.make_key(recipe.seed, "train-order")
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        if not restart:
            self.resume()

    def train(self, time_limit: float | None, report: Callable[[Progress], None], probe: TrainingProbe) -> None:
        """Train until all iterations of the recipe are done or the time is up."""
        recipe, begin, saved = self.recipe, time.monotonic(), time.monotonic()
        earlier, first = self.seconds, self.iteration
        every = max(recipe.iterations // _REPORTS, 1)
        look = max(recipe.iterations // _PROBES, 1)
        total, count = torch.zeros((), device=self.device), 0
        while self.iteration < recipe.iterations:
            lr = learning_rate(recipe, self.iteration)
            total += self.step(self.next_batch(), self.iteration)
            self.iteration += 1
            count += 1
            now = time.monotonic()
            self.seconds = earlier + now - begin
            timed_out = time_limit is not None and now - begin > time_limit
            last = timed_out or self.iteration == recipe.iterations
            if self.iteration % every == 0 or last:
                loss = float(total) / count
                if not math.isfinite(loss):
                    raise ModelError(
                        f"{self.name}: the loss is {loss} at iteration {self.iteration}; the recipe diverges "
                        "(learning rate too high?). Nothing was saved since the last checkpoint."
                    )
                left = (now - begin) / (self.iteration - first) * (recipe.iterations - self.iteration)
                clean = robust = None
                if self.iteration % look < every or last:
                    with self.step.use_average(self.iteration):
                        clean, robust = probe(self.module)
                progress = Progress(self.iteration, recipe.iterations, loss, lr, self.seconds, left, clean, robust)
                self.report_progress(progress, report)
                total, count = torch.zeros((), device=self.device), 0
            if last or now - saved > _CHECKPOINT_SECONDS:
                self.save()
                saved = time.monotonic()
            if timed_out:
                return

    def next_batch(self) -> Tensor:
        """Return the positions of the next batch. An epoch is a permutation without the incomplete last batch."""
        size, n = self.recipe.batch_size, len(self.step.y)
        epoch, place = divmod(self.iteration, n // size)
        if self._order[0] != epoch:
            position = torch.arange(n, device=self.device)
            draw = rng.bits(self.order_key, position, torch.full_like(position, epoch), 0, 1).squeeze(1)
            self._order = (epoch, draw.argsort(stable=True))
        return self._order[1][place * size : (place + 1) * size]

    def report_progress(self, progress: Progress, report: Callable[[Progress], None]) -> None:
        """Append a line to the log and call `report`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {k: v for k, v in asdict(progress).items() if k not in ("iterations", "left") and v is not None}
        with self.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        report(progress)

    def save(self) -> None:
        """Write the checkpoint."""
        buffer = io.BytesIO()
        content = {
            "identity": self.identity,
            "iteration": self.iteration,
            "seconds": self.seconds,
            "module": self.module.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "average": self.step.average,
        }
        torch.save(content, buffer)
        write_atomically(self.folder / "checkpoint.pt", buffer.getvalue())

    def resume(self) -> None:
        """Load the checkpoint, if there is one, and remove the log lines written after it."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            self.log.unlink(missing_ok=True)
            return
        content = torch.load(path, weights_only=True, map_location=self.device)
        if content["identity"] != self.identity:
            raise ModelError(
                f"{path} belongs to another recipe, architecture, teacher or data set than {self.name} has now. "
                "Start over with --restart."
            )
        self.module.load_state_dict(content["module"])
        self.step.optimizer.load_state_dict(content["optimizer"])
        self.step.relink()
        self.step.average = content["average"]
        self.iteration, self.seconds = content["iteration"], content["seconds"]
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        kept = [line for line in lines if json.loads(line)["iteration"] <= self.iteration]
        write_atomically(self.log, "".join(f"{line}\n" for line in kept).encode())
