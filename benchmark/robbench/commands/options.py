"""Options of several commands, and functions that parse and check them."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from robbench.core.errors import RobbenchError

if TYPE_CHECKING:
    from robbench.models.card import Registry
    from robbench.models.spec import ModelSpec, SpecFields

__all__ = [
    "SOURCES", "Architecture", "DataDir", "Dataset", "Device", "Gradients", "Imports", "Json", "Lanes", "Levels",
    "Mean", "ModelNames", "Models", "Norm", "Overwrite", "Radius", "Results", "Samples", "Seed", "Std", "SuiteName",
    "Surrogate", "Target", "check_about", "check_file", "check_folder", "check_positive", "explain_interrupt",
    "make_specs", "parse_radii_option",
    "per_channel",
]  # fmt: skip

SOURCES = "file:PATH, onnx:PATH, torchscript:PATH, hf:REPO, timm:NAME, robustbench:NAME or module:function"

Architecture = Annotated[
    str | None, typer.Option(help='For file: and hf:, such as "wide_resnet:depth=28,widen_factor=10".')
]
Dataset = Annotated[str | None, typer.Option(help="The test set for a source, which has no card to name it.")]


def _check_device(name: str) -> str:
    """Refuse what names no device anywhere. Whether a device is here is only known with torch."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise RobbenchError(f"--device: {name!r} given; allowed: auto, cpu, cuda or cuda:i.")
    return name


def check_positive(param: typer.CallbackParam, number: int | None) -> int | None:
    """Check an optional number that counts something: the callback of an option.

    Raises:
        RobbenchError: it is below 1.
    """
    from robbench.evaluation.options import check_count

    return check_count(str(param.name), number, 1)


def check_folder(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """Check the path of a folder that may be new: the callback of an option.

    Raises:
        RobbenchError: a file is there.
    """
    from robbench.evaluation.options import read_tree

    read_tree(f"--{str(param.name).replace('_', '-')}", path)
    return path


def check_file(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """Check the path of a file that may be new: the callback of an option.

    Raises:
        RobbenchError: a folder is there, or a file is where its folder must be.
    """
    if path is not None and path.is_dir():
        raise RobbenchError(f"--{param.name}: {path} given, which is a folder; allowed: the path of a file.")
    check_folder(param, None if path is None else path.parent)
    return path


Device = Annotated[str, typer.Option(callback=_check_device, help="auto, cpu, cuda or cuda:i.")]
Gradients = Annotated[
    Literal["bfloat16"] | None,
    typer.Option(help="Compute gradients in bfloat16, faster where the hardware has it; the judge keeps to float32."),
]
Lanes = Annotated[
    int | None, typer.Option(callback=check_positive, help="Batch width; chosen by image size if left out.")
]
Levels = Annotated[
    int | None,
    typer.Option(
        help="The model sees attacked pixels rounded to k / N: 255 for images of 8 bits (docs/misbehaving.md)."
    ),
]
Mean = Annotated[str | None, typer.Option(help="For file: and hf:, per channel, such as 0.49,0.48,0.45.")]
ModelNames = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", help=f"A registered model, or a source: {SOURCES} (repeatable)."),
]
Norm = Annotated[
    str | None,
    typer.Option(help="Linf, L2 or L1 (L0 for attacks that know it); goes with --eps, except in suite distance."),
]
Overwrite = Annotated[bool, typer.Option(help="Replace a stored result of a different run.")]
Radius = Annotated[str | None, typer.Option(help='Radius in [0, 1] pixel units, such as "8/255".')]
Samples = Annotated[
    int | None,
    typer.Option(
        callback=check_positive, help="The first N test images instead of all; of a folder, in a fixed mixed order."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the attacks' random numbers.")]
Std = Annotated[str | None, typer.Option(help="Goes with --mean.")]
Target = Annotated[
    str | None,
    typer.Option(help="Only this class is a break: least-likely, random, next (the label + 1), or a class."),
]
SuiteName = Annotated[str, typer.Option("--suite", "-s", help="A suite's name, or a .toml file.")]
Surrogate = Annotated[
    str | None, typer.Option(help="The model that transfer attacks use, a registered one or a source.")
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
Results = Annotated[
    Path,
    typer.Option(
        "--results", callback=check_folder, envvar="ROBBENCH_RESULTS", help="The results tree (also ROBBENCH_RESULTS)."
    ),
]


@contextlib.contextmanager
def explain_interrupt(kept: str) -> Iterator[None]:
    """Answer Ctrl-C with what was kept and how to go on."""
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


def parse_radii_option(eps: str | None) -> list[str | None]:
    """Parse --eps, in ascending order; [None] if it was not given.

    Raises:
        RobbenchError: a part is not a radius.
    """
    from robbench.core.numbers import parse_radii

    try:
        return [None] if eps is None else [*parse_radii(eps)]
    except ValueError as error:
        raise RobbenchError(f"--{error}. Several radii have commas between them, such as 2/255,8/255.") from None


def check_about(sources: set[str], about: Mapping[str, object]) -> None:
    """Refuse what describes a source where there is none.

    Raises:
        RobbenchError: such an option is given, and no model is a source.
    """
    given = [f"--{name.replace('_', '-')}" for name, value in about.items() if value is not None]
    if not sources and given:
        raise RobbenchError(
            f"{', '.join(given)} given with a registered model, whose card sets its images and its logits. "
            f"Such options go with a source ({SOURCES})."
        )


def make_specs(model: list[str], registry: Registry, about: SpecFields) -> list[ModelSpec]:
    """Make a spec of each model, so that a typo is reported before minutes of work.

    Args:
        model: registered names and sources; one that is given twice counts once.
        registry: where registered names are looked up.
        about: what is said about the sources.

    Raises:
        RobbenchError: a name is unknown, or something is said about sources where there are none.
    """
    from robbench.models.sources import parse_source
    from robbench.models.spec import ModelSpec

    sources = {name for name in model if parse_source(name)}
    names = [name if name in sources else registry.find(name).full_name for name in model]
    check_about(sources, about)
    return [ModelSpec.take(name, about if name in sources else {}) for name in dict.fromkeys(names)]
