"""`robbench measure`: measurements that need no attack."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robbench.commands.options import (
    SOURCES,
    DataDir,
    Device,
    Json,
    Lanes,
    Models,
    Results,
    Samples,
    make_specs,
    per_channel,
)
from robbench.commands.printing import announce, print_objects, print_table, print_text
from robbench.core.errors import RobbenchError, unknown_name

if TYPE_CHECKING:
    from robbench.models.spec import SpecFields

__all__ = ["measure"]


def measure(
    what: Annotated[str, typer.Argument(help="linear: logits, their gradients, and the radius L of Shafahi's Eq. 4.")],
    model: Annotated[
        list[str], typer.Option("--model", "-m", help=f"A registered model, or a source: {SOURCES} (repeatable).")
    ],
    samples: Samples = None,
    eps: Annotated[
        str | None, typer.Option(help="Linf radius of the predicted accuracy; the data set's usual one if left out.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    architecture: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    mean: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    std: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    lanes: Lanes = None,
    device: Device = "auto",
    models: Models = None,
    data_dir: DataDir = None,
    results: Results = Path("results"),
    overwrite: Annotated[bool, typer.Option(help="Replace a stored measurement of something else.")] = False,
    as_json: Json = False,
) -> None:
    """Predict the robust accuracy of models from a linear approximation of the network, without attacks."""
    from robbench.core.numbers import parse_threat
    from robbench.models.card import Registry

    if what != "linear":
        raise RobbenchError(unknown_name("measurement", what, ["linear"]))
    try:
        radius = None if eps is None else parse_threat("Linf", eps).eps
    except ValueError as error:
        raise RobbenchError(f"--eps: {error}") from None
    about: SpecFields = {"dataset": dataset, "architecture": architecture}
    about |= {"mean": per_channel("--mean", mean), "std": per_channel("--std", std)}
    specs = make_specs(model, Registry.default(models or []), about)
    announce(f"{model[0]} · linear: loading")
    from robbench.linear.measure import measure_linear
    from robbench.report.linear import make_linear_rows

    files = [
        measure_linear(
            str(spec.model),
            dataset=spec.dataset,
            architecture=spec.architecture,
            mean=spec.mean,
            std=spec.std,
            samples=samples,
            lanes=lanes,
            device=device,
            data_dir=data_dir,
            models=models or [],
            results=results,
            overwrite=overwrite,
            note=lambda text: print(text, file=sys.stderr),
        )
        for spec in specs
    ]
    if as_json:
        print_objects([file.model_dump(mode="json") for file in files])
        return
    print_table(list(make_linear_rows(files, results, radius)), as_json=False)
    print_text("Medians over the images, each at the wrong class of its smallest L (Eq. 4 of Shafahi et al. 2019).")
    for file in files:
        for flag, text in sorted(file.flags.items()):
            print_text(f"{file.dataset}/{file.model}: {flag}: {text}")
