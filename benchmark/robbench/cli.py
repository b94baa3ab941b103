"""The command line: argument parsing and printing only. Torch is imported by the commands that need it."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import robbench
from robbench.commands import gate, runs
from robbench.commands.options import SOURCES, DataDir, Json, Models, Results, check_about, per_channel, resumable
from robbench.commands.printing import print_objects, print_table, tree
from robbench.commands.sanity import examined, sanity
from robbench.errors import ResultError, RobbenchError, unknown_name

if TYPE_CHECKING:
    from robbench.report.tables import Sheet
    from robbench.store import ResultFile

__all__ = ["app"]

_BUDGETS = ("auto", "full", "cpu")
_PRECISIONS = ("auto", "float32", "bfloat16")

app = typer.Typer(
    name="robbench",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="How robust is this classifier, really? Attack it, judge every break, and print numbers with intervals.",
)
data_app = typer.Typer(no_args_is_help=True, help="Where test images come from.")
app.add_typer(data_app, name="data")
app.command()(gate.baseline)
app.command()(gate.check)
app.command()(runs.runs)
app.command()(runs.reproduce)
app.command()(sanity)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"robbench {robbench.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="models, suites, attacks, data or figures")],
    models: Models = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """List models, suites, attacks, data sets or figures."""
    from robbench.listing import LISTINGS

    if what not in LISTINGS:
        raise RobbenchError(unknown_name("listing", what, LISTINGS))
    print_table(LISTINGS[what](models or [], data_dir), as_json)


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="A model's name, such as digits/natural.")],
    models: Models = None,
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Show a model's card, and its stored results."""
    from robbench.models.card import Registry
    from robbench.store import read_result

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


def _dump(result: ResultFile) -> dict[str, Any]:
    return result.model_dump(mode="json")


@app.command("eval")
def eval_(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help=f"A registered model, or a source: {SOURCES} (repeatable)."),
    ] = None,
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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")] = "auto",
    models: Models = None,
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
    as_json: Json = False,
) -> None:
    """Measure the robust accuracy of models.

    Runs a suite of attacks and judges every claimed break.

    Interrupted runs go on where they stopped, and asking for more samples computes only the new ones.
    """
    if resume:
        asked = (model, samples, sample_seed, eps, norm, dataset, architecture, mean, std, lanes, models, data_dir)
        if any(v is not None for v in asked) or overwrite or save_adversarials or seed:
            raise RobbenchError(
                "--resume goes on with what was begun, as it was begun; it takes only --results, --device, "
                "--wait and --json."
            )
        runs.resume_runs(results, device, wait, as_json)
        return
    if not model:
        raise RobbenchError("What to measure? --model NAME (`robbench list models`), or --resume for unfinished runs.")
    from robbench.models.card import Registry
    from robbench.models.sources import parse_source
    from robbench.numbers import parse_eps
    from robbench.report.sanity import print_sanity
    from robbench.report.terminal import TerminalReporter, print_results
    from robbench.suite import load_suite

    registry = Registry.default(models or [])
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
    radii = _radii(eps)
    # Radius 0 of a sweep is the clean accuracy: there is nothing to attack.
    attacked = [r for r in radii if len(radii) == 1 or r is None or parse_eps(r) > 0]
    if seeds < 1 or (seeds > 1 and len(radii) > 1):
        raise RobbenchError(f"--seeds {seeds} given; allowed: 1 or more, and more than 1 at a single radius only.")
    from robbench.evaluation import evaluate

    reporter = TerminalReporter(hint_samples=samples is None)
    done: dict[str, list[ResultFile]] = {name: [] for name in names}
    with resumable("Every image that was finished is kept."), contextlib.closing(reporter):
        # The largest radius first: one that is not allowed is told before minutes of work.
        for name, radius, number in itertools.product(done, reversed(attacked), range(seed, seed + seeds)):
            done[name].append(
                evaluate(
                    name,
                    suite,
                    reporter=reporter,
                    **(about if name in sources else {}),
                    samples=samples,
                    sample_seed=sample_seed,
                    eps=radius,
                    norm=norm,
                    seed=number,
                    lanes=lanes,
                    device=device,
                    models=models or [],
                    data_dir=data_dir,
                    results=results,
                    overwrite=overwrite,
                    save_adversarials=save_adversarials,
                    wait=wait,
                )
            )
    if seeds > 1:
        _spread(done.values(), results, as_json)
        return
    checked = []
    if len(radii) == 1 and suite == "sanity":
        run = {"samples": samples, "sample_seed": sample_seed, "eps": eps, "norm": norm, "seed": seed, "lanes": lanes}
        place = {"device": device, "models": models or [], "data_dir": data_dir}
        checked = [
            examined(name, results, False, **(about if name in sources else {}), **run, **place) for name in names
        ]
    if len(radii) > 1:
        _sweep(done.values(), results, len(attacked) < len(radii), as_json)
        return
    flat = [r for group in done.values() for r in group]
    if as_json:
        print_objects([_dump(r) | _trust(r, results) for r in flat])
        return
    print_results(flat, results)
    for found in checked:
        print_sanity(found, every=False)


