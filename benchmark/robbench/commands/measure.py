"""`robbench measure`: measurements that need no attack."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from robbench.commands.options import SOURCES, DataDir, Json, Models, Results, per_channel
from robbench.commands.printing import print_objects, print_table
from robbench.core.errors import RobbenchError, unknown_name

__all__ = ["measure"]


def measure(
    what: Annotated[str, typer.Argument(help="linear: logits, their gradients, and the radius L of Shafahi's Eq. 4.")],
    model: Annotated[
        list[str], typer.Option("--model", "-m", help=f"A registered model, or a source: {SOURCES} (repeatable).")
    ],
    samples: Annotated[int | None, typer.Option(help="The first N test images instead of all.")] = None,
    eps: Annotated[
        str | None, typer.Option(help="Linf radius of the predicted accuracy; the data set's usual one if left out.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    architecture: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    mean: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    std: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    lanes: Annotated[int | None, typer.Option(help="Batch width; chosen by image size if left out.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")] = "auto",
    models: Models = None,
    data_dir: DataDir = None,
    results: Results = Path("results"),
    overwrite: Annotated[bool, typer.Option(help="Replace a stored measurement of something else.")] = False,
    as_json: Json = False,
) -> None:
    """Predict the robust accuracy of models from a linear approximation of the network, without attacks."""
    from robbench.core.numbers import parse_threat
    from robbench.models.card import Registry
    from robbench.models.sources import parse_source
    from robbench.report.linear import make_linear_rows

    if what != "linear":
        raise RobbenchError(unknown_name("measurement", what, ["linear"]))
    try:
        radius = None if eps is None else parse_threat("Linf", eps).eps
    except ValueError as error:
        raise RobbenchError(f"--eps: {error}") from None
    registry = Registry.default(models or [])
    names = [name if parse_source(name) else registry.find(name).full_name for name in model]
    from robbench.linear.measure import measure_linear

    files = [
        measure_linear(
            name,
            dataset=dataset,
            architecture=architecture,
            mean=per_channel("--mean", mean),
            std=per_channel("--std", std),
            samples=samples,
            lanes=lanes,
            device=device,
            data_dir=data_dir,
            models=models or [],
            results=results,
            overwrite=overwrite,
            note=lambda text: print(text, file=sys.stderr),
        )
        for name in names
    ]
    if as_json:
        print_objects([file.model_dump(mode="json") for file in files])
        return
    print_table(list(make_linear_rows(files, results, radius)), as_json=False)
    print("Medians over the images, each at the wrong class of its smallest L (Eq. 4 of Shafahi et al. 2019).")
    for file in files:
        for flag, text in sorted(file.flags.items()):
            print(f"{file.dataset}/{file.model}: {flag}: {text}")
