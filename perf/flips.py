"""Do verdicts move with the batch? Lane widths, shards and order, here and in AutoAttack's code.

Each attack of the suite runs on its own on the correctly classified ones among the first N test images, once as a
reference and again with other batches; a flip is an image that is broken in one run and not in the other. In float64
there must be none here; in float32 they are counted and listed.
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate

from duels import autoattack
from robbench.attacks import Attack
from robbench.classifier.batch_width import BatchWidths
from robbench.classifier.prepare import pick_device
from robbench.core import rng
from robbench.core.machine import describe_device, versions
from robbench.engine import engine
from robbench.suite import build_attack, load_suite
from sides import Given, Setup, given, start, wrong

WIDTHS, SHARDS, BATCHES = (16, 64, 256), (2, 4), (50, 100, 200, 400)
Positions = NDArray[np.int64]


def ours(g: Given, name: str, attack: Attack, dtype: torch.dtype, lanes: int, parts: list[Positions]) -> Positions:
    """Run one attack on parts of the images, in their order; returns the positions of those that stand."""
    model, x = g.prepared.to(dtype), g.x.to(dtype)
    widths = BatchWidths(model, x.shape[1:], lanes, dtype)
    standing = []
    for part in parts:
        rows = engine.attack_samples(
            model, attack, x[part], g.y[part], g.index[part], g.ball, key=rng.make_key(g.seed, name), widths=widths
        )
        standing.append(np.searchsorted(g.index, rows.sample[~rows.broken]))
    return np.sort(np.concatenate(standing))


def theirs(g: Given, name: str, batch: int, order: Positions) -> Positions:
    """Run one attack of AutoAttack on the images in this order; returns the positions of those that stand."""
    x_adv = torch.empty_like(g.x)
    x_adv[order] = autoattack(g, g.prepared, g.x[order], g.y[order], name, batch).cpu()
    return np.flatnonzero(~wrong(g.prepared, g, x_adv))


def flips(base: Positions, other: Positions, index: NDArray[np.int64]) -> list[int]:
    """List the official indices of the images on which two runs disagree."""
    found: list[int] = index[np.setxor1d(base, other)].tolist()
    return found


def compared(base: Positions, runs: dict[str, Callable[[], Positions]], g: Given) -> dict[str, list[int]]:
    """Run every variant, and say where it differs from the base."""
    return {name: flips(base, run(), g.index) for name, run in runs.items()}


def our_runs(g: Given, name: str, attack: Attack, dtype: torch.dtype) -> tuple[Positions, dict[str, list[int]]]:
    """Compare widths, shards and order with 64 lanes, one shard and the official order."""
    n = len(g.y)
    every, shuffled = np.arange(n), np.random.default_rng(0).permutation(n)
    base = ours(g, name, attack, dtype, 64, [every])
    runs = {f"{lanes} lanes": (lanes, [every]) for lanes in WIDTHS if lanes != 64}
    runs |= {f"{k} shards": (64, np.array_split(every, k)) for k in SHARDS}
    runs["shuffled"] = (64, [shuffled])
    return base, compared(base, {k: lambda v=v: ours(g, name, attack, dtype, *v) for k, v in runs.items()}, g)


def their_runs(model: str, setup: Setup, name: str) -> tuple[Positions, dict[str, list[int]]]:
    """Compare batch sizes and order with batches of 100 in the official order, in a process with usual arithmetic."""
    g = given(model, setup)
    n = len(g.y)
    every, shuffled = np.arange(n), np.random.default_rng(0).permutation(n)
    base = theirs(g, name, 100, every)
    runs: dict[str, Callable[[], Positions]] = {
        f"batch {b}": lambda b=b: theirs(g, name, b, every) for b in BATCHES if b != 100
    }
    return base, compared(base, runs | {"shuffled": lambda: theirs(g, name, 100, shuffled)}, g)


def main() -> None:
    """Print one row per attack, side and precision."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="digits/at")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attacks", nargs="+", default=["APGD-CE", "APGD-T", "FAB-T", "Square"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data-dir")
    options = parser.parse_args()
    setup = Setup(options.samples, options.seed, options.threads, options.device, options.data_dir)
    start(setup, keep=True)
    g = given(options.model, setup)
    rows = []

    def row(name: str, who: str, base: Positions, found: dict[str, list[int]]) -> None:
        counts = ", ".join(f"{k}: {len(v)}" for k, v in found.items())
        which = sorted({i for v in found.values() for i in v})
        rows.append([name, who, f"{len(base)}/{len(g.y)}", counts, " ".join(map(str, which[:12])) or "none"])
        print(*rows[-1], sep=" | ", flush=True)

    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start, initargs=(setup, False)) as peer:
        for stage in load_suite("autoattack").stages(g.dataset):
            if stage.name in options.attacks:
                attack = build_attack(stage)
                for dtype in (torch.float64, torch.float32):
                    row(stage.name, f"robbench, {str(dtype)[6:]}", *our_runs(g, stage.name, attack, dtype))
                theirs_ran = peer.submit(their_runs, options.model, setup, stage.name).result()
                row(stage.name, "pyautoattack, float32", *theirs_ran)
    about = ", ".join(f"{k} {v}" for k, v in versions().items())
    hardware = describe_device(pick_device(options.device))
    print(f"\n{hardware}; {about}, pyautoattack {version('pyautoattack')}; {options.model}, seed {options.seed}\n")
    headers = ["attack", "who", "robust", "flips against the reference", "images (the first 12)"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
