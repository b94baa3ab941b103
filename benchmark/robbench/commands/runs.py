"""The commands about runs that exist already: list them, go on with them, make one again. Printing only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robbench.commands.about import takes_model_options
from robbench.commands.options import (
    DataDir,
    Device,
    Imports,
    Json,
    Models,
    Results,
    Surrogate,
    check_positive,
    explain_interrupt,
)
from robbench.commands.printing import announce, print_json, print_objects, print_table, print_text, tree
from robbench.core.errors import RobbenchError
from robbench.core.user_code import import_user_modules
from robbench.core.words import name_tree

if TYPE_CHECKING:
    from robbench.evaluation.request import RunRequest
    from robbench.models.spec import RecalledFields
    from robbench.results.schema import ResultFile

__all__ = ["choose_ray", "reproduce_result", "resume_runs", "run_all", "runs"]


def runs(results: Results = Path("results"), as_json: Json = False) -> None:
    """List unfinished and finished runs; `eval --resume` goes on with the unfinished ones."""
    root = tree(results)
    announce(f"Reading {root}")
    from robbench.results.run_files import find_runs

    found = find_runs(root)
    rows = [run.as_row(results) for run in found]
    if not as_json and not any(row["note"] for row in rows):
        rows = [{column: cell for column, cell in row.items() if column != "note"} for row in rows]
    print_table(rows, as_json)
    if as_json:
        return
    if waiting := sum(run.resumable is not None for run in found):
        print(f"{waiting} to be continued: robbench eval --resume{name_tree(results)}", file=sys.stderr)


def choose_ray(executor: str, address: str | None, workers: int | None, threads: int) -> dict[str, Any] | None:
    """Return the options of `evaluate_all`; None means this process."""
    if executor == "ray":
        return {"address": address, "workers": workers, "threads": threads}
    if address is not None or workers is not None or threads != 1:
        raise RobbenchError("--address, --workers and --threads-per-worker go with --executor ray.")
    return None


def run_all(
    requests: Sequence[RunRequest], ray: dict[str, Any] | None, hint_samples: bool = False, alone: bool = True
) -> list[ResultFile | None]:
    """Do runs and show how they go.

    Args:
        requests: what to run.
        ray: options of `evaluate_all`; None runs them one after another in this process.
        hint_samples: whether to advise a shorter run.
        alone: in this process, stop at the first run that fails, and raise why; else say so and go on, as Ray does.

    Returns:
        The results, None where a run failed.
    """
    first, others = requests[0], f" (the first of {len(requests)} runs)" * (len(requests) > 1)
    announce(f"{first.spec.model} · {first.suite}{others}: loading")
    if ray is not None:
        from robbench.evaluation.ray_cluster import evaluate_all
        from robbench.report.progress import TerminalView

        view = TerminalView()
        with explain_interrupt("Every image that was finished is kept."), contextlib.closing(view):
            return [None if isinstance(o, RobbenchError) else o for o in evaluate_all(requests, view, **ray)]
    from robbench.evaluation.run import make_run, run_here
    from robbench.report.progress import TerminalReporter

    found: list[ResultFile | None] = []
    reporter = TerminalReporter(hint_samples=hint_samples)
    with explain_interrupt("Every image that was finished is kept."), contextlib.closing(reporter):
        for request in requests:
            try:
                found.append(run_here(make_run(request, reporter)))
            except RobbenchError as error:
                if alone:
                    raise
                print(f"robbench: {error}", file=sys.stderr)
                found.append(None)
    return found


def resume_runs(results: Path, device: str, wait: bool, as_json: bool, ray: dict[str, Any] | None = None) -> None:
    """Go on with every unfinished run of a tree, each as it was described when it began.

    Raises:
        typer.Exit: an unfinished run was left: it failed, must be begun otherwise, or another process works on it.
    """
    root = tree(results)
    announce(f"Reading {root}")
    from robbench.evaluation.request import RunRequest
    from robbench.report.terminal import print_results
    from robbench.results.run_files import find_runs

    found = find_runs(root)
    waiting = [about for run in found if (about := run.resumable)]
    left = [run for run in found if run.state in ("running", "unfinished") and run.resumable is None]
    for run in left:
        print(f"{run.folder}: {run.note or 'another process works on it'}.", file=sys.stderr)
    if not waiting:
        print(f"No run in {results} waits to be continued.", file=sys.stderr)
    place = {"device": device, "results": results, "wait": wait}
    requests = []
    for about in waiting:  # one that cannot go on holds up no other
        try:
            requests.append(RunRequest.from_description(about, place))
        except RobbenchError as error:
            print(f"robbench: {error}", file=sys.stderr)
    ended = run_all(requests, ray, alone=False) if requests else []
    done = [result for result in ended if result is not None]
    if as_json:
        print_objects([r.model_dump(mode="json") for r in done])
    elif done:
        print_results(done, results)
    if left or len(done) < len(waiting):
        raise typer.Exit(2)


@takes_model_options("dataset")
def reproduce_result(
    result: Annotated[Path, typer.Argument(help="The folder of a result, or its result.json.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="What was measured, if it has no card.")] = None,
    suite: Annotated[
        str | None, typer.Option("--suite", "-s", help="The .toml file, if the suite was one's own.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(callback=check_positive, help="Only the first N of the images.")
    ] = None,
    surrogate: Surrogate = None,
    device: Device = "auto",
    models: Models = None,
    imports: Imports = None,
    data_dir: DataDir = None,
    as_json: Json = False,
    *,
    about: RecalledFields,
) -> None:
    """Run a stored result again from its own description, and compare image by image.

    The last line says whether the differences matter. Exit code 1 if one does: a clean verdict, the worst case of an
    image, an attack that became weaker or stronger, a stored adversarial example. The stored result stays as it is.
    """
    import_user_modules(imports or [])
    from robbench.recheck.recall import find_result

    announce(f"{find_result(result)}: loading model and data")
    from robbench.recheck.reproduce import reproduce
    from robbench.report.progress import TerminalReporter

    reporter = TerminalReporter(hint_samples=False)
    with explain_interrupt("Nothing of it is stored."), contextlib.closing(reporter):
        found = reproduce(
            result,
            model,
            suite=suite,
            surrogate=surrogate,
            **about,
            samples=samples,
            device=device,
            models=models or [],
            data_dir=data_dir,
            reporter=reporter,
        )
    if as_json:
        print_json(found.as_json())
    else:
        for line in found.lines():
            print_text(line)
    if found.matters:
        raise typer.Exit(1)
