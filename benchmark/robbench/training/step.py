"""One iteration of training. All data is on the device, so on a GPU the whole iteration is one CUDA graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from robbench.classifier.guard import in_bfloat16
from robbench.core import rng
from robbench.core.threat import Ball
from robbench.core.types import Problem
from robbench.engine import engine
from robbench.models.card import Adversary, Recipe
from robbench.training.draws import Batch, Draws
from robbench.training.recipe import build_inner_attack, objective, pairing_penalty

__all__ = ["Graph", "Step"]

_EAGER = 3  # iterations before a graph is captured, because libraries initialize themselves in the first ones


class Step:
    """Network, optimizer and running average of one training run. A call does one iteration.

    Args:
        module: the network in [0, 1] pixel units, on the device.
        recipe: what to train.
        draws: the batches.
        precision: `float32`, `float64`, or `bfloat16` (autocast; weights, losses and noise are float32).
        target: a teacher's logits for every image [n, K], if the recipe has a teacher.
        compiled: run the network through `torch.compile`.
    """

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        draws: Draws,
        *,
        precision: str = "float32",
        target: Tensor | None = None,
        compiled: bool = False,
    ) -> None:
        self.module, self.recipe, self.draws, self.target = module, recipe, draws, target
        self.device = next(module.parameters()).device
        self.network: Callable[[Tensor], Tensor] = torch.compile(module) if compiled else module
        self.precision = precision
        self.attack_key = rng.make_key(recipe.seed, "train-attack")
        on_gpu = self.device.type == "cuda"
        # A captured graph reads the learning rate from the tensor that it was captured with.
        self.lr: Tensor | None = torch.tensor(recipe.lr, device=self.device) if on_gpu else None
        self.optimizer = _optimizer(module, recipe, self.lr)
        # It starts at 0 and is divided by 1 − decay^t at the end, as Adam does with its averages.
        self.average = {k: torch.zeros_like(v) for k, v in _floats(module).items()} if recipe.ema else {}
        self.graph: Graph | None = Graph(self._draw_and_iterate, draws) if on_gpu else None

    def __call__(self, iteration: int, lr: float) -> Tensor:
        """Do an iteration. Return the loss, on the device."""
        self.set_lr(lr)
        if self.graph is not None:
            return self.graph(iteration)
        return self._iterate(self.draws.at(iteration, self.is_noisy))

    @property
    def is_noisy(self) -> bool:
        """Whether the recipe adds noise."""
        return self.recipe.sigma > 0

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next update."""
        if self.lr is not None:
            self.lr.fill_(lr)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _draw_and_iterate(self, sample: Tensor, trial: Tensor) -> Tensor:
        return self._iterate(self.draws.draw(sample, trial, self.is_noisy))

    def _iterate(self, batch: Batch) -> Tensor:
        loss = self.compute_loss(batch)
        # A graph writes to the gradient tensors that it was captured with, so they must stay.
        self.optimizer.zero_grad(set_to_none=self.graph is None)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own annotation is missing
        self.update()
        return loss.detach()

    def compute_loss(self, batch: Batch, z: Tensor | None = None) -> Tensor:
        """Compute the recipe's loss of a batch. `z` [N, K] are logits of `add_noise(batch.x)`, if known already."""
        recipe, adversary, y = self.recipe, self.recipe.adversary, batch.y
        target = None if self.target is None else self.target[batch.sample]
        mix = adversary.mix if adversary else 0.0
        loss = torch.zeros((), device=self.device)
        z_adv = None
        if adversary is not None:
            z_adv = self.logits(self.add_noise(self.perturb(adversary, batch), batch))
            if mix > 0:
                loss = loss + mix * objective(z_adv, y, recipe, target)
        if mix < 1 or recipe.pairing:
            z = self.logits(self.add_noise(batch.x, batch)) if z is None else z
            if mix < 1:
                loss = loss + (1 - mix) * objective(z, y, recipe, target)
        if recipe.pairing and z is not None:
            loss = loss + recipe.pairing.weight * pairing_penalty(recipe.pairing.kind, z, z_adv)
        return loss

    def update(self) -> None:
        """Change the weights by the gradients, and the running average by the weights."""
        self.optimizer.step()
        for name, value in _floats(self.module).items() if self.average else ():
            self.average[name].lerp_(value, 1 - self.recipe.ema)

    def relink(self) -> None:
        """Make the optimizer fit the weights and `self.lr` again, after its state or the weights were replaced.

        The fused optimizers give wrong updates without a word where a weight and its averages differ in memory layout.
        """
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[key] = torch.empty_like(parameter).copy_(value)
        if self.lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr

    def logits(self, x: Tensor) -> Tensor:
        """Compute the network's logits in the chosen precision, and return them as float32 (or float64)."""
        with in_bfloat16(self.device, self.precision == "bfloat16"):
            z = self.network(x)
        return z if self.precision == "float64" else z.float()

    def add_noise(self, x: Tensor, batch: Batch) -> Tensor:
        """Add the recipe's Gaussian noise to images of a batch, if it has any."""
        return x if not self.is_noisy or batch.noise is None else x + float(self.recipe.sigma) * batch.noise

    def perturb(self, adversary: Adversary, batch: Batch) -> Tensor:
        """Perturb a batch with the recipe's adversary. Batch statistics are frozen meanwhile."""
        p = Problem(x=batch.x, y=batch.y, sample=batch.sample, trial=batch.trial, key=self.attack_key)
        ball = Ball(adversary.norm, float(adversary.eps))
        self.module.eval()
        reference = None
        if adversary.loss == "kl":
            with torch.no_grad():
                reference = self.logits(batch.x)
        x_adv = engine.perturb(self.logits, build_inner_attack(adversary, reference), p, ball)
        self.module.train()
        return x_adv

    @contextlib.contextmanager
    def use_average(self, iterations: int) -> Iterator[None]:
        """Load the running average into the network inside a `with` block, if the recipe has one."""
        if not self.average or not iterations:
            yield
            return
        values = _floats(self.module)
        now = {name: value.clone() for name, value in values.items()}
        with torch.no_grad():
            for name, value in values.items():
                value.copy_(self.average[name] / (1 - self.recipe.ema**iterations))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in values.items():
                    value.copy_(now[name])


