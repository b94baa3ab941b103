"""The labelled zoo, measured: what the usual attack says of each model, what the best known one says, and who notices.

Writes docs/sanity-zoo.md, and its held-out half into docs/sanity.md. What was measured stays in the cache, so that an
interrupted run goes on.
"""

import argparse
import importlib
import json
import logging
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyautoattack import AutoAttack, checks
from torch import Tensor, nn

from robbench.attacks import PGD
from robbench.classifier.batch_width import BatchWidths
from robbench.classifier.checks import classify
from robbench.core.errors import DataError
from robbench.core.files import digest, write_atomically
from robbench.core.machine import describe_device, keep_freed_memory, versions
from robbench.core.rng import make_key
from robbench.core.threat import Ball
from robbench.data.sets import load
from robbench.evaluation.inputs import Images, own_target
from robbench.evaluation.options import Options
from robbench.evaluation.stages import ReadyStage, ready_stages, run_stage
from robbench.evaluation.transfer import Transfer
from robbench.models.load import describe_module, digest_module
from robbench.suite import load_suite
from zoo import ZOO, ZooEntry
from zoo_page import page, summary

SUITE = Path(__file__).with_suffix(".toml")
LANES = 16
CPU = torch.device("cpu")


def _gradient_exists(module: nn.Module, x: Tensor) -> bool:
    logits: Tensor = module(x[:1].clone().requires_grad_(True))
    return logits.requires_grad


def attack(entry: ZooEntry, module: nn.Module, n: int, seed: int) -> dict[str, Any]:
    """Attack the first n images by the suite, and with the stand-in's adversarial examples: images left by each."""
    images, options = Images.of(load(entry.dataset)), Options(seed=seed, samples=n)
    target, suite = own_target(module, entry.name, CPU, images, Options()), load_suite(str(SUITE))
    threat = suite.threat(entry.dataset)
    index = images.index[:n]
    x, y = images.x(np.arange(n)), images.y[:n]
    prediction, flags = classify(target, x, y, images.num_classes, LANES)
    left = prediction == y.numpy()
    found: dict[str, Any] = {"n": n, "clean": int(left.sum()), "left": {}, "flags": sorted(flags)}
    found["gradient"] = _gradient_exists(target.module, x)
    stages = ready_stages(suite, threat, target, images, options)
    stages += _by_stand_in(entry, stages, seed)
    widths = BatchWidths(target.module, x.shape[1:], LANES, x.dtype)
    for stage in stages:
        usable = found["gradient"] or not getattr(stage.attack, "needs_grad", False)
        if usable and left.any():
            broken = run_stage(
                stage,
                target,
                images,
                x[left],
                y[left],
                index[left],
                Ball.of(threat),
                widths=widths,
                judge=suite.judge,
                deterministic="randomized" not in flags,
                on_rows=lambda rows: None,
                on_narrow=lambda width, reason: None,
            )
            left = left & ~np.isin(index, broken)
        found["left"][stage.name] = int(left.sum()) if usable else None
    return found


def _by_stand_in(entry: ZooEntry, stages: list[ReadyStage], seed: int) -> list[ReadyStage]:
    """Make the suite's PGD attacks on the stand-in, whose final points are tried on the model."""
    stand_in = entry.differentiable()
    if stand_in is None:
        return []
    return [
        ReadyStage(name, Transfer(stand_in, entry.name, digest_module(stand_in), s.attack), make_key(seed, name))
        for s in stages
        if isinstance(s.attack, PGD)
        for name in [f"{s.name} on the stand-in"]
    ]


class _Heard(logging.Handler):
    """Keeps what pyautoattack warns of, each sentence once with its numbers left out."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Take a warning."""
        self.take(record.getMessage())

    def take(self, text: str) -> None:
        """Name the check that a sentence comes from."""
        signs = {
            "randomized": "randomized defense",
            "probabilities": "probability distribution",
            "zero gradient": "points with zero gradient",
            "Square": "Square Attack has decreased",
            "dynamic": "dynamic defense",
            "classes": "classes",
        }
        for name, sign in signs.items():
            if sign in text:
                self.said.setdefault(name, text)


