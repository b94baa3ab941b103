"""One training run: its network, its checkpoint and its log.

A run depends on its card and its plan only. A run that was killed and started again ends with the same weights as an
uninterrupted run (same hardware and thread count, float32). The reason: batches, noise and the starts of inner attacks
are drawn by counter, so there is no generator whose state could be lost.

```
runs/<dataset>/<name>/checkpoint.pt        model, optimizer, running average, position and plan
runs/<dataset>/<name>/log.jsonl            one line per report: iteration, loss, lr, seconds; sometimes accuracies
runs/<dataset>/<name>/targets.safetensors  a teacher's logits, if the recipe has a teacher
```

Other runs of the same card have folders of their own: `<name>.cpu` and `<name>.gpu` with a budget, `<name>.fit` with
iterations fitted to a time, `<name>.iterations` with a given number of them.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections import deque
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from robbench.core.errors import ModelError
from robbench.core.files import (
    append_text,
    digest,
    read_bounded,
    read_json_lines,
    refuse_links,
    set_aside,
    write_atomically,
)
from robbench.core.types import Dataset
from robbench.models.architectures import Normalized, build
from robbench.models.card import DATASETS, Entry, extract_identity
from robbench.models.load import MOST_WEIGHT_BYTES, load_pickle
from robbench.training.draws import Draws
from robbench.training.options import Options, Progress, choose_recipe
from robbench.training.plan import Fitter, Plan
from robbench.training.probe import TrainingProbe
from robbench.training.recipe import learning_rate
from robbench.training.step import Step
from robbench.training.teacher import compute_targets, list_teacher_digests

__all__ = ["Run", "build_network"]

_CHECKPOINT_SECONDS = 20.0
_MOST_LOG_BYTES = 2**24
_REPORTS = 100  # log lines of a run
_PROBES = 10  # log lines of a run with accuracies
_IN_FLIGHT = 4  # iterations that a GPU may have to do


def build_network(entry: Entry, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build the network of a card, in training mode, with the first weights of a seed."""
    facts, card = DATASETS[entry.dataset], entry.card
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bare = build(card.architecture.name, card.architecture.args, facts.num_classes, facts.in_shape)
    pre = card.preprocess
    module: nn.Module = Normalized(bare, pre.mean, pre.std) if pre else bare
    return module.to(device, dtype).to(memory_format=torch.channels_last).train()


