"""What `fast_layers` saves: a forward and backward pass with plain layers and with faster ones, on one thread.

Both sides run in channels-last layout, as `prepare` makes it, and freed memory stays in the process. Times are the
least processor time of many passes, in turn, so other work on the machine disturbs them little.
"""

import argparse
import copy
import time

import torch
from tabulate import tabulate
from torch import Tensor, nn

from robbench.classifier.batch_width import compute_probe
from robbench.classifier.fast_layers import install_fast_layers
from robbench.core.machine import describe_device, keep_freed_memory, versions
from robbench.data.sets import load
from robbench.models.card import Registry
from robbench.models.load import load_model


def measure(sides: list[nn.Module], x: Tensor, bfloat16: bool, repeats: int) -> list[float]:
    """Measure the milliseconds of a pass on each side, in turn; the least of all repeats."""
    spent = [float("inf") for _ in sides]
    for _ in range(repeats):
        for side, model in enumerate(sides):
            begin = time.thread_time()
            compute_probe(model, x, bfloat16)
            spent[side] = min(spent[side], time.thread_time() - begin)
    return [1e3 * seconds for seconds in spent]


def compare(ours: Tensor, theirs: Tensor) -> str:
    """Word how far results are apart, as a share of their length."""
    if torch.equal(ours, theirs):
        return "same bits"
    return f"{float((ours - theirs).norm() / theirs.norm()):.0e}"


def parts(models: list[str], data_dir: str | None, n: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """Load registered models, and take single layers; each with n images."""
    found: dict[str, tuple[nn.Module, Tensor]] = {}
    for name in models:
        entry = Registry.default().find(name)
        data = load(entry.dataset, "test", data_dir)
        found[name] = load_model(entry).module, torch.from_numpy(data.x[:n]).float() / data.scale
    torch.manual_seed(0)
    for channels, kernel, size in ((1, 5, 28), (3, 5, 32), (3, 7, 64)):
        layer = nn.Conv2d(channels, 32, kernel, padding=kernel // 2)
        title = f"one layer, {channels}→32, {kernel}×{kernel}, {size}² pixels"
        found[title] = nn.Sequential(layer, nn.Flatten()).eval(), torch.rand(n, channels, size, size)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["digits/at", "mnist/at", "cifar10/at"])
    parser.add_argument("--lanes", type=int, nargs="+", default=[16, 64], help="images in a pass")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--data-dir", help="where the data sets are (ROBBENCH_DATA)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for name, (model, images) in parts(args.models, args.data_dir, max(args.lanes)).items():
        plain = model.requires_grad_(False).to(memory_format=torch.channels_last)
        fast = copy.deepcopy(plain)
        replaced = install_fast_layers(fast, images[:2], bfloat16=True)
        for bfloat16 in (False, True):
            for lanes in args.lanes:
                x, precision = images[:lanes], "bfloat16" if bfloat16 else "float32"
                if not replaced:
                    rows.append([name, precision, lanes, "no layer replaced"])
                    continue
                before, after = measure([plain, fast], x, bfloat16, args.repeats)
                found = map(compare, compute_probe(fast, x, bfloat16), compute_probe(plain, x, bfloat16))
                rows.append([name, precision, lanes, f"{before:.2f}", f"{after:.2f}", f"{before / after:.2f}×", *found])
    print(describe_device(torch.device("cpu")), *versions().items())
    headers = ["model", "precision", "images", "plain, ms", "faster, ms", "speedup", "logits", "gradient"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
