"""The figures of Tsipras et al. 2019: number, title, plan and what to see."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from robbench.papers.figures.gradients import plan_examples, plan_gradients, plan_interpolation
from robbench.papers.figures.studies import plan_accuracy_by_radius, plan_accuracy_by_size, plan_pair
from robbench.report.figures.source import FigureData, FigurePlan

__all__ = ["TSIPRAS"]

_SIZES = (
    "What to see: left, whether training on attacks helps where images are few. Right, whether it costs accuracy where "
    "there are many."
)
_GRADIENTS = "What to see: blue pixels raise the loss, red ones lower it. A gradient that one can read shows strokes."
_EXAMPLES = (
    "What to see: the answer above each picture, and whether the picture looks like it. Bars: how often the nearest "
    "training image is of the new class, and how far it is."
)
_WAY = "What to see: whether the images on the way still look like digits. A lower curve is closer to training images."
_PAIR = (
    "What to see: a and b, with an adversary only strongly correlated pixels have weight. c, whether weakly correlated "
    "pixels buy accuracy and cost robustness."
)
_RADII = "What to see: whether the accuracy falls as the adversary of the training grows."

_BOTH_SETS, _SMALL = ("digits", "mnist"), ("digits",)  # ten pictures in a row of MNIST are large files

TSIPRAS: tuple[tuple[str, str, tuple[str, ...], Callable[[FigureData, str, str], FigurePlan], str], ...] = (
    ("1", "Accuracy over the training set, L2", _BOTH_SETS, partial(plan_accuracy_by_size, "L2"), _SIZES),
    ("2", "Loss gradients", _BOTH_SETS, partial(plan_gradients, 3, ("alignment", "sparsity")), _GRADIENTS),
    ("3", "Large perturbations", _BOTH_SETS, partial(plan_examples, ("L2", "Linf"), 4), _EXAMPLES),
    ("4", "From an image to its large perturbation", _BOTH_SETS, plan_interpolation, _WAY),
    ("5", "What a linear classifier uses", _BOTH_SETS, plan_pair, _PAIR),
    ("6", "Accuracy over the training set, Linf", _BOTH_SETS, partial(plan_accuracy_by_size, "Linf"), _SIZES),
    ("7", "Accuracy over the radius of training", _BOTH_SETS, plan_accuracy_by_radius, _RADII),
    ("8", "Large perturbations, Linf", _SMALL, partial(plan_examples, ("Linf",), 1), _EXAMPLES),
    ("9", "Large perturbations, L2", _SMALL, partial(plan_examples, ("L2",), 1), _EXAMPLES),
    ("10", "Loss gradients of all classes", _SMALL, partial(plan_gradients, 1, ("roughness",)), _GRADIENTS),
)
"""Number, title, data sets, plan and caption of each figure."""
