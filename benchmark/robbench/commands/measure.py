"""`robbench measure`: what explains a model's robustness."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

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
    from collections.abc import Callable

    from robbench.analysis.gradients_record import GradientsFile
    from robbench.analysis.manifold_record import ManifoldsFile
    from robbench.analysis.record import LogitsFile
    from robbench.models.spec import SpecFields

__all__ = ["measure"]

_KINDS = ("linear", "logits", "manifolds", "gradients")
_WHAT = (
    "linear: the radius L of Shafahi's Eq. 4, without attacks. logits: clean, and where a fixed PGD breaks the image. "
    "manifolds: the geometry of each layer around images, clean and under PGD. gradients: of the loss, and large "
    "perturbations."
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
    """Measure what explains the robustness of models: linear model, logits, manifolds, gradients."""
    from robbench.core.numbers import parse_threat
    from robbench.models.card import Registry

    if what not in _KINDS:
        raise RobbenchError(unknown_name("measurement", what, _KINDS))
    if what != "linear" and eps is not None:
        raise RobbenchError("--eps goes with linear. The other measurements choose their radius.")
    try:
        radius = None if eps is None else parse_threat("Linf", eps).eps
    except ValueError as error:
        raise RobbenchError(f"--eps: {error}") from None
    about: SpecFields = {"dataset": dataset, "architecture": architecture}
    about |= {"mean": per_channel("--mean", mean), "std": per_channel("--std", std)}
    specs = make_specs(model, Registry.default(models or []), about)
    announce(f"{model[0]} · {what}: loading")
    if what != "linear":
        from robbench.evaluation.options import Options

        options = Options(samples=samples, lanes=lanes, device=device, data_dir=data_dir, models=models or [])
        run = _find_measurement(what)
        measured = [run(spec, options, results, overwrite, _note) for spec in specs]
        if as_json:
            print_objects([file.model_dump(mode="json") for file in measured])
        else:
            heads = ("model", "n", "flags", "manifolds") if what == "manifolds" else ()
            print_table([row for file in measured for row in _describe(file)], as_json=False, heads=heads)
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


def _find_measurement(what: str) -> Callable[..., LogitsFile | ManifoldsFile | GradientsFile]:
    from robbench.analysis.measure import measure_logits
    from robbench.analysis.measure_gradients import measure_gradients
    from robbench.analysis.measure_manifolds import measure_manifolds

    found: dict[str, Callable[..., LogitsFile | ManifoldsFile | GradientsFile]]
    found = {"logits": measure_logits, "manifolds": measure_manifolds, "gradients": measure_gradients}
    return found[what]


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _describe(file: LogitsFile | ManifoldsFile | GradientsFile) -> list[dict[str, str]]:
    about = {"model": f"{file.dataset}/{file.model}", "n": str(file.n)}
    flags = {"flags": ", ".join(sorted(file.flags)) or "–"}
    if file.identity["measure"] == "manifolds":
        return [
            about
            | {
                "layer": layer.layer,
                "manifolds": layer.kind,
                "capacity": f"{1 / layer.cost:.3f}" if layer.cost else "–",
                "simulated": "–" if layer.simulated is None else f"{layer.simulated:.3f}",
                "radius": f"{layer.radius:.3f}",
                "dimension": f"{layer.dimension:.2f}",
                "correlation": f"{layer.correlation:.3f}",
            }
            | flags
            for layer in cast("ManifoldsFile", file).layers
        ]
    if file.identity["measure"] == "gradients":
        means = cast("GradientsFile", file).means
        return [about | {name: f"{means[name]:.3f}" for name in ("alignment", "roughness", "sparsity")} | flags]
    logits = cast("LogitsFile", file)
    accuracies = {"clean %": logits.clean_accuracy, "PGD %": logits.robust_accuracy}
    return [about | {key: f"{100 * accuracy.value:.1f}" for key, accuracy in accuracies.items()} | flags]
