"""The networks that cards may name. Every builder takes the number of classes and the input shape (C, H, W).

All networks map images [N, C, H, W] in [0, 1] to logits [N, K]. `Normalized` adds the normalization.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robbench.core.errors import ModelError, unknown_name

__all__ = ["ARCHITECTURES", "Normalized", "Shape", "build", "list_arguments"]

Shape = tuple[int, int, int]
Builder = Callable[..., nn.Module]


class Normalized(nn.Module):
    """Compute `inner((x - mean) / std)`, so that an attack on this module works on x in [0, 1].

    `mean` and `std` have one number per channel. They come from the card, so they stay out of the state dict.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, inner: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            if not len(values) or not all(math.isfinite(v) and (name == "mean" or v > 0) for v in values):
                rule = "finite numbers" if name == "mean" else "finite numbers above 0"
                raise ModelError(f"{name}: {values!r} given; allowed: one per channel, {rule}.")
        if len(mean) != len(std):
            raise ModelError(f"mean {mean!r} and std {std!r} given; allowed: one number per channel in both.")
        self.inner = inner
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, H, W] in [0, 1] to logits [N, K]."""
        logits: Tensor = self.inner((x - self.mean) / self.std)
        return logits


def linear(num_classes: int, in_shape: Shape) -> nn.Module:
    """One linear map of the pixels. Its exact robust accuracy is known."""
    channels, height, width = in_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes))


def mlp(num_classes: int, in_shape: Shape, *, width: int = 128, depth: int = 2) -> nn.Module:
    """A perceptron with `depth` hidden layers of `width` ReLU units. It does not use the structure of images."""
    sizes = [prod(in_shape), *[width] * depth]
    hidden = [layer for before, after in pairwise(sizes) for layer in (nn.Linear(before, after), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, num_classes))


def digits_convnet(num_classes: int, in_shape: Shape, *, width: int = 32, hidden: int = 128) -> nn.Module:
    """Two 3x3 convolutions, one pooling layer and two linear layers, for the 8x8 digits. It trains fast."""
    channels, rows, columns = in_shape
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.MaxPool2d(2),  # before the ReLU: the same values and gradients, on a quarter of the numbers
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * (rows // 2) * (columns // 2), hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )


def madry_mnist(num_classes: int, in_shape: Shape) -> nn.Module:
    """The MNIST network of Madry et al. 2018 (https://arxiv.org/abs/1706.06083), with the same initialization."""
    channels, rows, columns = in_shape
    network = nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.MaxPool2d(2),  # before the ReLU: the same values and gradients, on a quarter of the numbers
        nn.ReLU(),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * (rows // 4) * (columns // 4), 1024),
        nn.ReLU(),
        nn.Linear(1024, num_classes),
    )
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            # TensorFlow's truncated normal redraws values beyond two standard deviations.
            nn.init.trunc_normal_(layer.weight, std=0.1, a=-0.2, b=0.2)
            if layer.bias is not None:
                nn.init.constant_(layer.bias, 0.1)
    return network


class _PreactBlock(nn.Module):
    """BN-ReLU-conv twice, with a shortcut. The shortcut is a 1x1 convolution if the shape changes."""

    def __init__(self, before: int, after: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        changes = before != after or stride != 1
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        inner = self.dropout(F.relu(self.bn2(self.conv1(active))))
        out: Tensor = kept + self.conv2(inner)
        return out


def wide_resnet(
    num_classes: int, in_shape: Shape, *, depth: int = 16, widen_factor: int = 4, dropout: float = 0.0
) -> nn.Module:
    """WRN-depth-widen_factor of Zagoruyko & Komodakis 2016 (https://arxiv.org/abs/1605.07146).

    Raises:
        ModelError: depth is not 6n + 4 (three stages of n blocks with two convolutions each), or dropout is
            outside [0, 1).
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ModelError(f"wide_resnet: depth {depth} given; allowed: 6n + 4, that is 10, 16, 22, 28, 34, 40, ...")
    if not 0 <= dropout < 1:
        raise ModelError(f"wide_resnet: dropout {dropout} given; allowed: in [0, 1)")
    widths = [16, *(base * widen_factor for base in (16, 32, 64))]
    stages = []
    for stage, (before, after) in enumerate(pairwise(widths)):
        first = _PreactBlock(before, after, 1 if stage == 0 else 2, dropout)
        stages.append(nn.Sequential(first, *(_PreactBlock(after, after, 1, dropout) for _ in range(blocks - 1))))
    head = nn.Linear(widths[-1], num_classes)
    network = nn.Sequential(
        nn.Conv2d(in_shape[0], widths[0], 3, padding=1, bias=False),
        *stages,
        nn.BatchNorm2d(widths[-1]),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        head,
    )
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(head.bias)
    return network


class _BasicBlock(nn.Module):
    """Two conv-BN pairs with a shortcut (He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if before != after or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class _ResNet18(nn.Module):
    """ResNet-18. The attribute names are those of published checkpoints, so that their state dicts load."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(_BasicBlock(64, 64, 1), _BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(_BasicBlock(64, 128, 2), _BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(_BasicBlock(128, 256, 2), _BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(_BasicBlock(256, 512, 2), _BasicBlock(512, 512, 1))
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.bn1(self.conv1(x)))
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(features, 1).flatten(1))
        return logits


def resnet18(num_classes: int, in_shape: Shape) -> nn.Module:
    """ResNet-18 of He et al. 2016 (https://arxiv.org/abs/1512.03385) for small images: 3x3 stem."""
    return _ResNet18(num_classes, in_shape[0])


_MOST = 4096  # largest value of an integer argument
_MOST_PARAMETERS = 2**31

ARCHITECTURES: dict[str, Builder] = {
    "digits_convnet": digits_convnet,
    "linear": linear,
    "madry_mnist": madry_mnist,
    "mlp": mlp,
    "resnet18": resnet18,
    "wide_resnet": wide_resnet,
}


def list_arguments(name: str) -> dict[str, int | float | str | bool]:
    """List the arguments of a builder besides classes and shape: name -> default.

    Raises:
        ModelError: the name is unknown.
    """
    if name not in ARCHITECTURES:
        raise ModelError(unknown_name("architecture", name, ARCHITECTURES))
    parameters = inspect.signature(ARCHITECTURES[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def build(
    name: str,
    args: Mapping[str, int | float | str | bool],
    num_classes: int,
    in_shape: Shape,
    most: int = _MOST_PARAMETERS,
) -> nn.Module:
    """Build a network with fresh random weights.

    Args:
        name: a key of `ARCHITECTURES`.
        args: keyword arguments of its builder.
        num_classes: K, the number of logits.
        in_shape: (C, H, W) of the images.
        most: largest number of parameters.

    Raises:
        ModelError: the name or an argument is unknown, a value is not allowed, or there are more parameters.
    """
    defaults = list_arguments(name)
    for key, given in args.items():
        if key not in defaults:
            raise ModelError(unknown_name(f"argument of architecture {name}", key, defaults))
        allowed: tuple[type, ...] = (int, float) if type(defaults[key]) is float else (type(defaults[key]),)
        if type(given) not in allowed:
            kind = type(defaults[key]).__name__
            raise ModelError(f"{name}: {key}: {given!r} given; expected: {kind}, such as {defaults[key]!r}")
        if type(given) is int and type(defaults[key]) is int and not 1 <= given <= _MOST:
            raise ModelError(f"{name}: {key}: {given} given; expected: at least 1, at most {_MOST}")
    try:
        with torch.device("meta"):  # needs no memory, even for a huge network
            size = sum(p.numel() for p in ARCHITECTURES[name](num_classes, in_shape, **args).parameters())
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{name} with {dict(args)} cannot be built: {error}") from error
    if size > most:
        raise ModelError(f"{name} with {dict(args)} has {size:,} parameters; allowed: {most:,}")
    return ARCHITECTURES[name](num_classes, in_shape, **args)
