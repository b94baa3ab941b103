"""`robbench plan`: what runs will cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from robbench.commands.options import (
    SOURCES,
    DataDir,
    Gradients,
    Imports,
    Json,
    Models,
    Results,
    check_about,
    per_channel,
)
from robbench.commands.printing import print_json, print_table
from robbench.core.errors import RobbenchError
from robbench.core.user_code import import_user_modules

__all__ = ["plan_runs"]


def plan_runs(
    model: Annotated[list[str], typer.Option("--model", "-m", help=f"A registered model, or a source: {SOURCES}.")],
    suite: Annotated[str, typer.Option("--suite", "-s", help="A suite's name, or a .toml file.")] = "whitebox",
    samples: Annotated[int | None, typer.Option(help="The first N test images instead of all.")] = None,
    pilot: Annotated[
        int | None, typer.Option(help="Images to run the suite on first; by default 128, or as many as fill the lanes.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Ray workers that share the work.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs that share the work, a worker each.")] = None,
    threads: Annotated[
        int | None, typer.Option("--threads-per-worker", help="CPU threads of a worker; 1 with --workers.")
    ] = None,
    eps: Annotated[str | None, typer.Option(help='Radius in [0, 1] pixel units, such as "8/255".')] = None,
    norm: Annotated[str | None, typer.Option(help="Linf, L2 or L1; goes with --eps.")] = None,
    dataset: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    architecture: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    mean: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    std: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the attacks' random numbers.")] = 0,
    lanes: Annotated[int | None, typer.Option(help="Batch width; chosen by image size if left out.")] = None,
    gradients: Gradients = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")] = "auto",
    models: Models = None,
    data_dir: DataDir = None,
    imports: Imports = None,
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Predict what runs will cost: passes, time and memory.

    Runs the suite on a few of the images, and scales what that took. Stored records of the same run tell the passes
    better where they hold more images.
    """
    if gpus is not None and workers is not None:
        raise RobbenchError("--gpus and --workers given; a GPU is a worker, so give one of them.")
    count = gpus or workers or 1
    if count < 1:
        raise RobbenchError(f"{count} workers given; there must be at least 1.")
    import_user_modules(imports or [])
    from robbench.models.sources import parse_source

    sources = {name for name in model if parse_source(name)}
    about: dict[str, Any] = {"dataset": dataset, "architecture": architecture}
    about |= {"mean": per_channel("--mean", mean), "std": per_channel("--std", std)}
    check_about(sources, about)
    import torch

    from robbench.classifier.prepare import pick_device
    from robbench.evaluation.planning import as_rows, plan, total

    place = pick_device(device)
    threads = threads or (1 if workers is not None else torch.get_num_threads())
    torch.set_num_threads(threads)
    options: dict[str, Any] = {"samples": samples, "eps": eps, "norm": norm, "seed": seed, "lanes": lanes}
    options |= {"gradients": gradients, "device": device, "models": models or [], "data_dir": data_dir}
    options["results"] = results
    plans = [plan(name, suite, pilot=pilot, **(about if name in sources else {}), **options) for name in model]
    sums = total(plans, count)
    elsewhere = gpus is not None and place.type != "cuda"
    if as_json:
        timed = None if elsewhere else sums
        print_json({"plans": [dataclasses.asdict(p) for p in plans], "total": timed})
        return
    print_table([*as_rows(plans)], False)
    for p in plans:
        print(
            f"{p.title}: {p.n} images, {p.seconds:.0f} s ± {100 * p.uncertainty:.0f} % on one worker. "
            f"Passes: {p.source}. {p.lanes} lanes; at most {p.memory / 2**20:.0f} MiB so far."
        )
    print(f"Timed on {place}, {threads} threads, as busy as it is now. Start-up and loading are not counted.")
    if elsewhere:
        print(f"The times are this CPU's, not a GPU's: run `robbench plan` on a machine with one to plan for {gpus}.")
    else:
        print(f"{count} workers: {sums['wall_seconds']:.0f} s, if each is as fast and none ever waits.")
