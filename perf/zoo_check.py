"""Measures the labelled zoo: the usual attack and the best known attacks on each model, and the verdicts of checks.

It writes docs/sanity-zoo.md, and the held-out half into docs/sanity.md. Measurements stay in a cache, so that an
interrupted run can resume.
"""

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyautoattack import AutoAttack, checks
from torch import Tensor, nn

from robbench.attacks import PGD
from robbench.classifier.batch_width import BatchWidths
from robbench.classifier.checks import classify
from robbench.core.errors import DataError, UnshippedError
from robbench.core.files import digest, write_atomically
from robbench.core.machine import describe_device, keep_freed_memory, versions
from robbench.core.rng import make_key
from robbench.core.threat import Ball
from robbench.data.sets import load
from robbench.evaluation.inputs import Images, own_target
from robbench.evaluation.options import Options
from robbench.evaluation.stages import ReadyStage, ready_stages, run_stage
from robbench.evaluation.transfer import Transfer
from robbench.masking.run import examine
from robbench.models.load import describe_module, digest_module
from robbench.suite import load_suite
from zoo import ZOO, ZooEntry
from zoo_page import insert_summary, render_page

SUITE = Path(__file__).with_name("zoo") / "zoo.toml"
LANES = 16
CPU = torch.device("cpu")


def _has_gradient(module: nn.Module, x: Tensor) -> bool:
    logits: Tensor = module(x[:1].clone().requires_grad_(True))
    return logits.requires_grad


def run_attacks(entry: ZooEntry, module: nn.Module, n: int, seed: int) -> dict[str, Any]:
    """Attack the first n images with the suite and the stand-in's adversarial examples. Count the robust images."""
    images, options = Images.of(load(entry.dataset)), Options(seed=seed, samples=n)
    target, suite = own_target(module, entry.name, CPU, images, Options()), load_suite(str(SUITE))
    threat = suite.threat(entry.dataset)
    index = images.index[:n]
    x, y = images.x(np.arange(n)), images.y[:n]
    prediction, flags = classify(target, x, y, images.num_classes, LANES)
    left = prediction == y.numpy()
    found: dict[str, Any] = {"n": n, "clean": int(left.sum()), "left": {}, "flags": sorted(flags)}
    found["gradient"] = _has_gradient(target.module, x)
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
    """Make transfer attacks from the stand-in with the PGD attacks of the suite."""
    stand_in = entry.build_stand_in()
    if stand_in is None:
        return []
    return [
        ReadyStage(name, Transfer(stand_in, entry.name, digest_module(stand_in), s.attack), make_key(seed, name))
        for s in stages
        if isinstance(s.attack, PGD)
        for name in [f"{s.name} on the stand-in"]
    ]


class _WarningRecorder(logging.Handler):
    """Records the checks of pyautoattack that warn, with the first sentence of each."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Record a warning."""
        self.take(record.getMessage())

    def take(self, text: str) -> None:
        """Find the check that a sentence comes from, and record it."""
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
                self.warnings.setdefault(name, text)


def run_autoattack(entry: ZooEntry, module: nn.Module, n: int, seed: int) -> dict[str, Any]:
    """Run pyautoattack on the first n images, and record which of its checks warn.

    It runs APGD-CE, APGD-T (the only attack that checks for zero gradients) and Square with 1,000 of the usual 5,000
    queries.
    """
    data = load(entry.dataset)
    x, y = torch.from_numpy(data.x[:n]).float() / data.scale, torch.from_numpy(data.y[:n])
    threat = load_suite(str(SUITE)).threat(entry.dataset)
    recorder, logger = _WarningRecorder(), logging.getLogger("auto-attack")
    logger.propagate = False
    # One of its checks counts calls over the life of the process. One dynamic model would mark all later models.
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    logger.addHandler(recorder)
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
    logger.removeHandler(recorder)
    for w in caught:
        recorder.take(str(w.message))
    return found | {"warnings": recorder.warnings}


def check_masking(entry: ZooEntry, module: nn.Module, n: int, seed: int, results: Path) -> dict[str, Any]:
    """Run this project's checks. They store their measurements in their own results tree."""
    found = examine(module, samples=n, seed=seed, dataset=entry.dataset, name=entry.name, results=results, device="cpu")
    return {"n": n, "verdict": found.verdict, "deciding": found.decided_by}


PARTS: dict[str, Callable[[ZooEntry, nn.Module, int, int], dict[str, Any]]] = {
    "attack": run_attacks,
    "autoattack": run_autoattack,
}


ALL = [*PARTS, "verdict"]


def cache_path(entry: ZooEntry, part: str, n: int, seed: int, cache: Path) -> Path:
    """Name the file for what is measured; label and half are no part of that."""
    modules = [m for m in (entry.build_model(), entry.build_stand_in()) if m is not None]
    about = [part, n, seed, [[digest_module(m), describe_module(m)] for m in modules], versions()]
    return cache / f"{entry.name}-{part}-{digest([*about, SUITE.read_text(encoding='utf-8')])[:12]}.json"


def measure_part(entry: ZooEntry, part: str, n: int, seed: int, cache: Path) -> dict[str, Any]:
    """Measure one part of an entry, or read it from the cache."""
    module = entry.build_model()
    torch.manual_seed(seed)
    if part == "verdict":
        return check_masking(entry, module, n, seed, cache / "results")
    path = cache_path(entry, part, n, seed, cache)
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
    """Measure what the cache lacks, and write the pages."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--samples", type=int, default=200, help="first N test images; the checks see half of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--entries", nargs="+", help="measure only these; write no page")
    parser.add_argument("--parts", nargs="+", default=ALL, choices=ALL, help="measure only these; write no page")
    parser.add_argument("--known", action="store_true", help="measure nothing; write what the cache holds")
    parser.add_argument("--cache", type=Path, default=Path("build/zoo"), help="folder of the cache")
    parser.add_argument("--output", type=Path, default=Path("docs/sanity-zoo.md"))
    parser.add_argument(
        "--summary", type=Path, default=Path("docs/sanity.md"), help="page with the table of the held-out half"
    )
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
        try:
            wanted = {
                part: n
                for part, n in parts.items()
                if not options.known
                or part == "verdict"
                or cache_path(entry, part, n, options.seed, options.cache).exists()
            }
            if "attack" in parts and "attack" not in wanted:
                print(f"{entry.name} is left out: not measured yet")
                continue
            found = {part: measure_part(entry, part, n, options.seed, options.cache) for part, n in wanted.items()}
        except (DataError, UnshippedError) as error:
            print(f"{entry.name} is left out: {error}")
            continue
        records[entry.name] = found
        print(entry.name, json.dumps(found), flush=True)
    if options.entries is None and options.parts == ALL:
        used = versions() | {"pyautoattack": version("pyautoattack")}
        write_atomically(options.output, render_page(records, options.seed, used).encode())
        text = insert_summary(options.summary.read_text(encoding="utf-8"), records, options.seed, used)
        write_atomically(options.summary, text.encode())
        print(f"{options.output} and {options.summary} written.")


if __name__ == "__main__":
    main()
