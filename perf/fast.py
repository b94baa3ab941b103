"""The suite `fast` beside AutoAttack: verdicts image by image, passes and seconds, on models of different kinds.

AutoAttack is the authors' code (pyautoattack, version standard) with batches of 250 and one seed; its passes are
counted at the model. Both see the first N test images.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pyautoattack import AutoAttack
from sides import BATCH, Counted
from tabulate import tabulate

from robbench.data import load
from robbench.evaluation import evaluate
from robbench.hardware import describe_device, versions
from robbench.models.card import Registry
from robbench.models.load import load_model
from robbench.stats import mcnemar
from robbench.suite import load_suite
from robbench.target import pick_device, prepare
from robbench.types import Status

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


@dataclass(frozen=True)
class Side:
    """What one side did: which images stand, how many passes it made, and how long it took."""

    robust: NDArray[np.bool_]
    passes: int
    seconds: float


def autoattack(name: str, n: int, cache: Path, device: torch.device) -> Side:
    """Run AutoAttack, or look up what it did in an earlier run."""
    entry = Registry.default().find(name)
    loaded = load_model(entry)
    kept = cache / f"{name.replace('/', '_')}-{n}-{loaded.weights_sha256[:12]}.npz"
    if kept.exists():
        with np.load(kept) as file:
            return Side(file["robust"], int(file["passes"]), float(file["seconds"]))
    data = load(entry.dataset)
    x = (torch.from_numpy(data.x[:n]).float() / data.scale).to(device)
    y = torch.from_numpy(data.y[:n]).to(device)
    model = prepare(loaded.module, device, x[:2].cpu())
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in x.split(BATCH)]) == y
    counted = Counted(model)
    threat = load_suite("autoattack").threat(entry.dataset)
    attack = AutoAttack(counted, norm=threat.norm, eps=float(threat.eps), seed=0, device=device)
    attack.verbose = False
    begin = time.perf_counter()
    x_adv = attack.run_standard_evaluation(x[right], y[right], batch_size=BATCH)[0]
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        stands = torch.cat([model(part).argmax(1) for part in x_adv.split(BATCH)]) == y[right]
    robust = right.cpu().numpy()
    robust[robust] = stands.cpu().numpy()
    passes = counted.seen.forwards + counted.seen.backwards
    cache.mkdir(parents=True, exist_ok=True)
    np.savez(kept, robust=robust, passes=passes, seconds=seconds)
    return Side(robust, passes, seconds)


def fast(name: str, suite: str, n: int, seed: int, device: torch.device) -> tuple[Side, int]:
    """Run the suite; returns what it did, and how many images are classified correctly."""
    with tempfile.TemporaryDirectory() as folder:
        result = evaluate(name, suite, samples=n, seed=seed, results=folder, device=str(device))
        (path,) = Path(folder).glob("*/*/*/outcomes.parquet")
        rows = pd.read_parquet(path)
    status = rows.pivot(index="sample", columns="attack", values="status")
    robust = (status == Status.ROBUST).all(axis=1).to_numpy()
    clean = int((status.iloc[:, 0] != Status.MISCLASSIFIED).sum())
    return Side(robust, result.forwards + result.backwards, result.seconds), clean


def main() -> None:
    """Print one row per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--suite", default="fast", help="or a suite file, to try another schedule")
    parser.add_argument("--samples", type=int, default=899)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of `fast`; the first for the pairs")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cache", type=Path, default=Path("runs/autoattack"), help="where AutoAttack's verdicts stay")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, rows = pick_device(options.device), []
    for name in options.models:
        theirs = autoattack(name, options.samples, options.cache, device)
        runs = [fast(name, options.suite, options.samples, seed, device) for seed in options.seeds]
        ours, clean = runs[0]
        mine, other = int((theirs.robust & ~ours.robust).sum()), int((ours.robust & ~theirs.robust).sum())
        passes = sum(side.passes for side, _ in runs) / len(runs)
        rows.append(
            {
                "model": name,
                "n": len(ours.robust),
                "clean": clean,
                "AutoAttack robust": int(theirs.robust.sum()),
                "fast robust": ", ".join(str(side.robust.sum()) for side, _ in runs),
                "only": f"{mine} / {other}",
                "p": f"{mcnemar(mine, other):.2g}",
                "AutoAttack passes": f"{theirs.passes / clean:,.0f}",
                "fast passes": f"{passes / clean:,.0f}",
                "share": f"{passes / theirs.passes:.3f}",
                "seconds": f"{theirs.seconds:.0f} / {ours.seconds:.0f}",
            }
        )
        print(f"{name} done", flush=True)
    about = ", ".join(f"{k} {v}" for k, v in versions().items())
    print(f"\n{describe_device(device)}; {about}, pyautoattack {version('pyautoattack')}\n")
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
    print(f"\n{NOTES}")


if __name__ == "__main__":
    main()
