"""`robbench train`, and `robbench cards`, which writes the cards that it reads."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from robbench.commands.options import DataDir, Device, Models, Results, check_folder, explain_interrupt
from robbench.commands.printing import announce
from robbench.core.errors import RobbenchError, unknown_name
from robbench.core.words import format_count

if TYPE_CHECKING:
    from robbench.models.card import Entry, Registry
    from robbench.training.options import BudgetName, Options, Precision, Progress
    from robbench.training.train import TrainingResult

__all__ = ["cards", "report_progress", "train"]

_BUDGETS = ("auto", "full", "cpu", "gpu")
_PRECISIONS = ("auto", "float32", "bfloat16", "float64")
_FAMILY = (
    "Train the models of a paper's table (shafahi2019-5), a list (a,b,c) of one architecture, or a study "
    "(tsipras2019-digits)."
)
_OF_A_STUDY = ("--time-limit", "--restart", "--device", "--runs", "--results", "--data-dir")


def train(
    card: Annotated[str | None, typer.Argument(help="The model to train, by its card's name.")] = None,
    all_missing: Annotated[
        bool,
        typer.Option("--all-missing", help="Train all models without weights or with unfinished training, in order."),
    ] = False,
    family: Annotated[str | None, typer.Option(help=_FAMILY)] = None,
    time_limit: Annotated[str | None, typer.Option(help="Stop after this long (90, 90s, 9m, 2h); resumable.")] = None,
    fit: Annotated[
        str | None,
        typer.Option(help="Fit the iterations and the schedule to this much time (30m), all calls together."),
    ] = None,
    iterations: Annotated[
        str | None, typer.Option(help="Train for so many iterations, or repeat the plan of a card's [trained] table.")
    ] = None,
    restart: Annotated[bool, typer.Option(help="Start again, without an earlier unfinished training.")] = False,
    budget: Annotated[
        str, typer.Option(help="full, cpu (a smaller recipe), gpu (larger batches), or auto: by the device.")
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="float32, bfloat16, float64, or auto: by the device and image size.")
    ] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    device: Device = "auto",
    runs: Annotated[Path, typer.Option(callback=check_folder, help="Where checkpoints and logs go.")] = Path("runs"),
    models: Models = None,
    data_dir: DataDir = None,
    results: Results = Path("results"),
) -> None:
    """Train a model by its card's recipe, or a study: a family of small networks.

    It writes the weights and their digest into the registry. Of a study, it writes the measurements into --results.
    If it is interrupted, the same command resumes.
    """
    began = time.monotonic()  # the imports below take seconds
    from robbench.analysis.study_spec import load_studies
    from robbench.models.card import Registry

    said = {"--fit": fit, "--iterations": iterations, "--time-limit": time_limit}
    said |= {"--budget": budget, "--precision": precision}
    _check(said, [card is None, not all_missing, family is None].count(False), all_missing, restart)
    if family is not None and family in load_studies():
        _check_study(family, said, bool(models) or compiled)
        _train_study(family, data_dir, results, runs, device, time_limit, restart)
        return
    registry = Registry.default(models or [])
    entry = None if card is None else registry.find(card)
    members = [] if family is None else _find_family(family, registry)
    limit, seconds = _seconds("--time-limit", time_limit), _seconds("--fit", fit)
    announce(f"train {entry.full_name if entry else family or 'what is missing'}: loading")
    from robbench.training.missing import train_family
    from robbench.training.options import Options
    from robbench.training.plan import Plan
    from robbench.training.train import train

    _warn_of_slow_precision(precision, device)
    names = [entry.full_name] if entry is not None else [f"--family {family}"] if members else []
    options = Options(
        data_dir=data_dir,
        runs=runs,
        device=device,
        budget=cast("BudgetName", budget),
        precision=cast("Precision", precision),
        compiled=compiled,
        time_limit=limit,
        restart=restart,
        fit=seconds,
        plan=None if iterations is None else Plan.parse(iterations),
        began=began,
        command=" ".join(["robbench train", *names, *_list_changed(said)]) if names else "",
        report=_report_member if members else report_progress,
    )
    with explain_interrupt(f"The last checkpoint is in {runs}."):
        if entry is not None:
            _finish(entry, train(entry, options))
        elif members:
            train_family(members, options, skip=_explain_skipped, done=_finish)
        else:
            _train_missing(models or [], options)


def cards(
    models: Annotated[Path | None, typer.Option("--models", help="A registry other than the built-in one.")] = None,
    check: Annotated[bool, typer.Option(help="Write nothing; fail (exit 1) when a card is stale.")] = False,
) -> None:
    """Write the cards that a registry's families.toml describes. Trained weights stay."""
    from robbench.models.card import locate_builtin_cards
    from robbench.models.families import list_stale_cards, write_cards

    root = models or locate_builtin_cards()
    paths = list_stale_cards(root) if check else write_cards(root)
    for path in paths:
        print(f"{path} is stale: run `robbench cards`." if check else f"{path} written.", file=sys.stderr)
    if check and paths:
        raise typer.Exit(1)
    print("The cards are up to date." if not paths else f"{format_count(len(paths), 'card')} written.")


