"""A model card in words. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from robbench.core.errors import CardError
from robbench.models.card import ModelCard, Recipe, Registry
from robbench.report.linear import format_radius

__all__ = ["describe_card"]


def describe_card(registry: Registry, name: str, weights: set[str]) -> list[str]:
    """Return sentences about a model, from its card. A card that cannot be read is named as damaged.

    Args:
        registry: where the card is looked up.
        name: full name of the model, such as digits/at.
        weights: SHA-256 of the weights that results are of.
    """
    if name not in {entry.full_name for entry in registry.entries()}:
        return ["The model has no card here."]
    try:
        card = registry.find(name).card
    except CardError as error:
        return [f"The card is damaged: {error}"]
    return list(_describe(card, weights))


def _describe(card: ModelCard, weights: set[str]) -> Iterator[str]:
    yield f"{card.title}. {card.description}".strip()
    arguments = ", ".join(f"{key} {value}" for key, value in card.architecture.args.items())
    yield f"Data set: {card.dataset}. Network: {card.architecture.name}" + (f" ({arguments})." if arguments else ".")
    if card.threat is not None:
        yield f"The card claims robustness in {card.threat.norm} within {format_radius(card.threat.eps)}."
    if card.recipe is not None:
        yield " ".join(_describe_recipe(card.recipe))
    if card.trained is not None:
        record = card.trained
        yield f"Trained here for {record.iterations:,} iterations in {record.seconds:.0f} s on {record.hardware}."
    if card.paper is not None:
        figures = ", ".join(f"{name} {value:g} %" for name, value in card.paper.figures.items())
        about = f"Paper: {card.paper.source}, Table {card.paper.table}, {card.paper.row}".rstrip(", ")
        yield f"{about}. The paper's numbers are of other weights: {figures}." if figures else f"{about}."
    known = card.weights.sha256 if card.weights is not None else None
    if weights != {known}:
        yield "Some or all results are of other weights than those that the card names now."
    if known is not None:
        yield f"SHA-256 of the weights: {known}."
    if card.licence:
        yield f"Licence: {card.licence}."


def _describe_recipe(recipe: Recipe) -> Iterator[str]:
    yield f"Recipe: {recipe.optimizer}, {recipe.iterations:,} iterations with batches of {recipe.batch_size}."
    if recipe.alpha:
        yield f"Label smoothing, α {recipe.alpha:g}."
    if recipe.beta:
        yield f"Logit squeezing, β {recipe.beta:g}."
    if recipe.sigma:
        yield f"Gaussian noise on the input, σ {format_radius(recipe.sigma)}."
    if recipe.adversary is not None:
        adversary = recipe.adversary
        yield (
            f"Adversarial training: {adversary.attack} in {adversary.norm} within {format_radius(adversary.eps)}, "
            f"{adversary.steps} steps."
        )
    if recipe.pairing is not None:
        yield f"Pairing of logits: {recipe.pairing.kind}, weight {recipe.pairing.weight:g}."
    if recipe.distillation is not None:
        yield f"Distillation from {recipe.distillation.teacher}."
    if not (recipe.alpha or recipe.beta or recipe.sigma or recipe.adversary or recipe.pairing or recipe.distillation):
        yield "Natural training, without a defence."