class Run:
    """The state of one training run.

    Attributes:
        recipe: the recipe of the run. Its number of iterations is the one of the card, or of the CPU budget.
        plan: the iterations.
        iteration: number of iterations that are done.
        seconds: wall time of all calls, with reports and checkpoints. Runs that train together share it.

    Args:
        entry: the card.
        options: how to train.
        data: the training set.
        device: where to train.
        shared: batches of other runs on these data, by what they depend on. It gets those of this run.

    Raises:
        CardError: see `choose_recipe`.
        ModelError: the checkpoint belongs to another recipe, a teacher is not trained, or there are too few images.
    """

    def __init__(
        self,
        entry: Entry,
        options: Options,
        data: Dataset,
        device: torch.device,
        shared: dict[tuple[object, ...], Draws] | None = None,
    ) -> None:
        self.entry, self.device = entry, device
        self.recipe, cut = choose_recipe(entry, device, options.budget)
        recipe = self.recipe
        suffix = (".gpu" if options.budget == "gpu" else ".cpu") if cut else ""
        self.fit = options.fit
        self.fitter: Fitter | None = None
        if options.fit is not None:
            suffix, self.plan = f"{suffix}.fit", Plan()
        elif options.plan is not None:
            suffix, self.plan = f"{suffix}.iterations", options.plan
        else:
            self.plan = Plan(((0, recipe.iterations),))
        self.folder = options.runs / entry.dataset / f"{entry.name}{suffix}"
        refuse_links(options.runs, self.folder)
        self.log = self.folder / "log.jsonl"
        self.report = options.report
        wide = device.type == "cuda" and data.x.shape[-1] >= 32
        self.precision = options.precision if options.precision != "auto" else ("bfloat16" if wide else "float32")
        content = [
            extract_identity(entry.card),
            recipe.model_dump(mode="json"),
            data.digest,
            list_teacher_digests(entry, recipe),
        ]
        if suffix.endswith((".fit", ".iterations")):
            content.append(f"fit {options.fit}" if options.plan is None else f"iterations {options.plan}")
        self.identity = digest(content)
        if recipe.batch_size > len(data):
            raise ModelError(
                f"{entry.full_name}: batch_size {recipe.batch_size} given; the training set has {len(data)} images."
            )
        dtype = torch.float64 if self.precision == "float64" else torch.float32
        self.module = build_network(entry, recipe.seed, device, dtype)
        target = compute_targets(entry, recipe, data, device, self.folder)
        same = recipe.seed, recipe.batch_size, recipe.augment
        shared = {} if shared is None else shared
        if same not in shared:
            shared[same] = Draws(data, recipe, device, dtype)
        self.step = Step(
            self.module, recipe, shared[same], precision=self.precision, target=target, compiled=options.compiled
        )
        self.probe = TrainingProbe(entry, options.data_dir, device, dtype, recipe.seed)
        self.iteration, self.seconds = 0, 0.0
        self.in_flight: deque[torch.cuda.Event] = deque()
        if not options.restart:
            self.resume()
        self.first, self.saved = self.iteration, self.seconds
        self.total, self.count = torch.zeros((), device=device), 0  # sum and number of losses since the last report

    @property
    def is_done(self) -> bool:
        """Whether all iterations of the plan are done."""
        return bool(self.plan.pieces) and self.iteration >= self.plan.total

    @property
    def wanted(self) -> int:
        """Number of iterations of the plan. While there is no plan yet, of the recipe."""
        return self.plan.total or self.recipe.iterations

    def start_clock(self, preparation: float) -> None:
        """Fit the time that is left after `preparation` seconds before the first iteration of this call.

        Raises:
            ModelError: no time is left.
        """
        if self.fit is None or self.is_done:
            return
        if preparation >= self.fit:
            raise ModelError(
                f"{self.entry.full_name}: --fit {self.fit:g}s given; reading data and building the network alone took "
                f"{preparation:.1f} s. Give more time."
            )
        self.fitter = Fitter(self.fit - preparation)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next iteration."""
        return learning_rate(self.recipe, self.plan.progress(self.iteration))

    def advance(self) -> None:
        """Do one iteration."""
        self.note(self.step(self.iteration, self.learning_rate))

    def note(self, loss: Tensor) -> None:
        """Note the loss of an iteration. On a GPU, wait until few are left to do, so that the clock means something."""
        self.total += loss
        self.iteration += 1
        self.count += 1
        if self.device.type == "cuda":
            self.in_flight.append(torch.cuda.current_stream().record_event())
            if len(self.in_flight) > _IN_FLIGHT:
                self.in_flight.popleft().synchronize()

    def settle(self, worked: float, elapsed: float, stop: bool) -> None:
        """Do what is due after an iteration: change the plan, report, write a checkpoint.

        Args:
            worked: seconds of the iteration.
            elapsed: seconds since the first iteration of this call.
            stop: whether this was the last iteration of the call.

        Raises:
            ModelError: the loss is NaN or infinite.
        """
        begin = time.monotonic()
        self.seconds += worked
        if self.fitter is not None and not self.is_done:
            self.plan = self.fitter.adjust(self.plan, self.iteration, worked, self.seconds)
        before, now = (self.plan.progress(i) for i in (self.iteration - 1, self.iteration))
        last = stop or self.is_done
        if self.count and (last or int(_REPORTS * before) < int(_REPORTS * now)):
            self.write_report(elapsed, last or int(_PROBES * before) < int(_PROBES * now))
        if last or self.seconds - self.saved > _CHECKPOINT_SECONDS:
            self.save()
        pause = time.monotonic() - begin
        self.seconds += pause
        if self.fitter is not None:
            self.fitter.pause(pause)

    def write_report(self, elapsed: float, tested: bool) -> None:
        """Append a line to the log, with accuracies if `tested`, and call `report`.

        Raises:
            ModelError: the loss is NaN or infinite.
        """
        loss = float(self.total) / self.count
        self.total.zero_()
        self.count = 0
        if not math.isfinite(loss):
            raise ModelError(
                f"{self.entry.full_name}: the loss is {loss} at iteration {self.iteration}; the recipe diverges "
                "(learning rate too high?). Nothing was saved since the last checkpoint."
            )
        clean = robust = None
        if tested:
            with self.step.use_average(self.iteration):
                clean, robust = self.probe(self.module)
        left = elapsed / (self.iteration - self.first) * (self.wanted - self.iteration)
        lr = learning_rate(self.recipe, self.plan.progress(self.iteration - 1))
        progress = Progress(
            self.entry.full_name, self.iteration, self.wanted, loss, lr, self.seconds, left, clean, robust
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {k: v for k, v in asdict(progress).items() if k not in ("model", "iterations", "left") and v is not None}
        append_text(self.log, json.dumps(line) + "\n")
        self.report(progress)

    def save(self) -> None:
        """Write the checkpoint."""
        buffer = io.BytesIO()
        content: dict[str, Any] = {
            "identity": self.identity,
            "precision": self.precision,
            "iteration": self.iteration,
            "seconds": self.seconds,
            "plan": str(self.plan) if self.plan.pieces else "",
            # Copies: a weight may be a view of the weights of a whole family, and all of them would be written.
            "module": {name: value.clone() for name, value in self.module.state_dict().items()},
            "optimizer": self.step.optimizer.state_dict(),
            "average": self.step.average,
        }
        torch.save(content, buffer)
        write_atomically(self.folder / "checkpoint.pt", buffer.getvalue())
        self.saved = self.seconds

    def resume(self) -> None:
        """Load the checkpoint, if there is one, and remove the log lines written after it."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            self.log.unlink(missing_ok=True)
            return
        try:
            content: Any = load_pickle(read_bounded(path, MOST_WEIGHT_BYTES), self.device)
            if content["identity"] == self.identity:
                self._restore(content)
        except Exception as error:  # a hostile or damaged file can make the parser raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ModelError(f"{path} cannot be read ({reason}). Start over with --restart.") from None
        if content["identity"] != self.identity:
            raise ModelError(
                f"{path} belongs to another recipe, architecture, teacher, data set, --fit or --iterations than "
                f"{self.entry.full_name} has now. Start over with --restart."
            )
        began = content.get("precision", self.precision)  # older checkpoints do not say it
        if began != self.precision:
            raise ModelError(
                f"{path} was begun in {began}; this call trains in {self.precision}. Go on with --precision {began}, "
                "or start over with --restart."
            )
        self._shorten_log()

    def _restore(self, content: dict[str, Any]) -> None:
        self.module.load_state_dict(content["module"])
        self.step.optimizer.load_state_dict(content["optimizer"])
        self.step.relink()
        self.step.average = content["average"]
        self.iteration, self.seconds = int(content["iteration"]), float(content["seconds"])
        if self.fit is not None and content["plan"]:
            self.plan = Plan.parse(content["plan"])

    def _shorten_log(self) -> None:
        """Remove the log lines after the checkpoint. A damaged log is set aside."""
        if not self.log.exists():
            return
        try:
            lines = read_json_lines(self.log, _MOST_LOG_BYTES)
            kept = [line for line in lines if line["iteration"] <= self.iteration]
        except (OSError, KeyError, TypeError, ValueError):
            set_aside(self.log, self.folder)
            return
        write_atomically(self.log, "".join(f"{json.dumps(line)}\n" for line in kept).encode())
