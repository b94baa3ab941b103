"""`robbench train`, and `robbench cards`, which writes the cards that it reads."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from robbench.commands.options import DataDir, Device, Models, explain_interrupt
from robbench.commands.printing import announce
from robbench.core.errors import RobbenchError, unknown_name

if TYPE_CHECKING:
    from robbench.models.card import Entry
    from robbench.training.options import BudgetName, Precision

__all__ = ["cards", "train"]

_BUDGETS = ("auto", "full", "cpu")
_PRECISIONS = ("auto", "float32", "bfloat16")


def train(
    card: Annotated[str | None, typer.Argument(help="The model to train, by its card's name.")] = None,
    all_missing: Annotated[
        bool,
        typer.Option("--all-missing", help="Train all models without weights or with unfinished training, in order."),
    ] = False,
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
        str, typer.Option(help="full, cpu (the card's smaller recipe for a CPU), or auto: by the device.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="float32, bfloat16, or auto: by the device and image size.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    device: Device = "auto",
    runs: Annotated[Path, typer.Option(help="Where checkpoints and logs go.")] = Path("runs"),
    models: Models = None,
    data_dir: DataDir = None,
) -> None:
    """Train a model by its card's recipe.

    It writes the weights and their digest into the registry. If it is interrupted, the same command resumes.
    """
    began = time.monotonic()  # the imports below take seconds
    from robbench.models.card import Registry

    if (card is None) != all_missing:
        raise RobbenchError("Give either the name of a card to train, or --all-missing.")
    if restart and all_missing:
        raise RobbenchError("--restart works for one card. Give its name instead of --all-missing.")
    if all_missing and (fit or iterations):
        raise RobbenchError("--fit and --iterations work for one card. Give its name instead of --all-missing.")
    if fit and iterations:
        raise RobbenchError("--fit and --iterations given; allowed: one of them. --fit chooses the iterations itself.")
    for option, given, allowed in (("--budget", budget, _BUDGETS), ("--precision", precision, _PRECISIONS)):
        if given not in allowed:
            raise RobbenchError(f"{option}: {unknown_name('value', given, allowed)}")
    registry = Registry.default(models or [])
    entry = None if card is None else registry.find(card)
    limit = None if time_limit is None else _seconds("--time-limit", time_limit)
    seconds = None if fit is None else _seconds("--fit", fit)
    announce(f"train {entry.full_name if entry else 'what is missing'}: loading")
    from robbench.report.curve import draw_curve
    from robbench.training.missing import list_missing, train_missing
    from robbench.training.options import Options, Progress
    from robbench.training.plan import Plan
    from robbench.training.train import TrainingResult, train

    def report(p: Progress) -> None:
        left = f"{p.left / 60:.1f} min left" if p.iteration < p.iterations else "done"
        tested = "" if p.clean is None or p.robust is None else f"  clean {p.clean:.1%}  robust {p.robust:.1%}"
        print(f"{p.iteration:>8}/{p.iterations}  loss {p.loss:.4f}  lr {p.lr:.2e}  {left}{tested}", file=sys.stderr)

    def finish(entry: Entry, trained: TrainingResult) -> None:
        draw_curve(trained.log, trained.log.with_name("curve.png"), f"{entry.full_name}: training")
        table = trained.table
        done = table["iterations"] == trained.wanted
        print(f"{entry.full_name}: {table['iterations']} of {trained.wanted} iterations in {table['seconds']} s.")
        if not trained.written:
            again = (
                "Use --restart to replace them." if done else "Run the same command again to continue this training."
            )
            print(f"The card keeps its old weights, because they were trained for more iterations. {again}")
        elif note := _explain_replaced(entry):
            print(note)
        print(f"Log and curve: {trained.log.parent}. Its robustness: robbench eval --model {entry.full_name}")

    said = {
        "--fit": fit,
        "--iterations": iterations,
        "--time-limit": time_limit,
        "--budget": budget,
        "--precision": precision,
    }
    changed = [f"{option} {value}" for option, value in said.items() if value not in (None, "auto")]
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
        command="" if entry is None else " ".join([f"robbench train {entry.full_name}", *changed]),
        report=report,
    )
    with explain_interrupt(f"The last checkpoint is in {runs}."):
        if entry is not None:
            finish(entry, train(entry, options))
            return
        before = list_missing(registry, device=device, budget=options.budget)
        train_missing(registry, options, begin=lambda e: print(f"Training {e.full_name}", file=sys.stderr), done=finish)
        left = list_missing(Registry.default(models or []), device=device, budget=options.budget)
        print(
            f"{len(before) - len(left)} finished; {len(left)} left" + (f", next: {left[0].full_name}" if left else "")
        )


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
    print("The cards are up to date." if not paths else f"{len(paths)} cards written.")


def _explain_replaced(entry: Entry) -> str:
    """Explain that training replaced the weights of a card; empty if the card, as read before, had none or the same."""
    from robbench.models.card import load_card

    before, after = entry.card.weights, load_card(entry.path).weights
    if before is None or after is None or before.sha256 == after.sha256:
        return ""
    return (
        f"The card had weights with SHA-256 {before.sha256}. They are replaced. Their results no longer count: "
        "`robbench eval --overwrite` makes new ones."
    )


def _seconds(option: str, text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], text[-1]) if text and text[-1] in units else (text, "s")
    try:
        value = float(number) * units[unit]
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise RobbenchError(f"{option}: {text!r} given; allowed: seconds, or a number with s, m or h, such as 9m.")
    return value
