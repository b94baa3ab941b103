"""Measures the speedup of `fast_layers`: a forward and backward pass with plain layers and with its layers.

Both sides use channels-last layout, as `prepare` does, and keep freed memory in the process.
"""

import argparse
import copy
import time
from statistics import median

import torch
from tabulate import tabulate
from torch import Tensor, nn

from robbench.classifier.batch_width import probe
from robbench.classifier.fast_layers import quicken
from robbench.core.machine import describe_device, keep_freed_memory, versions
from robbench.data.sets import load
from robbench.models.card import Registry
from robbench.models.load import load_model


def time_passes(sides: list[nn.Module], x: Tensor, coarse: bool, repeats: int) -> list[float]:
    """Return the median milliseconds of a pass on each side. The sides are measured in turn."""
    spent: list[list[float]] = [[] for _ in sides]
    for i in range(repeats + 3):
        for side, model in enumerate(sides):
            begin = time.perf_counter()
            probe(model, x, coarse)
            if i >= 3:
                spent[side].append(time.perf_counter() - begin)
    return [1e3 * median(times) for times in spent]


def format_difference(ours: Tensor, theirs: Tensor) -> str:
    """Format the difference of two results, relative to their length."""
    if torch.equal(ours, theirs):
        return "same bits"
    return f"{float((ours - theirs).norm() / theirs.norm()):.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["digits/at", "mnist/at", "cifar10/at"])
    parser.add_argument("--lanes", type=int, nargs="+", default=[16, 64], help="images in a pass")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--data-dir", help="where the data sets are (ROBBENCH_DATA)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    rows = []
    for name in args.models:
        entry = Registry.default().find(name)
        data = load(entry.dataset, "test", args.data_dir)
        images = torch.from_numpy(data.x[: max(args.lanes)]).float() / data.scale
        plain = load_model(entry).module.requires_grad_(False).to(memory_format=torch.channels_last)
        quick = copy.deepcopy(plain)
        quicken(quick, images[:2])
        for coarse in (False, True):
            for lanes in args.lanes:
                x = images[:lanes]
                before, after = time_passes([plain, quick], x, coarse, args.repeats)
                found = map(format_difference, probe(quick, x, coarse), probe(plain, x, coarse))
                precision = "bfloat16" if coarse else "float32"
                rows.append([name, precision, lanes, f"{before:.2f}", f"{after:.2f}", f"{before / after:.2f}×", *found])
    print(describe_device(torch.device("cpu")), *versions().items(), f"{args.threads} threads used")
    headers = ["model", "precision", "images", "plain, ms", "kernels, ms", "speedup", "logits", "gradient"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
