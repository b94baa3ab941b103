"""What runs on a worker of a Ray cluster."""

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

__all__ = ["Actor", "first_line", "import_ray"]


class Actor:
    """What runs on a worker: jobs by number, of parts that are fetched once."""

    def __init__(self, threads: int, device: str) -> None:
        keep_freed_memory()
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.images: dict[str, Images] = {}
        self.workers: dict[int, Worker] = {}

    def about(self) -> dict[str, Any]:
        """Say what it runs on."""
        return {"versions": versions(), "host": socket.gethostname(), "pid": os.getpid()}

    def do(self, task: Task, digest: str, parts: Sequence[Any]) -> Reply:
        """Do a task; `parts` refer to the images of that digest and to the rest of the job."""
        reply = Reply()
        try:
            if task.kind == "end":
                worker = self.workers.pop(task.run, None)
                reply.flags = worker.end() if worker else {}
                return reply
            if task.run not in self.workers:
                self.workers[task.run] = Worker(self.fetch(digest, parts))
            worker = self.workers[task.run]
            if task.kind == "look":
                reply.first = worker.look(task.positions)
                return reply
            worker.deterministic = task.deterministic
            try:
                worker.attack(task.stage, task.positions, reply)
            finally:
                reply.points = worker.points(exact=sys.exc_info()[0] is not None)
        except RobbenchError as error:
            reply.error = type(error)(*error.args)  # without its traceback, which holds the model
        return reply

    def fetch(self, digest: str, parts: Sequence[Any]) -> Job:
        """Get a job from this node's store; the images are kept for the next one."""
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
    """Import Ray, which annotates half of what is used here."""
    return importlib.import_module("ray")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