def _trust(result: ResultFile, results: Path) -> dict[str, Any]:
    """Say what stands beside a robust accuracy wherever it is printed."""
    from robbench.report.leaderboard import overestimation
    from robbench.sanity.record import Verdicts

    return {"verdict": Verdicts(results).of(result), "overestimation": overestimation(result)}


def _radii(eps: str | None) -> list[str | None]:
    from robbench.numbers import parse_radii

    try:
        return [None] if eps is None else [*parse_radii(eps)]
    except ValueError as error:
        raise RobbenchError(f"--eps {eps!r} given: {error}, or several of them with commas between.") from None


def _spread(groups: Iterable[list[ResultFile]], results: Path, as_json: bool) -> None:
    """Print and write what came out with several seeds."""
    from robbench.report.spread import print_spreads, spread, write_spread

    found = [spread(results, group) for group in groups]
    written = [write_spread(s, results) for s in found]
    if as_json:
        print_objects([s.as_json() for s in found])
        return
    print_spreads(found)
    for path in written:
        print(f"{path} written.")


def _sweep(groups: Iterable[list[ResultFile]], results: Path, clean: bool, as_json: bool) -> None:
    """Print and write what came out at several radii."""
    from robbench.report.sweep import print_sweep, sweep, write_sweep

    found = [sweep(results, group, clean) for group in groups]
    for s in found:
        table, curve = write_sweep(s, results)
        if not as_json:
            print_sweep(s)
            print(f"{table} and {curve} written.")
    if as_json:
        print_objects([s.as_json() for s in found])


@app.command()
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
    from robbench.verify import verify as verified

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


@app.command()
def measure(
    what: Annotated[str, typer.Argument(help="linear: logits, their gradients, and the radius L of Shafahi's Eq. 4.")],
    model: Annotated[
        list[str], typer.Option("--model", "-m", help=f"A registered model, or a source: {SOURCES} (repeatable).")
    ],
    samples: Annotated[int | None, typer.Option(help="The first N test images instead of all.")] = None,
    eps: Annotated[str | None, typer.Option(help="Linf radius to predict the accuracy at; by the data set.")] = None,
    dataset: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    architecture: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    mean: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    std: Annotated[str | None, typer.Option(help="As for eval.")] = None,
    lanes: Annotated[int | None, typer.Option(help="Batch width; chosen by image size if left out.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")] = "auto",
    models: Models = None,
    data_dir: DataDir = None,
    results: Results = Path("results"),
    overwrite: Annotated[bool, typer.Option(help="Replace a stored measurement of something else.")] = False,
    as_json: Json = False,
) -> None:
    """Measure models without attacking them: what a linear approximation of the network predicts."""
    from robbench.models.card import Registry
    from robbench.models.sources import parse_source
    from robbench.numbers import parse_threat
    from robbench.report.linear import linear_rows

    if what != "linear":
        raise RobbenchError(unknown_name("measurement", what, ["linear"]))
    try:
        radius = None if eps is None else parse_threat("Linf", eps).eps
    except ValueError as error:
        raise RobbenchError(f"--eps: {error}") from None
    registry = Registry.default(models or [])
    names = [name if parse_source(name) else registry.find(name).full_name for name in model]
    from robbench.linear.measure import measure_linear

    files = [
        measure_linear(
            name,
            dataset=dataset,
            architecture=architecture,
            mean=per_channel("--mean", mean),
            std=per_channel("--std", std),
            samples=samples,
            lanes=lanes,
            device=device,
            data_dir=data_dir,
            models=models or [],
            results=results,
            overwrite=overwrite,
            note=lambda text: print(text, file=sys.stderr),
        )
        for name in names
    ]
    if as_json:
        print_objects([file.model_dump(mode="json") for file in files])
        return
    print_table(list(linear_rows(files, results, radius)), as_json=False)
    print("Medians over the images, each at the wrong class of its smallest L (Eq. 4 of Shafahi et al. 2019).")
    for file in files:
        for flag, text in sorted(file.flags.items()):
            print(f"{file.dataset}/{file.model}: {flag}: {text}")


