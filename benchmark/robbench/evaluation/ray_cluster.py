"""Workers on a Ray cluster: one that is there, or one on this machine that lasts as long as the runs do."""

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
from robbench.evaluation.progress import Silent
from robbench.evaluation.ray_actor import Actor, first_line, import_ray
from robbench.evaluation.request import RunRequest
from robbench.evaluation.run import EvaluationRun, make_run
from robbench.evaluation.scheduler import Outcome, Reply, Task, View, spread
from robbench.evaluation.worker import Job

__all__ = ["RayPool", "cluster", "evaluate_all"]

_START_SECONDS = 300.0  # that the first worker may take
_AHEAD = 2  # tasks that a worker has at once: the one it works on and the one after it


@dataclass(eq=False)
class _Hand:
    """A worker as the driver sees it: its actor, and its tasks in the order in which it does them."""

    actor: Any
    starting: Any
    tasks: deque[tuple[Any, Task]] = field(default_factory=deque)
    runs: set[int] = field(default_factory=set)
    pid: int | None = None  # until it has started; not 0, which as a process id means a whole group


class RayPool:
    """Actors of a Ray cluster, a process each; one that is lost is replaced.

    Args:
        workers: how many are asked for.
        threads: of each; the CPUs that it reserves.
        gpu: whether each has a GPU of its own.
        note: hears of workers that do not fit.
    """

    def __init__(self, workers: int, threads: int, gpu: bool, note: Callable[[str], None]) -> None:
        self.workers, self.threads, self.gpu, self.note = workers, threads, gpu, note
        self.batches = 1 if gpu else threads
        self.parts: dict[int, tuple[str, list[Any]]] = {}
        self.images: dict[str, Any] = {}
        self.hands = [self._start() for _ in range(workers)]
        self._started()

    def _start(self) -> _Hand:
        ray = import_ray()
        options = {"num_cpus": self.threads, "num_gpus": int(self.gpu), "max_restarts": 0, "max_task_retries": 0}
        actor = ray.remote(**options)(Actor).remote(self.threads, "cuda:0" if self.gpu else "cpu")
        return _Hand(actor, actor.about.remote())

    def _started(self) -> None:
        """Wait for the first worker."""
        ray = import_ray()
        end = time.monotonic() + _START_SECONDS
        while not any(hand.starting is None for hand in self.hands):
            ray.wait([hand.starting for hand in self.hands], timeout=max(0.0, end - time.monotonic()))
            self._greet()
            if time.monotonic() > end:
                has = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")}
                raise RobbenchError(
                    f"No worker started within {_START_SECONDS:.0f} s. Each needs {self.threads} CPUs"
                    f"{' and a GPU' if self.gpu else ''}; the cluster has {has}. Others may be using it."
                )

    def _greet(self) -> None:
        """Take in workers that have started.

        Raises:
            RobbenchError: one cannot start, or has other versions than are here.
        """
        ray = import_ray()
        starting = {hand.starting: hand for hand in self.hands if hand.starting is not None}
        if not starting:
            return
        for ref in ray.wait([*starting], num_returns=len(starting), timeout=0)[0]:
            try:
                about = ray.get(ref)
            except ray.exceptions.RayError as error:
                raise RobbenchError(
                    f"A worker cannot start: {first_line(error)} Is robbench installed on every node?"
                ) from None
            if about["versions"] != versions():
                raise RobbenchError(
                    f"Worker {about['host']} has {about['versions']}, and this machine {versions()}: records would not "
                    "be of one kind. Install the same on every node."
                )
            starting[ref].starting, starting[ref].pid = None, about["pid"]

    @property
    def free(self) -> bool:
        """Whether a worker takes another task."""
        self._greet()
        return any(hand.starting is None and len(hand.tasks) < _AHEAD for hand in self.hands)

    def add(self, run: int, job: Job) -> None:
        """Put a run's model and data into the cluster's store, the data once for all runs.

        Raises:
            ModelError: the model cannot be sent to another process.
        """
        ray = import_ray()
        digest = job.images.digest
        try:
            # Its own pickle: the worker reports in a sentence what it cannot import.
            packed = ray.cloudpickle.dumps(replace(job, images=None))  # type: ignore[arg-type]  # sent apart
            if digest not in self.images:
                self.images[digest] = ray.put(job.images)
        except Exception as error:  # whatever a user's module raises: hooks, handles and generators do not pickle
            raise ModelError(
                f"{job.target.name} cannot be sent to another process: {first_line(error)} Run it without "
                "--executor ray."
            ) from None
        self.parts[run] = (digest, [self.images[digest], ray.put(packed)])

    def submit(self, task: Task) -> None:
        """Give a task to the worker that has least to do, one that has the model if there are several."""
        ready = [hand for hand in self.hands if hand.starting is None]
        self._send(min(ready, key=lambda hand: (len(hand.tasks), task.run not in hand.runs)), task)

    def _send(self, hand: _Hand, task: Task) -> None:
        hand.runs.add(task.run)
        hand.tasks.append((hand.actor.do.remote(task, *self.parts[task.run]), task))

    def close(self, run: int) -> int:
        """Ask every worker that has a run's model to end with it; returns how many replies will come."""
        having = [hand for hand in self.hands if run in hand.runs]
        for hand in having:
            self._send(hand, Task(run, "end"))
            hand.runs.discard(run)
        del self.parts[run]
        return len(having)

    def wait(self) -> Iterable[tuple[Task, Reply]]:
        """Wait until replies are there; a worker that is gone answers that its tasks are lost.

        Raises:
            RobbenchError: see `_greet`.
        """
        ray = import_ray()
        pending = {ref: hand for hand in self.hands for ref, _ in hand.tasks}
        if not pending:  # all workers are being replaced
            self._started()
            return []
        done = ray.wait([*pending], num_returns=1, timeout=1.0)[0]
        return [reply for ref in done for reply in self._replies(ref, pending[ref])]

    def _replies(self, ref: Any, hand: _Hand) -> Iterator[tuple[Task, Reply]]:
        ray = import_ray()
        if hand not in self.hands:  # its loss was reported before
            return
        try:
            reply = ray.get(ref)
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            self.hands[self.hands.index(hand)] = self._start()
            tasks = [task for _, task in hand.tasks]
            for i, task in enumerate(tasks):
                yield task, Reply(lost=first_line(error), begun=i == 0)
            return
        at = next(i for i, (sent, _) in enumerate(hand.tasks) if sent == ref)
        task = hand.tasks[at][1]
        del hand.tasks[at]
        yield task, reply

    def stop(self) -> None:
        """End the workers."""
        ray = import_ray()
        for hand in self.hands:
            ray.kill(hand.actor)


