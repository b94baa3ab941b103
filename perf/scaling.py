"""Measures the speed-up of several workers.

Usage: `python perf/scaling.py [--model digits/at] [--suite whitebox] [--workers 1 2]`.

It makes the same run with different numbers of workers of one local Ray, in turn, with one thread per worker. It prints
the seconds from the first task to the result (without start-up), the CPU seconds of every worker, the speed-up over the
first number of workers, and the load of the machine. If other programs load the machine, the CPU seconds of the busiest
worker estimate the seconds on an idle machine. It also compares the bytes of outcomes.parquet.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from robbench.core.machine import describe_device, versions
from robbench.evaluation import ray_cluster
from robbench.evaluation.request import RunRequest
from robbench.evaluation.scheduler import schedule_runs


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class QuietReporter:
    """A reporter that prints notes and ignores progress."""

    def note(self, text: str) -> None:
        """Print it."""
        print(text)

    def update(self, finished: int, asked: int) -> None:
        """Ignore it."""

    def progress(self, title: str, done: int, total: int) -> None:
        """Ignore it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append")
    parser.add_argument("--suite", default="whitebox")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    seconds: dict[int, list[float]] = {w: [] for w in args.workers}
    cpu: dict[int, list[float]] = {w: [] for w in args.workers}
    found = set()
    print(f"{describe_device(torch.device('cpu'))}; {versions()}")
    with ray_cluster.open_pool("local", max(args.workers), args.threads, "auto", print) as pool:
        device = torch.device("cuda" if pool.gpu else "cpu")
        pool.stop()
        for repeat in range(args.repeats + 1):  # the first warms up
            for workers in args.workers if repeat % 2 else args.workers[::-1]:
                pool = ray_cluster.RayPool(workers, args.threads, device.type == "cuda")
                while any(handle.start_ref is not None for handle in pool.handles):
                    assert pool.has_free_worker is not None  # it registers the workers that have started
                    time.sleep(0.1)
                with tempfile.TemporaryDirectory() as folder:
                    requests = [
                        RunRequest.of(m, args.suite, samples=args.samples, results=folder)
                        for m in args.model or ["digits/at"]
                    ]
                    before = [cpu_seconds(handle.pid) for handle in pool.handles]
                    begin = time.perf_counter()
                    reporter = QuietReporter()
                    schedule_runs(ray_cluster.make_factories(requests, reporter, device), pool, reporter)
                    spent = time.perf_counter() - begin
                    busy = [cpu_seconds(handle.pid) - b for handle, b in zip(pool.handles, before, strict=True)]
                    found.add(tuple(p.read_bytes() for p in sorted(Path(folder).rglob("outcomes.parquet"))))
                pool.stop()
                if repeat:
                    seconds[workers].append(spent)
                    cpu[workers].append(max(busy))
                each = ", ".join(f"{b:.1f}" for b in busy)
                print(f"{workers} workers: {spent:.1f} s, CPU {each} s, load {os.getloadavg()[0]:.1f}", flush=True)
    for name, spent in (("seconds", seconds), ("CPU seconds of the busiest worker", cpu)):
        for workers, own in spent.items():
            pairs = [a / b for a, b in zip(spent[args.workers[0]], own, strict=True)]
            each = ", ".join(f"{p:.2f}" for p in pairs)
            print(f"{name}: {workers} workers: median {median(own):.1f}, speed-up {median(pairs):.2f} ({each})")
    print("outcomes.parquet: " + ("the same bytes" if len(found) == 1 else "DIFFERENT"))


if __name__ == "__main__":
    main()
