"""Writes docs/trained.md, which compares the models trained here with the papers. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from robbench.masking.stored import VerdictIndex
from robbench.models.card import Entry, ModelCard
from robbench.report.escape import make_markdown_table
from robbench.report.leaderboard import format_damage, format_percent, format_with_interval
from robbench.results.reader import read_results
from robbench.results.schema import ResultFile

__all__ = ["find_same_training", "format_iterations", "render_trained_page"]

_INTRO = """\
# Trained models and the papers

Generated from the cards in `models/` and from `results/` by `robbench trained`; do not edit. Numbers are percentages of
the n test images: ours before the slash, the paper's after it (– if the paper gives none). In our numbers, an image is
broken if any queried point breaks it. The papers judged the last point only. **Worst case**, with its 95 % interval,
counts an image as robust only if no attack of the suite `whitebox` broke it. The papers have no such column.
**Verdict** is that of `robbench sanity` (unchecked if it has not run), with its own n where that is another one. The
column Iterations says whether a model was trained for less than its recipe, or by the smaller recipe for a CPU. The
numbers of such a model say nothing about the recipe. **Weights**: those not shipped are made by `robbench train NAME`.
The numbers are of weights whose SHA-256 begins with these digits.
"""

# Our column -> keys of the papers' columns in cards.
_PAPER_KEYS = {
    "clean": ("test",),
    "PGD-xent": ("wb_pgd40_xent", "pgd20_rand_xent"),
    "PGD-CW": ("wb_pgd40_cw", "pgd20_rand_cw"),
    "FGSM-xent": ("fgsm_xent",),
    "FGSM-CW": ("fgsm_cw",),
}
_ATTACKS = {
    "PGD-xent": ("PGD-40-xent", "PGD-20-xent"),
    "PGD-CW": ("PGD-40-CW", "PGD-20-CW"),
    "FGSM-xent": ("FGSM-xent",),
    "FGSM-CW": ("FGSM-CW",),
}


def render_trained_page(entries: Sequence[Entry], results: Path) -> str:
    """Return the page as markdown: one table per data set, one row per trained model.

    A result counts only if it was measured on the card's present weights.

    Damaged results and verdicts are listed at the end.

    Raises:
        CardError: a card is invalid.
    """
    stored = read_results(results)
    # The weights alone do not tell: a user's own model can have those of a card, and be measured on other images.
    measured = {
        (f"{r.dataset}/{r.model}", r.identity.get("weights")): r
        for r in stored.results
        if r.suite == "whitebox" and not r.overrides
    }
    trained = [e for e in entries if e.card.weights and e.card.trained and e.card.recipe]
    parts, verdicts = [_INTRO], VerdictIndex(results)
    for dataset, members in groupby(trained, key=lambda e: e.dataset):
        rows = [_row(e, measured.get((e.full_name, _digest(e.card))), verdicts) for e in members]
        parts.append(f"## {dataset}\n\n{make_markdown_table(rows)}\n")
    untrained = sum(1 for e in entries if e.card.recipe and not e.card.weights)
    parts.append(f"{untrained} more cards wait for training: `robbench train --all-missing`.\n")
    return "\n".join([*parts, *format_damage([*stored.damaged, *verdicts.list_damaged()])])


def _digest(card: ModelCard) -> str | None:
    return card.weights.sha256 if card.weights else None


def _row(entry: Entry, result: ResultFile | None, verdicts: VerdictIndex) -> dict[str, str]:
    card = entry.card
    cells = {"Model": entry.name, "Iterations": format_iterations(card)}
    values = {} if result is None else {a.name: format_percent(a.robust_accuracy) for a in result.attacks}
    if result is not None:
        values["clean"] = format_percent(result.clean_accuracy)
    paper = card.paper.figures if card.paper else {}
    for column, keys in _PAPER_KEYS.items():
        own = next((values[n] for n in _ATTACKS.get(column, (column,)) if n in values), "not measured")
        published = next((f"{paper[key]:.1f}" for key in keys if key in paper), "–")
        cells[column[0].upper() + column[1:]] = f"{own} / {published}"
    cells["Worst case"] = "not measured" if result is None else format_with_interval(result.robust_accuracy)
    cells["Verdict"] = "–" if result is None else verdicts.describe(result)
    cells["n"] = "–" if result is None else str(result.n)
    assert card.trained is not None
    cells["Trained on"] = f"{card.trained.hardware}, {card.trained.precision}, {card.trained.seconds:.0f} s"
    assert card.weights is not None
    cells["Weights"] = "shipped" if card.shipped else f"not shipped, {card.weights.sha256[:12]}"
    return cells


def format_iterations(card: ModelCard, planned: int | None = None) -> str:
    """Format the iterations of a trained model, and the differences from its recipe.

    Args:
        card: the card of the model.
        planned: the iterations of the recipe; None means those of the card.
    """
    assert card.trained is not None and card.recipe is not None
    done, planned = card.trained.iterations, planned or card.recipe.iterations
    text = f"{done:,}" if done == planned else f"{done:,} of {planned:,}"
    differences = _list_differences(card)
    return text + (f"; {', '.join(differences)}" if differences else "")


def _list_differences(card: ModelCard) -> list[str]:
    """List how the training differed from the recipe, but for the number of iterations."""
    assert card.trained is not None
    parts = [part for part in card.trained.instead.split(", ") if part and not part.startswith("iterations ")]
    return parts if card.trained.precision == "float32" else [*parts, f"in {card.trained.precision}"]


def find_same_training(card: ModelCard, entries: Sequence[Entry]) -> Entry | None:
    """Find a trained model that the recipe of a card reaches on its way. None if there is none.

    Recipes with a constant learning rate that differ in the number of iterations alone are one training. The longer
    recipe has the weights of the shorter one in between. Of several models, the one with the most iterations is found.

    Args:
        card: a card without weights.
        entries: the models to choose from.

    Raises:
        CardError: a card is invalid.
    """
    if card.recipe is None or card.recipe.schedule != "constant":
        return None
    found = [e for e in entries if e.card.dataset == card.dataset and _is_on_the_way(e.card, card)]
    return max(found, key=lambda e: e.card.trained.iterations if e.card.trained else 0, default=None)


def _is_on_the_way(trained: ModelCard, card: ModelCard) -> bool:
    """Return whether a model has the weights that the recipe of another card has after as many iterations."""
    if trained.weights is None or trained.trained is None or trained.recipe is None or card.recipe is None:
        return False
    done = trained.trained.iterations
    same = trained.recipe.model_copy(update={"iterations": card.recipe.iterations}) == card.recipe
    is_same = same and trained.architecture == card.architecture and not _list_differences(trained)
    return is_same and done <= min(trained.recipe.iterations, card.recipe.iterations)
