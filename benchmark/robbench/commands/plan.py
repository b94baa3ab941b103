"""`robbench plan`: what runs will cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robbench.commands.about import takes_model_options
from robbench.commands.options import (
    SOURCES,
    DataDir,
    Device,
    Gradients,
    Imports,
    Json,
    Lanes,
    Levels,
    Models,
    Norm,
    Radius,
    Results,
    Samples,
    Seed,
    SuiteName,
    Surrogate,
    Target,
    check_positive,
    make_specs,
)
from robbench.commands.printing import announce, print_json, print_table, print_text
from robbench.core.errors import RobbenchError
from robbench.core.user_code import import_user_modules
from robbench.core.words import format_count

if TYPE_CHECKING:
    from robbench.evaluation.planning import ModelPlan
    from robbench.models.spec import SpecFields

__all__ = ["plan_runs"]


@takes_model_options()
def plan_runs(
    model: Annotated[list[str], typer.Option("--model", "-m", help=f"A registered model, or a source: {SOURCES}.")],
    suite: SuiteName = "whitebox",
    samples: Samples = None,
    pilot: Annotated[
        int | None,
        typer.Option(
            callback=check_positive,
            help="Images to run the suite on first; by default 128, or as many as fill the lanes.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(callback=check_positive, help="Ray workers that share the work.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(callback=check_positive, help="GPUs that share the work, a worker each.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads-per-worker", callback=check_positive, help="CPU threads of a worker; 1 with --workers."
        ),
    ] = None,
    eps: Radius = None,
    norm: Norm = None,
    surrogate: Surrogate = None,
    target: Target = None,
    levels: Levels = None,
    seed: Seed = 0,
    lanes: Lanes = None,
    gradients: Gradients = None,
    device: Device = "auto",
    models: Models = None,
    data_dir: DataDir = None,
    imports: Imports = None,
    results: Results = Path("results"),
    as_json: Json = False,
    *,
    about: SpecFields,
) -> None:
    """Predict what runs will cost: passes, time and memory.

    Runs the suite on a few of the images, and scales what that took. Stored records of the same run tell the passes
    better where they hold more images.
    """
    if gpus is not None and workers is not None:
        raise RobbenchError("--gpus and --workers given; a GPU is a worker, so give one of them.")
    count = gpus or workers or 1
    import_user_modules(imports or [])
    from robbench.evaluation.arguments import check_request
    from robbench.evaluation.options import Options
    from robbench.evaluation.request import RunRequest
    from robbench.models.card import Registry

    specs = make_specs(model, Registry.default(models or []), about)
    options: dict[str, Any] = {"samples": samples, "eps": eps, "norm": norm, "seed": seed, "lanes": lanes}
    options |= {"gradients": gradients, "device": device, "models": models or [], "data_dir": data_dir}
    options |= {"results": results, "surrogate": surrogate, "target": target, "levels": levels}
    for spec in specs:
        check_request(RunRequest(spec, suite, Options(**options)))
    announce(f"{model[0]} · {suite}: loading, then attacking a few of the images")
    import torch

    from robbench.classifier.prepare import pick_device
    from robbench.evaluation.planning import plan, total

    place = pick_device(device)
    threads = threads or (1 if workers is not None else torch.get_num_threads())
    torch.set_num_threads(threads)
    plans = [plan(str(s.model), suite, pilot=pilot, **(about if s.source else {}), **options) for s in specs]
    sums = total(plans, count)
    elsewhere = gpus is not None and place.type != "cuda"
    if as_json:
        print_json({"plans": [dataclasses.asdict(p) for p in plans], "total": None if elsewhere else sums})
        return
    _print_plans(plans)
    print_text(
        f"Timed on {place}, {format_count(threads, 'thread')}, as busy as it is now, without start-up and loading."
    )
    _print_shared(format_count(count, "GPU" if elsewhere else "worker"), None if elsewhere else sums["wall_seconds"])


def _print_shared(workers: str, seconds: float | None) -> None:
    """Print how long several workers take together; None where they are GPUs, and this machine has none."""
    if seconds is None:
        print_text(f"The times are this CPU's. To plan for {workers}, run `robbench plan` on a machine with a GPU.")
    else:
        print_text(f"{workers}: {seconds:.0f} s, if each is as fast and none ever waits.")


def _print_plans(plans: list[ModelPlan]) -> None:
    from robbench.evaluation.planning import as_rows

    print_table([*as_rows(plans)], False, heads=["run"])
    for p in plans:
        print_text(p.headline)
