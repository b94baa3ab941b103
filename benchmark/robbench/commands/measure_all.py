"""`robbench measure all`: everything that a registry's measurements.toml declares, without what is known already."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robbench.analysis.study_spec import STUDY_PARTS
from robbench.commands.options import explain_interrupt
from robbench.core.errors import CardError, unknown_name
from robbench.core.files import load_toml
from robbench.core.numbers import parse_eps
from robbench.core.words import format_count
from robbench.models.card import Entry, Registry, read_card_text
from robbench.report.figures.source import FigureData

__all__ = ["PROGRAM", "Task", "is_known", "measure_all", "read_program"]

PROGRAM = "measurements.toml"
_TRAINED_BY_CARD = ("training", "students")  # they train networks of their own and need no weights
_KEYS = ("run", "suite", "models", "samples", "eps", "sigma")
_STUDY = "study"  # its models are the studies of analysis/studies.toml, without the data set


@dataclass(frozen=True)
class Task:
    """One measurement of one model.

    Attributes:
        run: eval, sanity, certify, study, or the name of a measurement of `robbench measure`.
        model: full name of the model, or of a study: `digits/tsipras2019`.
        suite: of eval; empty for the others.
        samples: number of the first test images; None if the measurement chooses them itself.
        eps: radii of eval; empty means the suite's own radius.
        sigma: standard deviation of the noise of certify, which smooths; 0 for the others.
    """

    run: str
    model: str
    suite: str = ""
    samples: int | None = None
    eps: tuple[str, ...] = ()
    sigma: float = 0.0

    def __str__(self) -> str:
        """Return the task for a line of the terminal."""
        return f"{self.model}: {' '.join(filter(None, [self.run, self.suite, ' '.join(self.eps)]))}"


def read_program(root: Path, dataset: str, measurements: Sequence[str]) -> list[Task]:
    """Read the tasks of a data set from a registry, in order.

    Args:
        root: folder of the registry.
        dataset: the data set.
        measurements: the allowed values of `run` besides eval, sanity, certify and study.

    Raises:
        CardError: the file is missing or invalid, names no measurement of the data set, or one twice.
    """
    path = root / PROGRAM
    try:
        declared = load_toml(read_card_text(path))
    except ValueError as error:
        raise CardError(f"{path}: not valid TOML: {error}") from None
    known = [name for name in declared if name != "version"]
    if dataset not in known:
        raise CardError(f"{path}: {unknown_name('data set', dataset, known)}")
    tasks: list[Task] = []
    for group in declared[dataset]:
        tasks += _read_group(path, dataset, group, ("eval", "sanity", "certify", _STUDY, *measurements))
    tasks = list(dict.fromkeys(tasks))
    if twice := [place for place, count in Counter(map(str, tasks)).items() if count > 1]:
        raise CardError(f"{path}: {twice[0]} is declared twice, with other samples. Keep one of them.")
    return tasks


def _read_group(path: Path, dataset: str, group: dict[str, Any], allowed: Sequence[str]) -> Iterator[Task]:
    run, suite, models, samples = (group.get(key) for key in ("run", "suite", "models", "samples"))
    if unknown := sorted(set(group) - set(_KEYS)):
        raise CardError(f"{path}: {dataset}: {unknown_name('key', unknown[0], _KEYS)}")
    if run not in allowed:
        raise CardError(f"{path}: {dataset}: {unknown_name('run', str(run), allowed)}")
    if not isinstance(models, list) or not all(isinstance(m, str) for m in models):
        raise CardError(f"{path}: {dataset}, {run}: models {models!r} given; expected: a list of names of cards.")
    if (run == "eval") != isinstance(suite, str):
        raise CardError(f"{path}: {dataset}, {run}: suite {suite!r} given; expected: a name with eval, else nothing.")
    if samples is not None and (not isinstance(samples, int) or samples < 1):
        raise CardError(f"{path}: {dataset}, {run}: samples {samples!r} given; expected: a number from 1 on.")
    eps, sigma = group.get("eps", []), group.get("sigma", 0.0)
    if not isinstance(eps, list) or not all(isinstance(radius, str) for radius in eps) or (eps and run != "eval"):
        raise CardError(f'{path}: {dataset}, {run}: eps {eps!r} given; expected: texts such as ["0.1"], with eval.')
    if not isinstance(sigma, float) or sigma < 0 or (run == "certify") != (sigma > 0):
        raise CardError(
            f"{path}: {dataset}, {run}: sigma {sigma!r} given; expected: above 0.0 with certify, else nothing."
        )
    for model in models:
        yield Task(str(run), f"{dataset}/{model}", suite or "", samples, tuple(eps), sigma)


def is_known(task: Task, data: FigureData) -> bool:
    """Return whether a result or measurement of the card's present weights, or recipe, is stored on enough images."""
    dataset = task.model.partition("/")[0]
    wanted = task.samples or 1
    if task.eps:
        radii = {parse_eps(r.threat.eps) for r in data.list_results(task.model, task.suite) if r.n >= wanted}
        return {parse_eps(radius) for radius in task.eps} <= radii
    if task.run == "sanity":
        checked = data.read_landscapes(dataset).get(task.model)
        return checked is not None and checked[0].n >= wanted
    if task.run == "certify":
        return any(
            file.n >= wanted and file.identity["settings"]["sigma"] == task.sigma
            for file, _ in data.list_smoothed(task.model)
        )
    if task.run == "eval":
        result = data.standard_results(dataset, task.suite).get(task.model)
        return result is not None and result.n >= wanted
    if task.run == "linear":
        linear = data.read_linear(task.model)
        return linear is not None and len(linear) >= wanted
    if task.run == "logits":
        logits = data.read_logits(dataset).get(task.model)
        return logits is not None and len(logits) >= wanted
    if task.run == "manifolds":
        return task.model in data.read_manifolds(dataset)
    if task.run == "gradients":
        return task.model in data.read_gradients(dataset)
    if task.run == _STUDY:
        return all(data.read_study(f"{task.model}-{part}") for part in STUDY_PARTS)
    return task.model in data.read_series(task.run, dataset)


