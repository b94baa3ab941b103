"""Trains the families of `studies.toml` and stores their numbers.

```
runs/studies/<study>.jsonl    one line per trained network. An interrupted training goes on after the last of them.
```
"""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from robbench.analysis.logits import Integers
from robbench.analysis.pair import compute_correlations, compute_margins, share_of_weak_pixels, train_linear
from robbench.analysis.study_record import COLUMNS, STUDY_VERSION, StudyFile, read_study, study_folder, write_study
from robbench.analysis.study_spec import STUDY_PARTS, Member, NetworksSpec, PairSpec, StudySpec
from robbench.classifier.prepare import pick_device
from robbench.core.errors import ModelError, ResultError, StorageError
from robbench.core.files import append_text, digest, read_bounded, read_json_lines, refuse_links, write_atomically
from robbench.core.machine import describe_device, versions
from robbench.core.types import Dataset
from robbench.data.sets import load
from robbench.linear.theory import Values
from robbench.models.architectures import build
from robbench.models.card import Adversary, Recipe
from robbench.results.differences import describe_other_run
from robbench.results.locking import lock_result
from robbench.training.draws import Draws
from robbench.training.recipe import learning_rate
from robbench.training.step import Step

__all__ = ["StudyOptions", "train_study"]

_MOST_LINES_BYTES = 2**24
_BATCH = 1000  # test images at once

_Row = tuple[str, float, int, int, float]


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """How to train a study.

    Attributes:
        data_dir: folder of the data sets.
        results: the results tree.
        runs: folder of the networks that are trained already.
        device: auto, cpu, cuda or cuda:i.
        time_limit: stop after this many seconds. At least one network is trained.
        restart: train everything again.
        note: hears what happens.
    """

    data_dir: str | Path | None = None
    results: Path = Path("results")
    runs: Path = Path("runs")
    device: str = "auto"
    time_limit: float | None = None
    restart: bool = False
    note: Callable[[str], None] = lambda text: None


