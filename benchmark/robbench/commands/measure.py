"""`robbench measure`: what explains a model's robustness."""

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
    from robbench.analysis.record import LogitsFile
    from robbench.models.spec import SpecFields

__all__ = ["measure"]

_WHAT = (
    "linear: the radius L of Shafahi's Eq. 4, without attacks. logits: clean, and where a fixed PGD breaks the image."
)


def measure(
    what: Annotated[str, typer.Argument(help=_WHAT)],
    model: Annotated[
        list[str], typer.Option("--model", "-m", help=f"A registered model, or a source: {SOURCES} (repeatable).")
    ],
    samples: Samples = None,
    eps: Annotated[
        str | None, typer.Option(help="linear: Linf radius of the prediction; the data set's usual one if left out.")
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
    """Measure what explains the robustness of models: their linear approximation, or their logits under attack."""
    from robbench.core.numbers import parse_threat
    from robbench.models.card import Registry

    if what not in ("linear", "logits"):
        raise RobbenchError(unknown_name("measurement", what, ["linear", "logits"]))
    if what != "linear" and eps is not None:
        raise RobbenchError("--eps goes with linear. The other measurements take the usual radius of the data set.")
    try:
        radius = None if eps is None else parse_threat("Linf", eps).eps
    except ValueError as error:
        raise RobbenchError(f"--eps: {error}") from None
    about: SpecFields = {"dataset": dataset, "architecture": architecture}
    about |= {"mean": per_channel("--mean", mean), "std": per_channel("--std", std)}
    specs = make_specs(model, Registry.default(models or []), about)
    announce(f"{model[0]} · {what}: loading")
    if what == "logits":
        from robbench.analysis.measure import measure_logits
        from robbench.evaluation.options import Options

        options = Options(samples=samples, lanes=lanes, device=device, data_dir=data_dir, models=models or [])
        measured = [measure_logits(spec, options, results, overwrite, _note) for spec in specs]
        if as_json:
            print_objects([file.model_dump(mode="json") for file in measured])
        else:
            print_table([_describe_logits(file) for file in measured], as_json=False)
        return
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
            note=_note,
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


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _describe_logits(file: LogitsFile) -> dict[str, str]:
    return {
        "model": f"{file.dataset}/{file.model}",
        "n": str(file.n),
        "clean %": f"{100 * file.clean_accuracy.value:.1f}",
        "PGD %": f"{100 * file.robust_accuracy.value:.1f}",
        "flags": ", ".join(sorted(file.flags)) or "–",
    }
