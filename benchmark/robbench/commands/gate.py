"""`robbench baseline` and `robbench check`: the gate for continuous integration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robbench.commands.about import takes_model_options
from robbench.commands.options import (
    DataDir,
    Device,
    Imports,
    Json,
    Lanes,
    Levels,
    ModelNames,
    Models,
    Norm,
    Radius,
    Seed,
    SuiteName,
    Surrogate,
    Target,
    check_file,
    check_folder,
    explain_interrupt,
    make_specs,
)
from robbench.commands.printing import announce, print_json
from robbench.core.errors import RobbenchError
from robbench.core.user_code import import_user_modules
from robbench.core.words import format_count

if TYPE_CHECKING:
    from robbench.evaluation.options import Options
    from robbench.evaluation.progress import Reporter
    from robbench.gate.baseline import BaselineEntry
    from robbench.models.spec import SpecFields

__all__ = ["check_baseline", "make_baseline"]

Stored = Annotated[
    list[Path] | None, typer.Option("--result", help="Read a stored result instead of measuring (repeatable).")
]
Kept = Annotated[
    Path | None,
    typer.Option(
        "--results",
        callback=check_folder,
        help="Keep the records in this results tree. Stored records are not measured again.",
    ),
]


@takes_model_options()
def make_baseline(
    out: Annotated[Path, typer.Option(callback=check_file, help="The file to write.")],
    model: ModelNames = None,
    result: Stored = None,
    suite: SuiteName = "whitebox",
    samples: Annotated[int | None, typer.Option(help="N test images instead of all.")] = None,
    sample_seed: Annotated[
        int, typer.Option(help="The images, and their order, are drawn at random with this seed.")
    ] = 0,
    eps: Radius = None,
    norm: Norm = None,
    seed: Seed = 0,
    surrogate: Surrogate = None,
    target: Target = None,
    levels: Levels = None,
    lanes: Lanes = None,
    device: Device = "auto",
    models: Models = None,
    imports: Imports = None,
    data_dir: DataDir = None,
    results: Kept = None,
    *,
    about: SpecFields,
) -> None:
    """Attack models and write their verdicts, image by image, as a baseline for `robbench check`.

    Commit the file. It holds no images and no weights.
    """
    import_user_modules(imports or [])
    if bool(model) == bool(result):
        raise RobbenchError("Give either --model, to measure, or --result, to take what is stored.")
    entries = _read_stored(result or [])
    if model:
        from robbench.evaluation.arguments import check_request
        from robbench.evaluation.request import RunRequest
        from robbench.models.card import Registry

        specs = make_specs(model, Registry.default(models or []), about)
        with _measure_into(results, device, lanes, data_dir, models, samples is None) as (options, reporter):
            options = replace(options, samples=samples, sample_seed=sample_seed, seed=seed, norm=norm, eps=eps)
            options = replace(options, target=target, levels=levels, surrogate=surrogate)
            for spec in specs:
                check_request(RunRequest(spec, suite, options))
            announce(f"{specs[0].model} · {suite}: loading")
            from robbench.gate.measure import measure_entry

            entries = [measure_entry(spec, suite, options, reporter) for spec in specs]
    from robbench.gate.baseline import write_baseline
    from robbench.models.sources import parse_source

    for entry in entries:  # before the file, which every check would refuse
        if problem := entry.find_contradiction():
            raise RobbenchError(
                f"{problem}. {out} was not written. Check the labels and the normalization, or take more --samples."
            )
    write_baseline(out, entries)
    for entry in entries:
        clean, robust = entry.clean_accuracy, entry.robust_accuracy
        print(
            f"{entry.title}: {format_count(entry.n, 'image')}, "
            f"clean {100 * clean.value:.1f} %, worst case {100 * robust.value:.1f} % "
            f"[{100 * robust.low:.1f}, {100 * robust.high:.1f}]"
        )
    sources = [parse_source(entry.given.model) for entry in entries]
    modules = dict.fromkeys(s.parts[0] for s in sources if s is not None and s.kind == "function")
    more = "".join(f" --import {name}" for name in modules)
    if surrogate is not None and parse_source(surrogate) is not None:
        more += f" --surrogate {surrogate}"
    print(f"{out} written. Check against it: robbench check --baseline {out}{more}")


def check_baseline(
    baseline: Annotated[Path, typer.Option(help="The file that `robbench baseline` wrote.")],
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Models of the baseline. If it holds only one, any other model."),
    ] = None,
    result: Stored = None,
    data: Annotated[
        Path | None, typer.Option(help="Where the images are now, if the baseline is of images of your own.")
    ] = None,
    max_drop: Annotated[float, typer.Option(help="Largest allowed drop of an accuracy, in points.")] = 1.0,
    alpha: Annotated[float, typer.Option(help="Largest allowed probability that unchanged models fail.")] = 0.01,
    sequential: Annotated[bool, typer.Option("--sequential", help="Stop as soon as the answer is certain.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the attacks, instead of the baseline's.")] = None,
    junit: Annotated[Path | None, typer.Option(callback=check_file, help="Write JUnit XML to this file.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(callback=check_file, help="Write a summary for a job's page to this file.")
    ] = None,
    surrogate: Surrogate = None,
    lanes: Lanes = None,
    device: Device = "auto",
    models: Models = None,
    imports: Imports = None,
    data_dir: DataDir = None,
    results: Kept = None,
    as_json: Json = False,
) -> None:
    """Measure again and compare with a baseline, image by image.

    Exit code 0: the check passed. 1: a model is significantly less robust, or an attack is weaker. 2: wrong input, or
    measurements that cannot be compared.
    """
    announce(f"Reading {baseline}")
    from robbench.core.files import write_atomically
    from robbench.gate.baseline import read_baseline
    from robbench.gate.decision import Policy, decide_gate, run_gate_check
    from robbench.gate.measure import choose_entries, measure_entry_again
    from robbench.gate.paired import compare_entries
    from robbench.report import gate

    import_user_modules(imports or [])
    policy = Policy(max_drop=max_drop, alpha=alpha)
    stored = read_baseline(baseline)
    if result:
        if model or sequential or seed is not None or surrogate is not None:
            raise RobbenchError(
                "--result reads stored results; --model, --surrogate, --seed and --sequential measure. "
                "Give one or the others."
            )
        entries = _read_stored(result)
        decision = decide_gate([compare_entries(_find_entry(stored.runs, e), e) for e in entries], policy)
    else:
        wanted = choose_entries(stored, model or [], data)
        if surrogate is not None and not any(entry.has_transfer for entry, _ in wanted):
            raise RobbenchError(
                f"--surrogate {surrogate} given, but no attack of the baseline is a transfer, so nothing would use it. "
                "Leave it out."
            )
        givens = {entry.name: given for entry, given in wanted}
        with _measure_into(results, device, lanes, data_dir, models, False) as (options, reporter):
            options = replace(options, surrogate=surrogate)

            def measure_first(entry: BaselineEntry, n: int) -> BaselineEntry:
                spec = givens[entry.name].make_spec()
                return measure_entry_again(entry, options, reporter, spec=spec, n=n, seed=seed)

            decision = run_gate_check([entry for entry, _ in wanted], measure_first, policy, sequential)
    for path, text in ((junit, gate.format_junit), (markdown, gate.format_markdown)):
        if path is not None:
            write_atomically(path, text(decision).encode())
    if as_json:
        print_json(gate.dump_decision(decision))
    else:
        gate.print_decision(decision)
    if decision.failed:
        raise typer.Exit(1)


def _read_stored(paths: list[Path]) -> list[BaselineEntry]:
    """Read stored results, and say on stderr which of them the present judging code did not judge."""
    if paths:
        announce(f"Reading {paths[0]}")
    from robbench.gate.measure import read_stored_entry
    from robbench.report.console import TerminalConsole

    entries = [read_stored_entry(path) for path in paths]
    for path, entry in zip(paths, entries, strict=True):
        if not entry.code:
            TerminalConsole(stderr=True).note(
                f"{path}: another or an unknown version of the judging code made this result."
            )
    return entries


def _find_entry(baseline: list[BaselineEntry], now: BaselineEntry) -> BaselineEntry:
    """Find the entry of a baseline with the name of `now`. A baseline with one entry is compared with any model."""
    from robbench.core.errors import ResultError, unknown_name

    by_name = {entry.name: entry for entry in baseline}
    if now.name not in by_name and len(baseline) > 1:
        raise ResultError(unknown_name("model of the baseline", now.name, by_name))
    return by_name.get(now.name, baseline[0])


@contextlib.contextmanager
def _measure_into(
    results: Path | None,
    device: str,
    lanes: int | None,
    data_dir: Path | None,
    models: list[Path] | None,
    hint_samples: bool,
) -> Iterator[tuple[Options, Reporter]]:
    """Yield the options and the reporter of measurements; their records go into the user's tree, or nowhere."""
    from robbench.evaluation.options import Options
    from robbench.gate.measure import open_results_tree
    from robbench.report.progress import TerminalReporter

    reporter = TerminalReporter(hint_samples=hint_samples)
    kept = "Every image that was finished is kept." if results else "Nothing is kept without --results DIR."
    with open_results_tree(results) as tree, explain_interrupt(kept), contextlib.closing(reporter):
        yield Options(results=tree, device=device, lanes=lanes, data_dir=data_dir, models=models or ()), reporter
