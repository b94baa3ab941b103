"""Several runs of one architecture, an iteration at a time.

On a GPU their networks are evaluated as one, with stacked weights (`Stack`). On a CPU that takes 1.5 to 2 times as long
as one after another, because convolutions with a group per model are slow there. So they take turns, as many at once as
there are threads, each on one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from robbench.training.run import Run
from robbench.training.step import Graph, Step

__all__ = ["Stack", "Team", "can_stack"]


def can_stack(step: Step) -> bool:
    """Tell whether a network and its recipe can be stacked.

    Not with an adversary, whose attack asks one network, nor with layers that change buffers (batch norm) or draw at
    random (dropout), nor in bfloat16.
    """
    random = any(isinstance(m, nn.Dropout) and m.p > 0 for m in step.module.modules())
    buffers = len(step.module.state_dict()) > len(list(step.module.parameters()))
    return not (step.recipe.adversary or random or buffers or step.precision == "bfloat16")


class Stack:
    """Steps of equal networks on the same batches, as one step.

    Every weight of the networks becomes a view of a stacked tensor [E, ...]. So the optimizers, the running averages
    and the checkpoints of the single steps work as before.

    Args:
        steps: E steps that `can_stack`, with the same `draws`.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps, self.draws = list(steps), steps[0].draws
        self.is_noisy = any(step.is_noisy for step in steps)
        named = [dict(step.module.named_parameters()) for step in steps]
        self.weights: dict[str, Tensor] = {}
        for name in named[0]:
            # Contiguous, because the gradients are, and the fused optimizers need one layout for both.
            stacked = torch.stack([parameters[name].detach().contiguous() for parameters in named])
            self.weights[name] = stacked.requires_grad_()
            for parameters, own in zip(named, stacked.detach(), strict=True):
                parameters[name].data = own
        for step in steps:
            step.relink()
        self.named = named
        on_gpu = self.draws.device.type == "cuda"
        self.graph = Graph(self._draw_and_iterate, self.draws) if on_gpu else None

    def __call__(self, iteration: int, lrs: Sequence[float]) -> Tensor:
        """Do an iteration of every step. Return the losses [E], on the device."""
        for step, lr in zip(self.steps, lrs, strict=True):
            step.set_lr(lr)
        if self.graph is not None:
            return self.graph(iteration)
        sample = self.draws.positions(iteration)
        return self._draw_and_iterate(sample, torch.full_like(sample, iteration))

    def _draw_and_iterate(self, sample: Tensor, trial: Tensor) -> Tensor:
        batch = self.draws.draw(sample, trial, self.is_noisy)
        x = torch.stack([step.add_noise(batch.x, batch) for step in self.steps])
        network = self.steps[0].module
        z = vmap(lambda weights, image: functional_call(network, weights, (image,)))(self.weights, x)
        losses = torch.stack([step.compute_loss(batch, z[e]) for e, step in enumerate(self.steps)])
        # No loss depends on another network, so the gradient of the sum has the gradient of each.
        gradients = torch.autograd.grad(losses.sum(), list(self.weights.values()))
        for name, gradient in zip(self.weights, gradients, strict=True):
            for parameters, own in zip(self.named, gradient.contiguous(), strict=True):
                parameters[name].grad = own
        for step in self.steps:
            step.update()
        return losses.detach()


class Team:
    """Runs that go on together. Use it in a `with` block."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.stacks: dict[int, Stack] = {}
        self.threads = torch.get_num_threads()
        self.stacked = _is_stacked(runs[0].device)
        workers = min(self.threads, len(runs))
        self.pool: ThreadPoolExecutor | None = None
        if workers > 1 and not self.stacked:
            self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pool is not None:
            self.pool.shutdown()
            # In the workers this call also changed the number that new threads begin with.
            torch.set_num_threads(self.threads)

    def advance(self, runs: Sequence[Run]) -> None:
        """Do one iteration of each run. All are at the same iteration."""
        if self.stacked:
            groups = _group([run for run in runs if can_stack(run.step)])
            for group in groups:
                self._advance_stack(group)
            done = {id(run) for group in groups for run in group}
            runs = [run for run in runs if id(run) not in done]
        else:  # runs with the same batches draw them once, and not in two threads
            noisy = any(run.step.is_noisy for run in runs)
            for run in runs:
                run.step.draws.at(run.iteration, noisy)
        for _ in map(Run.advance, runs) if self.pool is None else self.pool.map(Run.advance, runs):
            pass

    def _advance_stack(self, runs: Sequence[Run]) -> None:
        steps = [run.step for run in runs]
        stack = self.stacks.get(id(steps[0].draws))
        if stack is None or stack.steps != steps:  # a run has come or ended
            stack = self.stacks[id(steps[0].draws)] = Stack(steps)
        losses = stack(runs[0].iteration, [run.learning_rate for run in runs])
        for run, loss in zip(runs, losses, strict=True):
            run.note(loss)


def _is_stacked(device: torch.device) -> bool:
    return device.type == "cuda"


def _group(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs by their batches. Runs that are alone are left out."""
    groups: dict[int, list[Run]] = {}
    for run in runs:
        groups.setdefault(id(run.step.draws), []).append(run)
    return [group for group in groups.values() if len(group) > 1]