def autoattack(entry: ZooEntry, module: nn.Module, n: int, seed: int) -> dict[str, Any]:
    """Run pyautoattack on the first n images with its checks: which of them warn.

    Its APGD-CE, APGD-T (the only one that looks for zero gradients) and Square with 1,000 of the usual 5,000 queries.
    """
    data = load(entry.dataset)
    x, y = torch.from_numpy(data.x[:n]).float() / data.scale, torch.from_numpy(data.y[:n])
    threat = load_suite(str(SUITE)).threat(entry.dataset)
    heard, logger = _Heard(), logging.getLogger("auto-attack")
    logger.propagate = False
    # One of its checks counts calls for as long as the process lives: one dynamic model would mark all later ones.
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    logger.addHandler(heard)
    names = ["apgd-ce", "apgd-t", "square"]
    judge = AutoAttack(module, norm=threat.norm, eps=float(threat.eps), seed=seed, version="custom", attacks=names)
    judge.verbose, judge.apgd.n_restarts, judge.square.n_queries = False, 1, 1000
    found: dict[str, Any] = {"n": n}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            x_adv = judge.run_standard_evaluation(x, y, batch_size=n)[0]
            with torch.no_grad():
                found["left"] = int((module(x_adv).argmax(1) == y).sum())
        except (RuntimeError, AssertionError, ValueError) as error:
            found["stopped"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    logger.removeHandler(heard)
    for w in caught:
        heard.take(str(w.message))
    return found | {"warnings": heard.said}


def verdict(entry: ZooEntry, module: nn.Module, n: int, seed: int, results: Path) -> dict[str, Any]:
    """Ask this project's own checks, where they exist; they keep what they measured in a results tree of their own."""
    if find_spec("robbench.masking.run") is None:
        return {"n": n, "verdict": "unchecked", "deciding": []}
    examine = importlib.import_module("robbench.masking.run").examine
    found = examine(module, samples=n, seed=seed, dataset=entry.dataset, name=entry.name, results=results, device="cpu")
    return {"n": n, "verdict": found.verdict, "deciding": found.decided_by}


PARTS: dict[str, Callable[[ZooEntry, nn.Module, int, int], dict[str, Any]]] = {
    "attack": attack,
    "autoattack": autoattack,
}


ALL = [*PARTS, "verdict"]


def kept_at(entry: ZooEntry, part: str, n: int, seed: int, cache: Path) -> Path:
    """Name the file for what is measured; label and half are no part of that."""
    modules = [m for m in (entry.model(), entry.differentiable()) if m is not None]
    about = [part, n, seed, [[digest_module(m), describe_module(m)] for m in modules], versions()]
    return cache / f"{entry.name}-{part}-{digest([*about, SUITE.read_text(encoding='utf-8')])[:12]}.json"


def measure(entry: ZooEntry, part: str, n: int, seed: int, cache: Path) -> dict[str, Any]:
    """Measure one part of an entry, or read what an earlier run found."""
    module = entry.model()
    torch.manual_seed(seed)
    if part == "verdict":
        return verdict(entry, module, n, seed, cache / "results")
    path = kept_at(entry, part, n, seed, cache)
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return known
    begin = time.process_time()
    found = PARTS[part](entry, module, n, seed)
    found["seconds"] = round(time.process_time() - begin, 1)
    found["hardware"] = describe_device(CPU)
    write_atomically(path, json.dumps(found, indent=1).encode())
    return found


def main() -> None:
    """Measure what is not known yet, and write the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--samples", type=int, default=200, help="first N test images; the checks see half of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--entries", nargs="+", help="only these; no page is written")
    parser.add_argument("--parts", nargs="+", default=ALL, choices=ALL, help="only these; no page")
    parser.add_argument("--known", action="store_true", help="measure nothing: write what is known")
    parser.add_argument("--cache", type=Path, default=Path("build/zoo"), help="where what was measured stays")
    parser.add_argument("--output", type=Path, default=Path("docs/sanity-zoo.md"))
    parser.add_argument("--summary", type=Path, default=Path("docs/sanity.md"), help="page that gets the held-out half")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    options.cache.mkdir(parents=True, exist_ok=True)
    half = max(1, options.samples // 2)
    parts = {part: options.samples if part == "attack" else half for part in options.parts}
    records: dict[str, dict[str, Any]] = {}
    for entry in ZOO:
        if entry.name not in (options.entries or [entry.name]):
            continue
        wanted = {
            part: n
            for part, n in parts.items()
            if not options.known or part == "verdict" or kept_at(entry, part, n, options.seed, options.cache).exists()
        }
        if "attack" in parts and "attack" not in wanted:
            print(f"{entry.name} is left out: not measured yet")
            continue
        try:
            found = {part: measure(entry, part, n, options.seed, options.cache) for part, n in wanted.items()}
        except DataError as error:
            print(f"{entry.name} is left out: {error}")
            continue
        records[entry.name] = found
        print(entry.name, json.dumps(found), flush=True)
    if options.entries is None and options.parts == ALL:
        used = versions() | {"pyautoattack": version("pyautoattack")}
        write_atomically(options.output, page(records, options.seed, used).encode())
        text = summary(options.summary.read_text(encoding="utf-8"), records, options.seed, used)
        write_atomically(options.summary, text.encode())
        print(f"{options.output} and {options.summary} written.")


if __name__ == "__main__":
    main()
