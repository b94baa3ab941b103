"""Robbench beside the libraries people use today, in one run: same model, images, budgets, cores and threads.

PGD on cross-entropy is held against torchattacks, APGD-CE and APGD-DLR against pyautoattack (the authors' code), with
norm, eps and steps of the `whitebox` suite. All are given the correctly classified ones among the first N test images;
one judge (prediction, ball, box, finiteness; float32, on the model as loaded) looks at what each returns.
"""

import argparse
import json
import time
import warnings
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from torch import Tensor, nn

from robbench import engine, rng
from robbench.attacks import APGD, PGD
from robbench.data import load
from robbench.errors import RobbenchError
from robbench.hardware import describe_device, versions
from robbench.memory import keep_freed_memory
from robbench.models.card import Registry
from robbench.models.load import load_model
from robbench.stats import mcnemar
from robbench.suite import Suite, build_attack, load_suite
from robbench.target import pick_device, prepare
from robbench.threat import Ball
from robbench.widths import Widths, default_lanes

BATCH = 250  # AutoAttack's default; torchattacks has none
NOTES = f"""\
- robust: of n images, those classified correctly that survive by the judge; claims: the same by the side's own account
  (robbench: its records; peers: predictions at what they return, as AutoAttack counts, with no look at the ball).
- only: samples that only robbench / only the peer broke; p: exact McNemar test on them.
- seconds: median [min–max], order alternating, after one uncounted run, without loading, preparing and clean
  predictions; speedup: median over paired runs of peer / robbench.
- forwards, backwards: samples passed through the model. robbench charges each sample what it cost; in brackets what was
  computed, with idle lanes and, in this uncounted run, the check of narrower widths.
- Peers run in batches of {BATCH}. plain: on the model as `load_model` returns it, in a process of its own with the
  usual memory settings (the headline). prepared: on the channels-last copy that robbench runs on, in robbench's
  process, which keeps freed memory.
- robbench stops a sample at its first confirmed break at any queried point (the suite's judge); pyautoattack keeps such
  a point but spends all steps; torchattacks returns the last point, whatever it is.
"""


