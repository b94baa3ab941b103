"""Wrong arguments of public functions and classes: a sentence that names the closest one, instead of a TypeError."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from robbench.core.errors import RobbenchError, unknown_name

__all__ = ["explain_arguments"]

P = ParamSpec("P")
R = TypeVar("R")


def explain_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Check the names and the number of the arguments before the function is called.

    The function raises RobbenchError if a keyword is unknown, a required argument is missing, or too many are given.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **given: P.kwargs) -> R:
        try:
            signature.bind(*args, **given)
        except TypeError as error:
            name = function.__qualname__.removesuffix(".__init__")
            raise RobbenchError(_word(name, signature, given, error)) from None
        return function(*args, **given)

    return call


def _word(name: str, signature: inspect.Signature, given: dict[str, object], error: TypeError) -> str:
    known = [p.name for p in signature.parameters.values() if p.name != "self" and p.kind != p.VAR_KEYWORD]
    takes_others = any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values())
    if not takes_others and (unknown := [key for key in given if key not in known]):
        return f"{name}: {unknown_name('argument', unknown[0], known)}"
    needed = [p.name for p in signature.parameters.values() if p.default is p.empty and p.name in known]
    words = f"{error}".replace("'self', ", "")
    required = f" Required: {', '.join(needed)}." if needed else ""
    return f"{name}: {words}.{required} Allowed: {', '.join(known)}; give them by name, such as {known[-1]}=."
