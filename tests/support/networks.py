"""Tiny networks of every layer that can be certified, and their exact margins by enumeration of activation patterns."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from scipy.optimize import linprog
from torch import nn

from robbench.certify.layers import Affine, Graph, Input, Maximum, Sum


def seeded(network, seed=0, scale=1.0):
    """Fill a network with fixed random weights, and batch norms with fixed statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator) / max(p[0].numel(), 1) ** 0.5)
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.copy_(0.3 * torch.randn(part.running_mean.shape, generator=generator))
                part.running_var.copy_(0.5 + torch.rand(part.running_var.shape, generator=generator))
    return network.eval()


class Residual(nn.Module):
    """A block of a residual network, with batch norm and a mean over the pixels."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1, stride=2)
        self.bn = nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        x = self.bn(self.first((x - 0.3) / 0.7))
        x = x + self.second(torch.relu(x))
        return self.head(torch.relu(x).mean((2, 3)))


def mlp(seed=0):
    """Six ReLUs in two layers."""
    return seeded(
        nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)), seed, 2.0
    )


def zoo(seed=0):
    """Networks of images [1, 4, 4], which together have every layer: name -> network."""
    return {
        "linear": seeded(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), seed),
        "conv": seeded(
            nn.Sequential(
                nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 2, padding="same", dilation=2),
                nn.ReLU(), nn.Flatten(), nn.Linear(8, 3),
            ), seed, 2.0,
        ),
        "max_pool": seeded(
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 3)), seed, 2.0
        ),
        "padded_pool": seeded(
            nn.Sequential(nn.MaxPool2d(3, stride=2, padding=1), nn.Flatten(), nn.Linear(4, 3)), seed, 2.0
        ),
        "avg_pool": seeded(
            nn.Sequential(
                nn.AvgPool2d(2, padding=1), nn.Conv2d(1, 2, 2, groups=1), nn.BatchNorm2d(2), nn.ReLU(),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3),
            ), seed, 2.0,
        ),
        "residual": seeded(Residual(), seed, 2.0),
    }  # fmt: skip


def enumerate_margin(graph: Graph, x, eps, y, other):
    """Return the exact least margin over a Linf ball in the box: a linear program for every choice of signs.

    This shares nothing with the code under test but the graph's maps.
    """
    sizes = {at: int(np.prod(graph.shape(at))) for at in graph.maxima}
    n = x.numel()
    box = [(max(float(v) - eps, 0), min(float(v) + eps, 1)) for v in x.flatten()]
    best = np.inf
    for bits in itertools.product((0, 1), repeat=sum(sizes.values())):
        values, rows, limits, used = {}, [], [], 0
        for at, node in enumerate(graph.nodes):
            if isinstance(node, Input):
                values[at] = (torch.eye(n, dtype=torch.float64).view(n, *node.shape), torch.zeros(node.shape).double())
            elif isinstance(node, Affine):
                a, c = values[node.parent]
                values[at] = (node.apply(a), node.apply(c[None])[0] + node.bias)
            elif isinstance(node, Sum):
                (a, c), (b, d) = (values[p] for p in node.parents)
                values[at] = (a + b, c + d)
            else:
                assert isinstance(node, Maximum)
                a, c = values[node.a]
                b, d = values[node.b] if node.b is not None else (torch.zeros_like(a), torch.zeros_like(c))
                on = torch.tensor(bits[used : used + sizes[at]], dtype=torch.bool).view(node.shape)
                used += sizes[at]
                sign = torch.where(on, -1.0, 1.0).double()
                rows.append((sign * (a - b)).flatten(1).T)
                limits.append((-sign * (c - d)).flatten())
                values[at] = (torch.where(on, a, b), torch.where(on, c, d))
        a, c = values[len(graph.nodes) - 1]
        cost = (a[:, y] - a[:, other]).flatten().numpy()
        constraints = {"A_ub": torch.cat(rows).numpy(), "b_ub": torch.cat(limits).numpy()} if rows else {}
        found = linprog(cost, bounds=box, **constraints)
        if found.status == 0:
            best = min(best, found.fun + float(c[y] - c[other]))
    return best
