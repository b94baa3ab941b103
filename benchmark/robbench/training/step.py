"""One iteration of training, as a function of the positions of a batch and the number of the iteration.

All random numbers are drawn by counter from these two, so an iteration can be repeated anywhere. All data is on the
device, so on a GPU the whole iteration is one CUDA graph.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from robbench.classifier.guard import in_bfloat16
from robbench.core import rng
from robbench.core.threat import Ball
from robbench.core.types import Dataset, Problem
from robbench.engine import engine
from robbench.models.card import Adversary, Recipe
from robbench.training.recipe import add_noise, augment, build_inner_attack, objective, pairing_penalty

__all__ = ["Step"]

_EAGER = 3  # iterations before a graph is captured, because libraries initialize themselves in the first ones


class Step:
    """Network, optimizer, data and running average of one training run. A call does one iteration.

    Args:
        module: the network in [0, 1] pixel units, on the device.
        recipe: what to train.
        data: the training set. It is on the device as uint8 (MNIST 47 MB, CIFAR-10 154 MB).
        precision: `float32` or `bfloat16` (autocast; weights, losses and noise are float32).
        target: a teacher's logits for every image [n, K], if the recipe has a teacher.
        compiled: run the network through `torch.compile`.
    """

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        data: Dataset,
        *,
        precision: str = "float32",
        target: Tensor | None = None,
        compiled: bool = False,
    ) -> None:
        self.module, self.recipe, self.target = module, recipe, target
        self.device = next(module.parameters()).device
        self.network: Callable[[Tensor], Tensor] = torch.compile(module) if compiled else module
        self.precision = precision
        self.x = torch.from_numpy(data.x).to(self.device)
        self.y = torch.from_numpy(data.y).to(self.device)
        self.scale = data.scale
        self.keys = {name: rng.make_key(recipe.seed, f"train-{name}") for name in ("noise", "augment", "attack")}
        on_gpu = self.device.type == "cuda"
        # A captured graph reads the learning rate from the tensor that it was captured with.
        self.lr: Tensor | None = torch.tensor(recipe.lr, device=self.device) if on_gpu else None
        self.optimizer = _optimizer(module, recipe, self.lr)
        # It starts at 0 and is divided by 1 − decay^t at the end, as Adam does with its averages.
        self.average = {k: torch.zeros_like(v) for k, v in _floats(module).items()} if recipe.ema else {}
        self.graph: _Graph | None = _Graph(self._iterate, recipe.batch_size, self.device) if on_gpu else None

    def __call__(self, sample: Tensor, iteration: int, lr: float) -> Tensor:
        """Train on the images at the positions `sample` [N]. Return the loss, on the device."""
        if self.lr is None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        else:
            self.lr.fill_(lr)
        if self.graph is not None:
            return self.graph(sample, iteration)
        return self._iterate(sample, torch.full_like(sample, iteration))

    def _iterate(self, sample: Tensor, trial: Tensor) -> Tensor:
        """Do one iteration. `trial` [N] holds its number, the second counter of all random numbers."""
        recipe, adversary = self.recipe, self.recipe.adversary
        x = (self.x[sample].to(torch.float32) / self.scale).contiguous(memory_format=torch.channels_last)
        y = self.y[sample]
        if recipe.augment != "none":
            x = augment(x, recipe.augment, sample, trial, self.keys["augment"])
        target = None if self.target is None else self.target[sample]
        mix = adversary.mix if adversary else 0.0
        loss = torch.zeros((), device=self.device)
        z = z_adv = None
        if adversary is not None:
            z_adv = self.logits(self.add_noise(self.perturb(adversary, x, y, sample, trial), sample, trial))
            if mix > 0:
                loss = loss + mix * objective(z_adv, y, recipe, target)
        if mix < 1 or recipe.pairing:
            z = self.logits(self.add_noise(x, sample, trial))
            if mix < 1:
                loss = loss + (1 - mix) * objective(z, y, recipe, target)
        if recipe.pairing and z is not None:
            loss = loss + recipe.pairing.weight * pairing_penalty(recipe.pairing.kind, z, z_adv)
        # A graph writes to the gradient tensors that it was captured with, so they must stay.
        self.optimizer.zero_grad(set_to_none=self.graph is None)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own annotation is missing
        self.optimizer.step()
        for name, value in _floats(self.module).items() if self.average else ():
            self.average[name].lerp_(value, 1 - recipe.ema)
        return loss.detach()

    def relink(self) -> None:
        """Make the optimizer read `self.lr` again, after its state was loaded."""
        if self.lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr

    def logits(self, x: Tensor) -> Tensor:
        """Compute the network's logits in the chosen precision, and return them as float32."""
        with in_bfloat16(self.device, self.precision == "bfloat16"):
            return self.network(x).float()

    def add_noise(self, x: Tensor, sample: Tensor, trial: Tensor) -> Tensor:
        """Add the recipe's Gaussian noise, if it has any."""
        sigma = float(self.recipe.sigma)
        return x if sigma == 0 else add_noise(x, sigma, sample, trial, self.keys["noise"])

    def perturb(self, adversary: Adversary, x: Tensor, y: Tensor, sample: Tensor, trial: Tensor) -> Tensor:
        """Perturb a batch with the recipe's adversary. Batch statistics are frozen meanwhile."""
        p = Problem(x=x, y=y, sample=sample, trial=trial, key=self.keys["attack"])
        ball = Ball(adversary.norm, float(adversary.eps))
        self.module.eval()
        reference = None
        if adversary.loss == "kl":
            with torch.no_grad():
                reference = self.logits(x)
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


class _Graph:
    """An iteration that is captured once as a CUDA graph and replayed. This saves launches, the cost of small nets."""

    def __init__(self, body: Callable[[Tensor, Tensor], Tensor], size: int, device: torch.device) -> None:
        self.body = body
        self.sample = torch.zeros(size, dtype=torch.int64, device=device)
        self.trial = torch.zeros_like(self.sample)
        self.loss = torch.zeros((), device=device)
        self.eager = _EAGER
        self.captured: torch.cuda.CUDAGraph | None = None

    def __call__(self, sample: Tensor, iteration: int) -> Tensor:
        """Run the iteration. Return a copy of its loss."""
        self.sample.copy_(sample)
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