@app.command()
def train(
    card: Annotated[str | None, typer.Argument(help="The model to train, by its card's name.")] = None,
    all_missing: Annotated[
        bool, typer.Option("--all-missing", help="Train all that lack weights or are partly trained, in order.")
    ] = False,
    time_limit: Annotated[str | None, typer.Option(help="Stop after this long (90, 90s, 9m, 2h); resumable.")] = None,
    restart: Annotated[bool, typer.Option(help="Forget an earlier, unfinished training.")] = False,
    budget: Annotated[
        str, typer.Option(help="full, cpu (the card's smaller recipe for a CPU), or auto: by the device.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="float32, bfloat16, or auto: by the device and image size.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")] = "auto",
    runs: Annotated[Path, typer.Option(help="Where checkpoints and logs go.")] = Path("runs"),
    models: Models = None,
    data_dir: DataDir = None,
) -> None:
    """Train a model by its card's recipe.

    Writes the weights and their digest into the registry; stopped anywhere, the same command goes on.
    """
    from robbench.models.card import Entry, Registry

    if (card is None) != all_missing:
        raise RobbenchError("Give either the name of a card to train, or --all-missing.")
    if restart and all_missing:
        raise RobbenchError("--restart forgets the training of one card; give its name instead of --all-missing.")
    for option, given, allowed in (("--budget", budget, _BUDGETS), ("--precision", precision, _PRECISIONS)):
        if given not in allowed:
            raise RobbenchError(f"{option}: {unknown_name('value', given, allowed)}")
    registry = Registry.default(models or [])
    entry = None if card is None else registry.find(card)
    limit = None if time_limit is None else _seconds(time_limit)
    from robbench.report.curve import draw_curve
    from robbench.training.missing import missing, train_missing
    from robbench.training.train import Progress, Trained, train

    def report(p: Progress) -> None:
        left = f"{p.left / 60:.1f} min left" if p.iteration < p.iterations else "done"
        seen = "" if p.clean is None or p.robust is None else f"  clean {p.clean:.1%}  robust {p.robust:.1%}"
        print(f"{p.iteration:>8}/{p.iterations}  loss {p.loss:.4f}  lr {p.lr:.2e}  {left}{seen}", file=sys.stderr)

    def done(entry: Entry, trained: Trained) -> None:
        draw_curve(trained.log, trained.log.with_name("curve.png"), f"{entry.full_name}: training")
        table = trained.table
        print(f"{entry.full_name}: {table['iterations']} of {trained.wanted} iterations in {table['seconds']} s.")
        if not trained.kept:
            print("The card keeps its weights: they have seen more iterations. The same command goes on with these.")
        print(f"Log and curve: {trained.log.parent}. Its robustness: robbench eval --model {entry.full_name}")

    options: dict[str, Any] = {
        "data_dir": data_dir,
        "runs": runs,
        "device": device,
        "budget": budget,
        "precision": precision,
        "compiled": compiled,
        "time_limit": limit,
        "report": report,
    }
    with resumable(f"The last checkpoint is in {runs}."):
        if entry is not None:
            command = f"robbench train {entry.full_name}" + (f" --time-limit {time_limit}" if time_limit else "")
            done(entry, train(entry, restart=restart, command=command, **options))
            return
        before = missing(registry, device=device, budget=options["budget"])
        train_missing(registry, begin=lambda e: print(f"Training {e.full_name}", file=sys.stderr), done=done, **options)
        left = missing(Registry.default(models or []), device=device, budget=options["budget"])
        print(
            f"{len(before) - len(left)} finished; {len(left)} left" + (f", next: {left[0].full_name}" if left else "")
        )


@app.command()
def cards(
    models: Annotated[Path | None, typer.Option("--models", help="A registry other than the built-in one.")] = None,
    check: Annotated[bool, typer.Option(help="Write nothing; fail (exit 1) when a card is stale.")] = False,
) -> None:
    """Write the cards that a registry's families.toml describes; trained weights stay."""
    from robbench.models.card import builtin_root
    from robbench.models.families import stale_cards, write_cards

    root = models or builtin_root()
    paths = stale_cards(root) if check else write_cards(root)
    for path in paths:
        print(f"{path} is stale: run `robbench cards`." if check else f"{path} written.", file=sys.stderr)
    if check and paths:
        raise typer.Exit(1)
    print("The cards are up to date." if not paths else f"{len(paths)} cards written.")


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], text[-1]) if text and text[-1] in units else (text, "s")
    try:
        value = float(number) * units[unit]
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise RobbenchError(f"--time-limit: {text!r} given; allowed: seconds, or a number with s, m or h, such as 9m.")
    return value


