"""The definitions of all figures, and the models in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from robbench.core.errors import ResultError, unknown_name
from robbench.papers.figures.activations import plan_activations
from robbench.papers.figures.findings import FINDINGS
from robbench.papers.figures.histograms import GAPS, GRADIENTS, LOGITS, Quantity, plan_histograms
from robbench.papers.figures.images import plan_confident_images, plan_neighbours
from robbench.papers.figures.landscapes import Plane, plan_landscapes
from robbench.papers.figures.logits import plan_fixed_logits, plan_logit_gaps, plan_logit_orders
from robbench.papers.figures.manifolds import plan_manifolds, plan_simulated_capacity
from robbench.papers.figures.noise import plan_noise_accuracy, plan_smoothed_certificates
from robbench.papers.figures.steps import plan_step_sizes
from robbench.papers.figures.students import plan_students
from robbench.papers.figures.surrogate import plan_surrogate
from robbench.papers.figures.training import (
    plan_gap_evolution,
    plan_logit_evolution,
    plan_seed_gaps,
    plan_seed_overlaps,
)
from robbench.papers.figures.tsipras import TSIPRAS
from robbench.report.figures.captions import CAPTIONS
from robbench.report.figures.gallery import plan_gallery
from robbench.report.figures.robustness import plan_classes_figure, plan_eps_figure, plan_steps_figure
from robbench.report.figures.source import FigureData, FigurePlan

__all__ = ["FIGURES", "FigureDefinition", "find_figure"]

ModelChoices = Mapping[str, Sequence[Sequence[str]]]
"""Data set -> for each model of the paper's figure, its name here, followed by models that may replace it."""


@dataclass(frozen=True)
class FigureDefinition:
    """The definition of a figure.

    Attributes:
        id: name of the figure on the command line.
        title: title of the figure.
        datasets: data sets of the figure. The first is the default.
        make: (data, heading, data set) -> plan of the figure.
        caption: what to see in it.
        credit: the figure of a paper that it follows.
        is_for_any: whether a person can choose the models in it.
    """

    id: str
    title: str
    datasets: tuple[str, ...]
    make: Callable[[FigureData, str, str], FigurePlan]
    caption: str
    credit: str = ""
    is_for_any: bool = False

    def plan(self, data: FigureData, dataset: str) -> FigurePlan:
        """Plan the figure for a data set, with its heading and caption."""
        return replace(self.make(data, self.format_heading(dataset), dataset), caption=self.caption)

    def format_heading(self, dataset: str) -> str:
        """Return the heading of the figure for a data set."""
        return f"{self.title}, {dataset}" + (f"\n{self.credit}" if self.credit else "")


_PAPER = "Shafahi et al. 2019"
_ARXIV_NUMBERS = {"5": "6", "6": "7", "7": "8", "8": "10", "9": "11"}
"""Number of a figure in the paper's first version -> in arXiv:1910.11585, where it differs."""
_NATURAL = ("natural", "natural_wrn28_10", "natural_resnet18")
_AT = ("at", "at_wrn28_10", "at_resnet18")
_LS_NOISE = ("ls095_sigma03", "ls095_sigma05", "ls02_sigma05", "ls095_sigma30")
_LSQ_NOISE = ("lsq2_sigma05", "lsq2_sigma03", "lsq5_sigma05", "lsq10_sigma30")

