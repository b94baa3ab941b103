"""The honest models of the zoo. The usual attack is about as strong on them as the best known attack."""

from __future__ import annotations

from torch import nn

from zoo.entry import ZooEntry, load_network
from zoo.networks import LogProbabilities, MeanOf, Scale, Shift, replace_activations

__all__ = ["HONEST"]

_MADRY = "Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks"
_ZHANG = "Zhang et al. 2019, Theoretically Principled Trade-off between Robustness and Accuracy"
_CARLINI = "Carlini & Wagner 2016, Defensive Distillation is Not Robust to Adversarial Examples"
_COHEN = "Cohen et al. 2019, Certified Adversarial Robustness via Randomized Smoothing"

_UNDEFENDED = (
    ZooEntry(
        name="natural",
        label="honest",
        half="calibration",
        kind="undefended",
        dataset="digits",
        why="Cross-entropy on clean images: every attack breaks it.",
        source=_MADRY,
        build=lambda: load_network("digits/natural"),
    ),
    ZooEntry(
        name="wide",
        label="honest",
        half="held-out",
        kind="undefended",
        dataset="digits",
        why="As natural, one and a half times as wide.",
        source=_MADRY,
        build=lambda: load_network("digits/wide"),
    ),
    ZooEntry(
        name="shallow",
        label="honest",
        half="calibration",
        kind="undefended",
        dataset="digits",
        why="As natural, an eighth as wide.",
        source=_MADRY,
        build=lambda: load_network("digits/shallow"),
    ),
    ZooEntry(
        name="linear",
        label="honest",
        half="held-out",
        kind="undefended",
        dataset="digits",
        why="Logistic regression: its gradient is the same everywhere.",
        source="Goodfellow et al. 2015, Explaining and Harnessing Adversarial Examples",
        build=lambda: load_network("digits/linear"),
    ),
    ZooEntry(
        name="mlp",
        label="honest",
        half="calibration",
        kind="undefended",
        dataset="digits",
        why="A perceptron with two hidden layers.",
        source=_MADRY,
        build=lambda: load_network("digits/mlp"),
    ),
    ZooEntry(
        name="batchnorm",
        label="honest",
        half="held-out",
        kind="undefended",
        dataset="digits",
        why="A residual network with batch normalization.",
        source="Zagoruyko & Komodakis 2016, Wide Residual Networks",
        build=lambda: load_network("digits/batchnorm"),
    ),
    ZooEntry(
        name="cropped",
        label="honest",
        half="calibration",
        kind="undefended",
        dataset="digits",
        why="Cross-entropy on randomly shifted images.",
        source=_MADRY,
        build=lambda: load_network("digits/cropped"),
    ),
    ZooEntry(
        name="mnist_natural",
        label="honest",
        half="held-out",
        kind="undefended",
        dataset="mnist",
        why="Madry et al.'s network, cross-entropy on clean images.",
        source=_MADRY,
        build=lambda: load_network("mnist/natural"),
    ),
)

_NOISE = (
    ZooEntry(
        name="sigma01",
        label="honest",
        half="calibration",
        kind="noise alone",
        dataset="digits",
        why="Trained with Gaussian noise of 0.1, and asked without.",
        source=_COHEN,
        build=lambda: load_network("digits/sigma01"),
    ),
    ZooEntry(
        name="sigma03",
        label="honest",
        half="held-out",
        kind="noise alone",
        dataset="digits",
        why="Trained with Gaussian noise of 0.3, and asked without.",
        source=_COHEN,
        build=lambda: load_network("digits/sigma03"),
    ),
)

_ADVERSARIAL = (
    ZooEntry(
        name="at",
        label="honest",
        half="calibration",
        kind="adversarial training",
        dataset="digits",
        why="Trained on the attack at the benchmark's radius.",
        source=_MADRY,
        build=lambda: load_network("digits/at"),
    ),
    ZooEntry(
        name="trades",
        label="honest",
        half="held-out",
        kind="adversarial training",
        dataset="digits",
        why="TRADES at the benchmark's radius.",
        source=_ZHANG,
        build=lambda: load_network("digits/trades"),
    ),
    ZooEntry(
        name="at_eps01",
        label="honest",
        half="calibration",
        kind="adversarial training",
        dataset="digits",
        why="Trained on the attack at half the benchmark's radius.",
        source=_MADRY,
        build=lambda: load_network("digits/at_eps01"),
    ),
    ZooEntry(
        name="at_eps03",
        label="honest",
        half="held-out",
        kind="adversarial training",
        dataset="digits",
        why="Trained on the attack at one and a half times the benchmark's radius.",
        source=_MADRY,
        build=lambda: load_network("digits/at_eps03"),
    ),
    ZooEntry(
        name="at_mlp",
        label="honest",
        half="calibration",
        kind="adversarial training",
        dataset="digits",
        why="A perceptron trained on the attack.",
        source=_MADRY,
        build=lambda: load_network("digits/at_mlp"),
    ),
    ZooEntry(
        name="trades_eps01",
        label="honest",
        half="held-out",
        kind="adversarial training",
        dataset="digits",
        why="TRADES at half the benchmark's radius.",
        source=_ZHANG,
        build=lambda: load_network("digits/trades_eps01"),
    ),
)

