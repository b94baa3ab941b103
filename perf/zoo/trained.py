"""Masked models whose training causes the masking. Their labels are measured, because no wrapper hides the gradient."""

from __future__ import annotations

from zoo.entry import ZooEntry, load_network

__all__ = ["TRAINED"]

_SHAFAHI = "Shafahi et al. 2019, Label Smoothing and Logit Squeezing"

TRAINED = (
    ZooEntry(
        name="ls095_sigma03",
        label="masked",
        half="calibration",
        kind="trained",
        dataset="digits",
        why="Label smoothing 0.95 with noise: PGD on the cross-entropy stops short.",
        source=_SHAFAHI,
        build=lambda: load_network("digits/ls095_sigma03"),
    ),
    ZooEntry(
        name="lsq_sigma04",
        label="masked",
        half="held-out",
        kind="trained",
        dataset="digits",
        why="Logit squeezing with noise: PGD on the cross-entropy stops short.",
        source=_SHAFAHI,
        build=lambda: load_network("digits/lsq5_sigma04"),
    ),
    ZooEntry(
        name="clp_sigma03",
        label="masked",
        half="calibration",
        kind="trained",
        dataset="digits",
        why="Clean logit pairing with noise: PGD on the cross-entropy stops short.",
        source="Kannan et al. 2018, Adversarial Logit Pairing; Mosbach et al. 2018, Logit Pairing Methods Can Fool",
        build=lambda: load_network("digits/clp_sigma03"),
    ),
    ZooEntry(
        name="ls099_sigma03",
        label="masked",
        half="held-out",
        kind="trained",
        dataset="digits",
        why="Label smoothing 0.99 with noise: PGD on the cross-entropy stops short.",
        source=_SHAFAHI,
        build=lambda: load_network("digits/ls099_sigma03"),
    ),
    ZooEntry(
        name="mnist_lsq2_sigma05",
        label="masked",
        half="calibration",
        kind="trained",
        dataset="mnist",
        why="Logit squeezing 2 with noise on MNIST: 40 steps of PGD stop short.",
        source=_SHAFAHI,
        build=lambda: load_network("mnist/lsq2_sigma05"),
    ),
    ZooEntry(
        name="mnist_ls095_sigma03",
        label="masked",
        half="held-out",
        kind="trained",
        dataset="mnist",
        why="Label smoothing 0.95 with noise on MNIST: 40 steps of PGD stop short.",
        source=_SHAFAHI,
        build=lambda: load_network("mnist/ls095_sigma03"),
    ),
    ZooEntry(
        name="mnist_at",
        label="masked",
        half="calibration",
        kind="trained",
        dataset="mnist",
        why="Adversarial training for a tenth of its iterations: 40 steps of PGD stop short.",
        source="Madry et al. 2018, trained for 8,781 of 100,000 iterations",
        build=lambda: load_network("mnist/at"),
    ),
)