_TRAINING: ModelChoices = {
    "mnist": (_NATURAL, _AT),
    "digits": (_NATURAL, _AT, ("trades",)),
    "cifar10": (_NATURAL, _AT),
}
_ADVERSARIES: ModelChoices = {
    "mnist": (_NATURAL, ("at_weak",), _AT),
    "cifar10": (_NATURAL, ("at_weak",), _AT),
    "digits": _TRAINING["digits"],
}
_SMOOTHING: ModelChoices = {
    "mnist": (_NATURAL, ("ls075", "ls095", "ls02"), ("sigma05", "sigma03"), ("ls075_sigma05", *_LS_NOISE)),
    "digits": (_NATURAL, _LS_NOISE),
}
_BOTH: ModelChoices = {
    "mnist": (
        _NATURAL,
        ("ls02_sigma05",),
        ("ls075_sigma05", *_LS_NOISE),
        ("lsq05_sigma05",),
        _LSQ_NOISE,
    ),
    "digits": (_NATURAL, _LS_NOISE, _LSQ_NOISE),
}
_SQUEEZING: ModelChoices = {
    "mnist": (_NATURAL, ("lsq05", "lsq2"), ("sigma05", "sigma03"), ("lsq05_sigma05", *_LSQ_NOISE)),
    "digits": (_NATURAL, _LSQ_NOISE),
}
_LAYERS: ModelChoices = {
    "mnist": (_NATURAL, _AT, ("sigma05", "sigma03"), ("ls02_sigma05", *_LS_NOISE), ("lsq05_sigma05", *_LSQ_NOISE)),
    "digits": (_NATURAL, _AT, _LS_NOISE, _LSQ_NOISE),
}


def _choose_models(data: FigureData, dataset: str, choices: ModelChoices) -> tuple[list[str], list[str]]:
    """Choose a measured model for each model of the paper's figure.

    Return the chosen models, and the commands that measure the paper's models that are not measured. Models without a
    card are ignored.
    """
    names, missing = [], []
    for candidates in choices[dataset]:
        known = [f"{dataset}/{name}" for name in candidates if data.find_entry(f"{dataset}/{name}")]
        measured = [name for name in known if data.read_linear(name) is not None and name not in names]
        names += measured[:1]
        if known and measured[:1] != known[:1] and known[0] not in names:
            replacement = f" ({measured[0]} replaces it)" if measured else ""
            missing.append(data.make_command(known[0], "measure linear -m {}") + replacement)
    return names, missing


def _plan_histograms(
    choices: ModelChoices, panels: Sequence[Quantity], finding: str, data: FigureData, title: str, dataset: str
) -> FigurePlan:
    names, missing = _choose_models(data, dataset, choices)
    return replace(plan_histograms(data, title, dataset, names, panels, FINDINGS[finding]), missing=missing)


def _plan_activations(layer: str, data: FigureData, title: str, dataset: str) -> FigurePlan:
    names, missing = _choose_models(data, dataset, _LAYERS)
    return replace(plan_activations(data, title, names, layer), missing=missing)


_GAPS_CAPTION = (
    "What to see: L is the logit gap divided by the gradient gap. A curve of L further right means that the linear "
    "model promises more robustness. The two panels on the left say which of the gaps differs between the models."
)
_LOGITS_CAPTION = (
    "What to see: a curve further left means smaller logits. Small logits alone are no robustness, because "
    "gradients can shrink with them."
)
_GRADIENTS_CAPTION = (
    "What to see: a curve further left means smaller gradients. They help only if the logit gaps of the same models "
    "shrink less, because L is the ratio of the two."
)
_PENULTIMATE_CAPTION = (
    "What to see: how many neurons a model uses, and how strongly. A curve that ends early has many neurons that no "
    "image activates."
)
_LAST_CAPTION = (
    "What to see: the height of a curve is the size of a model's logits. A flat curve means that no class has larger "
    "logits than the others."
)
_LANDSCAPES: dict[Plane, tuple[str, str, str]] = {
    "random": (
        "Loss around images, two random directions",
        "5",
        "What to see: whether the loss is smooth, and whether it rises at all. A flat panel does not mean robust.",
    ),
    "adversarial": (
        "Loss around images, an adversarial and a random direction",
        "9",
        "What to see: whether the loss rises smoothly upwards. Then a gradient leads an attack.",
    ),
}
_SEGUIN_CAPTIONS = {
    "1": "What to see: how far the logits of training images grow, and whether the band is wider above than below.",
    "A.6": "What to see: a curve of students that falls to the right says that a late teacher teaches less robustness.",
    "B.1": "What to see: whether the gaps of A and B become alike, and whether C stays below B.",
    "B.2": "What to see: whether the images that only one model is sure of are hard to read.",
    "B.3": "What to see: whether the neighbours on the right look more like the seed image than those in the middle.",
    "B.5": "What to see: A, whose gaps are small. B, a curve that rises: images with a large gap withstand the attack.",
    "B.6": "What to see: a higher curve means that two networks order the classes more alike.",
    "2": (
        "What to see: A, whether robust models have smaller gaps. B, whether images with a larger gap withstand the "
        "attack more often: then a curve rises."
    ),
    "3": (
        "What to see: A, the two models rank the orange images very differently. B, a short bar means that two models "
        "agree. C, most wrong answers are the class that resembles the true one most. D, a higher curve means a more "
        "similar order."
    ),
    "4": (
        "What to see: A, the three largest logits stay, and the others change. B, the more logits stay, the less the "
        "softmax changes."
    ),
    "5": (
        "What to see: A, a higher curve means that classes of perturbed images are easier to tell apart. B and C, a "
        "smaller radius or dimension means tighter manifolds. D, the higher, the more alike their centres."
    ),
    "A.8": "What to see: on the diagonal, the theory predicts the simulated capacity. Below it, the theory is too low.",
    "C": (
        "What to see: C.1, the solutions lie below the line of β only to the right of the solid vertical line. C.2 and "
        "C.3, darker means a smaller loss and a smaller change of the gap."
    ),
}


