"""A yardstick for attacks: small networks whose exact robust accuracy is computed, and what every suite misses of it.

    python perf/truth.py [--images 100] [--seconds 60] [--only digits-mlp-natural] [--suites quick,whitebox,fast]

Trains networks of the digits, and of MNIST at 14 × 14 pixels if its files are there (seconds each). Computes the exact
verdict of each image, and runs every suite on the same images. An image that is proven and claimed broken is an
error of robbench: the run fails. The table goes to stdout.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import robbench as rb
from robbench.certify.interval import find_contradictions
from robbench.certify.record import read_certified
from robbench.certify.run import Balls, certify
from robbench.core.types import Threat
from robbench.evaluation.options import Options
from robbench.models.spec import ModelSpec
from robbench.report.escape import make_markdown_table
from robbench.results.reader import read_vouched_robust

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "digits-mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)
    ),
    "digits-conv": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 32), nn.ReLU(),
        nn.Linear(32, 10),
    ),
    "digits-pool": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 24), nn.ReLU(),
        nn.Linear(24, 10),
    ),
    "mnist14-mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(196, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    ),
    "mnist14-conv": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 4, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(196, 24), nn.ReLU(),
        nn.Linear(24, 10),
    ),
}  # fmt: skip
RECIPES = {"natural": "1/20", "at": "1/10", "ls_noise": "1/20", "lsq_noise": "1/20"}
"""Recipe -> radius of the exact verdicts."""


def load(dataset: str, split: str, n: int | None = None) -> tuple[Tensor, Tensor]:
    """Load images [n, 1, H, W] in [0, 1] and labels [n]. `mnist14` is MNIST, each pixel the mean of 2 × 2."""
    if dataset == "mnist14":
        x, y = rb.load_data("mnist", split=split, n=n)
        return F.avg_pool2d(x, 2), y
    return rb.load_data(dataset, split=split, n=n)


def train(net: nn.Module, recipe: str, x: Tensor, y: Tensor, steps: int = 1200) -> nn.Module:
    """Train a network with fixed random numbers."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(steps):
        at = torch.randint(0, len(y), (64,), generator=generator)
        batch, label = x[at], y[at]
        if recipe.endswith("noise"):
            batch = batch + 0.3 * torch.randn(batch.shape, generator=generator)
        if recipe == "at":
            batch = (batch + climb(net, batch, label, 0.1)).clamp(0, 1)
        logits = net(batch)
        loss = F.cross_entropy(logits, label, label_smoothing=0.5 if recipe == "ls_noise" else 0.0)
        if recipe == "lsq_noise":
            loss = loss + 0.05 * logits.square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return net.eval().requires_grad_(False)


def climb(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Find a perturbation with five steps of PGD."""
    delta = torch.zeros_like(x)
    for _ in range(5):
        delta.requires_grad_(True)
        loss = F.cross_entropy(net((x + delta).clamp(0, 1)), y)
        (grad,) = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + eps / 3 * grad.sign()).clamp(-eps, eps)
    return delta


def measure(name: str, suites: list[str], images: int, seconds: float, root: Path) -> list[dict[str, str]]:
    """Compute the truth about one network, and what every suite makes of it.

    Raises:
        SystemExit: an image is both proven and broken.
    """
    builder, recipe = name.rsplit("-", 1)
    dataset = builder.split("-")[0]
    torch.manual_seed(0)
    net = train(BUILDERS[builder](), recipe, *load(dataset, "train"))
    x, y = load(dataset, "test", images)
    threat = Threat("Linf", Fraction(RECIPES[recipe]))
    spec = ModelSpec(net, x, y, dataset="truth", name=name)
    file = certify(spec, Balls("exact", threat, seconds), Options(samples=images, results=root))
    (folder,) = (root / "truth" / name / "certified").iterdir()
    truth = read_certified(folder)[1].set_index("sample")["verdict"]
    rows = []
    for suite in suites:
        result = rb.evaluate(
            net, suite, x=x, y=y, dataset="truth", name=name, eps=str(threat.eps), norm="Linf", results=root
        )
        (path,) = (p for p in (root / "truth" / name).glob(f"{suite}*") if (p / "result.json").exists())
        robust = read_vouched_robust(path)
        missed = int((robust & (truth[robust.index] == "broken")).sum())
        found = int((~robust & (truth[robust.index] == "open")).sum())
        rows.append(
            {
                "Network": name,
                "eps": str(threat.eps),
                **{v: str(file.counts.get(v, 0)) for v in ("proven", "broken", "open", "misclassified")},
                "CPU s": f"{file.seconds:.0f}",
                "Suite": suite,
                "Attackable missed": str(missed),
                "Open broken": str(found),
                "Passes per image": f"{(result.forwards + result.backwards) / result.n:.0f}",
            }
        )
    if wrong := find_contradictions(root, f"truth/{name}"):
        raise SystemExit("\n".join(wrong))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", default=",".join(f"{b}-{r}" for r in RECIPES for b in BUILDERS))
    parser.add_argument("--suites", default="quick,whitebox,fast")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only.split(","):
            rows += measure(name, given.suites.split(","), given.images, given.seconds, Path(folder))
            print("\n".join(" · ".join(row.values()) for row in rows[-len(given.suites.split(",")) :]), flush=True)
    print("\n" + make_markdown_table(rows))


if __name__ == "__main__":
    main()
