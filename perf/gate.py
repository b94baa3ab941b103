"""Measures how often `robbench check --seed N` fails on an unchanged model whose attacks have other seeds.

Every run is checked against the first run as the baseline, and against another run that is drawn at random. `--power 2`
simulates how often the gate finds a true drop of 2 points.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
from scipy.stats import binom
from tabulate import tabulate

from robbench.classifier.prepare import pick_device
from robbench.core.machine import describe_device, versions
from robbench.core.stats import wilson
from robbench.evaluation.options import Options
from robbench.gate.baseline import BaselineEntry
from robbench.gate.decision import Policy, decide_gate
from robbench.gate.measure import measure_entry, open_results_tree
from robbench.gate.paired import compare_entries
from robbench.models.spec import ModelSpec


def measure_seeds(args: argparse.Namespace) -> list[BaselineEntry]:
    """Measure the model once per seed."""
    runs = []
    with open_results_tree(args.results) as tree:
        for seed in range(args.seeds + 1):
            options = Options(results=tree, device="cpu", samples=args.samples, sample_seed=0, seed=seed)
            runs.append(measure_entry(ModelSpec(args.model), args.suite, options))
    return runs


def report(title: str, pairs: list[tuple[BaselineEntry, BaselineEntry]], policy: Policy) -> None:
    """Check every pair. Print how many checks fail, and how many images change by chance."""
    compared = [compare_entries(before, now) for before, now in pairs]
    failed = sum(decide_gate([c], policy).failed for c in compared)
    low, high = wilson(failed, len(pairs))
    print(f"{title}: {failed} of {len(pairs)} checks fail [{100 * low:.1f} %, {100 * high:.1f} %]")
    for i, test in enumerate(compared[0].tests):
        tests = [c.tests[i] for c in compared]
        changed = [len(t.lost) + len(t.gained) for t in tests]
        p = [t.p for t in tests]
        print(
            f"  {test.what}: {np.mean(changed):.1f} images change on average, at most {max(changed)}; "
            f"smallest p {min(p):.2g}"
        )


def tabulate_power(drop: float, alpha: float, max_drop: float = 1.0, draws: int = 4000) -> str:
    """Tabulate how often a check of one model with new weights fails at a true drop (points), by number of images."""
    generator, rows = np.random.default_rng(0), []
    for n in (300, 900, 2000, 10000):
        row: dict[str, str | int] = {"n": n}
        for gained in (0.0, 0.5, 1.0, 2.0):
            shares = [(drop + gained) / 100, gained / 100, 1 - (drop + 2 * gained) / 100]
            lost, found, _ = generator.multinomial(n, shares, size=draws).T
            p = binom.sf(lost - 1, lost + found, 0.5) * 9 / 8  # the worst case weighs 8 of 9
            fails = (p <= alpha) & (100 * (lost - found) > max_drop * n)
            row[f"{gained:g} % gained"] = f"{100 * fails.mean():.0f} %"
        rows.append(row)
    return tabulate(rows, headers="keys", tablefmt="github")


def main() -> None:
    """Measure, check and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--power", type=float, help="only print how often the gate fails at a true drop of this many points"
    )
    parser.add_argument("--model", default="digits/ls095_sigma03")
    parser.add_argument("--suite", default="quick")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--results", type=Path, help="a results tree to keep the runs in")
    parser.add_argument("--save", type=Path, help="write the verdicts of the first seeds here, for the tests")
    parser.add_argument("--saved-seeds", type=int, default=20)
    args = parser.parse_args()
    if args.power is not None:
        print(tabulate_power(args.power, args.alpha))
        return
    begin = time.monotonic()
    runs = measure_seeds(args)
    made = ", ".join(f"{k} {v}" for k, v in versions().items())
    print(f"{args.model}, suite {args.suite}, n = {runs[0].n}, {args.seeds} further seeds, α = {args.alpha}")
    print(f"{describe_device(pick_device('cpu'))}; {made}; {time.monotonic() - begin:.0f} s")
    policy = Policy(alpha=args.alpha)
    report("against seed 0", [(runs[0], run) for run in runs[1:]], policy)
    others = np.random.default_rng(0).permutation(len(runs))
    report("against another seed", [(runs[a], runs[b]) for a, b in itertools.pairwise(others)], policy)
    if args.save:
        verdicts = [run.verdicts for run in runs[: args.saved_seeds]]
        content = {"baseline": runs[0].model_dump(mode="json"), "verdicts_by_seed": verdicts}
        args.save.write_text(json.dumps(content, indent=0) + "\n")


if __name__ == "__main__":
    main()