def _paper_figure(
    number: str,
    title: str,
    datasets: tuple[str, ...],
    make: Callable[[FigureData, str, str], FigurePlan],
    caption: str,
) -> FigureDefinition:
    other = f" ({_ARXIV_NUMBERS[number]} in arXiv:1910.11585)" if number in _ARXIV_NUMBERS else ""
    credit = f"after Figure {number} of {_PAPER}{other}"
    return FigureDefinition(f"shafahi2019-{number}", title, datasets, make, caption, credit)


def _landscape_figure(plane: Plane) -> FigureDefinition:
    title, number, see = _LANDSCAPES[plane]
    return FigureDefinition(
        f"landscape-{plane}",
        title,
        ("digits", "mnist", "cifar10"),
        partial(plan_landscapes, plane),
        see,
        f"after Figure {number} of {_PAPER} (arXiv:1910.11585)",
        is_for_any=True,
    )


def _gap_figure(
    number: str, title: str, datasets: tuple[str, ...], choices: ModelChoices, finding: str
) -> FigureDefinition:
    return _paper_figure(number, title, datasets, partial(_plan_histograms, choices, GAPS, finding), _GAPS_CAPTION)


def _seguin_figure(
    number: str,
    title: str,
    make: Callable[[FigureData, str, str], FigurePlan],
    datasets: tuple[str, ...] = ("digits", "mnist"),
    original: str = "",
) -> FigureDefinition:
    credit = f"after {original or f'Figure {number}'} of Seguin et al. 2021"
    return FigureDefinition(f"seguin2021-{number}", title, datasets, make, _SEGUIN_CAPTIONS[number], credit)


def _tsipras_figure(
    number: str,
    title: str,
    datasets: tuple[str, ...],
    make: Callable[[FigureData, str, str], FigurePlan],
    caption: str,
) -> FigureDefinition:
    credit = f"after Figure {number} of Tsipras et al. 2019"
    return FigureDefinition(f"tsipras2019-{number}", title, datasets, make, caption, credit)


def _result_figure(name: str, title: str, make: Callable[[FigureData, str, str], FigurePlan]) -> FigureDefinition:
    return FigureDefinition(
        name, title, ("mnist", "digits", "cifar10", "fashion_mnist", "cifar100"), make, CAPTIONS[name]
    )


