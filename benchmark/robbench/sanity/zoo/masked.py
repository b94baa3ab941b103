"""The masked models of the zoo: the usual attack overstates how robust they are, or they answer at random."""

from __future__ import annotations

import torch
from torch import nn

from robbench.models.architectures import build
from robbench.sanity.zoo.entry import ZooEntry, network
from robbench.sanity.zoo.images import (
    InputNoise,
    Jpeg,
    MedianFilter,
    Quantize,
    RandomResizePad,
    Ripple,
    StraightThrough,
    Thermometer,
)
from robbench.sanity.zoo.networks import (
    Decoy,
    Dropout,
    KillGradient,
    KWinners,
    MeanOf,
    Probabilities,
    RandomMember,
    ReverseGradient,
    RoundedReLU,
    Scale,
    with_activation,
)

__all__ = ["MASKED"]

_ATHALYE = "Athalye et al. 2018, Obfuscated Gradients Give a False Sense of Security"
_CARLINI = "Carlini & Wagner 2016, Defensive Distillation is Not Robust to Adversarial Examples"
_SHAFAHI = "Shafahi et al. 2019, Label Smoothing and Logit Squeezing"


def _untrained(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build("digits_convnet", {"width": 8, "hidden": 32}, 10, (1, 8, 8))


_SATURATION = (
    ZooEntry(
        name="natural_times_1000",
        label="masked",
        half="calibration",
        kind="saturation",
        dataset="digits",
        why="Logits a thousand times larger: the softmax saturates, and the gradient of the cross-entropy underflows.",
        source=_CARLINI,
        build=lambda: nn.Sequential(network("digits/natural"), Scale(1000)),
        stand_in=lambda: network("digits/natural"),
    ),
    ZooEntry(
        name="distilled_t100",
        label="masked",
        half="held-out",
        kind="saturation",
        dataset="digits",
        why="Distilled at temperature 100 and asked at 1, which is a student's logits times 100.",
        source="Papernot et al. 2016, Distillation as a Defense; " + _CARLINI,
        build=lambda: nn.Sequential(network("digits/student"), Scale(100)),
        stand_in=lambda: network("digits/student"),
    ),
    ZooEntry(
        name="natural_probabilities_t001",
        label="masked",
        half="calibration",
        kind="saturation",
        dataset="digits",
        why="Answers with probabilities at temperature 0.01, which are 0 and 1 exactly.",
        source="Croce & Hein 2020, AutoAttack's check of the output's range",
        build=lambda: nn.Sequential(network("digits/natural"), Scale(100), Probabilities()),
        stand_in=lambda: network("digits/natural"),
    ),
    ZooEntry(
        name="at_probabilities_t002",
        label="masked",
        half="held-out",
        kind="saturation",
        dataset="digits",
        why="An adversarially trained network that answers with probabilities at temperature 0.02.",
        source="Croce & Hein 2020, AutoAttack's check of the output's range",
        build=lambda: nn.Sequential(network("digits/at"), Scale(50), Probabilities()),
        stand_in=lambda: network("digits/at"),
    ),
)

_NO_GRADIENT = (
    ZooEntry(
        name="natural_quantized",
        label="masked",
        half="calibration",
        kind="no gradient",
        dataset="digits",
        why="Pixels rounded to 8 levels: the gradient is zero everywhere.",
        source="Guo et al. 2018, Countering Adversarial Images Using Input Transformations; " + _ATHALYE,
        build=lambda: nn.Sequential(Quantize(8), network("digits/natural")),
        stand_in=lambda: nn.Sequential(StraightThrough(Quantize(8)), network("digits/natural")),
    ),
    ZooEntry(
        name="at_jpeg",
        label="masked",
        half="held-out",
        kind="no gradient",
        dataset="digits",
        why="Cosine coefficients rounded as JPEG rounds them, before an adversarially trained network.",
        source="Guo et al. 2018, Countering Adversarial Images Using Input Transformations; " + _ATHALYE,
        build=lambda: nn.Sequential(Jpeg(0.1), network("digits/at")),
        stand_in=lambda: nn.Sequential(StraightThrough(Jpeg(0.1)), network("digits/at")),
    ),
    ZooEntry(
        name="natural_rounded_activations",
        label="masked",
        half="calibration",
        kind="no gradient",
        dataset="digits",
        why="Activations rounded to multiples of 0.05: the gradient is zero everywhere.",
        source=_ATHALYE,
        build=lambda: with_activation(network("digits/natural"), lambda: RoundedReLU(0.05)),
        stand_in=lambda: network("digits/natural"),
    ),
    ZooEntry(
        name="at_killed_gradient",
        label="masked",
        half="held-out",
        kind="no gradient",
        dataset="digits",
        why="A layer that passes images on and returns a gradient of zero, before an adversarially trained network.",
        source="fra31/auto-attack, issue 43",
        build=lambda: nn.Sequential(KillGradient(), network("digits/at")),
        stand_in=lambda: network("digits/at"),
    ),
    ZooEntry(
        name="natural_thermometer",
        label="masked",
        half="calibration",
        kind="no gradient",
        dataset="digits",
        why="Pixels as 16 bits, made by comparisons that leave no autograd graph.",
        source="Buckman et al. 2018, Thermometer Encoding; " + _ATHALYE,
        build=lambda: nn.Sequential(Thermometer(16), network("digits/natural")),
        stand_in=lambda: nn.Sequential(StraightThrough(Thermometer(16)), network("digits/natural")),
    ),
    ZooEntry(
        name="sigma01_median_filter",
        label="masked",
        half="held-out",
        kind="no gradient",
        dataset="digits",
        why="A median filter computed by numpy leaves no autograd graph.",
        source="Xu et al. 2018, Feature Squeezing",
        build=lambda: nn.Sequential(MedianFilter(2), network("digits/sigma01")),
        stand_in=lambda: nn.Sequential(StraightThrough(MedianFilter(2)), network("digits/sigma01")),
    ),
)

_WRONG_GRADIENT = (
    ZooEntry(
        name="natural_ripple",
        label="masked",
        half="calibration",
        kind="wrong gradient",
        dataset="digits",
        why="A ripple of 0.002 on every pixel whose slope is forty times that of the image: shattered gradients.",
        source=_ATHALYE,
        build=lambda: nn.Sequential(Ripple(0.002, 3000.0), network("digits/natural")),
        stand_in=lambda: network("digits/natural"),
    ),
    ZooEntry(
        name="natural_k_winners",
        label="masked",
        half="held-out",
        kind="wrong gradient",
        dataset="digits",
        why="Only the largest activations of a layer pass, and which they are changes all the time.",
        source="Xiao et al. 2020, Enhancing Adversarial Defense by k-Winners-Take-All",
        build=lambda: with_activation(network("digits/natural"), lambda: KWinners(0.2)),
        stand_in=lambda: network("digits/natural"),
    ),
    ZooEntry(
        name="at_reversed_gradient",
        label="masked",
        half="calibration",
        kind="wrong gradient",
        dataset="digits",
        why="A layer that reverses the gradient, before an adversarially trained network.",
        source=_ATHALYE,
        build=lambda: nn.Sequential(ReverseGradient(), network("digits/at")),
        stand_in=lambda: network("digits/at"),
    ),
    ZooEntry(
        name="natural_decoy",
        label="masked",
        half="held-out",
        kind="wrong gradient",
        dataset="digits",
        why="The logits of a trained network with the gradient of an untrained one.",
        source=_ATHALYE,
        build=lambda: Decoy(network("digits/natural"), _untrained(seed=0)),
        stand_in=lambda: network("digits/natural"),
    ),
)

_STRAIGHT_THROUGH = (
    ZooEntry(
        name="natural_black_and_white",
        label="masked",
        half="calibration",
        kind="straight-through",
        dataset="digits",
        why="Pixels rounded to black or white, with the gradient of the identity.",
        source="Xu et al. 2018, Feature Squeezing; " + _ATHALYE,
        build=lambda: nn.Sequential(StraightThrough(Quantize(2)), network("digits/natural")),
    ),
    ZooEntry(
        name="natural_jpeg_straight",
        label="masked",
        half="held-out",
        kind="straight-through",
        dataset="digits",
        why="Coarse JPEG-like rounding with the gradient of the identity.",
        source="Dziugaite et al. 2016, A Study of the Effect of JPG Compression; " + _ATHALYE,
        build=lambda: nn.Sequential(StraightThrough(Jpeg(0.4)), network("digits/natural")),
    ),
)

_RANDOM = (
    ZooEntry(
        name="sigma03_input_noise",
        label="masked",
        half="calibration",
        kind="random",
        dataset="digits",
        why="Gaussian noise of 0.3 on every image it is asked about.",
        source="Cohen et al. 2019, Certified Adversarial Robustness via Randomized Smoothing; " + _ATHALYE,
        build=lambda: nn.Sequential(InputNoise(0.3), network("digits/sigma03")),
        stand_in=lambda: network("digits/sigma03"),
    ),
    ZooEntry(
        name="cropped_resize_pad",
        label="masked",
        half="held-out",
        kind="random",
        dataset="digits",
        why="Images shrunk by up to a pixel and put at a random place.",
        source="Xie et al. 2018, Mitigating Adversarial Effects Through Randomization",
        build=lambda: nn.Sequential(RandomResizePad(7), network("digits/cropped")),
        stand_in=lambda: network("digits/cropped"),
    ),
    ZooEntry(
        name="natural_dropout",
        label="masked",
        half="calibration",
        kind="random",
        dataset="digits",
        why="Dropout of 0.3 behind every activation, also in eval mode.",
        source="Feinman et al. 2017, Detecting Adversarial Samples from Artifacts; " + _ATHALYE,
        build=lambda: with_activation(network("digits/natural"), lambda: Dropout(0.3)),
        stand_in=lambda: network("digits/natural"),
    ),
    ZooEntry(
        name="random_member",
        label="masked",
        half="held-out",
        kind="random",
        dataset="digits",
        why="Every answer comes from one of three networks, drawn anew.",
        source=_ATHALYE,
        build=lambda: RandomMember([network("digits/wide"), network("digits/cropped"), network("digits/sigma01")]),
        stand_in=lambda: MeanOf([network("digits/wide"), network("digits/cropped"), network("digits/sigma01")]),
    ),
)

_TRAINED = (
    ZooEntry(
        name="ls095_sigma03",
        label="masked",
        half="calibration",
        kind="trained",
        dataset="digits",
        why="Label smoothing 0.95 with noise: PGD on the cross-entropy stops short.",
        source=_SHAFAHI,
        build=lambda: network("digits/ls095_sigma03"),
    ),
    ZooEntry(
        name="lsq_sigma03",
        label="masked",
        half="held-out",
        kind="trained",
        dataset="digits",
        why="Logit squeezing with noise: PGD on the cross-entropy stops short.",
        source=_SHAFAHI,
        build=lambda: network("digits/lsq5_sigma03"),
    ),
    ZooEntry(
        name="clp_sigma03",
        label="masked",
        half="calibration",
        kind="trained",
        dataset="digits",
        why="Clean logit pairing with noise: PGD on the cross-entropy stops short.",
        source="Kannan et al. 2018, Adversarial Logit Pairing; Mosbach et al. 2018, Logit Pairing Methods Can Fool",
        build=lambda: network("digits/clp_sigma03"),
    ),
    ZooEntry(
        name="ls099_sigma03",
        label="masked",
        half="held-out",
        kind="trained",
        dataset="digits",
        why="Label smoothing 0.99 with noise: PGD on the cross-entropy stops short.",
        source=_SHAFAHI,
        build=lambda: network("digits/ls099_sigma03"),
    ),
    ZooEntry(
        name="mnist_lsq2_sigma05",
        label="masked",
        half="calibration",
        kind="trained",
        dataset="mnist",
        why="Logit squeezing 2 with noise on MNIST: 40 steps of PGD stop short.",
        source=_SHAFAHI,
        build=lambda: network("mnist/lsq2_sigma05"),
    ),
    ZooEntry(
        name="mnist_ls095_sigma03",
        label="masked",
        half="held-out",
        kind="trained",
        dataset="mnist",
        why="Label smoothing 0.95 with noise on MNIST: 40 steps of PGD stop short.",
        source=_SHAFAHI,
        build=lambda: network("mnist/ls095_sigma03"),
    ),
    ZooEntry(
        name="mnist_at",
        label="masked",
        half="calibration",
        kind="trained",
        dataset="mnist",
        why="Adversarial training on a tenth of its iterations and an eighth of its steps: 40 steps of PGD stop short.",
        source="Madry et al. 2018, with the CPU budget of this project's card",
        build=lambda: network("mnist/at"),
    ),
)

MASKED = (*_SATURATION, *_NO_GRADIENT, *_WRONG_GRADIENT, *_STRAIGHT_THROUGH, *_RANDOM, *_TRAINED)
"""All masked models, kind by kind."""
