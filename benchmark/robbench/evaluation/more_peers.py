"""The attacks of adv-lib and foolbox, as `peers` uses them: their names, norms, parameters and calls."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from robbench.core.errors import SuiteError
from robbench.core.threat import Ball
from robbench.core.types import NORMS, Norm

__all__ = ["ADVLIB_BOUNDED", "Call", "call_advlib", "call_foolbox", "list_attacks", "list_norms", "list_parameters"]

Call = Callable[[Tensor, Tensor], Tensor]


_ORDER: dict[Norm, float] = {"Linf": math.inf, "L2": 2.0, "L1": 1.0, "L0": 0.0}
_ADVLIB_NORMS: dict[str, tuple[Norm, ...]] = {  # the functions that are not here measure other distances
    "alma": ("L2", "L1"), "apgd": NORMS, "apgd_targeted": NORMS, "carlini_wagner_l2": ("L2",),
    "carlini_wagner_linf": ("Linf",), "ddn": ("L2",), "df": ("Linf", "L2"), "fab": NORMS, "fmn": (*NORMS, "L0"),
    "pdgd": ("L2",), "pdpgd": NORMS, "pgd_linf": ("Linf",), "sdf": ("L2",), "sigma_zero": ("L0",),
    "tr": ("Linf", "L2"),
}  # fmt: skip
_ADVLIB_RADIUS = {"apgd": "eps", "apgd_targeted": "eps", "fab": "ε", "pgd_linf": "ε"}
ADVLIB_BOUNDED = ("apgd", "apgd_targeted", "pgd_linf")  # functions whose points are within the radius
_ADVLIB_NORM = {  # the parameter that takes the norm
    "apgd": "norm",
    "apgd_targeted": "norm",
    "fab": "norm",
    "fmn": "norm",
    "pdpgd": "norm",
    "df": "norm",
    "tr": "p",
}
_NEEDS = {  # classes of foolbox that ask for what a suite cannot give
    "BinarizationRefinementAttack": "starting points",
    "DatasetAttack": "adversarial examples to start from",
    "GenAttack": "a target class",
}
_OURS = {  # parameters that follow from the run
    "advlib": {"model", "inputs", "images", "labels", "targeted", "callback", "distance", "num_classes"},
    "foolbox": {"distance", "constraint"},
}


def list_attacks(library: str, package: ModuleType) -> list[str]:
    """List the names of a library's attacks."""
    if library == "advlib":
        return [name for name, value in vars(package.attacks).items() if inspect.isfunction(value)]
    base = package.attacks.base.Attack
    values = vars(package.attacks).items()
    return [n for n, v in values if inspect.isclass(v) and issubclass(v, base) and not inspect.isabstract(v)]


def list_parameters(library: str, package: ModuleType, name: str) -> list[str]:
    """List the parameters of an attack that a suite may set."""
    ours = _OURS[library] | {_ADVLIB_RADIUS.get(name), _ADVLIB_NORM.get(name)}
    return [key for key in inspect.signature(getattr(package.attacks, name)).parameters if key not in ours]


def list_norms(library: str, package: ModuleType, name: str, params: dict[str, Any]) -> tuple[Norm, ...]:
    """List the norms that an attack is made for; none for attacks of other distances.

    Raises:
        SuiteError: foolbox does not accept the parameters.
    """
    if library == "advlib":
        return _ADVLIB_NORMS.get(name, ())
    cls = getattr(package.attacks, name)
    made = _make_foolbox(cls, params)
    takes = inspect.signature(cls).parameters
    if "distance" in takes or "constraint" in takes:
        return NORMS if "distance" in takes else ("Linf", "L2")
    order = getattr(getattr(made, "distance", None), "p", None)
    return tuple(norm for norm, p in _ORDER.items() if p == order)


def call_advlib(
    package: ModuleType, name: str, params: dict[str, Any], model: nn.Module, ball: Ball, classes: int
) -> Call:
    """Make the call of a function of adv-lib: (images, labels) -> points."""
    function = getattr(package.attacks, name)
    given = dict(params)
    given |= {_ADVLIB_RADIUS[name]: ball.eps} if name in _ADVLIB_RADIUS else {}
    given |= {_ADVLIB_NORM[name]: _ORDER[ball.norm]} if name in _ADVLIB_NORM else {}
    given |= {"distance": ball.norm.lower()} if name == "alma" else {}
    if name == "tr":  # the library fails if it is to try more classes than there are
        given["c"] = min(given.get("c", 9), classes - 1)

    def attack(x: Tensor, y: Tensor) -> Tensor:
        x_adv: Tensor = function(model, x, y, **given)
        return x_adv

    return attack


def call_foolbox(package: ModuleType, name: str, params: dict[str, Any], model: nn.Module, ball: Ball) -> Call:
    """Make the call of a class of foolbox: (images, labels) -> points."""
    cls = getattr(package.attacks, name)
    takes = inspect.signature(cls).parameters
    given = dict(params)
    given |= {"distance": package.distances.LpDistance(_ORDER[ball.norm])} if "distance" in takes else {}
    given |= {"constraint": ball.norm.lower()} if "constraint" in takes else {}
    made = _make_foolbox(cls, given)

    def attack(x: Tensor, y: Tensor) -> Tensor:
        wrapped = package.PyTorchModel(model, bounds=(0, 1), device=x.device)
        x_adv: Tensor = made(wrapped, x, y, epsilons=ball.eps)[1]
        return x_adv

    return attack


def _make_foolbox(cls: Any, params: dict[str, Any]) -> Any:
    if (needed := _NEEDS.get(cls.__name__)) is not None:
        raise SuiteError(f"foolbox:{cls.__name__} needs {needed}, which a suite cannot give. Choose another attack.")
    try:
        return cls(**params)
    except (TypeError, ValueError, ImportError) as error:
        raise SuiteError(f"foolbox:{cls.__name__}: {error}") from None
