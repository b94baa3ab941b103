"""`robbench sanity`: can the number be trusted?"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robbench.commands.about import takes_model_options
from robbench.commands.options import (
    SOURCES,
    DataDir,
    Device,
    Json,
    Lanes,
    Levels,
    Models,
    Norm,
    Overwrite,
    Radius,
    Results,
    Surrogate,
    explain_interrupt,
)
from robbench.commands.printing import announce, print_objects, print_text

if TYPE_CHECKING:
    from robbench.evaluation.request import RunRequest
    from robbench.masking.run import Examined
    from robbench.models.spec import SpecFields

__all__ = ["examine_model", "sanity"]


@takes_model_options()
def sanity(
    model: Annotated[str, typer.Argument(help=f"A registered model, or a source: {SOURCES}.")],
    samples: Annotated[int | None, typer.Option(help="The first N test images.")] = 200,
    act: Annotated[bool, typer.Option("--act", help="Run the suite that is advised, too.")] = False,
    eps: Radius = None,
    norm: Norm = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    surrogate: Surrogate = None,
    levels: Levels = None,
    lanes: Lanes = None,
    device: Device = "auto",
    models: Models = None,
    data_dir: DataDir = None,
    results: Results = Path("results"),
    overwrite: Overwrite = False,
    as_json: Json = False,
    *,
    about: SpecFields,
) -> None:
    """Check whether a model's robust accuracy can be trusted.

    Looks for hidden gradients, prints a verdict with its evidence and what to run next, and draws one page of pictures.
    """
    from robbench.evaluation.arguments import check_request
    from robbench.evaluation.request import RunRequest

    request = RunRequest.of(
        model,
        "sanity",
        **about,
        samples=samples,
        eps=eps,
        norm=norm,
        seed=seed,
        levels=levels,
        lanes=lanes,
        device=device,
        models=models or [],
        data_dir=data_dir,
        results=results,
        overwrite=overwrite,
        surrogate=surrogate,
    )
    check_request(request)
    found = examine_model(request, act=act)
    if as_json:
        print_objects([found.sanity.model_dump(mode="json")])
        return
    from robbench.report.sanity import print_sanity
    from robbench.report.terminal import describe_surrogate

    if told := describe_surrogate(found.result):
        print_text(told)
    print_sanity(found.sanity, "Give the same command with --act, and it runs this suite too.")


def examine_model(request: RunRequest, *, act: bool = False, hint_samples: bool = False) -> Examined:
    """Run the checks on one model, store what they saw, and draw the sheet.

    Args:
        request: the model, and options with a results tree.
        act: run the suite that is advised, too.
        hint_samples: whether to advise a shorter run.
    """
    announce(f"{request.spec.model} · sanity: loading")
    from robbench.core.files import write_atomically
    from robbench.masking.record import LANDSCAPE, SHEET, sanity_folder
    from robbench.masking.run import run_sanity
    from robbench.report.progress import TerminalReporter
    from robbench.report.sheet import draw_sheet

    assert request.options.results is not None
    reporter = TerminalReporter(hint_samples=hint_samples)
    with explain_interrupt("Every image that was attacked is kept."), contextlib.closing(reporter):
        found = run_sanity(request, reporter, act=act)
    folder = sanity_folder(Path(request.options.results), found.sanity)
    write_atomically(folder / SHEET, draw_sheet(found.sanity, folder / LANDSCAPE))
    print(f"{folder / SHEET} written.", file=sys.stderr)
    return found
