"""Measures whether verdicts depend on batch width, shards or order of the images, in robbench and in AutoAttack.

Each attack of the suite runs alone on the correctly classified images among the first N test images. It runs once as a
reference, then with other batches. A flip is an image that only one of two runs breaks. In float64, robbench must have
no flips. In float32, the flips are counted and listed.
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

from duels import run_autoattack
from robbench.attacks import Attack
from robbench.classifier.batch_width import BatchWidths
from robbench.classifier.prepare import pick_device
from robbench.core import rng
from robbench.core.machine import describe_device, versions
from robbench.engine import engine
from robbench.suite import build_attack, load_suite
from sides import Setup, SharedInput, find_wrong, load_input, start_process

WIDTHS, SHARDS, BATCHES = (16, 64, 256), (2, 4), (50, 100, 200, 400)
Positions = NDArray[np.int64]


def run_ours(
    g: SharedInput, name: str, attack: Attack, dtype: torch.dtype, lanes: int, parts: list[Positions]
) -> Positions:
    """Run one attack on parts of the images, in order. Return the positions of the robust images."""
    model, x = g.prepared.to(dtype), g.x.to(dtype)
    widths = BatchWidths(model, x.shape[1:], lanes, dtype)
    robust = []
    for part in parts:
        rows = engine.attack_samples(
            model, attack, x[part], g.y[part], g.index[part], g.ball, key=rng.make_key(g.seed, name), widths=widths
        )
        robust.append(np.searchsorted(g.index, rows.sample[~rows.broken]))
    return np.sort(np.concatenate(robust))


def run_theirs(g: SharedInput, name: str, batch: int, order: Positions) -> Positions:
    """Run one attack of AutoAttack on the images in this order. Return the positions of the robust images."""
    x_adv = torch.empty_like(g.x)
    x_adv[order] = run_autoattack(g, g.prepared, g.x[order], g.y[order], name, batch).cpu()
    return np.flatnonzero(~find_wrong(g.prepared, g, x_adv))


def list_flips(base: Positions, other: Positions, index: NDArray[np.int64]) -> list[int]:
    """List the official indices of the images on which two runs disagree."""
    found: list[int] = index[np.setxor1d(base, other)].tolist()
    return found


def compare_variants(base: Positions, runs: dict[str, Callable[[], Positions]], g: SharedInput) -> dict[str, list[int]]:
    """Run every variant. Return its flips against the base run."""
    return {name: list_flips(base, run(), g.index) for name, run in runs.items()}


def compare_our_batches(
    g: SharedInput, name: str, attack: Attack, dtype: torch.dtype
) -> tuple[Positions, dict[str, list[int]]]:
    """Compare other widths, shards and orders with 64 lanes, one shard and the official order."""
    n = len(g.y)
    every, shuffled = np.arange(n), np.random.default_rng(0).permutation(n)
    base = run_ours(g, name, attack, dtype, 64, [every])
    runs = {f"{lanes} lanes": (lanes, [every]) for lanes in WIDTHS if lanes != 64}
    runs |= {f"{k} shards": (64, np.array_split(every, k)) for k in SHARDS}
    runs["shuffled"] = (64, [shuffled])
    return base, compare_variants(
        base, {k: lambda v=v: run_ours(g, name, attack, dtype, *v) for k, v in runs.items()}, g
    )


def compare_their_batches(model: str, setup: Setup, name: str) -> tuple[Positions, dict[str, list[int]]]:
    """Compare other batch sizes and orders with batches of 100 in the official order. Needs the usual arithmetic."""
    g = load_input(model, setup)
    n = len(g.y)
    every, shuffled = np.arange(n), np.random.default_rng(0).permutation(n)
    base = run_theirs(g, name, 100, every)
    runs: dict[str, Callable[[], Positions]] = {
        f"batch {b}": lambda b=b: run_theirs(g, name, b, every) for b in BATCHES if b != 100
    }
    return base, compare_variants(base, runs | {"shuffled": lambda: run_theirs(g, name, 100, shuffled)}, g)


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
    start_process(setup, keep=True)
    g = load_input(options.model, setup)
    rows = []

    def row(name: str, who: str, base: Positions, found: dict[str, list[int]]) -> None:
        counts = ", ".join(f"{k}: {len(v)}" for k, v in found.items())
        which = sorted({i for v in found.values() for i in v})
        rows.append([name, who, f"{len(base)}/{len(g.y)}", counts, " ".join(map(str, which[:12])) or "none"])
        print(*rows[-1], sep=" | ", flush=True)

    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=start_process, initargs=(setup, False)
    ) as peer:
        for stage in load_suite("autoattack").stages(g.dataset):
            if stage.name in options.attacks:
                attack = build_attack(stage)
                for dtype in (torch.float64, torch.float32):
                    row(stage.name, f"robbench, {str(dtype)[6:]}", *compare_our_batches(g, stage.name, attack, dtype))
                theirs_ran = peer.submit(compare_their_batches, options.model, setup, stage.name).result()
                row(stage.name, "pyautoattack, float32", *theirs_ran)
    about = ", ".join(f"{k} {v}" for k, v in versions().items())
    hardware = describe_device(pick_device(options.device))
    print(f"\n{hardware}; {about}, pyautoattack {version('pyautoattack')}; {options.model}, seed {options.seed}\n")
    headers = ["attack", "who", "robust", "flips against the reference", "images (the first 12)"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
