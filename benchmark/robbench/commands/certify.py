"""`robbench certify`: what is proven about a model, image by image."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from robbench.commands.options import (
    SOURCES,
    Architecture,
    DataDir,
    Dataset,
    Device,
    Json,
    Lanes,
    Mean,
    Models,
    Overwrite,
    Radius,
    Results,
    Std,
    explain_interrupt,
    make_specs,
    per_channel,
)
from robbench.commands.printing import print_objects, print_text
from robbench.core.errors import RobbenchError

__all__ = ["certify"]


def certify(
    model: Annotated[str, typer.Argument(help=f"A registered model, or a source: {SOURCES}.")],
    method: Annotated[
        Literal["exact", "bounds", "smoothing"],
        typer.Option(
            help="exact: a program per class; bounds: linear bounds and branching; smoothing: Gaussian noise."
        ),
    ] = "exact",
    samples: Annotated[int | None, typer.Option(help="The first N test images.")] = 100,
    eps: Radius = None,
    norm: Annotated[Literal["Linf", "L2", "L1"], typer.Option(help="The norm of --eps; exact needs Linf.")] = "Linf",
    seconds: Annotated[float, typer.Option(help="Time limit of an image for exact and bounds.")] = 60.0,
    sigma: Annotated[
        float | None, typer.Option(help="Standard deviation of the noise of smoothing, in pixels.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Draws of smoothing that are counted.")] = 10_000,
    alpha: Annotated[float, typer.Option(help="Chance that a certificate of smoothing is wrong.")] = 0.001,
    seed: Annotated[int, typer.Option(help="Seed of the draws of smoothing.")] = 0,
    dataset: Dataset = None,
    architecture: Architecture = None,
    mean: Mean = None,
    std: Std = None,
    lanes: Lanes = None,
    device: Device = "auto",
    models: Models = None,
    data_dir: DataDir = None,
    results: Results = Path("results"),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Prove image by image that no attack can exist, and find the breaks that attacks missed.

    Each image is proven, broken (the judge confirmed the point), or open. Stored images are not computed again.
    """
    from robbench.certify.record import certified_folder
    from robbench.core.numbers import parse_threat
    from robbench.models.card import Registry
    from robbench.report.certified import print_certified

    about = {"dataset": dataset, "architecture": architecture, "mean": per_channel("--mean", mean)}
    spec = make_specs([model], Registry.default(models or []), {**about, "std": per_channel("--std", std)})[0]  # type: ignore[typeddict-item]
    _check_method(method, eps, sigma)
    if method == "exact" and norm != "Linf":
        raise RobbenchError(f"--norm {norm} given with --method exact; allowed: Linf. Use --method bounds.")
    if not 0 < seconds < float("inf"):
        raise RobbenchError(f"--seconds {seconds} given; allowed: a finite number above 0.")
    from robbench.certify.run import Balls
    from robbench.certify.run import certify as run
    from robbench.certify.smoothing import Smoothing
    from robbench.evaluation.options import Options

    how: Balls | Smoothing
    if eps is None:
        how = Smoothing(sigma=float(sigma or 0), draws=draws, alpha=alpha, seed=seed)
    else:
        try:
            how = Balls(method, parse_threat(norm, eps), seconds)
        except ValueError as error:
            raise RobbenchError(f"--{error}") from None
    options = Options(
        samples=samples,
        lanes=lanes,
        device=device,
        data_dir=data_dir,
        models=models or [],
        results=results,
        overwrite=overwrite,
    )
    with explain_interrupt("Every image that was written is kept."):
        file = run(spec, how, options, lambda text: print(text, file=sys.stderr))
    if as_json:
        print_objects([file.model_dump(mode="json")])
        return
    print_certified(file, results)
    folder = certified_folder(results, file.dataset, file.model, file.identity)
    named = f" --model {shlex.quote(str(spec.model))}" if spec.source else ""
    print_text(f"Check it again: robbench verify {shlex.quote(str(folder))}{named}")


def _check_method(method: str, eps: str | None, sigma: float | None) -> None:
    """Check that a method has what it needs, and nothing of another method.

    Raises:
        RobbenchError: it lacks --eps or --sigma, or has the other one.
    """
    needed, other = ("sigma", "eps") if method == "smoothing" else ("eps", "sigma")
    given = {"eps": eps, "sigma": sigma}
    example = {"eps": "0.03", "sigma": "0.3"}[needed]
    if given[other] is not None:
        methods = "--method smoothing" if other == "sigma" else "--method exact and --method bounds"
        raise RobbenchError(
            f"--{other} {given[other]} given with --method {method}; --{other} goes with {methods}. "
            f"--method {method} needs --{needed}, such as --{needed} {example}."
        )
    if given[needed] is None:
        raise RobbenchError(f"--method {method} given without --{needed}. Give it, such as --{needed} {example}.")