def _check(given: dict[str, str | None], named: int, all_missing: bool, restart: bool) -> None:
    if named != 1:
        raise RobbenchError("Give either the name of a card to train, or --family, or --all-missing.")
    if all_missing and (restart or given["--fit"] is not None or given["--iterations"] is not None):
        raise RobbenchError("--restart, --fit and --iterations work with named cards, not with --all-missing.")
    for option, known in (("--budget", _BUDGETS), ("--precision", _PRECISIONS)):
        if given[option] not in known:
            raise RobbenchError(f"{option}: {unknown_name('value', str(given[option]), known)}")
    if given["--fit"] is not None and given["--iterations"] is not None:
        raise RobbenchError("--fit and --iterations given; allowed: one of them. --fit chooses the iterations itself.")


def _warn_of_slow_precision(precision: str, device: str) -> None:
    from robbench.classifier.prepare import pick_device
    from robbench.core.machine import has_bfloat16_instructions

    if precision == "bfloat16" and pick_device(device).type == "cpu" and has_bfloat16_instructions() is False:
        print("This processor has no instructions for bfloat16. It trains many times slower with it.", file=sys.stderr)


def _train_missing(models: list[Path], options: Options) -> None:
    from robbench.models.card import Registry
    from robbench.training.missing import list_missing, train_missing

    def begin(entry: Entry) -> None:
        print(f"Training {entry.full_name}", file=sys.stderr)

    before = list_missing(Registry.default(models), device=options.device, budget=options.budget)
    train_missing(Registry.default(models), options, begin=begin, done=_finish)
    left = list_missing(Registry.default(models), device=options.device, budget=options.budget)
    print(f"{len(before) - len(left)} finished; {len(left)} left" + (f", next: {left[0].full_name}" if left else ""))


def _list_changed(given: dict[str, str | None]) -> list[str]:
    """List the options of a call that were given, as they are written."""
    return [f"{option} {value}" for option, value in given.items() if value not in (None, "auto")]


def _check_study(name: str | None, given: dict[str, str | None], changed: bool) -> None:
    if changed or any(not text.startswith("--time-limit") for text in _list_changed(given)):
        raise RobbenchError(f"--family {name} is a study; allowed with it: {', '.join(_OF_A_STUDY)}.")


def _train_study(
    name: str,
    data_dir: Path | None,
    results: Path,
    runs: Path,
    device: str,
    time_limit: str | None,
    restart: bool,
) -> None:
    announce(f"train {name}: loading")
    from robbench.analysis.study import StudyOptions, train_study
    from robbench.analysis.study_spec import load_studies

    limit = _seconds("--time-limit", time_limit)

    def note(text: str) -> None:
        print(text, file=sys.stderr)

    options = StudyOptions(
        data_dir=data_dir, results=results, runs=runs, device=device, time_limit=limit, restart=restart, note=note
    )
    with explain_interrupt(f"The networks that are trained are in {runs}."):
        for file in train_study(name, load_studies()[name], options):
            print(f"{file.dataset}/{file.model}: {format_count(file.rows, 'number')} in {results}.")


