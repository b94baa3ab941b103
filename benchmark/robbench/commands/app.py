"""The command line. It parses arguments and prints. Commands that need torch import it themselves."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from robbench.commands import evaluate, gate, pages, plan, runs, show, site, train
from robbench.commands.certify import certify
from robbench.commands.measure import measure
from robbench.commands.options import DataDir, Json, Models
from robbench.commands.printing import print_table
from robbench.commands.sanity import sanity
from robbench.core.errors import RobbenchError, unknown_name
from robbench.core.user_code import StrayExitError, refuse_exits
from robbench.core.version import __version__

__all__ = ["app"]

app = typer.Typer(
    name="robbench",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="How robust is this classifier, really? Attack it, judge every break, and print numbers with intervals.",
)
data_app = typer.Typer(no_args_is_help=True, help="Download data sets.")
app.add_typer(data_app, name="data")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"robbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
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
    from robbench.commands.listing import LISTINGS

    if what not in LISTINGS:
        raise RobbenchError(unknown_name("listing", what, LISTINGS))
    print_table(LISTINGS[what](models or [], data_dir), as_json)


def _count_as_done_if_it_returns(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command whose exit code is 0 only if it returns: code of the user may raise what ends the process."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            with refuse_exits():
                command(*args, **options)
        except StrayExitError as error:
            raise RobbenchError(f"{error}. The command was not done, and nothing can be concluded.") from error
        except typer.Exit as ended:
            if not ended.exit_code:
                raise RobbenchError("Something ended the command before it was done.") from ended
            raise

    return run


for name, command in (
    ("show", show.show),
    ("eval", evaluate.eval_),
    ("plan", plan.plan_runs),
    ("verify", show.verify_result),
    ("sanity", sanity),
    ("runs", runs.runs),
    ("reproduce", runs.reproduce_result),
    ("baseline", gate.make_baseline),
    ("check", gate.check_baseline),
    ("measure", measure),
    ("certify", certify),
    ("train", train.train),
    ("cards", train.cards),
    ("leaderboard", pages.leaderboard),
    ("trained", pages.trained),
    ("table", pages.table_),
    ("figure", pages.figure),
    ("export", pages.export),
    ("report", site.report),
    ("serve", site.serve),
):
    app.command(name)(_count_as_done_if_it_returns(command))


@data_app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="mnist, fashion_mnist, cifar10 or cifar100")], data_dir: DataDir = None
) -> None:
    """Download a data set from its public source, checksums verified."""
    from robbench.data.sets import fetch as fetch_data

    for path in fetch_data(name, data_dir, lambda line: print(line, file=sys.stderr)):
        print(path)
