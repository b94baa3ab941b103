"""Kill runs at random instants, and count what each kill costs."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

# Torch is imported once; every run is a process of its own, forked from there. Rows are told as they finish.
CHILDREN = """
import functools, os, sys, torch
torch.set_num_threads(1)
from robbench.evaluation import run as evaluation
from robbench.evaluation import shards
evaluation.Shards = functools.partial(shards.Shards, commit_seconds=0.2)
add, commit = shards.Shards.add, evaluation.RunStore.commit
def told(self, attack, status, rows):
    with open(sys.argv[2], "a") as log:
        log.writelines(f"{attack} {i}\\n" for i in rows["sample"])
    add(self, attack, status, rows)
def committed(self, rows, points=()):
    path = commit(self, rows, points)
    with open(sys.argv[2], "a") as log:
        log.write("committed\\n")
    return path
shards.Shards.add, evaluation.RunStore.commit = told, committed
for _ in sys.stdin:
    pid = os.fork()
    if not pid:
        evaluation.evaluate("digits/at", "whitebox", samples=int(sys.argv[3]), lanes=32, results=sys.argv[1])
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def lines(log):
    return log.read_text().splitlines() if log.exists() else []


def on_disk(root):
    """Records of a tree, finished or not, as the log tells them."""
    found = [*root.glob("digits/at/whitebox/.partial/*/*.parquet"), *root.glob("digits/at/whitebox/outcomes.parquet")]
    rows = [pd.read_parquet(path, columns=["attack", "sample"]) for path in found]
    return {f"{attack} {sample}" for part in rows for attack, sample in part.itertuples(index=False)}


def killed_runs(tmp_path, kills, samples, seed):
    """Kill a run again and again at random instants; returns its tree and, per kill, what it cost.

    Of each kill two numbers: finished records that are gone though a shard was committed after them, which must be 0,
    and finished records that waited for their shard.
    """
    rng, log, root = random.Random(seed), tmp_path / "log", tmp_path / "killed"
    args = [sys.executable, "-c", CHILDREN, str(root), str(log), str(samples)]
    lost = []
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        for i in range(kills + 1):
            begun, left = len(lines(log)), samples * 6 - len(on_disk(root))
            wanted = begun + rng.randrange(1, max(2, 2 * left // (kills - i + 1))) if i < kills else None
            parent.stdin.write("go\n")
            pid = int(parent.stdout.readline())
            if wanted is not None:
                while len(lines(log)) < wanted and Path(f"/proc/{pid}").exists():
                    time.sleep(0.002)
                time.sleep(rng.random() * 0.05)
                with contextlib.suppress(ProcessLookupError):  # a late instant may find the run finished
                    os.kill(pid, signal.SIGKILL)
            assert int(parent.stdout.readline()) in ((signal.SIGKILL, 0) if wanted is not None else (0,))
            told, kept = lines(log)[begun:], on_disk(root)
            last = max((n for n, line in enumerate(told) if line == "committed"), default=0)
            lost.append((len(set(told[:last]) - {"committed"} - kept), len(set(told[last:]) - {"committed"} - kept)))
    return root, lost