def train_study(name: str, spec: StudySpec, options: StudyOptions) -> list[StudyFile]:
    """Train a study: its linear classifier, then its networks. A part that is stored already is not trained again.

    Args:
        name: name of the study, such as `tsipras2019-digits`.
        spec: its declaration.
        options: how to train.

    Returns:
        The summaries of the finished parts. The networks are not among them if the time limit came first.

    Raises:
        DataError: the data set is not on this machine.
        ModelError: a loss is NaN or infinite, or the training set has too few images.
        ResultError: another run is stored, and `restart` is not given.
    """
    began = time.monotonic()
    train, test = (load(spec.dataset, split, options.data_dir) for split in ("train", "test"))
    short = name.removesuffix(f"-{spec.dataset}")
    files = []
    for kind in STUDY_PARTS:
        part: PairSpec | NetworksSpec = getattr(spec, kind)
        identity = {
            "measure": f"study {kind}",
            "version": STUDY_VERSION,
            "spec": part.model_dump(mode="json"),
            "data": {"train": train.digest, "test": test.digest},
        }
        folder = study_folder(options.results, spec.dataset, f"{short}-{kind}")
        title = f"{spec.dataset}/{short}-{kind}"
        with lock_result(options.results, folder, wait=True, note=options.note):
            if (folder / "study.json").exists() and not options.restart:
                file = read_study(folder)[0]
                if file.run_id != digest(identity):
                    text = describe_other_run(folder, file.identity, identity)
                    raise ResultError(text.replace("--overwrite", "--restart"))
                options.note(f"{title}: known since {file.date[:10]}, nothing to train.")
                files.append(file)
                continue
            begin = time.perf_counter()
            if isinstance(part, PairSpec):
                options.note(f"{title}: {part.draws + 1} times {_count_settings(train, part)} linear classifiers")
                rows, n = _train_pair(train, test, part)
            else:
                lines = options.runs / "studies" / f"{name}.jsonl"
                found = _Networks(title, part, identity, train, test, lines, options).train(began)
                if found is None:
                    return files
                rows, n = found, len(test)
            about: dict[str, Any] = {
                "model": f"{short}-{kind}",
                "dataset": spec.dataset,
                "n": n,
                "seconds": round(time.perf_counter() - begin, 3),
                "hardware": describe_device(pick_device(options.device)),
                "versions": versions(),
                "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            }
            files.append(write_study(folder, pd.DataFrame(rows, columns=list(COLUMNS)), identity, about))
    return files


def _choose_pair(data: Dataset, spec: PairSpec) -> tuple[Values, Values]:
    """Return the images of both classes as rows in [0, 1], and their labels -1 and 1."""
    chosen = np.isin(data.y, spec.classes)
    x: Values = data.x[chosen].reshape(int(chosen.sum()), -1) / data.scale
    return x, np.where(data.y[chosen] == spec.classes[1], 1.0, -1.0)


def _list_counts(pixels: int) -> list[int]:
    """List how many of the pixels a classifier uses: 1, and about two numbers a factor of two, up to all."""
    return sorted({*np.geomspace(1, pixels, 1 + 2 * int(np.log2(pixels))).round().astype(int).tolist()})


def _count_settings(data: Dataset, spec: PairSpec) -> int:
    return len(_list_counts(_choose_pair(data, spec)[0].shape[1])) + 2


def _train_pair(train: Dataset, test: Dataset, spec: PairSpec) -> tuple[list[_Row], int]:
    """Train the linear classifiers on the images as they are (draw 0) and on each bootstrap sample.

    A draw takes training and test images with replacement. So the spread of its numbers is that of both choices.
    """
    (x, y), (x_test, y_test) = _choose_pair(train, spec), _choose_pair(test, spec)
    rows = []
    for draw in range(spec.draws + 1):
        random = np.random.default_rng(draw)
        at, judged = np.arange(len(x)), np.arange(len(x_test))
        if draw:
            at = random.integers(len(x), size=min(len(x), spec.most))
            judged = random.integers(len(x_test), size=len(x_test))
        elif len(x) > spec.most:
            at = np.sort(random.permutation(len(x))[: spec.most])
        rows += _train_draw((x[at], y[at]), (x_test[judged], y_test[judged]), spec, draw)
    return rows, len(x_test)


def _train_draw(train: tuple[Values, Values], test: tuple[Values, Values], spec: PairSpec, draw: int) -> list[_Row]:
    (x, y), (x_test, y_test) = train, test
    pixels, eps = x.shape[1], float(spec.eps)
    correlation = compute_correlations(x, y)
    weak = np.abs(correlation) < spec.strong
    order = np.argsort(-np.abs(correlation), kind="stable")
    rows: list[_Row] = []
    if not draw:
        rows += [("correlation", 0.0, j, 0, value) for j, value in enumerate(correlation.tolist())]
    settings = [(0.0, k) for k in _list_counts(pixels)] + [(eps, pixels), (0.0, int((~weak).sum()))]
    for i, (radius, count) in enumerate(settings):
        used = order[:count]
        weights = np.zeros(pixels)
        weights[used], bias = train_linear(x[:, used], y, radius, spec.iterations)
        clean, robust = (float((compute_margins(x_test, y_test, weights, bias, e) > 0).mean()) for e in (0.0, eps))
        suffix = " strong" if i == len(settings) - 1 else ""  # the strong pixels alone, however many they are
        rows += [(f"clean{suffix}", radius, count, draw, clean), (f"robust{suffix}", radius, count, draw, robust)]
        if count == pixels and not suffix:
            rows.append(("weak", radius, count, draw, share_of_weak_pixels(weights, weak)))
            if not draw:
                rows += [("weight", radius, j, 0, value) for j, value in enumerate(weights.tolist())]
    return rows


class _Networks:
    """The networks of a study, and the file of those that are trained already."""

    def __init__(
        self,
        title: str,
        spec: NetworksSpec,
        identity: dict[str, Any],
        train: Dataset,
        test: Dataset,
        lines: Path,
        options: StudyOptions,
    ) -> None:
        self.title, self.spec, self.data, self.test, self.lines = title, spec, train, test, lines
        self.device, self.options = pick_device(options.device), options
        shared = {key: value for key, value in identity["spec"].items() if key not in ("seeds", "groups")}
        self.identity = digest({**identity, "spec": shared})  # another size or seed leaves the others as they are
        sizes = [size for group in spec.groups for size in group.sizes]
        least = int(spec.recipe["batch_size"])
        if min(sizes) < least or max(sizes) > len(train):
            raise ModelError(
                f"{title}: {min(sizes)} to {max(sizes)} training images declared; allowed: from {least}, the batch "
                f"size, to {len(train)}, the whole training set."
            )
        self.x = torch.from_numpy(test.x).to(torch.float32) / test.scale

    def train(self, began: float) -> list[_Row] | None:
        """Train the members that are missing. Return the rows of all; None if the time limit came first.

        Args:
            began: `time.monotonic()` at the begin of the call.
        """
        refuse_links(self.options.runs, self.lines)
        known = {} if self.options.restart else self._read()
        if self.options.restart:
            self.lines.unlink(missing_ok=True)
        members = self.spec.list_members()
        todo = [member for member in members if _key(member) not in known]
        limit = self.options.time_limit
        for i, member in enumerate(todo):
            if limit is not None and i and time.monotonic() - began > limit:
                done = len(members) - len(todo) + i
                self.options.note(
                    f"{self.title}: {done} of {len(members)} networks are trained. The same command goes on."
                )
                return None
            accuracy = self._train_member(member)
            known[_key(member)] = accuracy
            line = {"family": self.identity, "member": member.describe(), "accuracy": accuracy}
            append_text(self.lines, json.dumps(line) + "\n")
            done = len(members) - len(todo) + i + 1
            self.options.note(f"{self.title}: {done} of {len(members)}, {_describe(member)}: {accuracy:.1%}")
        return [
            (norm, float(m.eps), m.size, m.seed, known[_key(m)])
            for m in members
            for norm in ([m.norm] if m.norm else sorted({g.norm for g in self.spec.groups}))
        ]

    def _read(self) -> dict[str, float]:
        """Read the accuracies of the networks that are trained already. A last line that was cut off is removed.

        Raises:
            StorageError: the file cannot be read, or is damaged.
        """
        if not self.lines.exists():
            return {}
        try:
            content = read_bounded(self.lines, _MOST_LINES_BYTES)
            if not content.endswith(b"\n"):
                write_atomically(self.lines, content[: content.rfind(b"\n") + 1])
            lines = read_json_lines(self.lines, _MOST_LINES_BYTES)
            mine = {_text(line["member"]): float(line["accuracy"]) for line in lines if line["family"] == self.identity}
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{self.lines} cannot be read ({error}). Use --restart to train all again.") from None
        return mine

    def _train_member(self, member: Member) -> float:
        """Train a network and return its accuracy on the test images."""
        spec = self.spec
        adversary = None
        if member.norm is not None:
            adversary = Adversary(norm=member.norm, eps=member.eps, step_size=member.eps / 2, steps=spec.steps)
        recipe = Recipe.model_validate({**spec.recipe, "seed": member.seed, "adversary": adversary})
        data = _take_images(self.data, member.size, member.seed)
        shape = (data.x.shape[1], data.x.shape[2], data.x.shape[3])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(member.seed)
            network = build(spec.architecture.name, spec.architecture.args, data.num_classes, shape)
        network = network.to(self.device).to(memory_format=torch.channels_last).train()
        step = Step(network, recipe, Draws(data, recipe, self.device))
        for iteration in range(recipe.iterations):
            loss = step(iteration, learning_rate(recipe, iteration / recipe.iterations))
        if not bool(torch.isfinite(loss)):
            raise ModelError(f"{self.title}: the loss of {_describe(member)} is {float(loss)}; the recipe diverges.")
        network.eval()
        with torch.no_grad():
            parts = [network(part.to(self.device)).argmax(1).cpu() for part in torch.split(self.x, _BATCH)]
        return float((torch.cat(parts).numpy() == self.test.y).mean())


def _take_images(data: Dataset, size: int, seed: int) -> Dataset:
    """Return a random part of a training set. A smaller part of the same seed is a part of a larger one."""
    at: Integers = np.sort(np.random.default_rng(seed).permutation(len(data))[:size])
    return Dataset(
        data.name, data.split, data.x[at], data.y[at], data.index[at], data.num_classes, data.scale, "", data.labels
    )


def _text(member: dict[str, Any]) -> str:
    return json.dumps(member, sort_keys=True)


def _key(member: Member) -> str:
    return _text(member.describe())


def _describe(member: Member) -> str:
    adversary = f"{member.norm} {float(member.eps):g}" if member.norm else "no adversary"
    return f"{adversary}, {member.size} images, seed {member.seed}"
