"""Compares the suite `fast` with AutoAttack: verdicts image by image, passes and seconds, on different models.

AutoAttack is the authors' code (pyautoattack, version standard) with batches of 250 and one seed. Its passes are
counted at the model. Both sides get the first N test images.
"""

import argparse
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from duels import run_autoattack
from robbench.classifier.prepare import pick_device
from robbench.core.machine import describe_device, versions
from sides import CountingModel, Setup, SideResult, compare_sides, evaluate_side, find_wrong, load_input, start_process

MODELS = [
    "digits/natural",
    "digits/at",
    "digits/trades",
    "digits/ls095_sigma03",
    "digits/lsq2_sigma03",
    "mnist/natural",
    "mnist/at",
    "mnist/ls095_sigma03",
    "mnist/lsq2_sigma05",
    "mnist/lsq2",
]
NOTES = """\
- robust: of n images, those classified correctly and not broken, for `fast` with each seed (AutoAttack: seed 0). only:
  images that only `fast` (first seed) / only AutoAttack broke; p: exact McNemar test on them.
- passes: forward and backward passes through the model per correctly classified image, for `fast` the mean over seeds;
  share: of AutoAttack's. seconds: AutoAttack / `fast` with the first seed, one run each.
"""


def load_autoattack(name: str, setup: Setup, cache: Path) -> SideResult:
    """Run AutoAttack, or read its result from the cache."""
    g = load_input(name, setup)
    path = cache / f"{name.replace('/', '_')}-{setup.samples}-{g.weights[:12]}.npz"
    if path.exists():
        with np.load(path) as file:
            return SideResult(file["robust"], int(file["passes"]), float(file["seconds"]))
    counted = CountingModel(g.prepared)
    begin = time.perf_counter()
    x_adv = run_autoattack(g, counted, g.x.to(g.device), g.y.to(g.device)).cpu()
    seconds = time.perf_counter() - begin
    robust = np.zeros(g.n, bool)
    robust[g.right] = ~find_wrong(g.prepared, g, x_adv)
    passes = counted.seen.forwards + counted.seen.backwards
    cache.mkdir(parents=True, exist_ok=True)
    np.savez(path, robust=robust, passes=passes, seconds=seconds)
    return SideResult(robust, passes, seconds)


def main() -> None:
    """Print one row per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--suite", default="fast", help="or a suite file, to try another schedule")
    parser.add_argument("--samples", type=int, default=899)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of `fast`; the first is compared image by image"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/autoattack"), help="folder of AutoAttack's stored verdicts"
    )
    options = parser.parse_args()
    threads = options.threads or torch.get_num_threads()
    setup = Setup(options.samples, 0, threads, options.device, None)
    start_process(setup, keep=True)
    rows = []
    for name in options.models:
        peer = load_autoattack(name, setup, options.cache)
        asked = {"samples": options.samples, "device": options.device}
        runs = [evaluate_side(name, options.suite, seed=seed, **asked) for seed in options.seeds]
        ours, clean = runs[0]
        only, p = compare_sides(ours, peer)
        passes = sum(side.passes for side, _ in runs) / len(runs)
        rows.append(
            {
                "model": name,
                "n": len(ours.robust),
                "clean": clean,
                "AutoAttack robust": int(peer.robust.sum()),
                "fast robust": ", ".join(str(side.robust.sum()) for side, _ in runs),
                "only": only,
                "p": p,
                "AutoAttack passes": f"{peer.passes / clean:,.0f}",
                "fast passes": f"{passes / clean:,.0f}",
                "share": f"{passes / peer.passes:.3f}",
                "seconds": f"{peer.seconds:.0f} / {ours.seconds:.0f}",
            }
        )
        print(f"{name} done", flush=True)
    about = ", ".join(f"{k} {v}" for k, v in versions().items())
    print(f"\n{describe_device(pick_device(options.device))}; {about}, pyautoattack {version('pyautoattack')}\n")
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
    print(f"\n{NOTES}")


if __name__ == "__main__":
    main()
