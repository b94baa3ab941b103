"""Small models whose answers are known, and trained ones with images that they classify correctly."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from robbench.core.threat import Ball
from robbench.data.sets import load
from robbench.models.card import Registry
from robbench.models.load import load_model
from robbench.suite import load_suite

DUAL = {"Linf": 1, "L2": 2, "L1": float("inf")}  # the order of the dual norm


class Linear(nn.Module):
    """Two classes told apart by w·x + b in float64-exact arithmetic: logits (+s, −s) / 2 · scale."""

    def __init__(self, w: Tensor, b: Tensor | float, classes: int = 2, scale: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(w.flatten())
        self.b = nn.Parameter(torch.as_tensor(b, dtype=w.dtype))
        self.classes, self.scale = classes, scale

    def forward(self, x: Tensor) -> Tensor:
        s = (x.flatten(1) @ self.w + self.b) * self.scale / 2
        rest = torch.full((len(x), self.classes - 2), -10.0 * self.scale, dtype=x.dtype)
        return torch.cat([torch.stack([s, -s], dim=1), rest], dim=1)


def small(seed: int = 0) -> nn.Module:
    """A network of two layers with fixed weights."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (2 / max(p[0].numel(), 1)) ** 0.5)
    return net.eval()


def network(dtype=torch.float32, seed=0):
    """A convolutional network with fixed weights."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 64, 10),
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (2 / max(p[0].numel(), 1)) ** 0.5)
    return net.to(dtype).eval().requires_grad_(False)


def images(n, dtype=torch.float32, seed=1):
    """Uniform noise [n, 1, 8, 8]."""
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def labelled(net, n, dtype=torch.float32):
    """Images, and labels that the network agrees with."""
    x = images(n, dtype)
    return x, net(x).argmax(1)


def hyperplane(norm, seed, n=4, classes=2):
    """Images in the middle of the box, a random hyperplane, and the exact radius of each image."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(16, dtype=torch.float64, generator=generator)
    x = 0.5 + 0.02 * torch.randn(n, 1, 4, 4, dtype=torch.float64, generator=generator)
    model = Linear(w, -float(x.flatten(1).mean(0) @ w), classes)
    s = x.flatten(1) @ w + model.b
    y = (s < 0).long()
    return model, x, y, (s.abs() / torch.linalg.vector_norm(w, ord=DUAL[norm])).detach()


def equally_far(norm, n=40):
    """A random hyperplane, images in the middle of the box, and their distance from it, the same for all."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(64, dtype=torch.float64, generator=generator)
    x = 0.5 + 0.02 * torch.randn(n, 64, dtype=torch.float64, generator=generator)
    reach = torch.linalg.vector_norm(w, ord=DUAL[norm])
    radius = {"Linf": 0.05, "L2": 0.3, "L1": 1.0}[norm]
    x = x - ((x - 0.5) @ w - radius * reach)[:, None] * w / (w @ w)
    return Linear(w, float(-0.5 * w.sum())), x.view(n, 1, 8, 8), torch.zeros(n, dtype=torch.int64), radius


def random_images(*shape, seed=0):
    """Images of which a third of the pixels lie on the box."""
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(x < 1 / 6, 0.0, torch.where(x > 5 / 6, 1.0, x))


def correct(name, n):
    """A registered model, the first n test images that it classifies correctly, and the ball of `whitebox`."""
    entry = Registry.default().find(name)
    model = load_model(entry).module
    data = load(entry.dataset, "test")
    x, y = torch.from_numpy(data.x[: 2 * n]).float() / data.scale, torch.from_numpy(data.y[: 2 * n])
    with torch.no_grad():
        right = (model(x).argmax(1) == y).nonzero().squeeze(1)[:n]
    assert len(right) == n
    return model, x[right], y[right], Ball.of(load_suite("whitebox").threat(entry.dataset))


def trained(n):
    """A trained model in float64, where the width of a batch changes no decision, and images it gets right."""
    model, x, y, _ = correct("digits/at", n)
    return copy.deepcopy(model).double(), x.double(), y
