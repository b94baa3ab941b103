"""The actor: the process of a worker on a Ray cluster. It computes tasks."""

from __future__ import annotations

import importlib
import os
import pickle
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from robbench.core.errors import ModelError, RobbenchError
from robbench.core.machine import keep_freed_memory, versions
from robbench.evaluation.inputs import Images
from robbench.evaluation.scheduler import Reply, Task
from robbench.evaluation.worker import Job, Worker

__all__ = ["Actor", "get_first_line", "import_ray"]


class Actor:
    """Computes tasks on one device. It keeps the jobs and the images that it has fetched.

    Args:
        threads: CPU threads.
        device: the device, such as `cuda:0`.
    """

    def __init__(self, threads: int, device: str) -> None:
        keep_freed_memory()
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.images: dict[str, Images] = {}
        self.workers: dict[int, Worker] = {}

    def describe(self) -> dict[str, Any]:
        """Return the versions, the host name and the process id."""
        return {"versions": versions(), "host": socket.gethostname(), "pid": os.getpid()}

    def do_task(self, task: Task, digest: str, parts: Sequence[Any]) -> Reply:
        """Compute a task.

        Args:
            task: the task.
            digest: digest of the images.
            parts: references to the images, and to the pickled job without its images.
        """
        reply = Reply()
        try:
            if task.kind == "close":
                worker = self.workers.pop(task.run, None)
                reply.flags = worker.end() if worker else {}
                return reply
            if task.run not in self.workers:
                self.workers[task.run] = Worker(self.fetch_job(digest, parts))
            worker = self.workers[task.run]
            if task.kind == "classify":
                reply.clean_report = worker.look(task.positions)
                return reply
            worker.deterministic = task.deterministic
            try:
                worker.attack(task.stage, task.positions, reply)
            finally:
                reply.points = worker.points(exact=sys.exc_info()[0] is not None)
        except RobbenchError as error:
            reply.error = type(error)(*error.args)  # a copy without the traceback, which would hold the model
        return reply

    def fetch_job(self, digest: str, parts: Sequence[Any]) -> Job:
        """Get a job from the store of this node. Keep the images for the next job.

        Raises:
            ModelError: the job holds code that cannot be imported here.
        """
        ray = import_ray()
        if digest not in self.images:
            self.images = {digest: ray.get(parts[0])}
        try:
            job: Job = pickle.loads(ray.get(parts[1]))
        except (ImportError, AttributeError) as error:
            raise ModelError(
                f"The model or an attack is code that worker {socket.gethostname()} cannot import: {error}. Install "
                "it on every node, or run without --executor ray."
            ) from None
        return replace(job, images=self.images[digest]).on(self.device)


def import_ray() -> Any:
    """Import Ray without its types, because they cover only a part of the functions used here."""
    return importlib.import_module("ray")


def get_first_line(error: BaseException) -> str:
    """Return the first line of the message of an error, or its class if there is no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
