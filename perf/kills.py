"""Kills a suite at random times, resumes it, and compares the bytes.

Usage: `python perf/kills.py [--kills 20] [--samples 500]`.

It prints how many finished records each kill lost, before and after the last committed shard, and whether the final
outcomes.parquet equals that of an uninterrupted run.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from robbench.evaluation.run import evaluate
from support.killing import killed_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    where = Path("digits/at/whitebox/outcomes.parquet")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root, lost = killed_runs(folder, args.kills, args.samples, args.seed)
        evaluate("digits/at", "whitebox", samples=args.samples, lanes=32, results=folder / "whole")
        same = (root / where).read_bytes() == (folder / "whole" / where).read_bytes()
        size = (root / where).stat().st_size
    print(f"{args.kills} kills, {args.samples} images, {6 * args.samples} records, seed {args.seed}")
    print(f"finished records lost per kill although a later shard was committed: {[b for b, _ in lost[:-1]]}")
    print(f"finished records lost per kill because their shard was not committed yet: {[w for _, w in lost[:-1]]}")
    print(f"outcomes.parquet of {size:,} bytes: {'the same bytes' if same else 'DIFFERENT'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
