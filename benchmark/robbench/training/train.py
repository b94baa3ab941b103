"""The one training loop.

A run is a function of its card: killed anywhere and started again, it ends with the same weights as an
uninterrupted one (same hardware and thread count, float32), because batches, noise and the inner attacks' starts
are drawn by counter and not from a generator that would have to be rewound.

```
runs/<dataset>/<name>/checkpoint.pt   model, optimizer and position
runs/<dataset>/<name>/log.jsonl       one line per report: iteration, loss, lr, seconds
```
"""

from __future__ import annotations

import datetime as dt
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robbench import engine, rng
from robbench.data import load
from robbench.errors import CardError, ModelError
from robbench.files import digest, write_atomically
from robbench.hardware import describe_device, versions
from robbench.memory import keep_freed_memory
from robbench.models.architectures import Normalized, build
from robbench.models.card import DATASETS, WEIGHTS_FOLDER, Entry, Recipe, identity, write_training
from robbench.models.load import save_weights
from robbench.target import pick_device
from robbench.threat import Ball
from robbench.training.recipe import add_noise, augment, inner_attack, learning_rate, objective
from robbench.types import Dataset, Problem

__all__ = ["Progress", "train"]

_CHECKPOINT_SECONDS = 20.0
_REPORTS = 100  # log lines a run writes


@dataclass(frozen=True)
class Progress:
    """One report of a training run: `loss` is the mean since the last report, `left` an estimate in seconds."""

    iteration: int
    iterations: int
    loss: float
    lr: float
    seconds: float
    left: float


def train(
    entry: Entry,
    *,
    data_dir: str | Path | None = None,
    runs: Path = Path("runs"),
    device: str = "auto",
    time_limit: float | None = None,
    restart: bool = False,
    command: str = "",
    report: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Any]:
    """Train a card's model, or go on where an earlier call stopped, and write its weights and card.

    Args:
        entry: the card; its registry must be writable.
        data_dir: where the data sets are.
        runs: where checkpoints and logs go.
        device: auto, cpu, cuda or cuda:i.
        time_limit: stop after so many seconds, with a checkpoint and the weights so far.
        restart: forget an earlier call's checkpoint.
        command: how to repeat this, for the card.
        report: called about a hundred times.

    Returns:
        The card's `trained` table: iterations done, seconds, hardware, versions, date, seed.

    Raises:
        CardError: the card has no recipe, or its weights come from a package.
        ModelError: the loss became NaN, or the checkpoint belongs to another recipe.
    """
    keep_freed_memory()
    card = entry.card
    if card.recipe is None or (card.weights is not None and card.weights.path is None):
        raise CardError(f"{entry.full_name} has no recipe of its own to train by (weights from elsewhere).")
    run = _Training(entry, card.recipe, load(entry.dataset, "train", data_dir), pick_device(device), runs)
    if not restart:
        run.resume()
    run.go(time_limit, report)
    relative = f"{entry.dataset}/{entry.name}.safetensors"
    sha256 = save_weights(run.module, entry.root / WEIGHTS_FOLDER / relative)
    trained = {
        "iterations": run.iteration,
        "seconds": round(run.seconds, 1),
        "hardware": describe_device(run.device),
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "seed": card.recipe.seed,
        "command": command or f"robbench train {entry.full_name}",
    }
    write_training(entry.path, weights_path=relative, sha256=sha256, trained=trained)
    return trained


