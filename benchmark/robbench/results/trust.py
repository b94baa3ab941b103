"""Decides which models a stored file alone may load: registered ones, no other code, no download. Imports no torch."""

from __future__ import annotations

from robbench.core.errors import ResultError
from robbench.results.schema import ResultFile

__all__ = ["explain_refusal", "require_registered_name"]


def explain_refusal(model: str) -> str:
    """Return the part of a message that says why a model is not loaded when only a file names it."""
    return f"{model} is code or a download, which a file alone must not start"


def require_registered_name(result: ResultFile) -> str:
    """Return the name of the registered model of a result.

    Raises:
        ResultError: the model is not registered, so that the user must give it.
    """
    about = result.identity.get("model")
    if isinstance(about, dict) and "architecture" in about and "source" not in about:
        return f"{result.dataset}/{result.model}"
    origin = about.get("source", about.get("class")) if isinstance(about, dict) else None
    raise ResultError(
        f"{explain_refusal(origin or 'The model of the result')}. Give the model as in the run that made the "
        "result (--model; in Python: model=)."
    )
