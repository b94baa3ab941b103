"""Compares the answers of a model with those that belong to the stored records of a run."""

from __future__ import annotations

from collections.abc import Callable

from robbench.classifier.answers import AnswerProbe, describe_other_answers, is_comparable
from robbench.core.errors import ResultError
from robbench.results.store import RunStore

__all__ = ["check_stored_answers"]


def check_stored_answers(
    probe: AnswerProbe, store: RunStore, overwrite: bool, note: Callable[[str], None]
) -> list[str]:
    """Compare the model's answers with those of stored records of this run, and return the answers to store.

    Args:
        probe: asks the model.
        store: the run; nothing is changed in it unless `overwrite` is given.
        overwrite: whether to remove records of a model that answered differently.
        note: called with messages.

    Raises:
        ResultError: the model answers differently now, and `overwrite` is not given.
    """
    kept: list[str] = []
    for path, answers in store.list_answers().items():
        if change := probe.describe_change(answers):
            if not overwrite:
                raise ResultError(describe_other_answers(str(path), change))
            store.discard(path)
        elif is_comparable(answers):
            kept = kept or answers
        elif answers:
            note(
                f"{path}: the model did not answer, or at random in an older version, so answers then and now are not "
                "compared."
            )
        elif "architecture" not in probe.target.identity:  # in robbench's architectures the tensors say it all
            note(
                f"{path}: holds no answers of the model. Its class, structure and tensors are the same. If its "
                "function lies elsewhere (a file, NumPy arrays, a closure) and changed, --overwrite measures anew."
            )
    return kept or probe.record()
