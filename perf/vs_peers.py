"""Compares robbench with other libraries in one run, with the same model, images, budgets, cores and threads.

FGSM, PGD and C&W are compared with torchattacks. APGD-CE, APGD-T, FAB-T, Square and the cascade of all four are
compared with pyautoattack (the authors' code). All attacks get the correctly classified images among the first N test
images. One judge checks the returned points (prediction, ball, box, finiteness; in float32, on the model as loaded).
"""

import argparse
import json
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from duels import list_duels
from robbench.classifier.prepare import pick_device
from robbench.core.errors import RobbenchError
from robbench.core.machine import describe_device, versions
from robbench.core.stats import mcnemar
from sides import BATCH, CountingModel, Setup, find_wrong, load_input, start_process

NOTES = f"""\
- robust: of n images, those classified correctly that survive by the judge; claims: the same by the side's own account
  (robbench: its records; peers: predictions at what they return, as AutoAttack counts, with no look at the ball).
- only: samples that only robbench / only the peer broke; p: exact McNemar test on them.
- seconds: median [min–max], order alternating, after one uncounted run, without loading, preparing and clean
  predictions; speedup: median over paired runs of peer / robbench.
- forwards, backwards: samples passed through the model. robbench charges each sample the attack's queries; in brackets
  what was computed, with idle lanes, steps looked ahead and, in this uncounted run, the check of narrower widths.
- Peers run in batches of {BATCH}. plain: on the model as `load_model` returns it, in a process of its own with the
  usual memory and arithmetic settings (the headline). prepared: on the channels-last copy that robbench runs on, in
  robbench's process, which keeps freed memory and sums in one order.
- robbench stops a sample at its first confirmed break at any queried point (the suite's judge); pyautoattack keeps such
  a point but spends all steps; torchattacks returns the last point, whatever it is.
"""


@dataclass(frozen=True, eq=False)
class SideRun:
    """One run of one side."""

    seconds: float
    broken: NDArray[np.bool_]  # according to the judge
    claimed: int  # robust images according to the side itself
    charged: tuple[int, int]
    computed: tuple[int, int]


def run_side(setup: Setup, model: str, name: str, who: str, count: bool) -> SideRun:
    """Run one side once in this process. `count` counts passes, which costs a little time."""
    g = load_input(model, setup)
    (duel,) = (d for d in list_duels(g) if d.name == name)
    module = g.plain if who.endswith("plain") else g.prepared
    asked = CountingModel(module) if count else module
    begin = time.perf_counter()
    if who == "robbench":
        x_adv, claims, charged = duel.run_ours(g, asked)
    else:
        x_adv, claims, charged = duel.run_theirs(g, asked), None, None
    seconds = time.perf_counter() - begin  # the tensors are on the CPU, so a GPU is done as well
    broken = find_wrong(g.plain, g, x_adv) & duel.ball.contains(g.x, x_adv).numpy()
    claimed = find_wrong(module, g, x_adv) if claims is None else claims
    computed = (asked.seen.forwards, asked.seen.backwards) if isinstance(asked, CountingModel) else (0, 0)
    return SideRun(seconds, broken, int((~claimed).sum()), charged or computed, computed)


@dataclass(frozen=True)
class Row:
    """One row of the table, for one side. The fields after `seconds` compare robbench with this peer."""

    model: str
    attack: str
    who: str
    robust: int | None  # robust images according to the judge; None for a sum of several attacks
    claims: int | None
    n: int
    passes: tuple[int, int]  # charged samples, forwards and backwards
    computed: tuple[int, int]
    seconds: list[float]
    speedup: float | None = None
    only_robbench: int | None = None
    only_peer: int | None = None
    p: float | None = None


def compare_peers(
    model: str, name: str, peer: str, setup: Setup, options: argparse.Namespace, processes: dict[bool, Executor]
) -> list[Row]:
    """Measure robbench and its peer on one model and attack."""
    sides = ["robbench", *(f"{peer}, {side}" for side in options.sides)]

    def answer(who: str, count: bool = False) -> SideRun:
        return processes[not who.endswith("plain")].submit(run_side, setup, model, name, who, count).result()

    warm = {who: answer(who, count=True) for who in sides}
    seconds: dict[str, list[float]] = {who: [] for who in sides}
    for repeat in range(options.repeats):
        for who in sides[:: -1 if repeat % 2 else 1]:
            seconds[who].append(answer(who).seconds)
    rows = []
    n = load_input(model, setup).n
    ours = warm["robbench"].broken
    for who, side in warm.items():
        versus: dict[str, Any] = {}
        if who != "robbench":
            only_ours, only_peer = int((ours > side.broken).sum()), int((side.broken > ours).sum())
            ratio = median(b / a for a, b in zip(seconds["robbench"], seconds[who], strict=True))
            versus = {"speedup": ratio, "only_robbench": only_ours, "only_peer": only_peer}
            versus["p"] = mcnemar(only_ours, only_peer)
        robust = int((~side.broken).sum())
        rows.append(Row(model, name, who, robust, side.claimed, n, side.charged, side.computed, seconds[who], **versus))
    return rows