_BOTH_SETS = ("mnist", "digits")
_LOGIT_HISTOGRAMS = partial(_plan_histograms, _ADVERSARIES, LOGITS, "logits")
_GRADIENT_HISTOGRAMS = partial(_plan_histograms, _BOTH, GRADIENTS, "gradients")
_PENULTIMATE, _LAST = partial(_plan_activations, "penultimate"), partial(_plan_activations, "logits")
_ALL = (
    _gap_figure("1", "Adversarial training and the linear model", _BOTH_SETS, _TRAINING, "training"),
    _paper_figure("2", "Logits of adversarial training", (*_BOTH_SETS, "cifar10"), _LOGIT_HISTOGRAMS, _LOGITS_CAPTION),
    _gap_figure("3", "Label smoothing and noise", _BOTH_SETS, _SMOOTHING, "smoothing"),
    _gap_figure("4", "Label smoothing and logit squeezing with noise", _BOTH_SETS, _BOTH, "both"),
    _gap_figure("5", "Adversarial training and the linear model", ("cifar10",), _TRAINING, "training"),
    _paper_figure("6", "Gradients of smoothing and squeezing", _BOTH_SETS, _GRADIENT_HISTOGRAMS, _GRADIENTS_CAPTION),
    _gap_figure("7", "Logit squeezing and noise", _BOTH_SETS, _SQUEEZING, "squeezing"),
    _paper_figure("8", "Activations of the penultimate layer", _BOTH_SETS, _PENULTIMATE, _PENULTIMATE_CAPTION),
    _paper_figure("9", "Activations of the logit layer", _BOTH_SETS, _LAST, _LAST_CAPTION),
    _seguin_figure("1", "Maximum logit over a training", plan_logit_evolution, original="Figure 1 (B.4)"),
    _seguin_figure("2", "Logit gaps and who withstands the attack", plan_logit_gaps),
    _seguin_figure("3", "Order of the images and of the classes", plan_logit_orders),
    _seguin_figure("4", "The largest logits kept, the others changed", plan_fixed_logits),
    _seguin_figure("5", "Geometry of the manifolds in each layer", plan_manifolds),
    _seguin_figure("A.6", "Students by teacher and loss", plan_students, original="Figures A.6 and A.7"),
    _seguin_figure("A.8", "Capacity of manifolds, theory and simulation", plan_simulated_capacity),
    _seguin_figure("B.1", "Logit gap over a training", plan_gap_evolution),
    _seguin_figure("B.2", "Images that two models are sure of", plan_confident_images),
    _seguin_figure("B.3", "Nearest images by the cosine of the logits", plan_neighbours),
    _seguin_figure("B.5", "Logit gaps with three seeds", plan_seed_gaps),
    _seguin_figure("B.6", "Order of the classes with three seeds", plan_seed_overlaps),
    _seguin_figure("C", "The analytic model of logits", plan_surrogate, ("digits",), "Figures C.1-C.3"),
    *(_landscape_figure(plane) for plane in _LANDSCAPES),
    FigureDefinition(
        "mosbach2018",
        "Step size and number of steps of PGD",
        _BOTH_SETS[::-1],
        plan_step_sizes,
        "What to see: a model whose numbers change much between cells needs a careful choice of the attack.",
        "after Mosbach et al. 2018",
    ),
    FigureDefinition(
        "noise-certified",
        "Certified accuracy of smoothed models",
        ("digits",),
        plan_smoothed_certificates,
        "What to see: a higher curve means that more images are proven at that radius. All curves end at one radius, "
        "which the number of draws sets.",
    ),
    FigureDefinition(
        "noise-accuracy",
        "Robust accuracy over the noise in training",
        ("digits", "mnist"),
        plan_noise_accuracy,
        "What to see: A, whether models with more noise withstand the usual attack. B, what of it a stronger attack "
        "leaves.",
        "after Section 4 of Shafahi et al. 2019",
    ),
    *(_tsipras_figure(*figure) for figure in TSIPRAS),
    _result_figure("accuracy-eps", "Accuracy over the radius", plan_eps_figure),
    _result_figure("accuracy-steps", "Accuracy over the steps of an attack", plan_steps_figure),
    _result_figure("per-class", "Robust accuracy by class", plan_classes_figure),
    _result_figure("gallery", "Adversarial examples", plan_gallery),
)
FIGURES = {figure.id: figure for figure in _ALL}
"""Id -> definition, for all figures."""


def find_figure(name: str) -> FigureDefinition:
    """Return the figure with an id. A number alone is the number of a figure of Shafahi et al. 2019.

    Raises:
        ResultError: there is no such figure. The error names the known figures.
    """
    name = f"shafahi2019-{name}" if name.isdecimal() else name
    if name not in FIGURES:
        raise ResultError(unknown_name("figure", name, [*FIGURES, "all"]))
    return FIGURES[name]
