"""Small ReLU networks by families, to choose the schedules of attacks on one half and to report on the other.

    python perf/bench/networks.py --folder FOLDER [--only NAME ...]

Trains what the folder lacks, one file a network. A network is `DATA-BODY-RECIPE`: the recipe names how it was trained
and the radius at which it is attacked. No network pools, so gradients meet nothing but ReLU. The halves follow from a
hash of the name, so that nobody can sort them.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import robbench as rb


class Recipe(NamedTuple):
    """How a network is trained: radius of training (0: none), noise, weights of the terms, radius of attacks."""

    eps: float = 0.0
    trades: float = 0.0
    smoothing: float = 0.0
    squeezing: float = 0.0
    sigma: float = 0.0
    attacked: str = ""


BODIES: dict[str, Callable[[], nn.Module]] = {
    "digits-conv": lambda: nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 100), nn.ReLU(), nn.Linear(100, 10),
    ),
    "digits-dense": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    ),
    "mnist-conv": lambda: nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    ),
    "mnist-wide": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(6272, 64), nn.ReLU(), nn.Linear(64, 10),
    ),
    "mnist-deep": lambda: nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(1568, 128), nn.ReLU(), nn.Linear(128, 10),
    ),
    "cifar10-conv": lambda: nn.Sequential(
        nn.Conv2d(3, 32, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(4096, 128), nn.ReLU(), nn.Linear(128, 10),
    ),
    "cifar10-wide": lambda: nn.Sequential(
        nn.Conv2d(3, 48, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(48, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(4096, 256), nn.ReLU(), nn.Linear(256, 10),
    ),
    "cifar10-deep": lambda: nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(4096, 128), nn.ReLU(), nn.Linear(128, 10),
    ),
    "mnist-dense": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    ),
}  # fmt: skip
RECIPES: dict[str, dict[str, Recipe]] = {
    "digits": {
        "at1": Recipe(eps=0.1, attacked="0.1"),
        "at2": Recipe(eps=0.2, attacked="0.2"),
        "trades2": Recipe(eps=0.2, trades=3.0, attacked="0.2"),
        "ls": Recipe(smoothing=0.9, sigma=0.3, attacked="0.15"),
        "lsq": Recipe(squeezing=0.5, sigma=0.3, attacked="0.15"),
        "natural": Recipe(attacked="0.05"),
    },
    "mnist": {
        "at1": Recipe(eps=0.1, attacked="0.1"),
        "at2": Recipe(eps=0.2, attacked="0.2"),
        "at3": Recipe(eps=0.3, attacked="0.3"),
        "trades3": Recipe(eps=0.3, trades=1.0, attacked="0.3"),
        "ls": Recipe(smoothing=0.9, sigma=0.5, attacked="0.15"),
        "lsq": Recipe(squeezing=0.5, sigma=0.5, attacked="0.15"),
    },
    "cifar10": {
        "at2": Recipe(eps=2 / 255, attacked="2/255"),
        "ls": Recipe(smoothing=0.9, sigma=0.1, attacked="2/255"),
    },
}
NAMES = (
    "digits-conv-at2", "digits-dense-at2", "mnist-conv-at3", "mnist-wide-at3", "digits-conv-trades2",
    "digits-dense-lsq", "digits-conv-ls", "mnist-conv-at2", "mnist-deep-at3", "digits-dense-at1", "mnist-conv-lsq",
    "mnist-conv-trades3", "digits-conv-natural", "digits-dense-trades2", "mnist-dense-ls", "mnist-dense-at1",
    "mnist-dense-at3", "mnist-wide-ls", "mnist-deep-ls", "digits-dense-ls", "mnist-conv-ls", "cifar10-conv-at2",
    "cifar10-conv-ls", "cifar10-wide-at2", "cifar10-deep-at2", "mnist-deep-trades3",
)  # fmt: skip
STEPS = {"digits": 1500, "mnist": 2500, "cifar10": 4000}


def get_half(name: str) -> str:
    """Return the half of a network: `chosen` (schedules are chosen on it) or `reported`."""
    return ("chosen", "reported")[hashlib.sha256(name.encode()).digest()[0] % 2]


def get_recipe(name: str) -> Recipe:
    """Return the recipe that the name says."""
    data, _, recipe = name.split("-")
    return RECIPES[data][recipe]


def climb(net: nn.Module, x: Tensor, y: Tensor, eps: float, generator: torch.Generator, clean: Tensor | None) -> Tensor:
    """Take seven steps on the cross-entropy, or on the divergence from the clean answers, from a random start."""
    delta = eps * (2 * torch.rand(x.shape, generator=generator) - 1)
    for _ in range(7):
        delta.requires_grad_(True)
        logits = net((x + delta).clamp(0, 1))
        loss = F.cross_entropy(logits, y) if clean is None else diverge(logits, clean)
        (grad,) = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + eps / 3 * grad.sign()).clamp(-eps, eps)
    return (x + delta).clamp(0, 1)


def diverge(logits: Tensor, clean: Tensor) -> Tensor:
    """Compute the mean divergence of the answers from the clean ones."""
    return F.kl_div(logits.log_softmax(1), clean.log_softmax(1), log_target=True, reduction="batchmean")


def train(name: str) -> nn.Module:
    """Train a network with fixed random numbers."""
    data, body, _ = name.split("-")
    recipe, steps = get_recipe(name), STEPS[data]
    torch.manual_seed(0)
    net = BODIES[f"{data}-{body}"]()
    x, y = rb.load_data(data, split="train")
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        at = torch.randint(0, len(y), (64,), generator=generator)
        batch, label = x[at], y[at]
        # A network that begins at the full radius learns to answer the same everywhere.
        eps = recipe.eps * min(1.0, 2 * step / steps)
        if recipe.sigma:
            batch = batch + recipe.sigma * torch.randn(batch.shape, generator=generator)
        logits = net(batch)
        if recipe.trades:
            moved = climb(net, batch, label, eps, generator, logits.detach())
            loss = F.cross_entropy(logits, label) + recipe.trades * diverge(net(moved), logits)
        else:
            if eps:
                logits = net(climb(net, batch, label, eps, generator, None))
            loss = F.cross_entropy(logits, label, label_smoothing=recipe.smoothing)
            loss = loss + recipe.squeezing * logits.square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def load(name: str, folder: Path) -> nn.Module:
    """Load a network, or train it and keep its weights."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        begin = time.process_time()
        net = train(name)
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file(net.state_dict(), part)
        part.rename(path)
        print(f"{name} ({get_half(name)}): trained in {time.process_time() - begin:.0f} s", flush=True)
    data, body, _ = name.split("-")
    net = BODIES[f"{data}-{body}"]()
    net.load_state_dict(load_file(path))
    return net.eval().requires_grad_(False)


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="where the weights are")
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES, metavar="NAME")
    given = parser.parse_args()
    for name in given.only:
        load(name, given.folder)


if __name__ == "__main__":
    main()
