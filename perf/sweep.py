"""Measures scheduler and store without attacks: `python perf/sweep.py [--models 1000] [--samples 10000]`.

Runs, tasks, shards, locks, merged records and summaries are real. The workers are not real. They answer at once with
invented records of a suite's stages, and claim a computing time per pass. A simulated clock adds this time and the
driver's own CPU time. A task begins when it is submitted and its worker is free. The driver's work does not overlap
with it.

For each number of models and samples it prints the driver's time per task relative to the computing time of the task,
the total time beyond the workers' computing time, and the driver's memory (peak resident set; each line has its own
process).
"""

import argparse
import heapq
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from robbench.classifier.prepare import Target
from robbench.core.machine import describe_device, resident_bytes, versions
from robbench.core.rng import make_key
from robbench.engine.engine import Rows
from robbench.evaluation.inputs import Images
from robbench.evaluation.request import RunRequest
from robbench.evaluation.run import EvaluationRun
from robbench.evaluation.scheduler import Reply, Task, schedule_runs
from robbench.evaluation.worker import CleanReport, Job, Place
from robbench.suite import load_suite

ROUND = 0.1  # seconds for one pass of a full batch, about that of WRN-28-10 with 256 images on a GPU


class FakeWorkers:
    """Workers that invent records: every tenth image is misclassified, and every stage breaks a share of the rest."""

    def __init__(self, workers: int, share: float) -> None:
        self.workers, self.batches, self.share = workers, 1, share
        self.jobs: dict[int, Job] = {}
        self.queues: list[deque[tuple[float, Task]]] = [deque() for _ in range(workers)]
        self.idle_at = [0.0] * workers
        self.heap: list[tuple[float, int, int]] = []
        self.offset, self.begin = 0.0, time.process_time()
        self.tasks = self.count = 0
        self.computed = 0.0

    @property
    def now(self) -> float:
        """The simulated clock: the CPU time of this process plus the skipped waiting time."""
        return time.process_time() - self.begin + self.offset

    @property
    def has_free_worker(self) -> bool:
        """Whether a worker can take another task."""
        return min(map(len, self.queues)) < 2

    def add(self, run: int, job: Job) -> None:
        """Store a job."""
        self.jobs[run] = job

    def submit(self, task: Task) -> None:
        """Queue a task, and compute the time of its end."""
        worker = min(range(self.workers), key=lambda i: (len(self.queues[i]), self.idle_at[i]))
        job = self.jobs[task.run]
        batches = -(-len(task.positions) // job.lanes)
        seconds = {"classify": ROUND / 3 * batches, "close": 0.0}.get(task.kind, 0.0)
        if task.kind == "attack":
            seconds = ROUND * batches * job.stages[task.stage].passes
            self.tasks += 1
        self.computed += seconds
        end = max(self.now, self.idle_at[worker]) + seconds
        self.idle_at[worker] = end
        self.queues[worker].append((end, task))
        self.count += 1
        heapq.heappush(self.heap, (end, self.count, worker))

    def close(self, run: int) -> int:
        """Submit the task that removes a job."""
        self.submit(Task(run, "close"))
        return 1

    def wait(self) -> list[tuple[Task, Reply]]:
        """Advance the clock to the next end of a task."""
        end, _, worker = heapq.heappop(self.heap)
        self.offset += max(0.0, end - self.now)
        _, task = self.queues[worker].popleft()
        return [(task, self.reply(task))]

    def reply(self, task: Task) -> Reply:
        """Invent the reply to a task."""
        if task.kind == "close":
            del self.jobs[task.run]
            return Reply()
        job, n = self.jobs[task.run], len(task.positions)
        y, sample = job.images.y[task.positions].numpy(), job.images.index[task.positions]
        if task.kind == "classify":
            prediction = np.where(sample % 10 == 0, (y + 1) % 10, y)
            return Reply(clean_report=CleanReport(prediction, {}, ROUND, Place("none", {}, {}), job.lanes))
        broken = (sample * 7919 + 31 * task.stage) % 100 < 100 * self.share
        none = np.zeros(n, np.int64)
        rows = Rows(
            sample=sample,
            label=y,
            claimed=broken,
            broken=broken,
            prediction=np.where(broken, (y + 1) % 10, y),
            trial=none,
            step=none,
            forwards=np.full(n, job.stages[task.stage].passes),
            backwards=none,
            distance=np.where(broken, 0.03, np.nan),
            zero_gradients=none,
            nonfinite=none,
            seconds=np.full(n, ROUND / job.lanes),
        )
        return Reply(rows=[rows])


class MemoryView:
    """A view that prints notes, and records the memory at the end of each run."""

    def __init__(self) -> None:
        self.after: list[int] = []

    def note(self, text: str) -> None:
        """Print it."""
        print(text, file=sys.stderr)

    def progress(self, title: str, done: int, total: int) -> None:
        """Ignore it."""
        pass

    def update(self, finished: int, asked: int) -> None:
        """Record the memory."""
        self.after.append(resident_bytes() or 0)


def make_runs(models: int, samples: int, suite: str, results: Path, lanes: int) -> list[Any]:
    y = torch.arange(samples) % 10
    images = Images(
        "cifar10", lambda at: torch.zeros(len(at), 3, 32, 32), y, np.arange(samples), 10, f"{samples} images"
    )
    loaded = load_suite(suite)
    target = Target(nn.Flatten().eval(), "", torch.device("cpu"), "", {})

    def opening(i: int) -> Any:
        # The model is a module, so the run cannot be resumed from its folder alone.
        request = RunRequest.of(target.module, suite, results=results, lanes=lanes)
        mine = replace(target, name=f"model{i:04d}", weights=str(make_key(i, "weights")))
        return lambda: EvaluationRun(request, mine, images, loaded)

    return [opening(i) for i in range(models)]


def measure(models: int, samples: int, suite: str, workers: int, lanes: int, share: float) -> dict[str, Any]:
    """Run one sweep in this process."""
    wall, pool, view = time.perf_counter(), FakeWorkers(workers, share), MemoryView()
    with tempfile.TemporaryDirectory(prefix="robbench-sweep-") as folder:
        outcomes = schedule_runs(make_runs(models, samples, suite, Path(folder), lanes), pool, view)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        assert all(o.n == samples for o in outcomes)
        spent, end = time.process_time() - pool.begin, pool.now
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
    third = view.after[len(view.after) // 3]
    return {
        "models": models,
        "samples": samples,
        "suite": suite,
        "workers": workers,
        "tasks": pool.tasks,
        "seconds per task": round(pool.computed / pool.tasks, 2),
        "driver ms per task": round(1000 * spent / pool.tasks, 1),
        "driver / task, %": round(100 * spent / pool.computed, 3),
        "driver busy, %": round(100 * spent / end, 2),
        "beyond computing, %": round(100 * (end * workers / pool.computed - 1), 2),
        "peak MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "growth MiB, last two thirds": round((view.after[-1] - third) / 2**20),
        "wall s": round(time.perf_counter() - wall),
        "results MiB": round(size / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--suite", default="autoattack")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--lanes", type=int, default=256)
    parser.add_argument("--share", type=float, default=0.3, help="share of its images that a stage breaks")
    parser.add_argument("--here", action="store_true", help="one line only, in this process")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.models, args.samples, args.suite, args.workers, args.lanes, args.share)))
        return
    print(f"{describe_device(torch.device('cpu'))}; {versions()}; a pass of {args.lanes} images takes {ROUND} s")
    few = max(2, args.models // 20)
    for models, samples in ((few, args.samples // 10), (few, args.samples), (args.models, args.samples)):
        mine = ["--models", str(models), "--samples", str(samples), "--suite", args.suite, "--here"]
        rest = ["--workers", str(args.workers), "--lanes", str(args.lanes), "--share", str(args.share)]
        done = subprocess.run([sys.executable, __file__, *mine, *rest], check=True, stdout=subprocess.PIPE, text=True)
        print(done.stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
