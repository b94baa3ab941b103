"""Words that many messages share."""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["advise_overwrite", "fold_name", "format_count", "format_goal", "name_tree"]


def fold_name(name: str) -> str:
    """Return the letters and digits of a name in lower case. Names that look alike in a table have equal ones."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", name).casefold()))


def format_count(n: int, noun: str) -> str:
    """Return a number with its noun: `1 image`, `2 images`, `3 passes`."""
    if n == 1:
        return f"1 {noun}"
    return f"{n} {noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}"


def format_goal(identity: Mapping[str, Any]) -> str:
    """Return what stands behind a threat in a title: `, target next` and `, 255 levels`, where a run has them."""
    target, levels = identity.get("target"), identity.get("levels")
    return ("" if target is None else f", target {target}") + ("" if levels is None else f", {levels} levels")


def name_tree(results: Path) -> str:
    """Return ` --results DIR` for a command that is advised; empty for the tree that commands use without it."""
    return "" if results == Path("results") else f" --results {shlex.quote(str(results))}"


def advise_overwrite(command: str, folder: Path) -> str:
    """Return the shell command that makes a damaged measurement of a registered model again.

    Args:
        command: the command with its options, such as `measure linear --model {}`, with {} in the place of the model.
        folder: the folder of the measurement, RESULTS/DATASET/MODEL/NAME.
    """
    model, root = "/".join(folder.parts[-3:-1]), folder.parent.parent.parent
    return f"robbench {command.format(shlex.quote(model))}{name_tree(root)} --overwrite"