def report_progress(p: Progress) -> None:
    """Print a report of a training."""
    left = f"{p.left / 60:.1f} min left" if p.iteration < p.iterations else "done"
    tested = "" if p.clean is None or p.robust is None else f"  clean {p.clean:.1%}  robust {p.robust:.1%}"
    print(f"{p.iteration:>8}/{p.iterations}  loss {p.loss:.4f}  lr {p.lr:.2e}  {left}{tested}", file=sys.stderr)


def _report_member(p: Progress) -> None:
    if p.clean is not None:  # ten lines a model, not a hundred
        print(p.model, end=" ", file=sys.stderr)
        report_progress(p)


def _finish(entry: Entry, trained: TrainingResult) -> None:
    from robbench.report.curve import draw_curve

    draw_curve(trained.log, trained.log.with_name("curve.png"), f"{entry.full_name}: training")
    done = trained.table["iterations"]
    print(f"{entry.full_name}: {done} of {trained.wanted} iterations in {trained.table['seconds']} s.")
    if not trained.written:
        again = "Run the same command again to continue this training."
        if done == trained.wanted:
            again = "Use --restart to replace them."
        print(f"The card keeps its old weights, because they were trained for more iterations. {again}")
    elif note := _explain_replaced(entry):
        print(note)
    advice = (
        f" Its robustness: robbench eval --model {entry.full_name}{_name_registry(entry)}" if trained.written else ""
    )
    print(f"Log and curve: {trained.log.parent}.{advice}")


def _find_family(text: str, registry: Registry) -> list[Entry]:
    """Find the cards of a paper's table by its id or number, or of names separated by commas."""
    from robbench.analysis.study_spec import load_studies
    from robbench.papers.published import TABLES, find_table, read_paper_rows

    known = {f"shafahi2019-{text}" if text.isdecimal() else text} & set(TABLES)
    if not known and not set(",/") & set(text):
        problem = unknown_name("family", text, [*TABLES, *load_studies()])
        raise RobbenchError(f"--family: {problem} Or give names of cards: --family dataset/a,dataset/b")
    if not known:
        return list(dict.fromkeys(registry.find(name.strip()) for name in text.split(",")))
    rows = read_paper_rows(find_table(text), registry.entries())
    members = list(dict.fromkeys(entry for row in rows for entry in row.cards))
    if not members:
        raise RobbenchError(
            f"--family: {text!r} given; no card quotes this table. Give names: --family dataset/a,dataset/b"
        )
    return members


def _explain_skipped(entry: Entry) -> None:
    trained = entry.card.trained
    done = "" if trained is None else f" ({format_count(trained.iterations, 'iteration')})"
    print(f"{entry.full_name} is trained already{done}. --restart trains it again.")


def _explain_replaced(entry: Entry) -> str:
    """Explain that training replaced the weights of a card; empty if the card, as read before, had none or the same."""
    from robbench.models.card import load_card

    before, after = entry.card.weights, load_card(entry.path).weights
    if before is None or after is None or before.sha256 == after.sha256:
        return ""
    return (
        f"The card had weights with SHA-256 {before.sha256}. They are replaced. Their results no longer count: "
        f"`robbench eval --model {entry.full_name}{_name_registry(entry)} --overwrite` makes new ones."
    )


def _name_registry(entry: Entry) -> str:
    """Return the option that finds a card of a registry which commands do not read without it; else nothing."""
    from robbench.models.card import Registry

    known = {usual.path.resolve() for usual in Registry.default().entries()}
    return "" if entry.path.resolve() in known else f" --models {shlex.quote(str(entry.path.parent.parent))}"


def _seconds(option: str, text: str | None) -> float | None:
    if text is None:
        return None
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], text[-1]) if text and text[-1] in units else (text, "s")
    try:
        value = float(number) * units[unit]
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise RobbenchError(f"{option}: {text!r} given; allowed: seconds, or a number with s, m or h, such as 9m.")
    return value
