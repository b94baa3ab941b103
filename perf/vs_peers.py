"""Robbench beside the libraries people use today, in one run: same model, images, budgets, cores and threads.

PGD on cross-entropy is held against torchattacks, APGD-CE and APGD-DLR against pyautoattack (the authors' code), with
norm, eps and steps of the `whitebox` suite. All are given the correctly classified ones among the first N test images;
one judge (prediction, ball, box, finiteness; float32, on the model as loaded) looks at what each returns.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
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
- Peers run in batches of {BATCH}; plain: on the model as `load_model` returns it (the headline); prepared: on the
  channels-last copy that robbench runs on.
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
    widths: Widths  # checked in the uncounted run, as evaluation checks them once for all attacks
    n: int  # images before the misclassified ones were left out
    seed: int
    device: torch.device


# From a model to adversarials [n, C, H, W] on the CPU, and robbench's records.
Side = Callable[[nn.Module], tuple[Tensor, engine.Rows | None]]


def ours(given: Given, attack: PGD | APGD, name: str) -> Side:

    def run(model: nn.Module) -> tuple[Tensor, engine.Rows]:
        rows = engine.attack_samples(
            model, attack, given.x, given.y, given.index, given.ball, key=rng.make_key(given.seed, name),
            widths=given.widths, judge=given.suite.judge, keep_adversarials=True,
        )  # fmt: skip
        assert rows.x_adv is not None
        return rows.x_adv[torch.from_numpy(np.argsort(rows.sample))], rows

    return run


def theirs(given: Given, attack: PGD | APGD) -> Side:
    def make(model: nn.Module) -> Any:
        if isinstance(attack, APGD):
            from pyautoattack.autopgd_base import APGDAttack

            return APGDAttack(
                model, n_iter=attack.steps, norm=given.ball.norm, n_restarts=attack.restarts, eps=given.ball.eps,
                seed=given.seed, loss=attack.objective, device=given.device,
            ).perturb  # fmt: skip
        from torchattacks import PGD as Peer

        torch.manual_seed(given.seed)
        step = attack.relative_step * given.ball.eps if attack.step_size is None else attack.step_size
        return Peer(model, eps=given.ball.eps, alpha=step, steps=attack.steps, random_start=attack.random_start)

    def run(model: nn.Module) -> tuple[Tensor, None]:
        peer = make(model)
        pairs = zip(given.x.split(BATCH), given.y.split(BATCH), strict=True)
        return torch.cat([peer(x.to(given.device), y.to(given.device)).cpu() for x, y in pairs]), None

    return run


@torch.no_grad()
def wrong(model: nn.Module, given: Given, x: Tensor) -> NDArray[np.bool_]:
    logits = torch.cat([model(part.to(given.device)).cpu() for part in x.split(BATCH)])
    return ((logits.argmax(1) != given.y) & logits.isfinite().all(1)).numpy()


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


def compare(model: str, name: str, attack: PGD | APGD, given: Given, repeats: int) -> list[Row]:
    """Measure robbench and its peer on one model and attack."""
    peer = "pyautoattack" if isinstance(attack, APGD) else "torchattacks"
    if find_spec(peer) is None:
        print(f"{peer} is not installed: no comparison of {name} on {model}.")
        return []
    modules = {"robbench": given.prepared, f"{peer}, plain": given.plain, f"{peer}, prepared": given.prepared}
    us, them = ours(given, attack, name), theirs(given, attack)
    sides = [(who, us if who == "robbench" else them, module) for who, module in modules.items()]
    seconds: dict[str, list[float]] = {who: [] for who in modules}
    warm = {who: (counted := Counted(module), side(counted)) for who, side, module in sides}
    for repeat in range(repeats):
        for who, side, module in sides[:: -1 if repeat % 2 else 1]:
            begin = time.perf_counter()
            side(module)  # returns tensors on the CPU, so a GPU is done as well
            seconds[who].append(time.perf_counter() - begin)
    rows: list[Row] = []
    broken: dict[str, NDArray[np.bool_]] = {}
    for who, module in modules.items():
        counted, (x_adv, own) = warm[who]
        broken[who] = wrong(given.plain, given, x_adv) & given.ball.contains(given.x, x_adv).numpy()
        claimed = int((~(wrong(module, given, x_adv) if own is None else own.broken)).sum())
        versus: dict[str, Any] = {}
        if own is None:
            mine, its = int((broken["robbench"] > broken[who]).sum()), int((broken[who] > broken["robbench"]).sum())
            ratio = median(b / a for a, b in zip(seconds["robbench"], seconds[who], strict=True))
            versus = {"speedup": ratio, "only_robbench": mine, "only_peer": its, "p": mcnemar(mine, its)}
        computed = counted.forwards, counted.backwards
        charged = computed if own is None else (int(own.forwards.sum()), int(own.backwards.sum()))
        robust = int((~broken[who]).sum())
        rows.append(Row(model, name, who, robust, claimed, given.n, charged, computed, seconds[who], **versus))
    return rows


def measure(model: str, args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Measure all attacks on one model."""
    suite = load_suite("whitebox")
    entry = Registry.default().find(model)
    data = load(entry.dataset, "test", args.data_dir)
    plain = load_model(entry, device).module
    n = min(args.samples, len(data))
    x, y = torch.from_numpy(data.x[:n]).float() / data.scale, torch.from_numpy(data.y[:n])
    ball, prepared = Ball.of(suite.threat(entry.dataset)), prepare(plain, device, x[:2])
    widths = Widths(prepared, x.shape[1:], default_lanes(x.shape[1:], device), x.dtype)
    given = Given(plain, prepared, x, y, data.index[:n], ball, suite, widths, n, args.seed, device)
    right = ~wrong(plain, given, x)
    given = replace(given, x=x[right], y=y[right], index=given.index[right])
    rows = []
    for stage in suite.stages(entry.dataset):
        attack = build_attack(stage)
        # What the peers have: APGD on both losses, PGD on cross-entropy (FGSM is a PGD of one step).
        if isinstance(attack, APGD) or (type(attack) is PGD and attack.objective == "ce"):
            rows += compare(model, stage.name, attack, given, args.repeats)
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
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    # pyautoattack remarks on zero gradients of the DLR loss at every batch.
    warnings.filterwarnings("ignore", message="there are .* points with zero gradient")
    found = versions() | {p: version(p) if find_spec(p) else "missing" for p in ("pyautoattack", "torchattacks")}
    header = f"{describe_device(device)}; " + ", ".join(f"{k} {v}" for k, v in found.items())
    header += f"; n={args.samples}, seed {args.seed}, {args.threads} torch threads, {args.repeats} runs of each side"
    rows: list[Row] = []
    for model in args.models:
        try:
            rows += measure(model, args, device)
        except RobbenchError as error:
            print(f"{model} is left out: {error}")
    print(f"{header}\n\n{table(rows, 'simple')}\n\n{NOTES}")
    if args.markdown:
        args.markdown.write_text(f"{header}\n\n{table(rows, 'github')}\n\n{NOTES}", encoding="utf-8")
    if args.json:
        setup = {"hardware": describe_device(device), "versions": found, "suite": "whitebox", "batch": BATCH}
        setup |= {k: getattr(args, k) for k in ("samples", "repeats", "seed", "threads")}
        args.json.write_text(json.dumps(setup | {"rows": [asdict(r) for r in rows]}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
