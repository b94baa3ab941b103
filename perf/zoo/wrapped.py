"""Masked models made of a trained network and a wrapper that hides the gradient."""

from __future__ import annotations

import torch
from torch import nn

from robbench.models.architectures import build
from zoo.entry import ZooEntry, load_network
from zoo.images import Jpeg, MedianFilter, Quantize, Ripple, StraightThrough, Thermometer
from zoo.networks import (
    Decoy,
    KillGradient,
    KWinners,
    Probabilities,
    ReverseGradient,
    RoundedReLU,
    Scale,
    replace_activations,
)

__all__ = ["WRAPPED"]

_ATHALYE = "Athalye et al. 2018, Obfuscated Gradients Give a False Sense of Security"
_CARLINI = "Carlini & Wagner 2016, Defensive Distillation is Not Robust to Adversarial Examples"


def _untrained(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build("digits_convnet", {"width": 8, "hidden": 32}, 10, (1, 8, 8))


_LOGIT_SCALE = (
    ZooEntry(
        name="natural_times_1000",
        label="masked",
        half="calibration",
        kind="logit scale",
        dataset="digits",
        why="Logits a thousand times larger: the softmax saturates, and the gradient of the cross-entropy underflows.",
        source=_CARLINI,
        build=lambda: nn.Sequential(load_network("digits/natural"), Scale(1000)),
        stand_in=lambda: load_network("digits/natural"),
    ),
    ZooEntry(
        name="distilled_t100",
        label="masked",
        half="held-out",
        kind="logit scale",
        dataset="digits",
        why="Distilled at temperature 100 and asked at 1, which is a student's logits times 100.",
        source="Papernot et al. 2016, Distillation as a Defense; " + _CARLINI,
        build=lambda: nn.Sequential(load_network("digits/student"), Scale(100)),
        stand_in=lambda: load_network("digits/student"),
    ),
    ZooEntry(
        name="natural_probabilities_t001",
        label="masked",
        half="calibration",
        kind="logit scale",
        dataset="digits",
        why="Answers with probabilities at temperature 0.01, which are 0 and 1 exactly.",
        source="Croce & Hein 2020, AutoAttack's check of the output's range",
        build=lambda: nn.Sequential(load_network("digits/natural"), Scale(100), Probabilities()),
        stand_in=lambda: load_network("digits/natural"),
    ),
    ZooEntry(
        name="at_probabilities_t002",
        label="masked",
        half="held-out",
        kind="logit scale",
        dataset="digits",
        why="An adversarially trained network that answers with probabilities at temperature 0.02.",
        source="Croce & Hein 2020, AutoAttack's check of the output's range",
        build=lambda: nn.Sequential(load_network("digits/at"), Scale(50), Probabilities()),
        stand_in=lambda: load_network("digits/at"),
    ),
    ZooEntry(
        name="trades_times_01",
        label="masked",
        half="held-out",
        kind="logit scale",
        dataset="digits",
        why="Logits ten times smaller: the cross-entropy pulls at every class alike, as where logits are squeezed.",
        source="Mosbach et al. 2018, Logit Pairing Methods Can Fool Gradient-Based Attacks",
        build=lambda: nn.Sequential(load_network("digits/trades"), Scale(0.1)),
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
        build=lambda: nn.Sequential(Quantize(8), load_network("digits/natural")),
        stand_in=lambda: nn.Sequential(StraightThrough(Quantize(8)), load_network("digits/natural")),
    ),
    ZooEntry(
        name="at_jpeg",
        label="masked",
        half="held-out",
        kind="no gradient",
        dataset="digits",
        why="Cosine coefficients rounded as JPEG rounds them, before an adversarially trained network.",
        source="Guo et al. 2018, Countering Adversarial Images Using Input Transformations; " + _ATHALYE,
        build=lambda: nn.Sequential(Jpeg(0.1), load_network("digits/at")),
        stand_in=lambda: nn.Sequential(StraightThrough(Jpeg(0.1)), load_network("digits/at")),
    ),
    ZooEntry(
        name="natural_rounded_activations",
        label="masked",
        half="calibration",
        kind="no gradient",
        dataset="digits",
        why="Activations rounded to multiples of 0.05: the gradient is zero everywhere.",
        source=_ATHALYE,
        build=lambda: replace_activations(load_network("digits/natural"), lambda: RoundedReLU(0.05)),
        stand_in=lambda: load_network("digits/natural"),
    ),
    ZooEntry(
        name="at_killed_gradient",
        label="masked",
        half="held-out",
        kind="no gradient",
        dataset="digits",
        why="A layer that passes images on and returns a gradient of zero, before an adversarially trained network.",
        source="fra31/auto-attack, issue 43",
        build=lambda: nn.Sequential(KillGradient(), load_network("digits/at")),
        stand_in=lambda: load_network("digits/at"),
    ),
    ZooEntry(
        name="natural_thermometer",
        label="masked",
        half="calibration",
        kind="no gradient",
        dataset="digits",
        why="Pixels as 16 bits, made by comparisons that leave no autograd graph.",
        source="Buckman et al. 2018, Thermometer Encoding; " + _ATHALYE,
        build=lambda: nn.Sequential(Thermometer(16), load_network("digits/natural")),
        stand_in=lambda: nn.Sequential(StraightThrough(Thermometer(16)), load_network("digits/natural")),
    ),
    ZooEntry(
        name="sigma01_median_filter",
        label="masked",
        half="held-out",
        kind="no gradient",
        dataset="digits",
        why="A median filter computed by numpy leaves no autograd graph.",
        source="Xu et al. 2018, Feature Squeezing",
        build=lambda: nn.Sequential(MedianFilter(2), load_network("digits/sigma01")),
        stand_in=lambda: nn.Sequential(StraightThrough(MedianFilter(2)), load_network("digits/sigma01")),
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
        build=lambda: nn.Sequential(Ripple(0.002, 3000.0), load_network("digits/natural")),
        stand_in=lambda: load_network("digits/natural"),
    ),
    ZooEntry(
        name="at_k_winners",
        label="masked",
        half="held-out",
        kind="wrong gradient",
        dataset="digits",
        why="Only the largest twelfth of a layer's activations passes, and which these are changes all the time.",
        source="Xiao et al. 2020, Enhancing Adversarial Defense by k-Winners-Take-All",
        build=lambda: replace_activations(load_network("digits/at"), lambda: KWinners(0.08)),
    ),
    ZooEntry(
        name="at_reversed_gradient",
        label="masked",
        half="calibration",
        kind="wrong gradient",
        dataset="digits",
        why="A layer that reverses the gradient, before an adversarially trained network.",
        source=_ATHALYE,
        build=lambda: nn.Sequential(ReverseGradient(), load_network("digits/at")),
        stand_in=lambda: load_network("digits/at"),
    ),
    ZooEntry(
        name="natural_decoy",
        label="masked",
        half="held-out",
        kind="wrong gradient",
        dataset="digits",
        why="The logits of a trained network with the gradient of an untrained one.",
        source=_ATHALYE,
        build=lambda: Decoy(load_network("digits/natural"), _untrained(seed=0)),
        stand_in=lambda: load_network("digits/natural"),
    ),
)

_STRAIGHT_THROUGH = (
    ZooEntry(
        name="sigma03_black_and_white_straight",
        label="masked",
        half="calibration",
        kind="straight-through",
        dataset="digits",
        why="Pixels rounded to black or white, with the gradient of the identity in place of its own, which is zero.",
        source="Xu et al. 2018, Feature Squeezing; " + _ATHALYE,
        build=lambda: nn.Sequential(StraightThrough(Quantize(2)), load_network("digits/sigma03")),
        own_gradient=False,
    ),
    ZooEntry(
        name="natural_jpeg_straight",
        label="masked",
        half="held-out",
        kind="straight-through",
        dataset="digits",
        why="JPEG-like rounding, with the gradient of the identity in place of its own.",
        source="Dziugaite et al. 2016, A Study of the Effect of JPG Compression; " + _ATHALYE,
        build=lambda: nn.Sequential(StraightThrough(Jpeg(0.2)), load_network("digits/natural")),
        own_gradient=False,
    ),
    ZooEntry(
        name="at_17_levels_straight",
        label="masked",
        half="held-out",
        kind="straight-through",
        dataset="digits",
        why="Pixels rounded to the 17 levels that the images have anyway, with the gradient of the identity.",
        source=_ATHALYE,
        build=lambda: nn.Sequential(StraightThrough(Quantize(17)), load_network("digits/at")),
        own_gradient=False,
    ),
    ZooEntry(
        name="trades_9_levels_straight",
        label="masked",
        half="calibration",
        kind="straight-through",
        dataset="digits",
        why="Pixels rounded to nine levels, with the gradient of the identity.",
        source=_ATHALYE,
        build=lambda: nn.Sequential(StraightThrough(Quantize(9)), load_network("digits/trades")),
        own_gradient=False,
    ),
    ZooEntry(
        name="at_eps01_13_levels_straight",
        label="masked",
        half="held-out",
        kind="straight-through",
        dataset="digits",
        why="Pixels rounded to 13 levels, with the gradient of the identity.",
        source=_ATHALYE,
        build=lambda: nn.Sequential(StraightThrough(Quantize(13)), load_network("digits/at_eps01")),
        own_gradient=False,
    ),
)

WRAPPED = (*_LOGIT_SCALE, *_NO_GRADIENT, *_WRONG_GRADIENT, *_STRAIGHT_THROUGH)
"""All of them, kind by kind."""
