"""What a stored file may have loaded: a file's word never imports code and never downloads. Imports no torch."""

from __future__ import annotations

from robbench.core.errors import ResultError
from robbench.results.schema import ResultFile

__all__ = ["refusal", "registered_name"]


def refusal(model: str) -> str:
    """Say that a model is not loaded because a file names it."""
    return f"{model} is code or a download, which a file alone must not start"


def registered_name(result: ResultFile) -> str:
    """Name the registered model that a result was measured on.

    Raises:
        ResultError: the model has no card.
    """
    about = result.identity.get("model")
    if isinstance(about, dict) and "architecture" in about and "source" not in about:
        return f"{result.dataset}/{result.model}"
    origin = about.get("source", about.get("class")) if isinstance(about, dict) else None
    raise ResultError(
        f"{refusal(origin or 'The model of the result')}: give the model as it was given to the run (--model; in "
        "Python: model=)."
    )
