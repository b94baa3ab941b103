"""The flag `memory`: it needs memory that rises in the run, and a model that keeps what it is given."""

import mmap
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from robbench.classifier.leak import keeps_memory
from robbench.classifier.prepare import Target, prepare
from robbench.evaluation.request import RunRequest
from robbench.evaluation.run import make_run
from robbench.evaluation.worker import Worker
from support.models import network, small

EVERYWHERE = []


class Around(nn.Module):
    """A network, and what is done with its images and answers."""

    def __init__(self, keep):
        super().__init__()
        self.net, self.keep, self.kept = small(), keep, []

    def forward(self, x):
        logits = self.net(x)
        self.keep(self, x, logits)
        return logits


def keep_last(self, x, logits):
    self.kept = [x, logits]


def keep_some(self, x, logits):
    self.kept = [*self.kept, x][-3:]


LEAKS = {
    "images in a list": lambda self, x, logits: self.kept.append(x),
    "a global list": lambda self, x, logits: EVERYWHERE.append(x.detach().clone()),
    "graphs": lambda self, x, logits: self.kept.append(logits.sum()),
    "arrays": lambda self, x, logits: self.kept.append(x.detach().numpy().copy()),
    "numbers": lambda self, x, logits: self.kept.append(x.detach().flatten().tolist()),
    "every fourth batch": lambda self, x, logits: self.kept.append(x.clone() if len(self.kept) % 4 == 0 else None),
    "mapped memory": lambda self, x, logits: self.kept.append(mmap.mmap(-1, 2**16)),
}
HONEST = {"nothing": lambda *_: None, "the last batch": keep_last, "the last three": keep_some}


def on_cpu(module):
    return Target(
        prepare(module.eval(), torch.device("cpu"), torch.rand(2, 1, 8, 8)), "it", torch.device("cpu"), "", {}
    )


@pytest.mark.parametrize("name", LEAKS)
def test_a_model_that_keeps_what_it_is_given_is_found(name):
    EVERYWHERE.clear()
    assert keeps_memory(on_cpu(Around(LEAKS[name])), (1, 8, 8), torch.float32)


def test_a_hook_that_keeps_activations_is_found():
    target, kept = on_cpu(network()), []
    target.module.inner[1].register_forward_hook(lambda module, args, output: kept.append(output))
    assert keeps_memory(target, (1, 8, 8), torch.float32)


@pytest.mark.parametrize("name", HONEST)
def test_a_model_that_keeps_a_fixed_amount_is_not(name):
    assert not keeps_memory(on_cpu(Around(HONEST[name])), (1, 8, 8), torch.float32)
    assert not keeps_memory(on_cpu(network()), (1, 8, 8), torch.float32)


def fail(*_):
    raise ValueError("no digit")


def test_without_a_measurement_the_rise_in_the_run_counts():
    assert keeps_memory(on_cpu(Around(fail)), (1, 8, 8), torch.float32)
    assert keeps_memory(on_cpu(network()), (1, 8, 8), torch.float32, lambda: None)


@pytest.mark.parametrize(("keep", "flagged"), [(HONEST["nothing"], False), (LEAKS["images in a list"], True)])
def test_what_the_run_itself_keeps_is_not_blamed_on_the_model(problem, monkeypatch, keep, flagged):
    _, x, y = problem
    run = make_run(RunRequest.of(Around(keep).eval(), "quick", x=x, y=y, eps=0.1))
    held, ours = iter(range(10**6)), []

    def held_bytes(device):
        ours.append(bytearray(2**12))  # records of our own, which nobody reports
        return next(held) * 2**23

    monkeypatch.setattr("robbench.evaluation.worker.held_bytes", held_bytes)
    worker = Worker(run.make_job())
    worker.look(run.positions)
    sink = SimpleNamespace(take=lambda k, rows: None, narrow=print)
    for k in range(len(run.stages)):
        worker.attack(k, run.positions, sink)
    for _ in range(30):
        worker.growth.look(held_bytes(None))
    assert worker.growth.leaked
    assert ("memory" in worker.end()) == flagged
