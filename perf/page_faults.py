"""Measures a forward and backward pass with and without `keep_freed_memory`."""

import argparse
import resource
import subprocess
import sys
import time
from statistics import median

import torch

from robbench.core.machine import describe_device, keep_freed_memory, versions
from robbench.models.card import Registry
from robbench.models.load import load_model


def measure_pass(name: str, lanes: int, keep: bool, threads: int) -> str:
    """Measure the time and page faults of a pass in this process."""
    if keep and not keep_freed_memory():
        return "not available on this system"
    torch.set_num_threads(threads)
    loaded = load_model(Registry.default().find(name))
    module = loaded.module.to(memory_format=torch.channels_last)
    y = torch.zeros(lanes, dtype=torch.int64)
    seconds, before = [], 0
    for i in range(85):
        if i == 5:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        x = torch.rand(lanes, *loaded.in_shape).requires_grad_(True)
        begin = time.perf_counter()
        torch.autograd.grad(torch.nn.functional.cross_entropy(module(x), y), x)
        seconds.append(time.perf_counter() - begin)
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 80
    return f"{1e6 * median(seconds[5:]) / lanes:.0f} µs per image, {faults:.0f} page faults per pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="digits/at")
    parser.add_argument("--lanes", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--mode",
        choices=["usual", "kept"],
        help="measure one mode in this process; by default both in turn, each in a new process",
    )
    args = parser.parse_args()
    if args.mode:
        print(measure_pass(args.model, args.lanes, args.mode == "kept", args.threads))
        return
    print(describe_device(torch.device("cpu")), *versions().items(), f"{args.model}, {args.lanes} lanes")
    for _ in range(args.repeats):
        for mode in ("usual", "kept"):
            command = [sys.executable, *sys.argv, "--mode", mode]
            print(f"{mode}: {subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}")


if __name__ == "__main__":
    main()