class Graph:
    """An iteration that is captured once as a CUDA graph and replayed. This saves launches, the cost of small nets.

    Args:
        body: the iteration, a function of positions [N] and the number of the iteration [N]. It returns a loss.
        draws: the batches.
    """

    def __init__(self, body: Callable[[Tensor, Tensor], Tensor], draws: Draws) -> None:
        self.body, self.draws = body, draws
        self.sample = torch.zeros(draws.size, dtype=torch.int64, device=draws.device)
        self.trial = torch.zeros_like(self.sample)
        self.loss = torch.zeros((), device=draws.device)
        self.eager = _EAGER
        self.captured: torch.cuda.CUDAGraph | None = None

    def __call__(self, iteration: int) -> Tensor:
        """Run the iteration. Return a copy of its loss."""
        self.sample.copy_(self.draws.positions(iteration))
        self.trial.fill_(iteration)
        if self.captured is None and self.eager == 0:
            self.capture()
        if self.captured is not None:
            self.captured.replay()
            return self.loss.clone()
        self.eager -= self.eager > 0
        # Warm up on a separate stream, as torch requires before capturing.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self.body(self.sample, self.trial)
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    def capture(self) -> None:
        """Capture one iteration without running it. If that fails, warn and go on without a graph."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.loss = self.body(self.sample, self.trial)
            self.captured = graph
        except RuntimeError as error:
            self.eager = -1
            reason = (str(error).splitlines() or ["unknown"])[0]
            warnings.warn(f"training goes on without a CUDA graph, slower: {reason}", RuntimeWarning, stacklevel=2)


def _floats(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights and floating-point buffers, the tensors of the running average."""
    return {k: v for k, v in module.state_dict().items() if v.is_floating_point()}


def _optimizer(module: nn.Module, recipe: Recipe, lr: Tensor | None) -> torch.optim.Optimizer:
    # Fused: one pass over the weights instead of twelve. It saves a quarter of an MNIST iteration on a CPU.
    if recipe.optimizer == "adam":
        return torch.optim.Adam(
            module.parameters(),
            lr=recipe.lr if lr is None else lr,
            weight_decay=recipe.weight_decay,
            fused=True,
            capturable=lr is not None,
        )
    return torch.optim.SGD(
        module.parameters(),
        lr=recipe.lr if lr is None else lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
