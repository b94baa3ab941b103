"""Workers on a Ray cluster.

The cluster is one that the user started, or a new one on this machine that ends with the runs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from robbench.core.errors import ModelError, RobbenchError
from robbench.core.machine import versions
from robbench.core.user_code import make_cwd_importable
from robbench.core.words import format_count
from robbench.evaluation.progress import Silent
from robbench.evaluation.ray_actor import Actor, get_first_line, import_ray
from robbench.evaluation.request import RunRequest
from robbench.evaluation.run import EvaluationRun, make_run
from robbench.evaluation.scheduler import Outcome, Reply, RunsReporter, Task, schedule_runs
from robbench.evaluation.worker import Job

__all__ = ["RayPool", "evaluate_all", "make_factories", "open_pool"]

_START_SECONDS = 300.0  # longest wait for the first worker
_TASKS_PER_WORKER = 2  # the task that it computes, and the next one, so that it does not wait for the driver


@dataclass(eq=False)
class _WorkerHandle:
    """What the driver knows of a worker.

    Attributes:
        actor: the Ray actor.
        start_ref: reference to the reply that the actor sends when it has started; None after this reply.
        tasks: (reference to the reply, task), in the order in which the worker computes them.
        runs: numbers of the runs whose model the worker has.
        pid: process id; None before the start. It is never 0, because `kill` takes 0 for a group of processes.
    """

    actor: Any
    start_ref: Any
    tasks: deque[tuple[Any, Task]] = field(default_factory=deque)
    runs: set[int] = field(default_factory=set)
    pid: int | None = None


class RayPool:
    """Workers that are actors of a Ray cluster, one process each. A new worker replaces a lost one.

    Args:
        workers: number of workers.
        threads: CPU threads of each worker. The worker reserves as many CPUs.
        gpu: whether each worker reserves one GPU.
    """

    def __init__(self, workers: int, threads: int, gpu: bool) -> None:
        self.workers, self.threads, self.gpu = workers, threads, gpu
        self.batches = 1 if gpu else threads
        self.parts: dict[int, tuple[str, list[Any]]] = {}
        self.images: dict[str, Any] = {}
        self.handles = [self._start_worker() for _ in range(workers)]
        self._wait_for_first_worker()

    def _start_worker(self) -> _WorkerHandle:
        ray = import_ray()
        options = {"num_cpus": self.threads, "num_gpus": int(self.gpu), "max_restarts": 0, "max_task_retries": 0}
        actor = ray.remote(**options)(Actor).remote(self.threads, "cuda:0" if self.gpu else "cpu")
        return _WorkerHandle(actor, actor.describe.remote())

    def _wait_for_first_worker(self) -> None:
        """Wait for the first worker.

        Raises:
            RobbenchError: no worker started in `_START_SECONDS`, or see `_register_started_workers`.
        """
        ray = import_ray()
        end = time.monotonic() + _START_SECONDS
        while not any(handle.start_ref is None for handle in self.handles):
            ray.wait([handle.start_ref for handle in self.handles], timeout=max(0.0, end - time.monotonic()))
            self._register_started_workers()
            if time.monotonic() > end:
                has = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")}
                raise RobbenchError(
                    f"No worker started within {_START_SECONDS:.0f} s. Each needs {self.threads} CPUs"
                    f"{' and a GPU' if self.gpu else ''}; the cluster has {has}. Other programs may be using them."
                )

    def _register_started_workers(self) -> None:
        """Register the workers that have started since the last call.

        Raises:
            RobbenchError: a worker cannot start, or its versions differ from those of this machine.
        """
        ray = import_ray()
        starting = {handle.start_ref: handle for handle in self.handles if handle.start_ref is not None}
        if not starting:
            return
        for ref in ray.wait([*starting], num_returns=len(starting), timeout=0)[0]:
            try:
                about = ray.get(ref)
            except ray.exceptions.RayError as error:
                raise RobbenchError(
                    f"A worker cannot start: {get_first_line(error)} Is robbench installed on every node?"
                ) from None
            if about["versions"] != versions():
                raise RobbenchError(
                    f"Worker {about['host']} has {about['versions']}; this machine has {versions()}. All records of a "
                    "run must come from the same versions. Install the same versions on every node."
                )
            starting[ref].start_ref, starting[ref].pid = None, about["pid"]

    @property
    def has_free_worker(self) -> bool:
        """Whether a worker can take another task."""
        self._register_started_workers()
        return any(handle.start_ref is None and len(handle.tasks) < _TASKS_PER_WORKER for handle in self.handles)

    def add(self, run: int, job: Job) -> None:
        """Put the model and the data of a run into the store of the cluster. Runs with the same data share it.

        Raises:
            ModelError: the model cannot be pickled.
        """
        ray = import_ray()
        digest = job.images.digest
        try:
            # Ray must not unpickle this. The worker unpickles it and explains what it cannot import.
            packed = ray.cloudpickle.dumps(replace(job, images=None))  # type: ignore[arg-type]  # put separately below
            if digest not in self.images:
                self.images[digest] = ray.put(job.images)
        except Exception as error:  # the user's module may raise any error when it is pickled
            raise ModelError(
                f"{job.target.name} cannot be sent to another process: {get_first_line(error)} Run it without "
                "--executor ray."
            ) from None
        self.parts[run] = (digest, [self.images[digest], ray.put(packed)])

    def submit(self, task: Task) -> None:
        """Give a task to a worker with the fewest tasks. Among these, prefer a worker that has the model."""
        ready = [handle for handle in self.handles if handle.start_ref is None]
        self._send(min(ready, key=lambda handle: (len(handle.tasks), task.run not in handle.runs)), task)

    def _send(self, handle: _WorkerHandle, task: Task) -> None:
        handle.runs.add(task.run)
        handle.tasks.append((handle.actor.do_task.remote(task, *self.parts[task.run]), task))

    def close(self, run: int) -> int:
        """Submit a "close" task to every worker that has the model of a run. Return the number of these tasks."""
        holders = [handle for handle in self.handles if run in handle.runs]
        for handle in holders:
            self._send(handle, Task(run, "close"))
            handle.runs.discard(run)
        del self.parts[run]
        return len(holders)

    def wait(self) -> Iterable[tuple[Task, Reply]]:
        """Wait up to a second for replies. The reply to each task of a lost worker says that the worker was lost.

        Raises:
            RobbenchError: see `_wait_for_first_worker`.
        """
        ray = import_ray()
        pending = {ref: handle for handle in self.handles for ref, _ in handle.tasks}
        if not pending:  # all workers were lost, and the new ones have not started
            self._wait_for_first_worker()
            return []
        done = ray.wait([*pending], num_returns=1, timeout=1.0)[0]
        return [reply for ref in done for reply in self._read_replies(ref, pending[ref])]

    def _read_replies(self, ref: Any, handle: _WorkerHandle) -> Iterator[tuple[Task, Reply]]:
        ray = import_ray()
        if handle not in self.handles:  # lost, and already replaced
            return
        try:
            reply = ray.get(ref)
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            self.handles[self.handles.index(handle)] = self._start_worker()
            tasks = [task for _, task in handle.tasks]
            for i, task in enumerate(tasks):
                yield task, Reply(lost_reason=get_first_line(error), has_begun=i == 0)
            return
        at = next(i for i, (sent, _) in enumerate(handle.tasks) if sent == ref)
        task = handle.tasks[at][1]
        del handle.tasks[at]
        yield task, reply

    def stop(self) -> None:
        """Stop the workers."""
        ray = import_ray()
        for handle in self.handles:
            ray.kill(handle.actor)


@contextlib.contextmanager
def open_pool(
    address: str | None, workers: int | None, threads: int, device: str, note: Callable[[str], None]
) -> Iterator[RayPool]:
    """Start workers, and stop them at the end. A cluster that was started here stops with them.

    Args:
        address: HOST:PORT of a cluster, or "auto" for the cluster that runs on this machine. None means the environment
            variable RAY_ADDRESS, or without it a new cluster on this machine.
        workers: number of workers; None means one per GPU, or without GPUs as many as the CPUs allow.
        threads: CPU threads of each worker.
        device: auto, cpu or cuda.
        note: called with messages that the user should see.

    Raises:
        RobbenchError: Ray is not installed, the cluster does not answer, or it has too few CPUs or GPUs.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", str(os.nice(0)))  # as this process; Ray would use a lower priority
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning
        ray = import_ray()
    except ModuleNotFoundError as error:
        raise RobbenchError(
            f"--executor ray needs the package {error.name!r}, which is not installed: pip install 'robbench[cluster]'"
        ) from None
    for name, value in (("--workers", workers), ("--threads-per-worker", threads)):
        if value is not None and value < 1:
            raise RobbenchError(f"{name}: {value} given; it must be at least 1.")
    if device not in ("auto", "cpu", "cuda"):
        raise RobbenchError(f"--device {device} given; with --executor ray allowed: auto, cpu, cuda.")
    joined = ray.is_initialized()
    if not joined:
        _connect(ray, address or os.environ.get("RAY_ADDRESS") or "local", workers, threads)
    try:
        has = ray.cluster_resources()
        cpus, gpus = int(has.get("CPU", 0)), int(has.get("GPU", 0))
        if device == "cuda" and not gpus:
            raise RobbenchError(f"--device cuda given; the cluster has {cpus} CPUs and no GPU.")
        gpu = gpus > 0 and device != "cpu"
        most = min(gpus, cpus // threads) if gpu else cpus // threads
        if not most:
            raise RobbenchError(
                f"--threads-per-worker {threads} given; the cluster has {cpus} CPUs. Give fewer threads."
            )
        if workers is not None and workers > most:
            note(f"{format_count(workers, 'worker')} asked for; the cluster has room for {most}.")
        pool = RayPool(min(workers or most, most), threads, gpu)
        try:
            yield pool
        finally:
            pool.stop()
    finally:
        if not joined:
            ray.shutdown()  # stops the cluster if it was started here; otherwise only disconnects


def _connect(ray: Any, address: str, workers: int | None, threads: int) -> None:
    """Start Ray here, or join a cluster."""
    make_cwd_importable()  # workers import the user's modules from the same folders as this process
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        ray.init("local", num_cpus=workers and workers * threads, **local, **quiet)
        return
    host, _, port = address.rpartition(":")
    try:
        if address != "auto":
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray alone would try for minutes
        ray.init(address, **quiet)
    except (OSError, ValueError, RuntimeError, OverflowError) as error:
        raise RobbenchError(
            f"--address {address}: no Ray cluster answers there ({get_first_line(error)}). Allowed: HOST:PORT of a "
            "head node (ray start --head prints it), auto for the one on this machine, or no --address to start one."
        ) from None


def evaluate_all(
    requests: Sequence[RunRequest],
    reporter: RunsReporter,
    *,
    address: str | None = None,
    workers: int | None = None,
    threads: int = 1,
) -> list[Outcome]:
    """Compute runs on a Ray cluster. The results equal those of `robbench.evaluate`. If a run fails, others continue.

    Args:
        requests: the runs. Each names its model by a card's name or a source.
        reporter: gets messages about the progress.
        address: see `open_pool`.
        workers: number of workers; see `open_pool`.
        threads: CPU threads of each worker.

    Returns:
        For each request its result, or the error that stopped it.

    Raises:
        RobbenchError: the cluster cannot be used, no worker is left, or records cannot be stored.
    """
    devices = {request.options.device for request in requests}
    device = devices.pop() if len(devices) == 1 else "auto"
    with open_pool(address, workers, threads, device, reporter.note) as pool:
        factories = make_factories(requests, reporter, torch.device("cuda" if pool.gpu else "cpu"))
        return schedule_runs(factories, pool, reporter)


def make_factories(
    requests: Sequence[RunRequest], reporter: RunsReporter, device: torch.device
) -> list[Callable[[], EvaluationRun]]:
    """Return one function per request that makes its run. The function loads the model on the CPU of this machine.

    Args:
        requests: the runs.
        reporter: gets the notes of each run.
        device: device of the workers.
    """

    def make_factory(request: RunRequest) -> Callable[[], EvaluationRun]:
        here = replace(request, options=replace(request.options, device="cpu"))
        return lambda: make_run(here, _NoteReporter(reporter), device)

    return [make_factory(request) for request in requests]


class _NoteReporter(Silent):
    """Passes the notes of one run to the reporter of all runs, and ignores its progress."""

    def __init__(self, reporter: RunsReporter) -> None:
        self.note = reporter.note  # type: ignore[method-assign]
