"""Compares the speed of training with hand-written loops in the same process, and on a GPU with the hardware's limit.

    python perf/train.py                 # CPU: the MNIST network, batch 50, natural training
    python perf/train.py --device cuda   # MNIST network, WRN-16-4, WRN-28-10 and the matrix rate of the card

Runs are paired: every repetition times each loop once, in turn, and ratios are computed within a repetition. The images
are random, because their content does not change the cost. No data set is needed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

from robbench.core.machine import describe_device, keep_freed_memory, versions
from robbench.core.types import Dataset
from robbench.models.architectures import build
from robbench.models.card import Recipe
from robbench.training.draws import Draws
from robbench.training.step import Step

MNIST = ("madry_mnist", {}, (1, 28, 28), 50)
WRN_16_4 = ("wide_resnet", {"depth": 16, "widen_factor": 4}, (3, 32, 32), 128)
WRN_28_10 = ("wide_resnet", {"depth": 28, "widen_factor": 10}, (3, 32, 32), 128)


def make_images(shape: tuple[int, int, int], n: int = 20_000) -> Dataset:
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (n, *shape), dtype=np.uint8)
    y = generator.integers(0, 10, n)
    return Dataset(name="custom", split="train", x=x, y=y, index=np.arange(n), num_classes=10, digest="", scale=255)


def make_network(which: tuple, device: str) -> nn.Module:
    torch.manual_seed(0)
    return build(which[0], which[1], 10, which[2]).to(device).train()


def make_our_loop(which: tuple, data: Dataset, device: str, precision: str, compiled: bool) -> Callable[[int], None]:
    adam = which is MNIST
    recipe = Recipe(
        iterations=10**6,
        batch_size=which[3],
        optimizer="adam" if adam else "sgd",
        lr=1e-4 if adam else 0.1,
        momentum=0.0 if adam else 0.9,
        weight_decay=0.0 if adam else 2e-4,
        augment="none" if adam else "crop_flip",
    )
    module = make_network(which, device).to(memory_format=torch.channels_last)
    step = Step(module, recipe, Draws(data, recipe, torch.device(device)), precision=precision, compiled=compiled)
    state = {"i": 0}

    def run(iterations: int) -> None:
        for _ in range(iterations):
            step(state["i"], recipe.lr)
            state["i"] += 1

    return run


def make_bare_loop(which: tuple, data: Dataset, device: str, prepared: bool) -> Callable[[int], None]:
    """Make a usual hand-written loop. `prepared` adds channels-last layout and the fused optimizer."""
    module = make_network(which, device)
    layout = torch.channels_last if prepared else torch.contiguous_format
    module = module.to(memory_format=layout)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4, fused=prepared or None)
    x = torch.from_numpy(data.x).to(device).float() / 255
    y = torch.from_numpy(data.y).to(device)

    def run(iterations: int) -> None:
        order = torch.randperm(len(x), device=device)
        for i in range(iterations):
            at = order[(i % (len(x) // which[3])) * which[3] :][: which[3]]
            optimizer.zero_grad()
            F.cross_entropy(module(x[at].contiguous(memory_format=layout)), y[at]).backward()
            optimizer.step()

    return run


def time_loop(run: Callable[[int], None], iterations: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run(iterations)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / iterations


def run_on_cpu(iterations: int, repetitions: int) -> str:
    data = make_images(MNIST[2])
    loops = {
        "robbench": make_our_loop(MNIST, data, "cpu", "float32", False),
        "bare loop": make_bare_loop(MNIST, data, "cpu", False),
        "bare loop, channels-last and fused Adam": make_bare_loop(MNIST, data, "cpu", True),
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    for run in loops.values():
        time_loop(run, min(10, iterations), "cpu")
    for _ in range(repetitions):
        for name, run in loops.items():
            times[name].append(time_loop(run, iterations, "cpu"))
    rows = []
    for name, measured in times.items():
        ratios = [a / b for a, b in zip(times["robbench"], measured, strict=True)]
        rows.append(
            {
                "loop": name,
                "ms per iteration, median [min, max]": format_spread([1000 * t for t in measured], ".1f"),
                "robbench / this, median [min, max]": format_spread(ratios, ".2f"),
            }
        )
    return tabulate(rows, headers="keys", tablefmt="github")


def format_spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def measure_matrix_rate(size: int = 8192) -> float:
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    taken = min(time_loop(lambda n: [a @ b for _ in range(n)] and None, 20, "cuda") for _ in range(5))
    return 2 * size**3 / taken


def count_flops(which: tuple) -> float:
    """Count the FLOPs of a forward and backward pass of one image. The backward pass costs twice the forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    module, x = make_network(which, "cpu"), torch.zeros(1, *which[2])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(x)
    return 3.0 * counter.get_total_flops()


def run_on_gpu(compiled: bool) -> str:
    rows, rate = [], measure_matrix_rate()
    for which, iterations, aim, precision in (
        (MNIST, 100_000, "100,000 iterations in 90 s", "float32"),
        (WRN_16_4, 80_000, "80,000 iterations in 5 minutes", "bfloat16"),
        (WRN_28_10, 80_000, "45 % of the matrix rate", "bfloat16"),
    ):
        run = make_our_loop(which, make_images(which[2]), "cuda", precision, compiled)
        time_loop(run, 50, "cuda")
        taken = statistics.median(time_loop(run, 500 if which is not WRN_28_10 else 100, "cuda") for _ in range(3))
        rows.append(
            {
                "network": f"{which[0]} {which[1] or ''}",
                "precision": precision,
                "ms per iteration": f"{1000 * taken:.3f}",
                "whole recipe": f"{iterations:,} in {taken * iterations:.0f} s",
                "share of the bf16 matrix rate": f"{count_flops(which) * which[3] / taken / rate:.0%}",
                "aim": aim,
            }
        )
    note = f"\n\nbf16 matrix rate: {rate / 1e12:.0f} TFLOP/s (8192 x 8192)."
    return tabulate(rows, headers="keys", tablefmt="github") + note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    keep_freed_memory()
    table = run_on_gpu(given.compile) if given.device == "cuda" else run_on_cpu(given.iterations, given.repetitions)
    device = describe_device(torch.device(given.device))
    text = f"{table}\n\n{device}; {', '.join(f'{k} {v}' for k, v in versions().items())}\n"
    sys.stdout.write(text)
    if given.output:
        given.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