def measure_model(model: str, setup: Setup, options: argparse.Namespace, processes: dict[bool, Executor]) -> list[Row]:
    """Compare all attacks on one model, and the sum of torchattacks' attacks."""
    rows = []
    for duel in list_duels(load_input(model, setup)):
        if options.attacks and duel.name not in options.attacks:
            continue
        rows += compare_peers(model, duel.name, duel.peer, setup, options, processes)
        print(f"{model}: {duel.name} done", flush=True)
    return rows + sum_rows([row for row in rows if row.attack in ("FGSM", "C&W L2") or row.attack.startswith("PGD")])


def sum_rows(rows: list[Row]) -> list[Row]:
    """Add up seconds and passes of a peer's attacks, in one row for each side."""
    sums: list[Row] = []
    for who in dict.fromkeys(row.who for row in rows):
        mine = [row for row in rows if row.who == who]
        seconds = [sum(times) for times in zip(*(row.seconds for row in mine), strict=True)]
        ratio = median(b / a for a, b in zip(sums[0].seconds, seconds, strict=True)) if sums else None
        passes, computed = (
            (sum(p[0] for p in pairs), sum(p[1] for p in pairs))
            for pairs in ([row.passes for row in mine], [row.computed for row in mine])
        )
        names = ", ".join(row.attack for row in mine)
        sums.append(Row(mine[0].model, names, who, None, None, mine[0].n, passes, computed, seconds, ratio))
    return sums if len(rows) > len(sums) else []


def format_cells(r: Row) -> tuple[str, ...]:
    passes = [f"{a:,}" if a == b else f"{a:,} ({b:,})" for a, b in zip(r.passes, r.computed, strict=True)]
    seconds = f"{median(r.seconds):.2f} [{min(r.seconds):.2f}–{max(r.seconds):.2f}]"
    versus = () if r.speedup is None else (f"{r.speedup:.2f}×",)
    versus += () if r.p is None else (f"{r.only_robbench} / {r.only_peer}", f"{r.p:.2g}")
    counts = ("", "") if r.robust is None else (f"{r.robust}/{r.n}", str(r.claims))
    return (r.model, r.attack, r.who, *counts, seconds, *passes, *versus)


def format_table(rows: list[Row], style: str) -> str:
    headers = ["model", "attack", "who", "robust", "claims", "seconds", "forwards", "backwards", "speedup", "only", "p"]
    return tabulate([format_cells(r) for r in rows], headers, tablefmt=style, disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["digits/at", "digits/ls095_sigma03", "digits/natural"])
    parser.add_argument("--attacks", nargs="+", help="only these rows")
    parser.add_argument("--samples", type=int, default=256, help="first N images of the test set")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side")
    parser.add_argument("--sides", nargs="+", default=["plain", "prepared"], help="how the peers are run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="torch threads, for all sides")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:i")
    parser.add_argument("--gradients", choices=["bfloat16"], help="of robbench's attacks; the judge keeps to float32")
    parser.add_argument("--data-dir", help="where the data sets are (ROBBENCH_DATA)")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    args = parser.parse_args()
    setup = Setup(args.samples, args.seed, args.threads, args.device, args.data_dir, args.gradients)
    for peer in ("pyautoattack", "torchattacks"):
        if find_spec(peer) is None:
            parser.error(f"{peer} is not installed; pip install 'robbench[peers]'")
    start_process(setup, keep=True)
    found = versions() | {p: version(p) for p in ("pyautoattack", "torchattacks")}
    hardware = describe_device(pick_device(args.device))
    header = f"{hardware}; " + ", ".join(f"{k} {v}" for k, v in found.items())
    header += f"; n={args.samples}, seed {args.seed}, {args.threads} torch threads, {args.repeats} runs of each side"
    header += f"; robbench with --gradients {args.gradients}" if args.gradients else ""
    rows: list[Row] = []
    with ExitStack() as stack:
        processes: dict[bool, Executor] = {
            keep: stack.enter_context(
                ProcessPoolExecutor(
                    1, mp_context=get_context("spawn"), initializer=start_process, initargs=(setup, keep)
                )
            )
            for keep in (True, False)
        }
        for model in args.models:
            try:
                rows += measure_model(model, setup, args, processes)
            except RobbenchError as error:
                print(f"{model} is left out: {error}")
    print(f"{header}\n\n{format_table(rows, 'simple')}\n\n{NOTES}")
    if args.markdown:
        args.markdown.write_text(f"{header}\n\n{format_table(rows, 'github')}\n\n{NOTES}", encoding="utf-8")
    if args.json:
        record = {"hardware": hardware, "versions": found, "batch": BATCH, **asdict(setup)}
        record |= {"repeats": args.repeats, "rows": [asdict(r) for r in rows]}
        args.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
