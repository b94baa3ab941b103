"""`robbench eval`, and what shows and checks its results."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from robbench.commands import runs
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
from robbench.commands.printing import print_objects
from robbench.commands.runs import run_all
from robbench.commands.sanity import examined
from robbench.core.errors import RobbenchError
from robbench.core.user_code import import_own

if TYPE_CHECKING:
    from robbench.models.card import Registry
    from robbench.results.schema import ResultFile


__all__ = ["eval_", "show", "verify"]

Executor = Literal["process", "ray"]


def eval_(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help=f"A registered model, or a source: {SOURCES} (repeatable)."),
    ] = None,
    all_models: Annotated[
        bool, typer.Option("--all", help="Every registered model that has weights; with --dataset, of that data set.")
    ] = False,
    suite: Annotated[str, typer.Option("--suite", "-s", help="A suite's name, or a .toml file.")] = "whitebox",
    samples: Annotated[int | None, typer.Option(help="The first N test images instead of all.")] = None,
    sample_seed: Annotated[int | None, typer.Option(help="Draw the N images at random with this seed.")] = None,
    eps: Annotated[
        str | None,
        typer.Option(help='Radius in [0, 1] pixel units, such as "8/255"; several with commas make a sweep.'),
    ] = None,
    norm: Annotated[str | None, typer.Option(help="Linf, L2 or L1; goes with --eps.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="The test set for a source, which has no card to name it.")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help='For file: and hf:, such as "wide_resnet:depth=28,widen_factor=10".')
    ] = None,
    mean: Annotated[str | None, typer.Option(help="For file: and hf:, per channel, such as 0.49,0.48,0.45.")] = None,
    std: Annotated[str | None, typer.Option(help="Goes with --mean.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the attacks' random numbers.")] = 0,
    seeds: Annotated[int, typer.Option(help="Run N seeds, from --seed on: mean, range, and worst over seeds.")] = 1,
    lanes: Annotated[int | None, typer.Option(help="Batch width; chosen by image size if left out.")] = None,
    gradients: Gradients = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")] = "auto",
    models: Models = None,
    imports: Imports = None,
    data_dir: DataDir = None,
    results: Results = Path("results"),
    overwrite: Annotated[bool, typer.Option(help="Replace a stored result of a different run.")] = False,
    save_adversarials: Annotated[
        bool, typer.Option("--save-adversarials", help="Keep every adversarial example, for `robbench verify`.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Instead of --model: go on with every unfinished run (`robbench runs`).")
    ] = False,
    wait: Annotated[bool, typer.Option(help="Where another process works on the same result, wait for it.")] = False,
    executor: Annotated[
        Executor, typer.Option(help="Where the work runs: in this process, or on a Ray cluster (docs/scaling.md).")
    ] = "process",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster: HOST:PORT or auto; without it one is started here.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Ray workers; by default one per GPU, or as many as the CPUs allow.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads-per-worker", help="CPU threads of each Ray worker.")] = 1,
    as_json: Json = False,
) -> None:
    """Measure the robust accuracy of models.

    Runs a suite of attacks and judges every claimed break.

    Interrupted runs go on where they stopped, and asking for more samples computes only the new ones.
    """
    if executor == "process" and (address is not None or workers is not None or threads != 1):
        raise RobbenchError("--address, --workers and --threads-per-worker go with --executor ray.")
    ray = {"address": address, "workers": workers, "threads": threads} if executor == "ray" else None
    import_own(imports or [])
    if resume:
        asked = (model, samples, sample_seed, eps, norm, dataset, architecture, mean, std, lanes, gradients, models)
        if any(v is not None for v in (*asked, data_dir)) or overwrite or save_adversarials or seed or all_models:
            raise RobbenchError(
                "--resume goes on with what was begun, as it was begun; it takes only --results, --device, "
                "--wait, --json and what says where the work runs."
            )
        runs.resume_runs(results, device, wait, as_json, ray)
        return
    if bool(model) == all_models:
        raise RobbenchError(
            "What to measure? --model NAME (`robbench list models`) or --all, or --resume for unfinished runs."
        )
    from robbench.core.numbers import parse_eps
    from robbench.models.card import Registry
    from robbench.models.sources import parse_source
    from robbench.report.sanity import print_sanity
    from robbench.report.terminal import print_results
    from robbench.suite import load_suite

    registry = Registry.default(models or [])
    if all_models:
        model, dataset = _trained(registry, dataset), None
    assert model is not None
    # A typo is told before minutes of work.
    sources = {name for name in model if parse_source(name)}
    names = [name if name in sources else registry.find(name).full_name for name in model]
    about: dict[str, Any] = {
        "dataset": dataset,
        "architecture": architecture,
        "mean": per_channel("--mean", mean),
        "std": per_channel("--std", std),
    }
    check_about(sources, about)
    load_suite(suite)
    if suite == "sanity" and gradients is not None:
        raise RobbenchError(
            f"--gradients {gradients} given with the sanity checks, which look at the gradients themselves."
        )
    radii = _radii(eps)
    # Radius 0 of a sweep is the clean accuracy: there is nothing to attack.
    attacked = [r for r in radii if len(radii) == 1 or r is None or parse_eps(r) > 0]
    if seeds < 1 or (seeds > 1 and len(radii) > 1):
        raise RobbenchError(f"--seeds {seeds} given; allowed: 1 or more, and more than 1 at a single radius only.")
    options: dict[str, Any] = {
        "samples": samples,
        "sample_seed": sample_seed,
        "norm": norm,
        "lanes": lanes,
        "gradients": gradients,
        "device": device,
        "models": models or [],
        "data_dir": data_dir,
        "results": results,
        "overwrite": overwrite,
        "save_adversarials": save_adversarials,
        "wait": wait,
    }
    calls = [
        {"model": name, "suite": suite, "eps": radius, "seed": number, **(about if name in sources else {}), **options}
        # The largest radius first: one that is not allowed is told before minutes of work.
        for name, radius, number in itertools.product(
            dict.fromkeys(names), reversed(attacked), range(seed, seed + seeds)
        )
    ]
    found = run_all(calls, ray, hint_samples=samples is None)
    done: dict[str, list[ResultFile]] = {name: [] for name in names}
    for call, result in zip(calls, found, strict=True):
        if result is not None:
            done[call["model"]].append(result)
    failed = any(result is None for result in found)
    if failed and (seeds > 1 or len(radii) > 1):
        raise typer.Exit(2)  # a spread or a curve of what is left would mislead
    if seeds > 1:
        _spread(done.values(), results, as_json)
        return
    checked = []
    if len(radii) == 1 and suite == "sanity":
        run = {"samples": samples, "sample_seed": sample_seed, "eps": eps, "norm": norm, "seed": seed, "lanes": lanes}
        place = {"device": device, "models": models or [], "data_dir": data_dir}
        checked = [
            examined(name, results, False, **(about if name in sources else {}), **run, **place)
            for name in names
            if done[name]
        ]
    if len(radii) > 1:
        _sweep(done.values(), results, len(attacked) < len(radii), as_json)
        return
    flat = [r for group in done.values() for r in group]
    if as_json:
        print_objects([_dump(r) | _trust(r, results) for r in flat])
    elif flat:
        print_results(flat, results)
        for verdict in checked:
            print_sanity(verdict, every=False)
    if failed:
        raise typer.Exit(2)


def show(
    model: Annotated[str, typer.Argument(help="A model's name, such as digits/natural.")],
    models: Models = None,
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Show a model's card, and its stored results."""
    from robbench.models.card import Registry
    from robbench.results.schema import read_result

    entry = Registry.default(models or []).find(model)
    stored = [read_result(p) for p in sorted((results / entry.dataset / entry.name).glob("*/result.json"))]
    if as_json:
        card = entry.card.model_dump(mode="json")
        described = [_dump(r) | _trust(r, results) for r in stored]
        print(json.dumps({"model": entry.full_name, "card": card, "results": described}, indent=2))
        return
    print(f"# {entry.full_name}  ({entry.path})\n")
    print(entry.path.read_text(encoding="utf-8"))
    if stored:
        from robbench.report.terminal import print_results

        print_results(stored, results)
    else:
        print(f"No results yet: robbench eval --model {entry.full_name}")


