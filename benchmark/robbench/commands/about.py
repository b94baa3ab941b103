"""The options that say more about a model and its images. Several commands share them."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from robbench.commands.options import Architecture, Dataset, Mean, Std, check_positive, per_channel

__all__ = ["takes_model_options"]

_OPTIONS: dict[str, Any] = {
    "dataset": Dataset,
    "architecture": Architecture,
    "mean": Mean,
    "std": Std,
    "data": Annotated[
        Path | None,
        typer.Option(help="Images of your own: a folder of class folders, .csv or .parquet, or .npz (docs/data.md)."),
    ],
    "resize": Annotated[
        int | None, typer.Option(callback=check_positive, help="For --data: length of the shorter side.")
    ],
    "crop": Annotated[
        int | None, typer.Option(callback=check_positive, help="For --data: side of the square from the centre.")
    ],
    "channels": Annotated[int | None, typer.Option(help="For --data: 3 (the default), or 1 for grayscale.")],
    "classes": Annotated[
        Path | None, typer.Option(help="For --data: names of the classes in the order of the model's outputs, or JSON.")
    ],
    "on_broken": Annotated[
        Literal["stop", "skip"] | None, typer.Option(help="For --data: what to do at a file that is no image.")
    ],
    "output": Annotated[
        str | None, typer.Option(help="The part of the model's answer that holds the logits, such as logits.")
    ],
    "binary": Annotated[bool, typer.Option("--binary", help="The model answers with one logit, of class 1.")],
}


def takes_model_options(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the parameter `about` of a command by the options that say more about a model.

    The command is called with `about`: the fields of `ModelSpec` that were given.

    Args:
        left_out: names of options that the command does not have.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = {name: p for name, p in inspect.signature(command).parameters.items() if name != "about"}
        # The type of `about` is not imported at run time.
        given = types.SimpleNamespace(__annotations__={name: p.annotation for name, p in own.items()})
        hints = typing.get_type_hints(given, command.__globals__, include_extras=True)
        shared = {name: hint for name, hint in _OPTIONS.items() if name not in left_out}

        @functools.wraps(command)
        def run(**given: Any) -> None:
            about = {name: given.pop(name) or None for name in shared}
            about |= {name: per_channel(f"--{name}", about[name]) for name in ("mean", "std")}
            command(**given, about={name: value for name, value in about.items() if value is not None})

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [p.replace(kind=keyword, annotation=hints[name]) for name, p in own.items()]
        parameters += [
            inspect.Parameter(name, keyword, default=False if name == "binary" else None, annotation=hint)
            for name, hint in shared.items()
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate
