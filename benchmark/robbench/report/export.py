"""Exports a result as an entry of another leaderboard. Imports no torch.

RobustBench has one JSON object per model under `model_info/<dataset>/<threat>/`. Its text fields hold percentages with
two decimals. Fields that a result does not determine stay empty ("" for text, null for others). `autoattack_acc` is
filled only with a robust accuracy that AutoAttack measured. The optional field `external` (a lower robust accuracy from
another evaluation) is left out, because readers use it as the robust accuracy if it is present.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from robbench.core.errors import CardError, ResultError, unknown_name
from robbench.core.words import format_count, format_goal
from robbench.models.card import ModelCard, Registry
from robbench.report.leaderboard import is_about_every_break
from robbench.results.reader import read_vouched
from robbench.results.schema import Accuracy, ResultFile

__all__ = ["build_robustbench_entry", "export_result"]

_AUTOATTACK = "autoattack"
_LEADERBOARDS = {"cifar10": ("Linf", "L2"), "cifar100": ("Linf",), "imagenet": ("Linf",)}
_TEST_IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}
_NETWORKS = {"resnet18": "ResNet-18", "wide_resnet": "WideResNet"}


def export_result(path: Path, kind: str, registry: Registry) -> tuple[str, list[str]]:
    """Read a result and format it for another leaderboard.

    Args:
        path: a result.json or its folder.
        kind: the format, "robustbench".
        registry: the registry to look for the model's card.

    Returns:
        The JSON text, and sentences about what the entry lacks.

    Raises:
        ResultError: unknown format, or the result is missing or damaged.
    """
    if kind != "robustbench":
        raise ResultError("--format: " + unknown_name("format", kind, ["robustbench"]))
    result = read_vouched(path)
    if not result.has_radius:
        raise ResultError(f"{path}: distances of nearest breaks given; expected: a result of a suite with a radius.")
    card = _find_card(result, registry)
    text = json.dumps(build_robustbench_entry(result, card), indent=2, ensure_ascii=False) + "\n"
    return text, _list_gaps(result, card)


def build_robustbench_entry(result: ResultFile, card: ModelCard | None) -> dict[str, Any]:
    """Build a RobustBench entry.

    Args:
        result: the result.
        card: the card of the model with the measured weights; None if there is none.
    """
    ours = card is not None and card.recipe is not None  # recipes use no data but the training set
    return {
        "link": "",
        "name": card.title if card else result.model,
        "authors": "",
        "additional_data": False if ours else None,
        "number_forward_passes": 1 if ours and "randomized" not in result.flags else None,
        "dataset": result.dataset,
        "venue": "",
        "architecture": _architecture(result),
        "eps": result.threat.eps,
        "clean_acc": _percent(result.clean_accuracy),
        "reported": "",  # the papers' numbers are about other weights
        "autoattack_acc": _percent(result.robust_accuracy) if _is_autoattack(result) else "",
        "footnote": _footnote(result),
        "unreliable": True if result.flags else None,
    }


def _find_card(result: ResultFile, registry: Registry) -> ModelCard | None:
    """Return the card of the model; None if there is none or its weights are not the measured ones."""
    try:
        card = registry.find(f"{result.dataset}/{result.model}").card
    except CardError:
        return None
    return card if card.weights and card.weights.sha256 == result.identity.get("weights") else None


def _is_autoattack(result: ResultFile) -> bool:
    """Return whether the suite has AutoAttack's name and attacks, and every break counted."""
    kinds = {str(a.config.get("kind", "")) for a in result.attacks}
    is_complete = {"apgd", "fab", "square"} <= kinds or not kinds.isdisjoint({"autoattack:standard", "autoattack:plus"})
    return result.suite == _AUTOATTACK and is_complete and is_about_every_break(result)


def _architecture(result: ResultFile) -> str:
    model = result.identity.get("model")
    architecture = model.get("architecture") if isinstance(model, dict) else None
    if not isinstance(architecture, dict) or "name" not in architecture:
        return ""
    name = architecture["name"]
    sizes = [str(v) for v in architecture.get("args", {}).values()]
    return "-".join([_NETWORKS.get(name, str(name)), *sizes])


def _percent(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.value:.2f}"


def _footnote(result: ResultFile) -> str:
    worst = result.robust_accuracy
    goal = f"{result.threat.norm} {result.threat.eps}{format_goal(result.identity)}"
    text = (
        f"robbench, suite {result.suite}, {goal}: worst case {_percent(worst)} % of "
        f"{format_count(result.n, 'image')}, 95 % interval {100 * worst.low:.2f} to {100 * worst.high:.2f}; "
        f"seed {result.seed}; run {result.run_id[:8]}."
    )
    if (target := result.identity.get("target")) is not None:
        text += f" Targeted: only predictions of the target count as breaks (target {str(target)[:40]})."
    if not _is_autoattack(result):
        text += " Not an AutoAttack evaluation."
    if result.flags:
        text += f" Flags: {', '.join(sorted(result.flags))}."
    return text


def _list_gaps(result: ResultFile, card: ModelCard | None) -> list[str]:
    notes = ["link, authors, venue and reported are not in a result; fill them in."]
    if not _is_autoattack(result):
        why = f"suite {result.suite!r} is not AutoAttack; only a suite of that name fills it"
        if not is_about_every_break(result):
            why = "with a target or levels, not every break counts"
        notes.append(f"autoattack_acc is empty: {why}.")
    if result.threat.norm not in _LEADERBOARDS.get(result.dataset, ()):
        notes.append(f"RobustBench has no leaderboard for {result.dataset} under {result.threat.norm}.")
    elif result.n < _TEST_IMAGES[result.dataset]:
        size = format_count(result.n, "image")
        were = "was" if result.n == 1 else "were"
        notes.append(f"{size} {were} measured; RobustBench's leaderboard takes {_TEST_IMAGES[result.dataset]}.")
    if card is None:
        notes.append("No card has the weights that were measured: name and additional_data are not known.")
    return notes
