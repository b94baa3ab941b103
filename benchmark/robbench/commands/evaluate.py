"""`robbench eval`: what was asked for becomes a list of runs, which are done and shown."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from robbench.commands.about import takes_model_options
from robbench.commands.options import (
    DataDir,
    Device,
    Gradients,
    Imports,
    Json,
    Lanes,
    Levels,
    ModelNames,
    Models,
    Norm,
    Overwrite,
    Results,
    Samples,
    Seed,
    SuiteName,
    Surrogate,
    Target,
    check_positive,
    make_specs,
    parse_radii_option,
)
from robbench.commands.printing import print_objects
from robbench.commands.runs import choose_ray, resume_runs, run_all
from robbench.commands.sanity import examine_model
from robbench.commands.show import as_object, write_curves
from robbench.core.errors import RobbenchError
from robbench.core.numbers import parse_eps
from robbench.core.user_code import import_user_modules

if TYPE_CHECKING:
    from robbench.evaluation.options import Options
    from robbench.evaluation.request import RunRequest
    from robbench.masking.record import SanityFile
    from robbench.models.card import Registry
    from robbench.models.spec import ModelSpec, SpecFields
    from robbench.results.schema import ResultFile


__all__ = ["eval_"]

AllModels = Annotated[
    bool, typer.Option("--all", help="Every registered model that has weights; with --dataset, of that data set.")
]
Radii = Annotated[
    str | None,
    typer.Option("--eps", help='Radius in [0, 1] pixel units, such as "8/255"; several with commas make a sweep.'),
]
FastLayers = Annotated[bool, typer.Option(help="On a CPU, replace layers whose gradient torch computes slowly.")]
OneByOne = Annotated[bool, typer.Option("--one-by-one", help="Give the model each image in a batch of its own (slow).")]
Keep = Annotated[
    bool, typer.Option("--save-adversarials", help="Keep every adversarial example, for `robbench verify`.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Instead of --model: go on with every unfinished run (`robbench runs`).")
]
Executor = Annotated[
    Literal["process", "ray"],
    typer.Option(help="Where the work runs: in this process, or on a Ray cluster (docs/scaling.md)."),
]
Address = Annotated[str | None, typer.Option(help="Of a Ray cluster: HOST:PORT or auto; else one is started here.")]
Workers = Annotated[
    int | None,
    typer.Option(callback=check_positive, help="Ray workers; by default one per GPU, or as many as the CPUs allow."),
]
Threads = Annotated[
    int, typer.Option("--threads-per-worker", callback=check_positive, help="CPU threads of each Ray worker.")
]


@takes_model_options()
def eval_(
    model: ModelNames = None,
    all_models: AllModels = False,
    suite: SuiteName = "whitebox",
    samples: Samples = None,
    sample_seed: Annotated[int | None, typer.Option(help="Draw the N images at random with this seed.")] = None,
    eps: Radii = None,
    norm: Norm = None,
    surrogate: Surrogate = None,
    seed: Seed = 0,
    seeds: Annotated[int, typer.Option(help="Run N seeds, from --seed on: mean, range, and worst over seeds.")] = 1,
    lanes: Lanes = None,
    gradients: Gradients = None,
    fast_layers: FastLayers = True,
    one_by_one: OneByOne = False,
    target: Target = None,
    levels: Levels = None,
    device: Device = "auto",
    models: Models = None,
    imports: Imports = None,
    data_dir: DataDir = None,
    results: Results = Path("results"),
    overwrite: Overwrite = False,
    save_adversarials: Keep = False,
    resume: Resume = False,
    wait: Annotated[bool, typer.Option(help="Where another process works on the same result, wait for it.")] = False,
    executor: Executor = "process",
    address: Address = None,
    workers: Workers = None,
    threads: Threads = 1,
    as_json: Json = False,
    *,
    about: SpecFields,
) -> None:
    """Measure the robust accuracy of models.

    Runs a suite of attacks and judges every claimed break.

    Interrupted runs go on where they stopped, and asking for more samples computes only the new ones.
    """
    from robbench.evaluation.options import Options

    ray = choose_ray(executor, address, workers, threads)
    import_user_modules(imports or [])
    place = Options(device=device, results=results, wait=wait)
    options = replace(
        place,
        samples=samples,
        sample_seed=sample_seed,
        seed=seed,
        lanes=lanes,
        gradients=gradients,
        fast_layers=fast_layers,
        one_by_one=one_by_one,
        target=target,
        levels=levels,
        models=models or (),
        data_dir=data_dir,
        overwrite=overwrite,
        save_adversarials=save_adversarials,
        surrogate=surrogate,
    )
    if resume:
        if options != place or model or all_models or about or any(v is not None for v in (eps, norm)):
            raise RobbenchError(
                "--resume goes on with what was begun, as it was begun; it takes only --results, --device, "
                "--wait, --json and what says where the work runs."
            )
        resume_runs(results, device, wait, as_json, ray)
        return
    specs = _choose_models(model or [], all_models, models or [], about)
    _evaluate(_Asked(specs, suite, parse_radii_option(eps), norm, seeds, options, ray, as_json))


@dataclass(frozen=True)
class _Asked:
    """What `robbench eval` was asked for.

    Attributes:
        specs: the models.
        suite: as it was given.
        radii: in ascending order; [None] means the radius of the suite.
        norm: goes with the radii.
        seeds: how many runs there are at each radius, each with the next seed.
        options: of every run, with the first seed and the results tree.
        ray: options of `evaluate_all`; None runs everything in this process.
        as_json: whether to print JSON.
    """

    specs: list[ModelSpec]
    suite: str
    radii: list[str | None]
    norm: str | None
    seeds: int
    options: Options
    ray: dict[str, Any] | None
    as_json: bool

    @property
    def attacked(self) -> list[str | None]:
        """The radii to attack at: radius 0 of a sweep is the clean accuracy, and there is nothing to attack."""
        return [r for r in self.radii if len(self.radii) == 1 or r is None or parse_eps(r) > 0]

    @property
    def results(self) -> Path:
        """The results tree."""
        assert self.options.results is not None
        return Path(self.options.results)


def _evaluate(asked: _Asked) -> None:
    """Plan the runs, do them, and show what came out."""
    requests = _plan_runs(asked)
    is_sanity = asked.suite == "sanity" and len(asked.radii) == asked.seeds == 1
    verdicts: list[SanityFile] = []
    results: list[ResultFile | None]
    if is_sanity:
        results, verdicts = _run_sanity(asked, requests)
    else:
        results = run_all(requests, asked.ray, hint_samples=asked.options.samples is None)
    groups: dict[Any, list[ResultFile]] = {spec.model: [] for spec in asked.specs}
    for request, result in zip(requests, results, strict=True):
        if result is not None:
            groups[request.spec.model].append(result)
    _show_results(asked, list(groups.values()), verdicts, failed=None in results)


def _plan_runs(asked: _Asked) -> list[RunRequest]:
    """List the runs: every model at every radius with every seed.

    Raises:
        RobbenchError: the suite is unknown, or options do not go together.
    """
    from robbench.evaluation.arguments import check_request
    from robbench.evaluation.request import RunRequest
    from robbench.suite import load_suite

    if asked.suite == "sanity" and asked.options.gradients is not None:
        raise RobbenchError(
            f"--gradients {asked.options.gradients} given with the sanity checks, which look at the gradients "
            "themselves."
        )
    if asked.seeds < 1 or (asked.seeds > 1 and len(asked.radii) > 1):
        raise RobbenchError(
            f"--seeds {asked.seeds} given; allowed: 1 or more, and more than 1 at a single radius only."
        )
    if asked.seeds > 1 and load_suite(asked.suite).judge == "nearest":
        raise RobbenchError(
            f"--seeds {asked.seeds} given with suite {asked.suite!r}, which looks for the nearest break. Give the "
            "command once for each seed, with --seed N: each has a table of its own."
        )
    seeds = range(asked.options.seed, asked.options.seed + asked.seeds)
    requests = [
        RunRequest(spec, asked.suite, replace(asked.options, norm=asked.norm, eps=radius, seed=seed))
        for spec, radius, seed in itertools.product(asked.specs, reversed(asked.attacked), seeds)
    ]
    for request in requests:
        check_request(request)
    return requests


def _run_sanity(asked: _Asked, requests: list[RunRequest]) -> tuple[list[ResultFile | None], list[SanityFile]]:
    """Examine every model. With Ray, the suite runs there first, and its records are found here."""
    hint = asked.options.samples is None
    on_ray = run_all(requests, asked.ray) if asked.ray is not None else requests
    found = [
        None if there is None else examine_model(request, hint_samples=hint)
        for request, there in zip(requests, on_ray, strict=True)
    ]
    return [f and f.result for f in found], [f.sanity for f in found if f]


def _show_results(asked: _Asked, groups: list[list[ResultFile]], verdicts: list[SanityFile], *, failed: bool) -> None:
    """Print tables or JSON, and write the pages of several seeds or radii.

    Raises:
        typer.Exit: a run failed. Without it, a spread or a curve would mislead.
    """
    from robbench.report.sanity import print_sanity
    from robbench.report.terminal import print_results

    several = asked.seeds > 1 or len(asked.radii) > 1
    if failed and several:
        raise typer.Exit(2)
    if asked.seeds > 1:
        _show_spread(groups, asked.results, asked.as_json)
    elif len(asked.radii) > 1:
        _show_sweep(groups, asked.results, len(asked.attacked) < len(asked.radii), asked.as_json)
    elif asked.as_json:
        print_objects([as_object(r, asked.results) for group in groups for r in group])
    elif flat := [r for group in groups for r in group]:
        print_results(flat, asked.results)
        write_curves(flat, asked.results)
        for verdict in verdicts:
            again = f"Give the same command with --suite {verdict.advice.suite}, and it runs this suite."
            print_sanity(verdict, again, every=False)
    if failed:
        raise typer.Exit(2)


def _choose_models(model: list[str], all_models: bool, models: list[Path], about: SpecFields) -> list[ModelSpec]:
    """Make the specs of the models that were named, or of all that have weights."""
    if model and all_models:
        raise RobbenchError(
            f"--model {model[0]} and --all given; allowed: one of them. --all is every registered model with weights."
        )
    if not model and not all_models:
        raise RobbenchError(
            "What to measure? --model NAME (`robbench list models`) or --all, or --resume for unfinished runs."
        )
    from robbench.models.card import Registry

    registry = Registry.default(models)
    if all_models:
        model = _list_trained(registry, about.pop("dataset", None))
    return make_specs(model, registry, about)


def _list_trained(registry: Registry, dataset: str | None) -> list[str]:
    """List the models whose weights are here; the others are named on stderr."""
    entries = [e for e in registry.entries() if dataset in (None, e.dataset)]
    left_out = [e for e in entries if e.needs_training]
    for why, members in (
        ("not trained yet", [e.full_name for e in left_out if e.card.weights is None]),
        ("with weights that are not in the repository", [e.full_name for e in left_out if e.card.weights is not None]),
    ):
        if members:
            some = ", ".join(members[:3]) + (" …" if len(members) > 3 else "")
            print(f"{len(members)} {why} and left out ({some}); see `robbench list models`.", file=sys.stderr)
    if len(left_out) == len(entries):
        raise RobbenchError(f"--all --dataset {dataset}: no registered model of it has weights here.")
    return [e.full_name for e in entries if not e.needs_training]


def _show_spread(groups: Iterable[list[ResultFile]], results: Path, as_json: bool) -> None:
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


def _show_sweep(groups: Iterable[list[ResultFile]], results: Path, clean: bool, as_json: bool) -> None:
    """Print and write what came out at several radii."""
    from robbench.report.sweep import extend_sweep, print_sweep, write_sweep

    found = [extend_sweep(results, group, clean) for group in groups]
    for s in found:
        table, curve = write_sweep(s, results)
        if not as_json:
            print_sweep(s)
            print(f"{table} and {curve} written.")
    if as_json:
        print_objects([s.as_json() for s in found])