def measure_all(
    dataset: str,
    registry: Registry,
    results: Path,
    measurements: Sequence[str],
    measure: Callable[[Task, bool], object],
    train: Callable[[Entry], object],
) -> None:
    """Train and measure what a data set's program declares and what is not known yet.

    It can be stopped at any time. The next call goes on: trainings from their checkpoint, evaluations from their last
    images, other measurements from the beginning.

    Args:
        dataset: the data set.
        registry: the cards. The last of its folders with a program counts.
        results: the results tree.
        measurements: the allowed measurements besides eval and study.
        measure: measures a task; the second argument says whether to replace what is stored.
        train: trains a card's model, or goes on with it.

    Raises:
        RobbenchError: the program is invalid, or a training or measurement fails.
    """
    root = next((r for r in reversed(registry.roots) if (r / PROGRAM).exists()), registry.roots[0])
    tasks = read_program(root, dataset, measurements)
    data = FigureData(registry, results)
    known = 0
    begin = time.monotonic()
    with explain_interrupt("What is finished is stored."):
        for number, task in enumerate(tasks, 1):
            title = f"[{number}/{len(tasks)}] {task}"
            if is_known(task, data):
                print(f"{title}: known already", file=sys.stderr)
                known += 1
                continue
            print(f"{title} ({(time.monotonic() - begin) / 60:.1f} min so far)", file=sys.stderr)
            if task.run not in (*_TRAINED_BY_CARD, _STUDY) and (entry := registry.find(task.model)).needs_training:
                print(f"{task.model}: its weights are not here, so it is trained first", file=sys.stderr)
                train(entry)
                registry = Registry(registry.roots)  # the card names other weights now
                data = FigureData(registry, results)
                if is_known(task, data):
                    print(f"{title}: known already, of the same weights", file=sys.stderr)
                    known += 1
                    continue
            measure(task, _is_stored(task, results, data))  # what it writes is that of no other task
    print(f"{dataset}: {format_count(len(tasks), 'measurement')}, {known} known before, {len(tasks) - known} made.")


def _is_stored(task: Task, results: Path, data: FigureData) -> bool:
    """Return whether something is stored in the place of a task that does not count: of other weights, or damaged."""
    if task.run == _STUDY:
        parts = [f"{task.model}-{part}" for part in STUDY_PARTS]
        stored = [part for part in parts if (results / part / "study" / "study.json").exists()]
        return any(data.read_study(part) is None for part in stored)
    if task.eps or task.run == "certify":
        return False  # each has a folder of its own
    folder = results / task.model / (task.suite or task.run)
    name = "result.json" if task.run == "eval" else f"{task.run}.json"
    return (folder / name).exists()
