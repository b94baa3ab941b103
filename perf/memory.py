"""Print the peak memory of a run on 5,000 JPEGs of 224 × 224, which are read from disk as they are used.

    python perf/memory.py [--images 5000] [--format folder|npz]

The images are generated into a temporary folder. The network is small, so that the number is that of the images: one
stage of FGSM on all of them. The limit is 4 GiB for the whole process.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from robbench.attacks import FGSM
from robbench.evaluation.run import evaluate

LIMIT = 4 * 2**30
SIDE = 224


def generate(n: int, seed: int = 0):
    """Yield small smooth images, enlarged to 224 × 224: [224, 224, 3] uint8."""
    generator = np.random.default_rng(seed)
    for _ in range(n):
        small = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        yield Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def write(folder: Path, n: int, form: str) -> Path:
    if form == "npz":
        x = np.empty((n, SIDE, SIDE, 3), np.uint8)
        for i, image in enumerate(generate(n)):
            x[i] = np.asarray(image)
        np.savez(folder / "images.npz", x=x, y=np.arange(n) % 2)
        return folder / "images.npz"
    for i, image in enumerate(generate(n)):
        place = folder / "images" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{i:05}.jpg")
    return folder / "images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--format", choices=("folder", "npz"), default="folder")
    given = parser.parse_args()
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 16, stride=16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    with tempfile.TemporaryDirectory() as folder:
        data = write(Path(folder), given.images, given.format)
        written = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        begin = time.perf_counter()
        result = evaluate(nn.Sequential(*layers).eval(), [FGSM()], data=data, eps="4/255")
        seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{result.n} images of {SIDE} × {SIDE} ({given.format}), {seconds:.0f} s: peak {peak / 2**30:.2f} GiB "
        f"({written / 2**30:.2f} GiB before the run); limit {LIMIT / 2**30:.0f} GiB"
    )
    sys.exit(peak > LIMIT)


if __name__ == "__main__":
    main()
