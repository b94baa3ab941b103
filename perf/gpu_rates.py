"""What a card can do, and which share of it the engine gets: matrix rates, copies, passes a second.

python perf/gpu_rates.py rates --device cuda --json rates.json
python perf/gpu_rates.py engine --device cuda --json engine.json --rates rates.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robbench.attacks import APGD
from robbench.classifier.prepare import pick_device
from robbench.core.machine import describe_device, keep_freed_memory, versions
from robbench.evaluation.run import evaluate
from robbench.models.architectures import build
from sides import BATCH, CountingModel

NETWORKS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int]]] = {
    "WRN-28-10": ("wide_resnet", {"depth": 28, "widen_factor": 10}, (3, 32, 32)),
    "WRN-16-4": ("wide_resnet", {"depth": 16, "widen_factor": 4}, (3, 32, 32)),
    "digits_convnet": ("digits_convnet", {}, (1, 8, 8)),
}
EPS = 1 / 2550  # so small that nearly all images withstand all steps, and every pass is paid


def time_best(run: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Return the least seconds of `run`, after one run that is not counted."""
    taken = []
    for _ in range(repetitions + 1):
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_rates(device: torch.device, size: int) -> dict[str, float]:
    """Measure rates of products of two square matrices in TFLOP/s, and of a copy in GB/s (read and written)."""
    found = {}
    kinds = {"float32": (torch.float32, False), "tf32": (torch.float32, True), "bfloat16": (torch.bfloat16, False)}
    before = torch.backends.cuda.matmul.allow_tf32
    for name, (kind, allowed) in kinds.items():
        torch.backends.cuda.matmul.allow_tf32 = allowed
        a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
        found[f"{name}_tflops"] = 2 * size**3 / time_best(lambda a=a, b=b: a @ b, device, 5) / 1e12  # type: ignore[misc]
    torch.backends.cuda.matmul.allow_tf32 = before
    source = torch.randn(size, size, device=device)
    target = torch.empty_like(source)
    found["copy_gbps"] = 2 * source.nbytes / time_best(lambda: target.copy_(source), device, 5) / 1e9
    return found


def count_forward_flops(name: str, shape: tuple[int, int, int]) -> float:
    """Count the FLOPs of a forward pass of one image. A backward pass to the input costs about the same again."""
    kind, arguments, _ = NETWORKS[name]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build(kind, arguments, 10, shape).eval()(torch.zeros(1, *shape))
    return float(counter.get_total_flops())


def make_network(name: str, device: torch.device) -> nn.Module:
    """Make a network with random weights. Its cost does not depend on them."""
    torch.manual_seed(0)
    kind, arguments, shape = NETWORKS[name]
    return build(kind, arguments, 10, shape).eval().to(device)


def run_ours(module: nn.Module, x: Tensor, y: Tensor, steps: int, gradients: str | None) -> tuple[float, int]:
    """Run APGD-CE on the engine. Return the seconds of the attack and the passes that it was charged."""
    with tempfile.TemporaryDirectory() as folder:
        result = evaluate(
            module, [APGD(objective="ce", steps=steps)], x=x, y=y, name="random", eps=EPS, norm="Linf",
            device=str(next(module.parameters()).device), gradients=gradients, results=folder,
        )  # fmt: skip
    return result.seconds, result.forwards + result.backwards


def run_theirs(module: nn.Module, x: Tensor, y: Tensor, steps: int) -> tuple[float, int]:
    """Run APGD-CE of pyautoattack. Return its seconds and passes."""
    from pyautoattack.autopgd_base import APGDAttack

    counting = CountingModel(module)
    device = next(module.parameters()).device
    attack = APGDAttack(
        counting, n_iter=steps, norm="Linf", eps=EPS, loss="ce", n_restarts=1, seed=0, device=device, verbose=False
    )
    begin = time.perf_counter()
    for part, label in zip(x.split(BATCH), y.split(BATCH), strict=True):
        attack.perturb(part.to(device), label.to(device))
    _wait(device)
    return time.perf_counter() - begin, counting.seen.forwards + counting.seen.backwards


def measure_engine(
    name: str, device: torch.device, images: int, steps: int, repetitions: int, rates: dict[str, float]
) -> list[dict[str, Any]]:
    """Compare the engine with pyautoattack on a network with random weights, APGD-CE, labels as predicted."""
    module, shape = make_network(name, device), NETWORKS[name][2]
    x = torch.rand(images, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = torch.cat([module(part.to(device)).argmax(1).cpu() for part in x.split(BATCH)])
    flops = count_forward_flops(name, shape)
    sides: dict[str, tuple[Callable[[], tuple[float, int]], str]] = {
        "robbench": (lambda: run_ours(module, x, y, steps, None), "tf32_tflops"),
        "pyautoattack": (lambda: run_theirs(module, x, y, steps), "tf32_tflops"),
    }
    if device.type == "cuda":
        sides["robbench, bfloat16"] = (lambda: run_ours(module, x, y, steps, "bfloat16"), "bfloat16_tflops")
    rows = []
    for who, (run, rate) in sides.items():
        run()  # compiles, captures and fills caches
        times, passes = zip(*(run() for _ in range(repetitions)), strict=True)
        seconds = statistics.median(times)
        rows.append(
            {
                "network": name, "who": who, "images": images, "steps": steps, "seconds": list(times),
                "passes_per_second": passes[0] / seconds,
                "share_of_rate": passes[0] * flops / seconds / 1e12 / rates[rate] if rate in rates else None,
                "rate": rate,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["rates", "engine"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", type=int, default=8192, help="side of the matrices")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["WRN-28-10"])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rates", type=Path, help="JSON of `rates`")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    keep_freed_memory()
    device = pick_device(given.device)
    about: dict[str, Any] = {"device": describe_device(device), "versions": versions()}
    if given.what == "rates":
        about |= measure_rates(device, given.size)
    else:
        rates = json.loads(given.rates.read_text()) if given.rates and given.rates.exists() else {}
        about["rows"] = [
            row
            for name in given.networks
            for row in measure_engine(name, device, given.images, given.steps, given.repetitions, rates)
        ]
    given.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
