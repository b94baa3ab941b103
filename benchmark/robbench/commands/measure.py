"""`robbench measure`: what explains a model's robustness."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

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
    from collections.abc import Callable, Sequence
    from fractions import Fraction

    from robbench.analysis.gradients_record import GradientsFile
    from robbench.analysis.manifold_record import ManifoldsFile
    from robbench.analysis.record import LogitsFile
    from robbench.models.spec import ModelSpec, SpecFields
    from robbench.results.measurement import MeasurementFile

__all__ = ["measure"]

_KINDS = ("linear", "logits", "manifolds", "gradients", "steps", "training", "students")
_WHAT = (
    "linear: the radius L of Shafahi's Eq. 4, without attacks. logits: clean, and where a fixed PGD breaks the image. "
    "manifolds: the geometry of each layer around images, clean and under PGD. gradients: of the loss, and large "
    "perturbations. steps: PGD of several step sizes. training: logits at iterations of short trainings of the recipe. "
    "students: networks that learn these logits. all: what the registry's measurements.toml declares for --dataset, "
    "without what is known."
)


def measure(
    what: Annotated[str, typer.Argument(help=_WHAT)],
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help=f"A registered model, or a source: {SOURCES} (repeatable)."),
    ] = None,
    samples: Samples = None,
    eps: Annotated[
        str | None, typer.Option(help="linear: Linf radius of the prediction; the data set's usual one if left out.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="As for eval. With all, the data set of the program.")] = None,
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
    """Measure what explains robustness: linear model, logits, layers, gradients, steps of attacks, trainings."""
    from robbench.core.numbers import parse_threat
    from robbench.models.card import Registry

    if what not in (*_KINDS, "all"):
        raise RobbenchError(unknown_name("measurement", what, (*_KINDS, "all")))
    if what == "all":
        given = [model, samples, eps, architecture, mean, std, lanes, overwrite or None, as_json or None]
        if dataset is None or any(value is not None for value in given):
            raise RobbenchError(
                "all takes --dataset, and of the other options --device, --models, --data-dir, --results."
            )
        _measure_all(dataset, models or [], device, data_dir, results)
        return
    if not model:
        raise RobbenchError("Give --model: a registered model, or a source.")
    if what != "linear" and eps is not None:
        raise RobbenchError("--eps goes with linear. The other measurements choose their radius.")
    try:
        radius = None if eps is None else parse_threat("Linf", eps).eps
    except ValueError as error:
        raise RobbenchError(f"--{error}") from None
    about: SpecFields = {"dataset": dataset, "architecture": architecture}
    about |= {"mean": per_channel("--mean", mean), "std": per_channel("--std", std)}
    specs = make_specs(model, Registry.default(models or []), about)
    announce(f"{model[0]} · {what}: loading")
    given_options: dict[str, Any] = {
        "samples": samples,
        "lanes": lanes,
        "device": device,
        "data_dir": data_dir,
        "models": models or [],
    }
    if what == "linear":
        _print_linear(specs, given_options, results, overwrite, radius, as_json)
        return
    from robbench.evaluation.options import Options

    run = _find_measurement(what)
    measured = [run(spec, Options(**given_options), results, overwrite, _note) for spec in specs]
    if as_json:
        print_objects([file.model_dump(mode="json") for file in measured])
    else:
        heads = ("model", "n", "flags", "manifolds") if what == "manifolds" else None
        print_table([row for file in measured for row in _describe(file)], as_json=False, heads=heads)


def _print_linear(
    specs: Sequence[ModelSpec],
    given: dict[str, Any],
    results: Path,
    overwrite: bool,
    radius: Fraction | None,
    as_json: bool,
) -> None:
    """Measure linear models, and print them."""
    from robbench.linear.measure import measure_linear
    from robbench.report.linear import make_linear_rows

    given = given | {"results": results, "overwrite": overwrite, "note": _note}
    names = ("dataset", "architecture", "mean", "std")
    files = [measure_linear(str(s.model), **{name: getattr(s, name) for name in names}, **given) for s in specs]
    if as_json:
        print_objects([file.model_dump(mode="json") for file in files])
        return
    print_table(list(make_linear_rows(files, results, radius)), as_json=False, heads=())
    print_text("Medians over the images, each at the wrong class of its smallest L (Eq. 4 of Shafahi et al. 2019).")
    for file in files:
        for flag, text in sorted(file.flags.items()):
            print_text(f"{file.dataset}/{file.model}: {flag}: {text}")


def _measure_all(dataset: str, models: list[Path], device: str, data_dir: Path | None, results: Path) -> None:
    """Train and measure what is declared and missing."""
    from robbench.commands.measure_all import Task, measure_all
    from robbench.models.card import Entry, Registry

    def measure_task(task: Task, overwrite: bool) -> None:
        from robbench.api import evaluate
        from robbench.certify.run import certify
        from robbench.certify.smoothing import Smoothing
        from robbench.commands.sanity import examine_model
        from robbench.evaluation.options import Options
        from robbench.evaluation.request import RunRequest
        from robbench.linear.measure import measure_linear
        from robbench.models.spec import ModelSpec

        about: dict[str, Any] = {
            "samples": task.samples,
            "device": device,
            "data_dir": data_dir,
            "models": models,
            "results": results,
            "overwrite": overwrite,
        }
        if task.run == "eval":
            evaluate(task.model, task.suite, eps=list(task.eps) or None, **about)
        elif task.run == "sanity":
            examine_model(RunRequest.of(task.model, "sanity", **about))
        elif task.run == "certify":
            certify(ModelSpec(task.model), Smoothing(sigma=task.sigma), Options(**about), _note)
        elif task.run == "linear":
            measure_linear(task.model, note=_note, **about)
        elif task.run == "study":
            train_study_of(task.model, overwrite)
        else:
            _find_measurement(task.run)(ModelSpec(task.model), Options(**about), results, overwrite, _note)

    def train_study_of(task: str, restart: bool) -> None:
        from robbench.analysis.study import StudyOptions, train_study
        from robbench.analysis.study_spec import load_studies

        name = f"{task.partition('/')[2]}-{dataset}"
        options = StudyOptions(data_dir=data_dir, results=results, device=device, restart=restart, note=_note)
        train_study(name, load_studies()[name], options)

    def train_entry(entry: Entry) -> None:
        from robbench.commands.train import report_progress
        from robbench.training.options import Options
        from robbench.training.train import train

        train(entry, Options(data_dir=data_dir, device=device, report=report_progress))

    measure_all(dataset, Registry.default(models), results, _KINDS, measure_task, train_entry)


def _find_measurement(what: str) -> Callable[..., MeasurementFile]:
    from robbench.analysis.measure import measure_logits
    from robbench.analysis.measure_gradients import measure_gradients
    from robbench.analysis.measure_manifolds import measure_manifolds
    from robbench.analysis.measure_steps import measure_steps
    from robbench.analysis.measure_training import measure_students, measure_training

    known: dict[str, Callable[..., MeasurementFile]] = {
        "logits": measure_logits,
        "manifolds": measure_manifolds,
        "gradients": measure_gradients,
        "steps": measure_steps,
        "training": measure_training,
        "students": measure_students,
    }
    return known[what]


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _describe(file: MeasurementFile) -> list[dict[str, str]]:
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
    if file.identity["measure"] != "logits":
        return [about | {"measured": file.identity["measure"], "on": file.date[:10]} | flags]
    logits = cast("LogitsFile", file)
    accuracies = {"clean %": logits.clean_accuracy, "PGD %": logits.robust_accuracy}
    return [about | {key: f"{100 * accuracy.value:.1f}" for key, accuracy in accuracies.items()} | flags]
