"""Options of several commands, and functions that parse and check them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from robbench.core.errors import RobbenchError

__all__ = [
    "SOURCES", "DataDir", "Gradients", "Imports", "Json", "Models", "Results", "check_about", "per_channel",
    "resumable",
]  # fmt: skip

SOURCES = "file:PATH, hf:REPO, timm:NAME, robustbench:NAME or module:function"

Gradients = Annotated[
    Literal["bfloat16"] | None,
    typer.Option(help="Compute gradients in bfloat16, faster where the hardware has it; the judge keeps to float32."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]
Models = Annotated[
    list[Path] | None,
    typer.Option("--models", help="A further registry of model cards (repeatable; also ROBBENCH_MODELS)."),
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Where the data sets are (also ROBBENCH_DATA).", show_default=False)
]
Imports = Annotated[
    list[str] | None,
    typer.Option("--import", help="A module of your own that the suite or the baseline may name (repeatable)."),
]
Results = Annotated[Path, typer.Option("--results", help="The results tree.")]


@contextlib.contextmanager
def resumable(kept: str) -> Iterator[None]:
    """On Ctrl-C, print what is stored and how to resume, and exit with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nrobbench: stopped. {kept} Run the same command again to resume.", file=sys.stderr)
        raise typer.Exit(130) from None


def per_channel(option: str, text: str | None) -> list[float] | None:
    """Parse one number per channel, separated by commas.

    Raises:
        RobbenchError: the text is not a list of numbers.
    """
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise RobbenchError(
            f"{option}: {text!r} given; allowed: one number per channel, separated by commas, such as 0.49,0.48,0.45."
        ) from None


def check_about(sources: set[str], about: dict[str, object]) -> None:
    """Refuse options that describe a source if all models are registered.

    Raises:
        RobbenchError: such an option is given, and no model is a source.
    """
    if not sources and any(v is not None for v in about.values()):
        raise RobbenchError(
            f"--dataset, --architecture, --mean and --std go with a source ({SOURCES}). The card of a registered model "
            "sets them."
        )
