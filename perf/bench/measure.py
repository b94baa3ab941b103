"""What suites leave standing on the networks of `networks.py`, half by half, image by image.

    python perf/bench/measure.py --folder FOLDER [--suites fast autoattack] [--samples 200] [--half chosen]
    python perf/bench/measure.py --folder FOLDER --public alpha-beta-CROWN/complete_verifier/models

The first suite is compared with every other one on each image. Measurements are kept in the folder, so a stopped run
goes on. A network without weights is trained first. Give `--only` to measure a few. With `--public`, the networks of
`public.py` are measured instead.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import NamedTuple

import networks
import numpy as np
import public
from tabulate import tabulate
from torch import nn

import robbench as rb
from robbench.core.stats import mcnemar
from robbench.core.types import Status

NOTES = """\
- left: images, of n, that are classified correctly and not broken, one number for each seed. only: images that only
  this suite / only the first suite broke, with the first seed; p: exact McNemar test on them.
- passes: forward and backward passes per correctly classified image, mean over seeds.
"""


class Measured(NamedTuple):
    """One suite with one seed on one network: verdict by image, number of correct images, passes."""

    robust: dict[int, bool]
    clean: int
    passes: int


def measure(
    net: nn.Module, name: str, suite: str, seed: int, norm: str, eps: str, given: argparse.Namespace
) -> Measured:
    """Run a suite on a network, or read what is stored."""
    x, y = rb.load_data(name.split("-")[0], split="test", n=given.samples)
    stored = given.folder / "results" / f"{Path(suite).stem}-{seed}-{norm}-{given.samples}"
    result = rb.evaluate(
        net, suite, x=x, y=y, dataset="bench", name=name, eps=eps, norm=norm, seed=seed, results=stored
    )
    rows = result.records  # of the suite as it is now; the folder may hold results of an earlier one
    stands = (rows["status"] == Status.ROBUST.value).groupby(rows["sample"]).all()
    clean = round(result.clean_accuracy.value * result.n)
    return Measured({int(i): bool(r) for i, r in stands.items()}, clean, result.forwards + result.backwards)


def compare(ours: Measured, other: Measured) -> str:
    """Count the images that only one of two suites broke, and test them."""
    images = ours.robust.keys() & other.robust.keys()
    a = sum(not ours.robust[i] and other.robust[i] for i in images)
    b = sum(ours.robust[i] and not other.robust[i] for i in images)
    return f"{a} / {b} (p {mcnemar(a, b):.2g})"


def main() -> None:
    """Print one row per network and suite."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="of weights and results")
    parser.add_argument("--suites", nargs="+", default=["fast", "autoattack"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--norm", choices=["Linf", "L2"], default="Linf")
    parser.add_argument("--eps", help="another radius than the recipe's, as for L2")
    parser.add_argument("--half", choices=["chosen", "reported"], help="measure one half only")
    parser.add_argument("--public", type=Path, help="folder of the weights that public.py names")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    given = parser.parse_args()
    if given.norm != "Linf" and not given.eps:
        parser.error(f"--norm {given.norm} given without --eps; the radii of the networks are for Linf")
    if given.public and given.half:
        parser.error(f"--half {given.half} and --public given; public networks are in no half")
    names = tuple(public.NETWORKS) if given.public else networks.NAMES
    if unknown := set(given.only or ()) - set(names):
        parser.error(f"--only {' '.join(sorted(unknown))} given; allowed: {' '.join(names)}")
    warnings.simplefilter("ignore")
    rows = []
    for name in given.only or names:
        half = "public" if given.public else networks.get_half(name)
        if given.half and given.half != half:
            continue
        first = None
        eps = given.eps or (public.NETWORKS[name].eps if given.public else networks.get_recipe(name).attacked)
        net = public.load(name, given.public) if given.public else networks.load(name, given.folder)
        for suite in given.suites:
            runs = [measure(net, name, suite, seed, given.norm, eps, given) for seed in given.seeds]
            first = first or runs[0]
            rows.append(
                {
                    "network": name,
                    "half": half,
                    "threat": f"{given.norm} {eps}",
                    "n": len(runs[0].robust),
                    "clean": runs[0].clean,
                    "suite": Path(suite).stem,
                    "left": ", ".join(str(sum(run.robust.values())) for run in runs),
                    "only": "" if runs[0] is first else compare(runs[0], first),
                    "passes": f"{np.mean([run.passes / run.clean for run in runs]):,.0f}",
                }
            )
            print(" | ".join(str(value) for value in rows[-1].values()), flush=True)
    print(f"\n{tabulate(rows, headers='keys', tablefmt='github', disable_numparse=True)}\n\n{NOTES}")


if __name__ == "__main__":
    main()
