"""Which figures there are, and which models stand for those that the paper drew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from robbench.core.errors import ResultError, unknown_name
from robbench.papers.figures.activations import activations
from robbench.papers.figures.histograms import GAPS, GRADIENTS, LOGITS, Quantity, histograms
from robbench.report.figures.gallery import plan_gallery
from robbench.report.figures.robustness import plan_classes_figure, plan_eps_figure, plan_steps_figure
from robbench.report.figures.source import FigureData, FigurePlan

__all__ = ["FIGURES", "Definition", "find_figure"]

Cast = Mapping[str, Sequence[Sequence[str]]]
"""By data set: for each model that the paper drew, its name here and then those that may stand in for it."""


@dataclass(frozen=True)
class Definition:
    """A figure.

    Attributes:
        id: its name on the command line.
        title: what it shows.
        datasets: it is drawn for these; the first is the one it is about.
        make: (data, heading, data set) -> picture.
        credit: whose figure it follows.
    """

    id: str
    title: str
    datasets: tuple[str, ...]
    make: Callable[[FigureData, str, str], FigurePlan]
    credit: str = ""

    def heading(self, dataset: str) -> str:
        """Title the figure of a data set."""
        return f"{self.title}, {dataset}" + (f"\n{self.credit}" if self.credit else "")


_PAPER = "Shafahi et al. 2019"
_NATURAL = ("natural", "natural_wrn28_10", "natural_resnet18")
_AT = ("at", "at_wrn28_10", "at_resnet18")
_LS_NOISE = ("ls095_sigma03", "ls095_sigma05", "ls02_sigma05", "ls095_sigma30")
_LSQ_NOISE = ("lsq2_sigma05", "lsq2_sigma03", "lsq5_sigma05", "lsq10_sigma30")

_TRAINING: Cast = {
    "mnist": (_NATURAL, _AT),
    "digits": (_NATURAL, _AT, ("trades",)),
    "cifar10": (_NATURAL, _AT),
}
_ADVERSARIES: Cast = {
    "mnist": (_NATURAL, ("at_weak",), _AT),
    "cifar10": (_NATURAL, ("at_weak",), _AT),
    "digits": _TRAINING["digits"],
}
_SMOOTHING: Cast = {
    "mnist": (_NATURAL, ("ls075", "ls095", "ls02"), ("sigma05", "sigma03"), ("ls075_sigma05", *_LS_NOISE)),
    "digits": (_NATURAL, _LS_NOISE),
}
_BOTH: Cast = {
    "mnist": (
        _NATURAL,
        ("ls02_sigma05",),
        ("ls075_sigma05", *_LS_NOISE),
        ("lsq05_sigma05",),
        _LSQ_NOISE,
    ),
    "digits": (_NATURAL, _LS_NOISE, _LSQ_NOISE),
}
_SQUEEZING: Cast = {
    "mnist": (_NATURAL, ("lsq05", "lsq2"), ("sigma05", "sigma03"), ("lsq05_sigma05", *_LSQ_NOISE)),
    "digits": (_NATURAL, _LSQ_NOISE),
}
_LAYERS: Cast = {
    "mnist": (_NATURAL, _AT, ("sigma05", "sigma03"), ("ls02_sigma05", *_LS_NOISE), ("lsq05_sigma05", *_LSQ_NOISE)),
    "digits": (_NATURAL, _AT, _LS_NOISE, _LSQ_NOISE),
}


def _chosen(data: FigureData, dataset: str, cast: Cast) -> tuple[list[str], list[str]]:
    """Choose the measured models, and say what the paper's own would need that no measured one is.

    Only roles that a card of the data set can play are asked for.
    """
    names, missing = [], []
    for role in cast[dataset]:
        known = [f"{dataset}/{name}" for name in role if data.find_entry(f"{dataset}/{name}")]
        measured = [name for name in known if data.read_linear(name) is not None and name not in names]
        names += measured[:1]
        if known and measured[:1] != known[:1] and known[0] not in names:
            standing = f" ({measured[0]} stands in for it)" if measured else ""
            missing.append(data.make_command(known[0], "measure linear -m {}") + standing)
    return names, missing


def _histograms(cast: Cast, panels: Sequence[Quantity], data: FigureData, title: str, dataset: str) -> FigurePlan:
    names, missing = _chosen(data, dataset, cast)
    return replace(histograms(data, title, dataset, names, panels), missing=missing)


def _activations(layer: str, data: FigureData, title: str, dataset: str) -> FigurePlan:
    names, missing = _chosen(data, dataset, _LAYERS)
    return replace(activations(data, title, names, layer), missing=missing)


def _of_paper(
    number: str, title: str, datasets: tuple[str, ...], make: Callable[[FigureData, str, str], FigurePlan]
) -> Definition:
    return Definition(f"shafahi2019-{number}", title, datasets, make, f"after Figure {number} of {_PAPER}")


def _of_gaps(number: str, title: str, datasets: tuple[str, ...], cast: Cast) -> Definition:
    return _of_paper(number, title, datasets, partial(_histograms, cast, GAPS))


_BOTH_SETS = ("mnist", "digits")
_EVERY = ("mnist", "digits", "cifar10", "fashion_mnist", "cifar100")
_ALL = (
    _of_gaps("1", "Adversarial training and the linear model", _BOTH_SETS, _TRAINING),
    _of_paper(
        "2", "Logits of adversarial training", (*_BOTH_SETS, "cifar10"), partial(_histograms, _ADVERSARIES, LOGITS)
    ),
    _of_gaps("3", "Label smoothing and noise", _BOTH_SETS, _SMOOTHING),
    _of_gaps("4", "Label smoothing and logit squeezing with noise", _BOTH_SETS, _BOTH),
    _of_gaps("5", "Adversarial training and the linear model", ("cifar10",), _TRAINING),
    _of_paper("6", "Gradients of smoothing and squeezing", _BOTH_SETS, partial(_histograms, _BOTH, GRADIENTS)),
    _of_gaps("7", "Logit squeezing and noise", _BOTH_SETS, _SQUEEZING),
    _of_paper("8", "Activations of the penultimate layer", _BOTH_SETS, partial(_activations, "penultimate")),
    _of_paper("9", "Activations of the logit layer", _BOTH_SETS, partial(_activations, "logits")),
    Definition("accuracy-eps", "Accuracy over the radius", _EVERY, plan_eps_figure),
    Definition("accuracy-steps", "Accuracy over the steps of an attack", _EVERY, plan_steps_figure),
    Definition("per-class", "Robust accuracy by class", _EVERY, plan_classes_figure),
    Definition("gallery", "Adversarial examples", _EVERY, plan_gallery),
)
FIGURES = {figure.id: figure for figure in _ALL}
"""Every figure, by its name."""


def find_figure(name: str) -> Definition:
    """Look a figure up by its id; a number alone is that figure of Shafahi et al. 2019.

    Raises:
        ResultError: unknown; the known ones are named.
    """
    name = f"shafahi2019-{name}" if name.isdecimal() else name
    if name not in FIGURES:
        raise ResultError(unknown_name("figure", name, [*FIGURES, "all"]))
    return FIGURES[name]
