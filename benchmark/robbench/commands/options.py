"""Options that several commands share, and how they are read."""

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
    """Answer Ctrl-C with what was kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nrobbench: stopped. {kept} The same command goes on from there.", file=sys.stderr)
        raise typer.Exit(130) from None


def per_channel(option: str, text: str | None) -> list[float] | None:
    """Read one number per channel, with commas between.

    Raises:
        RobbenchError: something else was given.
    """
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise RobbenchError(
            f"{option}: {text!r} given; allowed: numbers with commas, one per channel, such as 0.49,0.48,0.45."
        ) from None


def check_about(sources: set[str], about: dict[str, object]) -> None:
    """Refuse what describes a source where there is none.

    Raises:
        RobbenchError: options of a source with registered models only.
    """
    if not sources and any(v is not None for v in about.values()):
        raise RobbenchError(
            f"--dataset, --architecture, --mean and --std go with a source ({SOURCES}); a card names its own."
        )