@contextlib.contextmanager
def cluster(
    address: str | None, workers: int | None, threads: int, device: str, note: Callable[[str], None]
) -> Iterator[RayPool]:
    """Bring workers up, on a cluster that is there or on one of this machine's that ends with them.

    Args:
        address: HOST:PORT of a cluster, or "auto" for the one of this machine; by default what RAY_ADDRESS says, and
            else a new one on this machine.
        workers: how many; by default one for each GPU, or as many as the CPUs allow.
        threads: CPU threads of each.
        device: auto, cpu or cuda.
        note: hears what a user should know.

    Raises:
        RobbenchError: Ray is not installed, there is no cluster, or it has not what is asked for.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", str(os.nice(0)))  # as in this process; Ray would give way to all
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a warning about what is not used here
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
            note(f"{workers} workers asked for; the cluster has room for {most}.")
        pool = RayPool(min(workers or most, most), threads, gpu, note)
        try:
            yield pool
        finally:
            pool.stop()
    finally:
        if not joined:
            ray.shutdown()  # ends a cluster that was started here, and leaves one that was joined


def _connect(ray: Any, address: str, workers: int | None, threads: int) -> None:
    """Start Ray here, or join a cluster."""
    make_cwd_importable()  # workers look for a user's modules where this process does
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        ray.init("local", num_cpus=workers and workers * threads, **local, **quiet)
        return
    host, _, port = address.rpartition(":")
    try:
        if address != "auto":
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself would try for minutes
        ray.init(address, **quiet)
    except (OSError, ValueError, RuntimeError, OverflowError) as error:
        raise RobbenchError(
            f"--address {address}: no Ray cluster answers there ({first_line(error)}). Allowed: HOST:PORT of a head "
            "node (ray start --head prints it), auto for the one on this machine, or no --address to start one."
        ) from None


def evaluate_all(
    requests: Sequence[RunRequest],
    view: View,
    *,
    address: str | None = None,
    workers: int | None = None,
    threads: int = 1,
) -> list[Outcome]:
    """Do on a Ray cluster what `robbench.evaluate` does in this process; one run that fails holds up no other.

    Args:
        requests: what to run; models by name or source.
        view: hears of progress.
        address: see `cluster`, like what follows.
        workers: how many.
        threads: CPU threads of each worker.

    Returns:
        For each request its result, or why there is none.

    Raises:
        RobbenchError: there is no cluster, no worker is left, or records cannot be stored.
    """
    devices = {request.options.device for request in requests}
    device = devices.pop() if len(devices) == 1 else "auto"
    with cluster(address, workers, threads, device, view.note) as pool:
        return spread(open_runs(requests, view, torch.device("cuda" if pool.gpu else "cpu")), pool, view)


def open_runs(requests: Sequence[RunRequest], view: View, device: torch.device) -> list[Callable[[], EvaluationRun]]:
    """Make what opens each run: its model is loaded here, on the CPU, and asked on a worker's device."""

    def opening(request: RunRequest) -> Callable[[], EvaluationRun]:
        here = replace(request, options=replace(request.options, device="cpu"))
        return lambda: make_run(here, _Noted(view), device)

    return [opening(request) for request in requests]


class _Noted(Silent):
    """Reports of one run of many. It passes on its notes."""

    def __init__(self, view: View) -> None:
        self.note = view.note  # type: ignore[method-assign]
