"""`robbench baseline` and `robbench check`: the gate for continuous integration."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robbench.commands.options import SOURCES, DataDir, Imports, Json, Models, check_about, per_channel, resumable
from robbench.core.errors import RobbenchError
from robbench.core.user_code import import_user_modules

if TYPE_CHECKING:
    from robbench.gate.baseline import Run
    from robbench.gate.measure import Machine

__all__ = ["baseline", "check"]

Stored = Annotated[
    list[Path] | None, typer.Option("--result", help="Take a stored result instead of measuring (repeatable).")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")]
Lanes = Annotated[int | None, typer.Option(help="Batch width; chosen by image size if left out.")]
Kept = Annotated[
    Path | None,
    typer.Option("--results", help="Keep the records in this results tree; what is there is not measured again."),
]


def baseline(
    out: Annotated[Path, typer.Option(help="The file to write.")],
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help=f"A registered model, or a source: {SOURCES} (repeatable)."),
    ] = None,
    result: Stored = None,
    suite: Annotated[str, typer.Option("--suite", "-s", help="A suite's name, or a .toml file.")] = "whitebox",
    samples: Annotated[int | None, typer.Option(help="N test images instead of all.")] = None,
    sample_seed: Annotated[
        int, typer.Option(help="The images, and their order, are drawn at random with this seed.")
    ] = 0,
    eps: Annotated[str | None, typer.Option(help='Radius in [0, 1] pixel units, such as "8/255".')] = None,
    norm: Annotated[str | None, typer.Option(help="Linf, L2 or L1; goes with --eps.")] = None,
    dataset: Annotated[str | None, typer.Option(help="The test set for a source.")] = None,
    architecture: Annotated[str | None, typer.Option(help="For file: and hf:, as for eval.")] = None,
    mean: Annotated[str | None, typer.Option(help="For file: and hf:, as for eval.")] = None,
    std: Annotated[str | None, typer.Option(help="Goes with --mean.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the attacks' random numbers.")] = 0,
    lanes: Lanes = None,
    device: Device = "auto",
    models: Models = None,
    imports: Imports = None,
    data_dir: DataDir = None,
    results: Kept = None,
) -> None:
    """Write a baseline: what attacks find on models now, image by image, for `robbench check`.

    Commit the file. It holds no images and no weights.
    """
    from robbench.core.numbers import parse_threat
    from robbench.gate.baseline import Given, write_baseline
    from robbench.gate.measure import stored_run

    import_user_modules(imports or [])
    if bool(model) == bool(result):
        raise RobbenchError("Give either --model, to measure, or --result, to take what is stored.")
    runs = [stored_run(path) for path in result or []]
    about: dict[str, Any] = {
        "dataset": dataset,
        "architecture": architecture,
        "mean": per_channel("--mean", mean),
        "std": per_channel("--std", std),
    }
    if model:
        from robbench.gate.measure import measure

        named = [Given(model=name, **(about if source else {})) for name, source in _named(model, models, about)]
        with _measuring(results, device, lanes, data_dir, models, samples is None) as machine:
            chosen: dict[str, Any] = {"samples": samples, "sample_seed": sample_seed, "seed": seed}
            runs = [measure(given, suite, machine, **chosen, norm=norm, eps=eps) for given in named]
    write_baseline(out, runs)
    for run in runs:
        clean, robust = run.clean_accuracy, run.robust_accuracy
        print(
            f"{run.name} · {run.identity['suite']['name']} · {parse_threat(**run.threat)}: {run.n} images, "
            f"clean {100 * clean.value:.1f} %, worst case {100 * robust.value:.1f} % "
            f"[{100 * robust.low:.1f}, {100 * robust.high:.1f}]"
        )
    print(f"{out} written. Check against it: robbench check --baseline {out}")


def check(
    baseline: Annotated[Path, typer.Option(help="The file that `robbench baseline` wrote.")],
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Models of the baseline; or, if it has only one, another in its place."),
    ] = None,
    result: Stored = None,
    max_drop: Annotated[float, typer.Option(help="Points that an accuracy may fall.")] = 1.0,
    alpha: Annotated[float, typer.Option(help="Probability with which unchanged models may fail.")] = 0.01,
    sequential: Annotated[bool, typer.Option("--sequential", help="Stop as soon as the answer is certain.")] = False,
    seed: Annotated[int | None, typer.Option(help="Another seed of the attacks than the baseline's.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a summary for a job's page to this file.")] = None,
    lanes: Lanes = None,
    device: Device = "auto",
    models: Models = None,
    imports: Imports = None,
    data_dir: DataDir = None,
    results: Kept = None,
    as_json: Json = False,
) -> None:
    """Measure again and compare with a baseline image by image.

    Exit code 0: nothing got worse. 1: a model is significantly less robust, or an attack weaker. 2: wrong input, or
    not comparable.
    """
    from robbench.core.files import write_atomically
    from robbench.gate.baseline import read_baseline
    from robbench.gate.decision import Policy, decide
    from robbench.gate.decision import check as checked
    from robbench.gate.measure import measure_again, stored_run, wanted_runs
    from robbench.gate.paired import compare
    from robbench.report.gate import as_json as dump
    from robbench.report.gate import as_junit, as_markdown, print_decision

    import_user_modules(imports or [])
    policy = Policy(max_drop=max_drop, alpha=alpha)
    stored = read_baseline(baseline)
    if result:
        if model or sequential or seed is not None:
            raise RobbenchError("--result reads what is stored; --model, --seed and --sequential measure.")
        found = [stored_run(path) for path in result]
        decision = decide([compare(_beside(stored.runs, run), run) for run in found], policy)
    else:
        wanted = wanted_runs(stored, model or [])
        givens = {run.name: given for run, given in wanted}
        with _measuring(results, device, lanes, data_dir, models, False) as machine:

            def measured(run: Run, n: int) -> Run:
                return measure_again(run, machine, given=givens[run.name], n=n, seed=seed)

            decision = checked([run for run, _ in wanted], measured, policy, sequential)
    for path, text in ((junit, as_junit), (markdown, as_markdown)):
        if path is not None:
            write_atomically(path, text(decision).encode())
    if as_json:
        print(json.dumps(dump(decision), indent=2, ensure_ascii=False))
    else:
        print_decision(decision)
    if decision.failed:
        raise typer.Exit(1)


def _beside(runs: list[Run], found: Run) -> Run:
    """Find the run of a baseline that a stored result belongs to; with only one, it is meant."""
    from robbench.core.errors import ResultError, unknown_name

    named = {run.name: run for run in runs}
    if found.name not in named and len(runs) > 1:
        raise ResultError(unknown_name("model of the baseline", found.name, named))
    return named.get(found.name, runs[0])


def _named(model: list[str], models: list[Path] | None, about: dict[str, Any]) -> list[tuple[str, bool]]:
    """Tell typos before minutes of work; returns names and whether each is a source."""
    from robbench.models.card import Registry
    from robbench.models.sources import parse_source

    registry = Registry.default(models or [])
    sources = {name for name in model if parse_source(name)}
    check_about(sources, about)
    return [(name if name in sources else registry.find(name).full_name, name in sources) for name in model]


@contextlib.contextmanager
def _measuring(
    results: Path | None,
    device: str,
    lanes: int | None,
    data_dir: Path | None,
    models: list[Path] | None,
    hint_samples: bool,
) -> Iterator[Machine]:
    from robbench.gate.measure import Machine, results_tree
    from robbench.report.terminal import TerminalReporter

    reporter = TerminalReporter(hint_samples=hint_samples)
    kept = "Every image that was finished is kept." if results else "Nothing is kept without --results DIR."
    with results_tree(results) as tree, resumable(kept), contextlib.closing(reporter):
        yield Machine(
            results=tree,
            device=device,
            lanes=lanes,
            data_dir=data_dir,
            models=tuple(models or ()),
            reporter=reporter,
        )