class Counted(nn.Module):
    """Counts the samples that pass through a model, forwards and backwards."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0
        self.train(model.training)  # a new module trains, and torchattacks would hand that mode on to the model

    def forward(self, x: Tensor) -> Tensor:
        """Answer as the model does."""
        logits: Tensor = self.model(x)
        self.forwards += len(x)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, grad: Tensor) -> None:
        self.backwards += len(grad)


@dataclass(frozen=True)
class Setup:
    """What all processes agree on."""

    samples: int
    seed: int
    threads: int
    device: str
    data_dir: str | None


@dataclass(frozen=True, eq=False)
class Given:
    """What every side is given: the model twice, correctly classified images on the CPU, and the protocol."""

    plain: nn.Module  # as loaded
    prepared: nn.Module  # the copy that robbench runs on
    x: Tensor
    y: Tensor
    index: NDArray[np.int64]
    ball: Ball
    suite: Suite
    dataset: str
    widths: Widths  # checked in the uncounted run, as evaluation checks them once for all attacks
    n: int  # images before the misclassified ones were left out
    seed: int
    device: torch.device


@cache
def given(model: str, setup: Setup) -> Given:
    """Load a model and its images, once in each process."""
    suite, device = load_suite("whitebox"), pick_device(setup.device)
    entry = Registry.default().find(model)
    data = load(entry.dataset, "test", setup.data_dir)
    plain = load_model(entry, device).module
    n = min(setup.samples, len(data))
    x, y = torch.from_numpy(data.x[:n]).float() / data.scale, torch.from_numpy(data.y[:n])
    ball, prepared = Ball.of(suite.threat(entry.dataset)), prepare(plain, device, x[:2])
    widths = Widths(prepared, x.shape[1:], default_lanes(x.shape[1:], device), x.dtype)
    index = data.index[:n]
    g = Given(plain, prepared, x, y, index, ball, suite, entry.dataset, widths, n, setup.seed, device)
    right = ~wrong(plain, g, x)
    return replace(g, x=x[right], y=y[right], index=index[right])


def ours(g: Given, attack: PGD | APGD, name: str, model: nn.Module) -> tuple[Tensor, engine.Rows]:
    rows = engine.attack_samples(
        model, attack, g.x, g.y, g.index, g.ball, key=rng.make_key(g.seed, name), widths=g.widths,
        judge=g.suite.judge, keep_adversarials=True,
    )  # fmt: skip
    assert rows.x_adv is not None
    return rows.x_adv[torch.from_numpy(np.argsort(rows.sample))], rows


def theirs(g: Given, attack: PGD | APGD, model: nn.Module) -> Tensor:
    peer: Any
    if isinstance(attack, APGD):
        from pyautoattack.autopgd_base import APGDAttack

        peer = APGDAttack(
            model, n_iter=attack.steps, norm=g.ball.norm, n_restarts=attack.restarts, eps=g.ball.eps,
            seed=g.seed, loss=attack.objective, device=g.device,
        ).perturb  # fmt: skip
    else:
        from torchattacks import PGD as Peer

        torch.manual_seed(g.seed)
        step = attack.relative_step * g.ball.eps if attack.step_size is None else attack.step_size
        peer = Peer(model, eps=g.ball.eps, alpha=step, steps=attack.steps, random_start=attack.random_start)
    pairs = zip(g.x.split(BATCH), g.y.split(BATCH), strict=True)
    return torch.cat([peer(x.to(g.device), y.to(g.device)).cpu() for x, y in pairs])


@dataclass(frozen=True, eq=False)
class Answer:
    """One run of one side."""

    seconds: float
    broken: NDArray[np.bool_]  # by the one judge
    claimed: int  # left standing, by the side's own account
    charged: tuple[int, int]
    computed: tuple[int, int]


def run(setup: Setup, model: str, stage: str, who: str, count: bool) -> Answer:
    """Run one side once, in the process that it belongs to; `count` counts passes, which costs a little time."""
    g = given(model, setup)
    (attack,) = (build_attack(s) for s in g.suite.stages(g.dataset) if s.name == stage)
    assert isinstance(attack, PGD | APGD)
    module = g.plain if who.endswith("plain") else g.prepared
    counted = Counted(module) if count else module
    begin = time.perf_counter()
    x_adv, rows = ours(g, attack, stage, counted) if who == "robbench" else (theirs(g, attack, counted).detach(), None)
    seconds = time.perf_counter() - begin  # the tensors are on the CPU, so a GPU is done as well
    broken = wrong(g.plain, g, x_adv) & g.ball.contains(g.x, x_adv).numpy()
    claimed = int((~(wrong(module, g, x_adv) if rows is None else rows.broken)).sum())
    computed = (counted.forwards, counted.backwards) if isinstance(counted, Counted) else (0, 0)
    charged = computed if rows is None else (int(rows.forwards.sum()), int(rows.backwards.sum()))
    return Answer(seconds, broken, claimed, charged, computed)


@torch.no_grad()
def wrong(model: nn.Module, g: Given, x: Tensor) -> NDArray[np.bool_]:
    logits = torch.cat([model(part.to(g.device)).cpu() for part in x.split(BATCH)])
    return ((logits.argmax(1) != g.y) & logits.isfinite().all(1)).numpy()


@dataclass(frozen=True)
class Row:
    """One side's line of the table; the fields after `seconds` hold robbench against this peer."""

    model: str
    attack: str
    who: str
    robust: int  # by our judge
    claims: int
    n: int
    passes: tuple[int, int]  # samples charged, forwards and backwards
    computed: tuple[int, int]
    seconds: list[float]
    speedup: float | None = None
    only_robbench: int | None = None
    only_peer: int | None = None
    p: float | None = None


def start(setup: Setup, keep: bool) -> None:
    """Begin a process: robbench keeps freed memory (as `evaluate` does), a peer's user does not."""
    torch.set_num_threads(setup.threads)
    # pyautoattack remarks on zero gradients of the DLR loss at every batch.
    warnings.filterwarnings("ignore", message="there are .* points with zero gradient")
    if keep:
        keep_freed_memory()