@data_app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="mnist, fashion_mnist, cifar10 or cifar100")], data_dir: DataDir = None
) -> None:
    """Download a data set from its public source, checksums verified."""
    from robbench.data import fetch as fetch_data

    for path in fetch_data(name, data_dir, lambda line: print(line, file=sys.stderr)):
        print(path)


@app.command()
def leaderboard(
    results: Results = Path("results"),
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("leaderboard.md"),
    check: Annotated[bool, typer.Option(help="Write nothing; fail (exit 1) when the file is stale.")] = False,
) -> None:
    """Write leaderboard.md from the results tree."""
    from robbench.report.leaderboard import leaderboard as render

    _page(render(tree(results)), output, check, "leaderboard")


@app.command()
def trained(
    results: Results = Path("results"),
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("docs/trained.md"),
    check: Annotated[bool, typer.Option(help="Write nothing; fail (exit 1) when the file is stale.")] = False,
) -> None:
    """Write docs/trained.md: the models trained here beside the papers' figures."""
    from robbench.models.card import Registry, builtin_root
    from robbench.report.trained import trained_models

    _page(trained_models(Registry([builtin_root()]).entries(), tree(results)), output, check, "trained")


@app.command("table")
def table_(
    name: Annotated[str, typer.Argument(metavar="ID", help="A table: shafahi2019-5 (or just 5), ... or all.")],
    run: Annotated[
        bool, typer.Option("--run", help="First make the results that are missing for cards with weights.")
    ] = False,
    kind: Annotated[str, typer.Option("--format", help="terminal, markdown, latex, csv or html.")] = "terminal",
    output: Annotated[Path | None, typer.Option(help="The file to write instead of printing.")] = None,
    check: Annotated[bool, typer.Option(help="With all: write nothing; fail (exit 1) when a file is stale.")] = False,
    samples: Annotated[int | None, typer.Option(help="With --run: the first N test images instead of all.")] = None,
    device: Annotated[str, typer.Option(help="With --run: auto, cpu, cuda or cuda:i.")] = "auto",
    models: Models = None,
    data_dir: DataDir = None,
    results: Results = Path("results"),
) -> None:
    """Set our results beside a table of a paper; "all" writes every table to RESULTS/tables/."""
    from robbench.models.card import Registry
    from robbench.report.layout import Commands, check_format, render
    from robbench.report.published import TABLES, find_table
    from robbench.report.tables import fill

    tables = list(TABLES.values()) if name == "all" else [find_table(name)]
    if name == "all" and (kind != "terminal" or output):
        raise RobbenchError(
            "--format and --output go with one table; all writes .md and .csv files to RESULTS/tables/."
        )
    if check and (name != "all" or run):
        raise RobbenchError("--check goes with all, and without --run.")
    check_format(kind)
    registry = Registry.default(models or [])
    if run:
        options = {"samples": samples, "device": device, "models": models or [], "data_dir": data_dir}
        for table in tables:
            _make(fill(table, registry, results), results, options)
    tree(results)
    commands = Commands(models or [], results)
    for table in tables:
        sheet = fill(table, registry, results)
        if name == "all":
            for ending, written in (("md", "markdown"), ("csv", "csv")):
                page = results / "tables" / f"{table.id}.{ending}"
                _page(render(sheet, written, commands), page, check, "table all")
        elif output:
            _page(render(sheet, kind, commands), output, False, "table")
        else:
            from rich.console import Console

            console = Console()
            print(render(sheet, kind, commands, console.width if console.is_terminal else None), end="")


