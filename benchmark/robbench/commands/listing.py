"""The rows of `robbench list`: models, suites, attacks, data sets and figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robbench.core.errors import CardError

if TYPE_CHECKING:
    from robbench.models.card import Entry

__all__ = ["LISTINGS"]


def _models(models: list[Path], data_dir: Path | None) -> list[dict[str, Any]]:
    from robbench.models.card import Registry

    return [_describe_card(entry) for entry in Registry.default(models).entries()]


def _describe_card(entry: Entry) -> dict[str, Any]:
    """Return the row of a card. An invalid card gets a row too, so that it hides no other card."""
    try:
        card = entry.card
    except CardError as error:
        return {"model": entry.full_name, "title": f"invalid card: {error}", "architecture": "", "weights": ""}
    return {
        "model": entry.full_name,
        "title": card.title,
        "architecture": card.architecture.name,
        "weights": _describe_weights(entry),
    }


def _describe_weights(entry: Entry) -> str:
    card = entry.card
    if card.weights is None:
        return "not trained yet"
    text = "yes" if card.weights.path else f"in package {card.weights.package}"
    if card.trained and card.recipe and (card.trained.instead or card.trained.iterations < card.recipe.iterations):
        other = f" ({card.trained.instead})" if card.trained.instead else ""
        text = f"trained {card.trained.iterations} of {card.recipe.iterations} iterations{other}"
    if card.shipped:
        return text
    how = f"made by `robbench train {entry.full_name}`" if entry.needs_training else "made here"
    return f"not in the repository, {how}; {text}"


def _suites(models: list[Path], data_dir: Path | None) -> list[dict[str, Any]]:
    from robbench.suite import load_suite, suite_names

    suites = [load_suite(name) for name in suite_names()]
    return [
        {
            "suite": s.name,
            "title": s.title,
            "mode": s.mode,
            "judge": s.judge,
            "attacks": ", ".join(a["name"] for a in s.attacks),
            "threats": ", ".join(f"{d}: {t}" for d, t in s.threats.items()),
        }
        for s in suites
    ]


def _attacks(models: list[Path], data_dir: Path | None) -> list[dict[str, Any]]:
    from robbench.commands.attack_sources import read_attacks

    return [
        {
            "kind": source.kind,
            "what": source.what,
            "parameters": ", ".join(f"{name}={default}" for name, default in source.parameters.items()),
        }
        for source in read_attacks()
    ] + [
        {
            "kind": "transfer",
            "what": "Adversarial examples of a surrogate model, tried on the target.",
            "parameters": "surrogate, attack, and that attack's own",
        },
        {
            "kind": "torchattacks:NAME",
            "what": "An attack of torchattacks, judged by robbench.",
            "parameters": "batch=100, and the class's own",
        },
        {
            "kind": "autoattack:NAME",
            "what": "The authors' AutoAttack: standard, plus, rand, APGD-CE, APGD-DLR, APGD-T, FAB, FAB-T or SQUARE.",
            "parameters": "batch=100",
        },
        {
            "kind": "advlib:NAME",
            "what": "A function of adv-lib, judged by robbench: fmn, ddn, alma, apgd, pdpgd, tr, sdf and others.",
            "parameters": "batch=100, and the function's own",
        },
        {
            "kind": "foolbox:NAME",
            "what": "An attack of foolbox, judged by robbench.",
            "parameters": "batch=100, and the class's own",
        },
        {
            "kind": "module:Class",
            "what": "An attack of your own, from a module that --import names (docs/tutorial.md).",
            "parameters": "the class's own",
        },
    ]


def _data(models: list[Path], data_dir: Path | None) -> list[dict[str, Any]]:
    from robbench.data.sets import describe_datasets

    return [
        {
            "data set": d.name,
            "shape": "×".join(map(str, d.shape)),
            "classes": d.num_classes,
            "train": d.train,
            "test": d.test,
            "available": "yes" if d.available else "no",
            "where": d.where,
        }
        for d in describe_datasets(data_dir)
    ]


def _figures(models: list[Path], data_dir: Path | None) -> list[dict[str, Any]]:
    from robbench.papers.figures.definitions import FIGURES

    return [{"figure": f.id, "title": f.title, "data sets": ", ".join(f.datasets)} for f in FIGURES.values()]


LISTINGS: dict[str, Callable[[list[Path], Path | None], list[dict[str, Any]]]] = {
    "models": _models,
    "suites": _suites,
    "attacks": _attacks,
    "data": _data,
    "figures": _figures,
}
"""Name of a list -> function that returns its rows. The function gets further registries and the data directory."""
