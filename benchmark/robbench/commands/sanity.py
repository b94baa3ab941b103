"""`robbench sanity`: can the number be trusted?"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robbench.commands.options import SOURCES, DataDir, Json, Models, Results, per_channel, resumable
from robbench.commands.printing import print_objects

if TYPE_CHECKING:
    from robbench.masking.record import SanityFile

__all__ = ["examined", "sanity"]


def sanity(
    model: Annotated[str, typer.Argument(help=f"A registered model, or a source: {SOURCES}.")],
    samples: Annotated[int | None, typer.Option(help="The first N test images.")] = 200,
    act: Annotated[bool, typer.Option("--act", help="Run the suite that is advised, too.")] = False,
    eps: Annotated[str | None, typer.Option(help='Radius in [0, 1] pixel units, such as "8/255".')] = None,
    norm: Annotated[str | None, typer.Option(help="Linf, L2 or L1; goes with --eps.")] = None,
    dataset: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    architecture: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    mean: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    std: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    lanes: Annotated[int | None, typer.Option(help="As for eval.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")] = "auto",
    models: Models = None,
    data_dir: DataDir = None,
    results: Results = Path("results"),
    overwrite: Annotated[bool, typer.Option(help="Replace a stored result of a different run.")] = False,
    as_json: Json = False,
) -> None:
    """Check whether a model's robust accuracy can be trusted.

    Looks for hidden gradients, prints a verdict with its evidence and what to run next, and draws one page of pictures.
    """
    from robbench.report.sanity import print_sanity

    about = {"dataset": dataset, "architecture": architecture, "mean": per_channel("--mean", mean)}
    found = examined(
        model,
        results,
        act,
        **about,
        std=per_channel("--std", std),
        samples=samples,
        eps=eps,
        norm=norm,
        seed=seed,
        lanes=lanes,
        device=device,
        models=models or [],
        data_dir=data_dir,
        overwrite=overwrite,
    )
    if as_json:
        print_objects([found.model_dump(mode="json")])
        return
    print_sanity(found)


def examined(model: str, results: Path, act: bool, **options: Any) -> SanityFile:
    """Run the checks on one model, store what they saw, and draw the sheet."""
    from robbench.masking.record import LANDSCAPE, SHEET, sanity_folder
    from robbench.masking.run import examine
    from robbench.report.sheet import draw_sheet
    from robbench.report.terminal import TerminalReporter

    reporter = TerminalReporter(hint_samples=False)
    with resumable("Every image that was attacked is kept."), contextlib.closing(reporter):
        found = examine(model, act=act, results=results, reporter=reporter, **options)
    folder = sanity_folder(results, found)
    draw_sheet(found, folder / LANDSCAPE, folder / SHEET)
    print(f"{folder / SHEET} written.", file=sys.stderr)
    return found