_HARMLESS = (
    ZooEntry(
        name="at_log_probabilities",
        label="honest",
        half="calibration",
        kind="harmless change",
        dataset="digits",
        why="Answers with log-probabilities: the cross-entropy of them is that of the logits.",
        source="log-softmax is idempotent",
        build=lambda: nn.Sequential(load_network("digits/at"), LogProbabilities()),
    ),
    ZooEntry(
        name="ensemble",
        label="honest",
        half="calibration",
        kind="harmless change",
        dataset="digits",
        why="The mean of the logits of two adversarially trained networks.",
        source="He et al. 2017, Adversarial Example Defenses: Ensembles of Weak Defenses Are Not Strong",
        build=lambda: MeanOf([load_network("digits/at"), load_network("digits/at_eps01")]),
    ),
    ZooEntry(
        name="at_softplus",
        label="honest",
        half="held-out",
        kind="harmless change",
        dataset="digits",
        why="Adversarially trained, then its ReLUs rounded off (softplus, β = 30): a smoother function, close to it.",
        source="Dugas et al. 2001, Incorporating Second-Order Functional Knowledge for Better Option Pricing",
        build=lambda: replace_activations(load_network("digits/at"), lambda: nn.Softplus(beta=30)),
    ),
)

_SCALED = (
    ZooEntry(
        name="natural_times_1000",
        label="honest",
        half="calibration",
        kind="logit scale",
        dataset="digits",
        why="Logits a thousand times larger: the plain cross-entropy underflows, the rescaled one does not.",
        source=_CARLINI,
        build=lambda: nn.Sequential(load_network("digits/natural"), Scale(1000)),
        stand_in=lambda: load_network("digits/natural"),
    ),
    ZooEntry(
        name="distilled_t100",
        label="honest",
        half="held-out",
        kind="logit scale",
        dataset="digits",
        why="Distilled at temperature 100 and asked at 1, which is a student's logits times 100.",
        source="Papernot et al. 2016, Distillation as a Defense; " + _CARLINI,
        build=lambda: nn.Sequential(load_network("digits/student"), Scale(100)),
        stand_in=lambda: load_network("digits/student"),
    ),
    ZooEntry(
        name="trades_times_01",
        label="honest",
        half="held-out",
        kind="logit scale",
        dataset="digits",
        why="Logits ten times smaller: the plain cross-entropy pulls at every class alike.",
        source="Mosbach et al. 2018, Logit Pairing Methods Can Fool Gradient-Based Attacks",
        build=lambda: nn.Sequential(load_network("digits/trades"), Scale(0.1)),
    ),
    ZooEntry(
        name="at_times_10",
        label="honest",
        half="calibration",
        kind="logit scale",
        dataset="digits",
        why="Adversarially trained, with logits ten times larger.",
        source=_CARLINI,
        build=lambda: nn.Sequential(load_network("digits/at"), Scale(10)),
    ),
    ZooEntry(
        name="at_eps01_times_100",
        label="honest",
        half="held-out",
        kind="logit scale",
        dataset="digits",
        why="Adversarially trained, with logits a hundred times larger.",
        source=_CARLINI,
        build=lambda: nn.Sequential(load_network("digits/at_eps01"), Scale(100)),
    ),
    ZooEntry(
        name="at_mlp_times_001",
        label="honest",
        half="calibration",
        kind="logit scale",
        dataset="digits",
        why="Adversarially trained, with logits a hundred times smaller.",
        source=_MADRY,
        build=lambda: nn.Sequential(load_network("digits/at_mlp"), Scale(0.01)),
    ),
    ZooEntry(
        name="sigma03_plus_50",
        label="honest",
        half="held-out",
        kind="logit scale",
        dataset="digits",
        why="Trained with noise, with 50 added to every logit.",
        source=_COHEN,
        build=lambda: nn.Sequential(load_network("digits/sigma03"), Shift(50)),
    ),
)

HONEST = (*_UNDEFENDED, *_NOISE, *_ADVERSARIAL, *_HARMLESS, *_SCALED)
"""All honest models, kind by kind."""