def _make(sheet: Sheet, results: Path, options: dict[str, Any]) -> None:
    """Make the results that a table lacks and that need no training first."""
    from robbench.report.terminal import TerminalReporter

    waiting = sum(bool(line.todo.train) for line in sheet.lines)
    print(f"{sheet.table.id}: {len(sheet.runs)} runs to make; {waiting} rows wait for training.", file=sys.stderr)
    if not sheet.runs:
        return
    from robbench.evaluation import evaluate
    from robbench.linear.measure import measure_linear

    reporter = TerminalReporter(hint_samples=options["samples"] is None)
    with resumable("Every image that was finished is kept."), contextlib.closing(reporter):
        for job in sheet.runs:
            common = {"results": results, "overwrite": job.overwrite, **options}
            if job.suite:
                evaluate(job.model, job.suite, reporter=reporter, **common)
            else:
                measure_linear(job.model, note=reporter.note, **common)


@app.command()
def figure(
    name: Annotated[str, typer.Argument(metavar="ID", help="A figure (`robbench list figures`), or all.")],
    dataset: Annotated[str | None, typer.Option(help="Draw it for this data set; by default the paper's.")] = None,
    output: Annotated[Path | None, typer.Option(help="The folder to write to; RESULTS/figures if left out.")] = None,
    check: Annotated[bool, typer.Option(help="Write nothing; fail (exit 1) when a figure is stale.")] = False,
    models: Models = None,
    data_dir: DataDir = None,
    results: Results = Path("results"),
) -> None:
    """Draw a figure from stored results: a PNG and the plotted numbers as CSV; "all" draws every one."""
    from robbench.models.card import Registry
    from robbench.report.figures.definitions import find_figure
    from robbench.report.figures.source import Source
    from robbench.report.figures.write import every_figure, write_figure

    if name == "all" and dataset:
        raise RobbenchError("--dataset goes with one figure; all draws every data set.")
    source = Source(Registry.default(models or []), tree(results), data_dir)
    folder = output or results / "figures"
    if name == "all":
        found = every_figure(source, folder, check)
    else:
        one = find_figure(name)
        found = iter([write_figure(source, one, dataset or one.datasets[0], folder, check)])
    out_of_date = False
    for written in found:
        for line in written.missing:
            print(f"{written.name}: not measured: {line}", file=sys.stderr)
        if not written.paths and name != "all":
            raise ResultError(f"Nothing to draw for {written.name}. " + " Or: ".join(written.missing))
        if written.stale:
            print(f"{written.stale}: run `robbench figure {name}`.", file=sys.stderr)
            out_of_date = True
        elif written.paths:
            print(f"{written.paths[0]} {'is up to date' if check else 'written'}.")
    if out_of_date:
        raise typer.Exit(1)


@app.command()
def export(
    result: Annotated[Path, typer.Argument(help="A result.json, or the folder that holds it.")],
    kind: Annotated[str, typer.Option("--format", help="robustbench: an entry of its leaderboard.")] = "robustbench",
    output: Annotated[Path | None, typer.Option(help="The file to write instead of printing.")] = None,
    models: Models = None,
) -> None:
    """Print a result in the form of another leaderboard."""
    from robbench.models.card import Registry
    from robbench.report.export import export_result

    text, notes = export_result(result, kind, Registry.default(models or []))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if output:
        _page(text, output, False, "export")
    else:
        print(text, end="")


def _page(text: str, output: Path, check: bool, command: str) -> None:
    """Write a generated page, or tell whether the one there is up to date."""
    from robbench.files import write_atomically

    if not check:
        write_atomically(output, text.encode())
        print(f"{output} written.")
        return
    if not output.exists() or output.read_text(encoding="utf-8") != text:
        print(f"{output} is stale: run `robbench {command}`.", file=sys.stderr)
        raise typer.Exit(1)
    print(f"{output} is up to date.")