def verify(
    result: Annotated[Path, typer.Argument(help="The folder of a result, or its result.json.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help=f"What was measured, if it has no card: {SOURCES}.")
    ] = None,
    architecture: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    mean: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    std: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    lanes: Annotated[int | None, typer.Option(help="Batch width; that of the run if left out.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")] = "auto",
    models: Models = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Derive every break of a stored result again, without attacking.

    Needs a result of `eval --save-adversarials`. Exit code 1 if something does not hold; every such entry is named.
    """
    from robbench.recheck.verify import verify as verified

    v = verified(
        result,
        model,
        architecture=architecture,
        mean=per_channel("--mean", mean),
        std=per_channel("--std", std),
        lanes=lanes,
        device=device,
        models=models or [],
        data_dir=data_dir,
    )
    if as_json:
        print(json.dumps(v.as_json(), indent=2, ensure_ascii=False))
    else:
        for finding in v.refuted:
            print(f"refuted: {finding}")
        for finding in v.borderline:
            print(f"within rounding: {finding}")
        print(v)
    if v.refuted:
        raise typer.Exit(1)


def _trained(registry: Registry, dataset: str | None) -> list[str]:
    """List the models that have weights; those that have none are named on stderr."""
    entries = [e for e in registry.entries() if dataset in (None, e.dataset)]
    having = [e.full_name for e in entries if e.card.weights is not None]
    if left_out := sorted({e.full_name for e in entries} - {*having}):
        some = ", ".join(left_out[:3]) + (" …" if len(left_out) > 3 else "")
        print(f"{len(left_out)} not trained yet and left out ({some}); see `robbench list models`.", file=sys.stderr)
    if not having:
        raise RobbenchError(f"--all --dataset {dataset}: no registered model of it has weights.")
    return having


def _dump(result: ResultFile) -> dict[str, Any]:
    return result.model_dump(mode="json")


def _trust(result: ResultFile, results: Path) -> dict[str, Any]:
    """Say what stands beside a robust accuracy wherever it is printed."""
    from robbench.masking.record import VerdictIndex
    from robbench.report.leaderboard import compute_overestimation

    return {"verdict": VerdictIndex(results).find(result), "overestimation": compute_overestimation(result)}


def _radii(eps: str | None) -> list[str | None]:
    from robbench.core.numbers import parse_radii

    try:
        return [None] if eps is None else [*parse_radii(eps)]
    except ValueError as error:
        raise RobbenchError(f"--eps {eps!r} given: {error}, or several of them with commas between.") from None


def _spread(groups: Iterable[list[ResultFile]], results: Path, as_json: bool) -> None:
    """Print and write what came out with several seeds."""
    from robbench.report.spread import build_spread, print_spreads, write_spread

    found = [build_spread(results, group) for group in groups]
    written = [write_spread(s, results) for s in found]
    if as_json:
        print_objects([s.as_json() for s in found])
        return
    print_spreads(found)
    for path in written:
        print(f"{path} written.")


def _sweep(groups: Iterable[list[ResultFile]], results: Path, clean: bool, as_json: bool) -> None:
    """Print and write what came out at several radii."""
    from robbench.report.sweep import build_sweep, print_sweep, write_sweep

    found = [build_sweep(results, group, clean) for group in groups]
    for s in found:
        table, curve = write_sweep(s, results)
        if not as_json:
            print_sweep(s)
            print(f"{table} and {curve} written.")
    if as_json:
        print_objects([s.as_json() for s in found])