class _Training:
    """Model, optimizer and position of one run."""

    def __init__(self, entry: Entry, recipe: Recipe, data: Dataset, device: torch.device, runs: Path) -> None:
        self.recipe, self.device = recipe, device
        self.folder = runs / entry.dataset / entry.name
        self.identity = digest([identity(entry.card), recipe.model_dump(mode="json"), data.digest])
        self.name = entry.full_name
        facts, card = DATASETS[entry.dataset], entry.card
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            bare = build(card.architecture.name, card.architecture.args, facts.num_classes, facts.in_shape)
        pre = card.preprocess
        module = Normalized(bare, pre.mean, pre.std) if pre else bare
        self.module: nn.Module = module.to(device).to(memory_format=torch.channels_last).train()
        self.optimizer = _optimizer(self.module, recipe)
        self.iteration, self.seconds = 0, 0.0
        # The whole data set lives on the device as it is stored: MNIST takes 47 MB, CIFAR-10 154 MB.
        self.x = torch.from_numpy(data.x).to(device)
        self.y = torch.from_numpy(data.y).to(device)
        self.scale = data.scale
        keys = ("order", "noise", "augment", "attack")
        self.keys = {name: rng.make_key(recipe.seed, f"train-{name}") for name in keys}
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def go(self, time_limit: float | None, report: Callable[[Progress], None]) -> None:
        """Train until the recipe's iterations are done or the time is up."""
        recipe, begin, saved = self.recipe, time.monotonic(), time.monotonic()
        earlier, first = self.seconds, self.iteration
        every = max(recipe.iterations // _REPORTS, 1)
        total, count = torch.zeros((), device=self.device), 0
        while self.iteration < recipe.iterations:
            total += self.step()
            count += 1
            now = time.monotonic()
            self.seconds = earlier + now - begin
            late = time_limit is not None and now - begin > time_limit
            last = late or self.iteration == recipe.iterations
            if self.iteration % every == 0 or last:
                loss = float(total) / count
                if not math.isfinite(loss):
                    raise ModelError(
                        f"{self.name}: the loss is {loss} at iteration {self.iteration}; the recipe diverges "
                        "(learning rate too high?). Nothing was saved since the last checkpoint."
                    )
                left = (now - begin) / (self.iteration - first) * (recipe.iterations - self.iteration)
                self.tell(Progress(self.iteration, recipe.iterations, loss, self.lr, self.seconds, left), report)
                total, count = torch.zeros((), device=self.device), 0
            if last or now - saved > _CHECKPOINT_SECONDS:
                self.save()
                saved = time.monotonic()
            if late:
                return

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return learning_rate(self.recipe, self.iteration)

    def step(self) -> Tensor:
        """Do one iteration; returns its loss, still on the device."""
        recipe, sample = self.recipe, self.batch()
        x = (self.x[sample].to(torch.float32) / self.scale).contiguous(memory_format=torch.channels_last)
        y = self.y[sample]
        if recipe.augment != "none":
            x = augment(x, recipe.augment, sample, self.iteration, self.keys["augment"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        loss = torch.zeros((), device=self.device)
        mix = recipe.adversary.mix if recipe.adversary else 0.0
        if mix > 0:
            loss = loss + mix * objective(self.module(self.noisy(self.adversarial(x, y, sample), sample)), y, recipe)
        if mix < 1:
            loss = loss + (1 - mix) * objective(self.module(self.noisy(x, sample)), y, recipe)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own annotation is missing
        self.optimizer.step()
        self.iteration += 1
        return loss.detach()

    def noisy(self, x: Tensor, sample: Tensor) -> Tensor:
        """Gaussian augmentation, if the recipe has one."""
        sigma = float(self.recipe.sigma)
        return x if sigma == 0 else add_noise(x, sigma, sample, self.iteration, self.keys["noise"])

    def adversarial(self, x: Tensor, y: Tensor, sample: Tensor) -> Tensor:
        """Perturb a batch with the recipe's adversary, batch statistics frozen."""
        adversary = self.recipe.adversary
        assert adversary is not None
        trial = torch.full_like(sample, self.iteration)
        p = Problem(x=x, y=y, sample=sample, trial=trial, key=self.keys["attack"])
        self.module.eval()
        x_adv = engine.perturb(self.module, inner_attack(adversary), p, Ball(adversary.norm, float(adversary.eps)))
        self.module.train()
        return x_adv

    def batch(self) -> Tensor:
        """Positions of the next batch; an epoch is a permutation drawn by counter, without its incomplete end."""
        size, n = self.recipe.batch_size, len(self.y)
        if size > n:
            raise ModelError(f"{self.name}: batch_size {size} given; the training set has {n} images.")
        epoch, place = divmod(self.iteration, n // size)
        if self._order[0] != epoch:
            position = torch.arange(n, device=self.device)
            draw = rng.bits(self.keys["order"], position, torch.full_like(position, epoch), 0, 1).squeeze(1)
            self._order = (epoch, draw.argsort(stable=True))
        return self._order[1][place * size : (place + 1) * size]

    def tell(self, progress: Progress, report: Callable[[Progress], None]) -> None:
        """Append to the log and tell the caller."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {"iteration": progress.iteration, "loss": progress.loss, "lr": progress.lr, "seconds": progress.seconds}
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
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
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(content, buffer)
        write_atomically(self.folder / "checkpoint.pt", buffer.getvalue())

    def resume(self) -> None:
        """Go back to the checkpoint, if there is one, and drop the log lines that came after it."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            (self.folder / "log.jsonl").unlink(missing_ok=True)
            return
        content = torch.load(path, weights_only=True, map_location=self.device)
        if content["identity"] != self.identity:
            raise ModelError(
                f"{path} belongs to another recipe, architecture or data set than {self.name} has now. "
                "Start over with --restart."
            )
        self.module.load_state_dict(content["module"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.iteration, self.seconds = content["iteration"], content["seconds"]
        log = self.folder / "log.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        kept = [line for line in lines if json.loads(line)["iteration"] <= self.iteration]
        write_atomically(log, "".join(f"{line}\n" for line in kept).encode())


def _optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        # Fused: one pass over the weights instead of a dozen, a quarter of an iteration of the MNIST network on a CPU.
        return torch.optim.Adam(module.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.SGD(
        module.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )
