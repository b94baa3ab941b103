"""One result in the form of another leaderboard. Imports no torch.

RobustBench keeps a JSON object per model under `model_info/<dataset>/<threat>/`; its text fields hold percentages with
two decimals. What a result does not say stays empty ("" for text, null for the rest), and robustness that AutoAttack
did not measure never enters `autoattack_acc`. The optional field `external` (a lower figure from somebody else's
evaluation) is left out, as in entries without one: readers take it for the robust accuracy wherever it is present.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from robbench.core.errors import CardError, ResultError, unknown_name
from robbench.models.card import ModelCard, Registry
from robbench.results.schema import Accuracy, ResultFile, read_result

__all__ = ["export_result", "robustbench"]

_AUTOATTACK = "autoattack"
_LEADERBOARDS = {"cifar10": ("Linf", "L2"), "cifar100": ("Linf",), "imagenet": ("Linf",)}
_TEST_IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}
_NETWORKS = {"resnet18": "ResNet-18", "wide_resnet": "WideResNet"}


def export_result(path: Path, kind: str, registry: Registry) -> tuple[str, list[str]]:
    """Read a result and print it for another leaderboard.

    Args:
        path: a result.json or its folder.
        kind: "robustbench".
        registry: where the model's card may be.

    Returns:
        The JSON text, and what keeps it from being a complete entry, as sentences.

    Raises:
        ResultError: unknown format; no result there, or a damaged one.
    """
    if kind != "robustbench":
        raise ResultError("--format: " + unknown_name("format", kind, ["robustbench"]))
    file = path / "result.json" if path.is_dir() else path
    if not file.is_file():
        raise ResultError(f"No result at {file}; give a result.json, such as results/digits/at/whitebox/result.json.")
    result = read_result(file)
    card = _card(result, registry)
    text = json.dumps(robustbench(result, card), indent=2, ensure_ascii=False) + "\n"
    return text, _shortcomings(result, card)


def robustbench(result: ResultFile, card: ModelCard | None) -> dict[str, Any]:
    """Fill the fields of a RobustBench entry.

    Args:
        result: the measurement.
        card: of the model with these weights, where there is one.
    """
    ours = card is not None and card.recipe is not None  # a recipe sees the training set of its data set only
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
        "reported": "",  # the papers' figures belong to the papers' weights
        "autoattack_acc": _percent(result.robust_accuracy) if _by_autoattack(result) else "",
        "footnote": _footnote(result),
        "unreliable": True if result.flags else None,
    }


def _card(result: ResultFile, registry: Registry) -> ModelCard | None:
    """Find the card of the model, if it still has the weights that were measured."""
    try:
        card = registry.find(f"{result.dataset}/{result.model}").card
    except CardError:
        return None
    return card if card.weights and card.weights.sha256 == result.identity.get("weights") else None


def _by_autoattack(result: ResultFile) -> bool:
    """Tell whether the suite is AutoAttack: by its name, and by the attacks that it is made of."""
    kinds = {str(a.config.get("kind", "")) for a in result.attacks}
    whole = {"apgd", "fab", "square"} <= kinds or not kinds.isdisjoint({"autoattack:standard", "autoattack:plus"})
    return result.suite == _AUTOATTACK and whole


def _architecture(result: ResultFile) -> str:
    model = result.identity.get("model")
    found = model.get("architecture") if isinstance(model, dict) else None
    if not isinstance(found, dict) or "name" not in found:
        return ""
    sizes = [str(v) for v in found.get("args", {}).values()]
    return "-".join([_NETWORKS.get(found["name"], str(found["name"])), *sizes])


def _percent(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.value:.2f}"


def _footnote(result: ResultFile) -> str:
    worst = result.robust_accuracy
    text = (
        f"robbench, suite {result.suite}, {result.threat.norm} {result.threat.eps}: worst case {_percent(worst)} % of "
        f"{result.n} images, 95 % interval {100 * worst.low:.2f} to {100 * worst.high:.2f}; seed {result.seed}; "
        f"run {result.run_id[:8]}."
    )
    if not _by_autoattack(result):
        text += " Not an AutoAttack evaluation."
    if result.flags:
        text += f" Flags: {', '.join(sorted(result.flags))}."
    return text


def _shortcomings(result: ResultFile, card: ModelCard | None) -> list[str]:
    notes = ["link, authors, venue and reported are not in a result; fill them in."]
    if not _by_autoattack(result):
        notes.append(
            f"autoattack_acc is empty: suite {result.suite!r} is not AutoAttack; only a suite of that name fills it."
        )
    if result.threat.norm not in _LEADERBOARDS.get(result.dataset, ()):
        notes.append(f"RobustBench has no leaderboard for {result.dataset} under {result.threat.norm}.")
    elif result.n < _TEST_IMAGES[result.dataset]:
        notes.append(
            f"{result.n} images were measured; RobustBench's leaderboard takes {_TEST_IMAGES[result.dataset]}."
        )
    if card is None:
        notes.append("No card has the weights that were measured: name and additional_data are not known.")
    return notes
