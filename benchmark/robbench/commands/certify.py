"""`robbench certify`: what is proven about a model, image by image."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
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

_SECONDS = 60.0  # time limit of an image


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
    norm: Annotated[
        Literal["Linf", "L2", "L1"] | None, typer.Option(help="The norm of --eps; Linf if left out. exact needs Linf.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Time limit of an image (exact, bounds); 60 if left out.")
    ] = None,
    sigma: Annotated[float | None, typer.Option(help="Standard deviation of smoothing's noise, in pixels.")] = None,
    draws: Annotated[int | None, typer.Option(help="Draws of smoothing that are counted; 10000 if left out.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Chance that a certificate is wrong; 0.001 if left out.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws of smoothing; 0 if left out.")] = None,
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
    of_noise = {"sigma": sigma, "draws": draws, "alpha": alpha, "seed": seed}
    _check_method(method, {"eps": eps, "norm": norm, "seconds": seconds}, of_noise)
    if method == "exact" and norm not in (None, "Linf"):
        raise RobbenchError(f"--norm {norm} given with --method exact; allowed: Linf. Use --method bounds.")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise RobbenchError(f"--seconds {seconds} given; allowed: a finite number above 0.")
    from robbench.certify.run import Balls
    from robbench.certify.run import certify as run
    from robbench.certify.smoothing import Smoothing
    from robbench.evaluation.options import Options

    how: Balls | Smoothing
    if eps is None:
        how = Smoothing(**{name: value for name, value in of_noise.items() if value is not None})  # type: ignore[arg-type]
    else:
        try:
            how = Balls(method, parse_threat(norm or "Linf", eps), _SECONDS if seconds is None else seconds)
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


def _check_method(method: str, of_balls: Mapping[str, object], of_noise: Mapping[str, object]) -> None:
    """Check that a method has what it needs, and nothing of another method.

    Args:
        method: as given.
        of_balls: the options of exact and bounds, None where not given; --eps is needed.
        of_noise: the options of smoothing; --sigma is needed.

    Raises:
        RobbenchError: an option is lacking, or is of another method.
    """
    own, others, owners = of_balls, of_noise, "--method smoothing"
    needed, example = "eps", "0.03"
    if method == "smoothing":
        own, others, owners = of_noise, of_balls, "--method exact and --method bounds"
        needed, example = "sigma", "0.3"
    for name, value in others.items():
        if value is not None:
            raise RobbenchError(
                f"--{name} {value} given with --method {method}; --{name} goes with {owners}. "
                f"--method {method} needs --{needed}, such as --{needed} {example}."
            )
    if own[needed] is None:
        raise RobbenchError(f"--method {method} given without --{needed}. Give it, such as --{needed} {example}.")
