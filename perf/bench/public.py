"""Public networks of verification, for measurements on weights that nobody here trained.

The weights lie in `complete_verifier/models` of the repository Verified-Intelligence/alpha-beta-CROWN (BSD-3): those of
Dathathri et al. 2020 (cnn-a), Zhang et al. 2022 (madry-tiny), ERAN (conv-small, 6-100, 9-200), OVAL (wide, deep)
and Marabou. Clone it, and give `measure.py` that folder as `--public`. Radii are those of its configurations.

`HARD` lists test images of which a complete solver found an adversarial example and gradients did not
(`exp_configs/bab_attack/attack_idx`; Zhang et al. 2022, "A branch and bound framework for stronger adversarial attacks
of ReLU networks").
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robbench.models.architectures import Normalized


class Network(NamedTuple):
    """Where the weights lie, radius in Linf, mean and deviation of the input, padding and strides."""

    file: str
    eps: str
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    padding: int = 1
    strides: tuple[int, ...] = (2, 2)


SDP = ((0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616))
ERAN = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
OVAL = ((0.485, 0.456, 0.406), (0.225, 0.225, 0.225))
NETWORKS = {
    "mnist-madry-tiny": Network("bab_attack/MadryCNN_no_maxpool_tiny.pt", "0.3", padding=2),
    "mnist-cnn-a": Network("sdp/mnist_cnn_a_adv.model", "0.3"),
    "mnist-conv-small": Network("eran/mnist_conv_small_nat.pth", "0.12", (0.1307,), (0.3081,), padding=0),
    "mnist-6-100": Network("eran/mnist_6_100_nat.pth", "0.026"),
    "mnist-9-200": Network("eran/mnist_9_200_nat.pth", "0.015"),
    "cifar10-cnn-a": Network("sdp/cifar_cnn_a_adv.model", "2/255", *SDP),
    "cifar10-cnn-a-mix": Network("sdp/cifar_cnn_a_mix.model", "2/255", *SDP),
    "cifar10-conv-small": Network("eran/cifar_conv_small_pgd.pth", "2/255", *ERAN, padding=0),
    "cifar10-marabou": Network("marabou_cifar10/cifar_marabou_small.pth", "2/255", padding=0),
    "cifar10-wide": Network("oval/cifar_wide.pth", "2/255", *OVAL),
    "cifar10-deep": Network("oval/cifar_deep.pth", "2/255", *OVAL, strides=(2, 1, 1, 2)),
}
HARD = {
    "mnist-madry-tiny": (
        333, 758, 1028, 1105, 1406, 2244, 3343, 3542, 4432, 4479, 4633, 4963, 4974, 6605, 7027, 7903, 8847, 9680, 9751,
        9754,
    ),
    "mnist-cnn-a": (
        273, 1729, 2113, 2318, 2745, 2769, 3343, 3468, 4311, 4547, 4868, 7071, 7799, 8049, 8258, 8374, 8578, 8702, 9697,
        9711,
    ),
}  # fmt: skip


def build(weights: dict[str, Tensor], network: Network) -> nn.Module:
    """Build convolutions, a flattening, linear layers, and a ReLU between any two, in the order of the weights."""
    layers: list[nn.Module] = []
    strides = iter(network.strides)
    for name, weight in weights.items():
        if weight.dim() == 1:
            continue  # a bias
        if weight.dim() == 4:
            layers.append(nn.Conv2d(*weight.shape[1::-1], weight.shape[2], next(strides), network.padding))
        else:
            if not any(isinstance(layer, nn.Flatten) for layer in layers):
                layers.append(nn.Flatten())
            layers.append(nn.Linear(*weight.shape[::-1]))
        layers[-1].load_state_dict({"weight": weight, "bias": weights[name.replace("weight", "bias")]})
        layers.append(nn.ReLU())
    return Normalized(nn.Sequential(*layers[:-1]), network.mean, network.std).eval()


def load(name: str, folder: Path) -> nn.Module:
    """Load a network from `complete_verifier/models`: images [N, C, H, W] to logits [N, 10]."""
    network = NETWORKS[name]
    weights = torch.load(folder / network.file, map_location="cpu", weights_only=True)
    while not isinstance(weights, dict) or "state_dict" in weights:  # some files hold a list, some a checkpoint
        weights = weights[0] if isinstance(weights, list) else weights["state_dict"]
    return build(weights, network)