def compare(model: str, name: str, peer: str, setup: Setup, repeats: int, processes: dict[bool, Executor]) -> list[Row]:
    """Measure robbench and its peer on one model and attack."""
    sides = ["robbench", f"{peer}, plain", f"{peer}, prepared"]

    def answer(who: str, count: bool = False) -> Answer:
        return processes[not who.endswith("plain")].submit(run, setup, model, name, who, count).result()

    warm = {who: answer(who, count=True) for who in sides}
    seconds: dict[str, list[float]] = {who: [] for who in sides}
    for repeat in range(repeats):
        for who in sides[:: -1 if repeat % 2 else 1]:
            seconds[who].append(answer(who).seconds)
    rows = []
    n = given(model, setup).n
    us = warm["robbench"].broken
    for who, side in warm.items():
        versus: dict[str, Any] = {}
        if who != "robbench":
            mine, its = int((us > side.broken).sum()), int((side.broken > us).sum())
            ratio = median(b / a for a, b in zip(seconds["robbench"], seconds[who], strict=True))
            versus = {"speedup": ratio, "only_robbench": mine, "only_peer": its, "p": mcnemar(mine, its)}
        robust = int((~side.broken).sum())
        rows.append(Row(model, name, who, robust, side.claimed, n, side.charged, side.computed, seconds[who], **versus))
    return rows


def measure(model: str, setup: Setup, repeats: int, processes: dict[bool, Executor]) -> list[Row]:
    """Measure what the peers have: PGD on cross-entropy and APGD on both losses (FGSM is a PGD of one step)."""
    rows = []
    g = given(model, setup)
    for stage in g.suite.stages(g.dataset):
        attack = build_attack(stage)
        if isinstance(attack, APGD) or (type(attack) is PGD and attack.objective == "ce"):
            peer = "pyautoattack" if isinstance(attack, APGD) else "torchattacks"
            if find_spec(peer) is None:
                print(f"{peer} is not installed: no comparison of {stage.name} on {model}.")
            else:
                rows += compare(model, stage.name, peer, setup, repeats, processes)
    return rows


def cells(r: Row) -> tuple[str, ...]:
    passes = [f"{a:,}" if a == b else f"{a:,} ({b:,})" for a, b in zip(r.passes, r.computed, strict=True)]
    seconds = f"{median(r.seconds):.2f} [{min(r.seconds):.2f}–{max(r.seconds):.2f}]"
    versus = () if r.speedup is None else (f"{r.speedup:.2f}×", f"{r.only_robbench} / {r.only_peer}", f"{r.p:.2g}")
    return (r.model, r.attack, r.who, f"{r.robust}/{r.n}", str(r.claims), seconds, *passes, *versus)


def table(rows: list[Row], style: str) -> str:
    headers = ["model", "attack", "who", "robust", "claims", "seconds", "forwards", "backwards", "speedup", "only", "p"]
    return tabulate([cells(r) for r in rows], headers, tablefmt=style, disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["digits/at", "digits/natural", "cifar10/natural_resnet18"])
    parser.add_argument("--samples", type=int, default=256, help="first N images of the test set")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="torch threads, for all sides")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:i")
    parser.add_argument("--data-dir", help="where the data sets are (ROBBENCH_DATA)")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    args = parser.parse_args()
    setup = Setup(args.samples, args.seed, args.threads, args.device, args.data_dir)
    start(setup, keep=True)
    found = versions() | {p: version(p) if find_spec(p) else "missing" for p in ("pyautoattack", "torchattacks")}
    hardware = describe_device(pick_device(args.device))
    header = f"{hardware}; " + ", ".join(f"{k} {v}" for k, v in found.items())
    header += f"; n={args.samples}, seed {args.seed}, {args.threads} torch threads, {args.repeats} runs of each side"
    rows: list[Row] = []
    with ExitStack() as stack:
        processes: dict[bool, Executor] = {
            keep: stack.enter_context(
                ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start, initargs=(setup, keep))
            )
            for keep in (True, False)
        }
        for model in args.models:
            try:
                rows += measure(model, setup, args.repeats, processes)
            except RobbenchError as error:
                print(f"{model} is left out: {error}")
    print(f"{header}\n\n{table(rows, 'simple')}\n\n{NOTES}")
    if args.markdown:
        args.markdown.write_text(f"{header}\n\n{table(rows, 'github')}\n\n{NOTES}", encoding="utf-8")
    if args.json:
        record = {"hardware": hardware, "versions": found, "suite": "whitebox", "batch": BATCH, **asdict(setup)}
        record |= {"repeats": args.repeats, "rows": [asdict(r) for r in rows]}
        args.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
