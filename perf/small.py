"""Compares the processor time of `autoattack` with pyautoattack's on a small network.

The engine's own cost counts there. The network has five layers (three convolutions, two dense ones) on 28 × 28 pixels.
It is trained here, adversarially on MNIST. Both sides attack the same correctly classified images on one thread. Wall
time says little on a shared machine, so the table holds processor time.
"""

import argparse
import time
import warnings
from statistics import median

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from duels import list_duels
from robbench.attacks import PGD
from robbench.classifier.batch_width import BatchWidths, default_lanes
from robbench.classifier.prepare import prepare
from robbench.core.machine import keep_freed_memory
from robbench.core.threat import Ball
from robbench.core.types import Problem
from robbench.data.sets import load
from robbench.engine.engine import perturb
from sides import SharedInput, find_wrong

CPU = torch.device("cpu")


def train_network(x: Tensor, y: Tensor, ball: Ball, steps: int) -> nn.Module:
    """Train the network on images [N, 1, 28, 28] with PGD of five steps, at a radius that grows over 500 steps."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    attack = PGD(objective="ce", steps=5, relative_step=1 / 3, random_start=True)
    for step in range(steps):
        at = torch.randint(len(x), (100,))
        p = Problem(x[at], y[at], at, torch.full_like(at, step), (0, 0))
        x_adv = perturb(net, attack, p, Ball(ball.norm, ball.eps * min(1.0, (step + 1) / 500)))
        optimizer.zero_grad()
        cross_entropy(net(x_adv), y[at]).backward()
        optimizer.step()
    return net.eval()


def make_input(samples: int, eps: float, steps: int) -> SharedInput:
    """Train and prepare the network, and take the correctly classified ones of the first images."""
    train, test, ball = load("mnist", "train"), load("mnist", "test"), Ball("Linf", eps)
    plain = train_network(torch.from_numpy(train.x).float() / train.scale, torch.from_numpy(train.y), ball, steps)
    x, y = torch.from_numpy(test.x[:samples]).float() / test.scale, torch.from_numpy(test.y[:samples])
    with torch.no_grad():
        right = (plain(x).argmax(1) == y).numpy().nonzero()[0]
    x, y = x[right], y[right]
    prepared = prepare(plain, CPU, x[:2])
    widths = BatchWidths(prepared, x.shape[1:], default_lanes(x.shape[1:], CPU), x.dtype)
    return SharedInput(
        plain, prepared, x, y, test.index[right], ball, "mnist", widths, samples, right, "", seed=0, device=CPU
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--samples", type=int, default=60, help="first N test images")
    parser.add_argument("--eps", type=float, default=0.3, help="Linf radius of training and attack")
    parser.add_argument("--steps", type=int, default=750, help="training steps")
    parser.add_argument("--attacks", nargs="+", default=["APGD-CE", "APGD-T", "FAB-T", "Square", "all four"])
    parser.add_argument("--pairs", type=int, default=5, help="runs of each side, in turn")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="there are .* points with zero gradient")
    keep_freed_memory()
    g = make_input(args.samples, args.eps, args.steps)
    rows = []
    for duel in (d for d in list_duels(g) if d.name in args.attacks):
        seconds: dict[str, list[float]] = {"robbench": [], "pyautoattack": []}
        robust: dict[str, int] = {}
        for pair in range(args.pairs):
            for who in list(seconds)[:: -1 if pair % 2 else 1]:
                begin = time.process_time()
                x_adv = duel.run_ours(g, g.prepared)[0] if who == "robbench" else duel.run_theirs(g, g.plain)
                seconds[who].append(time.process_time() - begin)
                broken = find_wrong(g.plain, g, x_adv) & duel.ball.contains(g.x, x_adv).numpy()
                robust[who] = int(np.sum(~broken))
        ratio = median(b / a for a, b in zip(*seconds.values(), strict=True))
        times = [f"{median(s):.2f} [{min(s):.2f}–{max(s):.2f}]" for s in seconds.values()]
        rows.append((duel.name, len(g.y), *robust.values(), *times, f"{ratio:.2f}×"))
    headers = ["attack", "n", "left", "left, pyautoattack", "CPU s", "CPU s, pyautoattack", "speedup"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
