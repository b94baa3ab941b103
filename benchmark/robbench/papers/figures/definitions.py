"""The definitions of all figures, and the models in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from robbench.core.errors import ResultError, unknown_name
from robbench.papers.figures.activations import plan_activations
from robbench.papers.figures.histograms import GAPS, GRADIENTS, LOGITS, Quantity, plan_histograms
from robbench.papers.figures.logits import plan_fixed_logits, plan_logit_gaps, plan_logit_orders
from robbench.papers.figures.manifolds import plan_manifolds, plan_simulated_capacity
from robbench.papers.figures.surrogate import plan_surrogate
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
        credit: the figure of a paper that it follows.
    """

    id: str
    title: str
    datasets: tuple[str, ...]
    make: Callable[[FigureData, str, str], FigurePlan]
    credit: str = ""

    def format_heading(self, dataset: str) -> str:
        """Return the heading of the figure for a data set."""
        return f"{self.title}, {dataset}" + (f"\n{self.credit}" if self.credit else "")


_PAPER = "Shafahi et al. 2019"
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
    choices: ModelChoices, panels: Sequence[Quantity], data: FigureData, title: str, dataset: str
) -> FigurePlan:
    names, missing = _choose_models(data, dataset, choices)
    return replace(plan_histograms(data, title, dataset, names, panels), missing=missing)


def _plan_activations(layer: str, data: FigureData, title: str, dataset: str) -> FigurePlan:
    names, missing = _choose_models(data, dataset, _LAYERS)
    return replace(plan_activations(data, title, names, layer), missing=missing)


def _paper_figure(
    number: str, title: str, datasets: tuple[str, ...], make: Callable[[FigureData, str, str], FigurePlan]
) -> FigureDefinition:
    return FigureDefinition(f"shafahi2019-{number}", title, datasets, make, f"after Figure {number} of {_PAPER}")


def _gap_figure(number: str, title: str, datasets: tuple[str, ...], choices: ModelChoices) -> FigureDefinition:
    return _paper_figure(number, title, datasets, partial(_plan_histograms, choices, GAPS))


def _seguin_figure(number: str, title: str, make: Callable[[FigureData, str, str], FigurePlan]) -> FigureDefinition:
    return FigureDefinition(
        f"seguin2021-{number}", title, ("digits", "mnist"), make, f"after Figure {number} of Seguin et al. 2021"
    )


_BOTH_SETS = ("mnist", "digits")
_EVERY = ("mnist", "digits", "cifar10", "fashion_mnist", "cifar100")
_ALL = (
    _gap_figure("1", "Adversarial training and the linear model", _BOTH_SETS, _TRAINING),
    _paper_figure(
        "2", "Logits of adversarial training", (*_BOTH_SETS, "cifar10"), partial(_plan_histograms, _ADVERSARIES, LOGITS)
    ),
    _gap_figure("3", "Label smoothing and noise", _BOTH_SETS, _SMOOTHING),
    _gap_figure("4", "Label smoothing and logit squeezing with noise", _BOTH_SETS, _BOTH),
    _gap_figure("5", "Adversarial training and the linear model", ("cifar10",), _TRAINING),
    _paper_figure("6", "Gradients of smoothing and squeezing", _BOTH_SETS, partial(_plan_histograms, _BOTH, GRADIENTS)),
    _gap_figure("7", "Logit squeezing and noise", _BOTH_SETS, _SQUEEZING),
    _paper_figure("8", "Activations of the penultimate layer", _BOTH_SETS, partial(_plan_activations, "penultimate")),
    _paper_figure("9", "Activations of the logit layer", _BOTH_SETS, partial(_plan_activations, "logits")),
    _seguin_figure("2", "Logit gaps and who withstands the attack", plan_logit_gaps),
    _seguin_figure("3", "Order of the images and of the classes", plan_logit_orders),
    _seguin_figure("4", "The largest logits kept, the others changed", plan_fixed_logits),
    _seguin_figure("5", "Geometry of the manifolds in each layer", plan_manifolds),
    _seguin_figure("A.8", "Capacity of manifolds, theory and simulation", plan_simulated_capacity),
    FigureDefinition(
        "seguin2021-C",
        "The analytic model of logits",
        ("digits",),
        plan_surrogate,
        "after Figures C.1-C.3 of Seguin et al. 2021",
    ),
    FigureDefinition("accuracy-eps", "Accuracy over the radius", _EVERY, plan_eps_figure),
    FigureDefinition("accuracy-steps", "Accuracy over the steps of an attack", _EVERY, plan_steps_figure),
    FigureDefinition("per-class", "Robust accuracy by class", _EVERY, plan_classes_figure),
    FigureDefinition("gallery", "Adversarial examples", _EVERY, plan_gallery),
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
