"""Masked models that answer at random. One answer proves nothing, and one gradient is noise."""

from __future__ import annotations

from torch import nn

from zoo.entry import ZooEntry, load_network
from zoo.images import InputNoise, NoiseOffGrid, RandomResizePad
from zoo.networks import Dropout, MeanOf, RandomMember, replace_activations

__all__ = ["AT_RANDOM"]

_ATHALYE = "Athalye et al. 2018, Obfuscated Gradients Give a False Sense of Security"

AT_RANDOM = (
    ZooEntry(
        name="sigma03_input_noise",
        label="masked",
        half="calibration",
        kind="random",
        dataset="digits",
        why="Gaussian noise of 0.3 on every image it is asked about.",
        source="Cohen et al. 2019, Certified Adversarial Robustness via Randomized Smoothing; " + _ATHALYE,
        build=lambda: nn.Sequential(InputNoise(0.3), load_network("digits/sigma03")),
        stand_in=lambda: load_network("digits/sigma03"),
    ),
    ZooEntry(
        name="cropped_resize_pad",
        label="masked",
        half="held-out",
        kind="random",
        dataset="digits",
        why="Images shrunk by up to a pixel and put at a random place.",
        source="Xie et al. 2018, Mitigating Adversarial Effects Through Randomization",
        build=lambda: nn.Sequential(RandomResizePad(7), load_network("digits/cropped")),
        stand_in=lambda: load_network("digits/cropped"),
    ),
    ZooEntry(
        name="natural_dropout",
        label="masked",
        half="calibration",
        kind="random",
        dataset="digits",
        why="Dropout of 0.3 behind every activation, also in eval mode.",
        source="Feinman et al. 2017, Detecting Adversarial Samples from Artifacts; " + _ATHALYE,
        build=lambda: replace_activations(load_network("digits/natural"), lambda: Dropout(0.3)),
        stand_in=lambda: load_network("digits/natural"),
    ),
    ZooEntry(
        name="random_member",
        label="masked",
        half="held-out",
        kind="random",
        dataset="digits",
        why="Every answer comes from one of three networks, drawn anew.",
        source=_ATHALYE,
        build=lambda: RandomMember(
            [load_network("digits/wide"), load_network("digits/cropped"), load_network("digits/sigma01")]
        ),
        stand_in=lambda: MeanOf(
            [load_network("digits/wide"), load_network("digits/cropped"), load_network("digits/sigma01")]
        ),
    ),
    ZooEntry(
        name="at_random_off_grid",
        label="masked",
        half="calibration",
        kind="random off the grid",
        dataset="digits",
        why="Gaussian noise of 0.2 on every image whose pixels are not those of a test image.",
        source=_ATHALYE,
        build=lambda: nn.Sequential(NoiseOffGrid(0.2, 16), load_network("digits/at")),
        stand_in=lambda: load_network("digits/at"),
    ),
    ZooEntry(
        name="trades_random_off_grid",
        label="masked",
        half="held-out",
        kind="random off the grid",
        dataset="digits",
        why="Gaussian noise of 0.1 on every image whose pixels are not those of a test image.",
        source=_ATHALYE,
        build=lambda: nn.Sequential(NoiseOffGrid(0.1, 16), load_network("digits/trades")),
        stand_in=lambda: load_network("digits/trades"),
    ),
)
