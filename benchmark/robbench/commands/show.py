"""`robbench show` and `robbench verify`: what is stored, and whether it holds."""

from __future__ import annotations

import glob
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from robbench.commands.about import takes_model_options
from robbench.commands.options import (
    SOURCES,
    DataDir,
    Device,
    Json,
    Models,
    Results,
    check_positive,
)
from robbench.commands.printing import announce, print_json, print_text
from robbench.core.words import name_tree

if TYPE_CHECKING:
    from robbench.certify.verify import CertifiedCheck
    from robbench.models.card import Registry
    from robbench.models.spec import RecalledFields
    from robbench.recheck.recall import VerifyFields
    from robbench.recheck.verify import Verification
    from robbench.results.schema import ResultFile

__all__ = ["as_object", "show", "verify_result", "write_curves"]


def as_object(result: ResultFile, results: Path) -> dict[str, Any]:
    """Say a result as JSON, with what stands beside a robust accuracy wherever it is printed."""
    from robbench.masking.stored import VerdictIndex
    from robbench.report.distance import describe_distances, read_distances
    from robbench.report.leaderboard import compute_overestimation

    verdicts = VerdictIndex(results)
    trust: dict[str, Any] = {
        "verdict": verdicts.find(result),
        "verdict_n": verdicts.find_n(result),
        "overestimation": compute_overestimation(result),
    }
    if not result.has_radius:
        trust["distances"] = describe_distances(read_distances(results, result))
    return result.model_dump(mode="json") | trust


def write_curves(results: list[ResultFile], root: Path) -> None:
    """Write the curve of each result of distances, and name its files."""
    from robbench.report.distance import write_survival

    for result in results:
        if not result.has_radius:
            numbers, picture = write_survival(root, result)
            print_text(f"{numbers} and {picture} written.")


def show(
    model: Annotated[
        str, typer.Argument(help="A model's name, such as digits/natural, or that of a model of your own.")
    ],
    models: Models = None,
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Show a model's card, and its stored results. A model of your own has results only."""
    from robbench.models.card import Registry, read_card_text

    registry = Registry.default(models or [])
    own = _find_own(model, registry, results)
    entry = None if own else registry.find(model)
    card = entry and entry.card  # an invalid card is refused before anything is printed
    if entry and card and not as_json:  # at once: reading results takes a second
        print_text(f"# {entry.full_name}  ({entry.path})\n")
        print_text(read_card_text(entry.path).expandtabs(4))
        if card.weights is not None and not card.shipped:
            print_text(entry.explain_unshipped() + "\n")
        sys.stdout.flush()
    from robbench.certify.interval import CertificateIndex
    from robbench.masking.stored import VerdictIndex
    from robbench.results.reader import Damage, read_results

    names = [entry.full_name] if entry else own
    stored: list[ResultFile] = []
    damaged: list[Damage] = []
    for pattern in map(glob.escape, names):
        found, unread = read_results(results, pattern)
        stored += found
        damaged += (
            unread + VerdictIndex(results).list_damaged(pattern) + CertificateIndex(results).list_damaged(pattern)
        )
    if as_json:
        described = [as_object(r, results) for r in stored]
        lost = {"damaged": list(map(str, damaged))} if damaged else {}
        about = {"model": names[0], "card": card and card.model_dump(mode="json")}
        print_json(about | {"results": described} | lost)
        return
    if stored:
        from robbench.report.terminal import print_results

        print_results(stored, results)
    for damage in damaged:
        print_text(str(damage))
    if not stored and not damaged:
        registries = "".join(f" --models {shlex.quote(str(path))}" for path in models or [])
        if entry is None:
            print_text(f"No result of a suite in {results}: robbench eval, with --model and the source of {names[0]}.")
        else:
            print_text(f"No results yet: robbench eval --model {model}{registries}{name_tree(results)}")


def _find_own(model: str, registry: Registry, results: Path) -> list[str]:
    """List the full names of models that have this name and a folder in a results tree; none if a card has the name.

    Args:
        model: `dataset/name`, a name alone, or the source that was measured, such as mine:make_net.
        registry: the models with a card.
        results: the results tree.

    Raises:
        CardError: there is neither such a folder nor one card of this name. The message lists the folders.
    """
    from robbench.core.errors import CardError
    from robbench.models.sources import parse_source

    try:
        registry.find(model)
    except CardError as error:
        cards = {entry.full_name for entry in registry.entries()}
        kept = [*results.glob("*/*/*/*.json"), *results.glob("*/*/certified/*/")]  # not the pages of `robbench report`
        folders = {path.parents[1].relative_to(results).as_posix() for path in kept}
        own = sorted(folders - cards)
        source = parse_source(model)
        asked = model if source is None else source.name
        found = [name for name in own if asked in (name, name.partition("/")[2])]
        if found and not any(entry.name == model for entry in registry.entries()):
            return found
        if source is not None:
            holds = f"It holds other models of your own: {', '.join(own)}." if own else "It holds no model of your own."
            raise CardError(
                f"No result of {model} in {results}. {holds} Another results tree: --results DIR. A result of it: "
                f"robbench eval --model {shlex.quote(model)} --dataset NAME{name_tree(results)}"
            ) from None
        listed = f" In {results} there are also: {', '.join(own)}." if own else ""
        raise CardError(f"{error}{listed}") from None
    return []


@takes_model_options("dataset")
def verify_result(
    result: Annotated[Path, typer.Argument(help="The folder of a result or of certificates, or its result.json.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help=f"What was measured, if it has no card: {SOURCES}.")
    ] = None,
    lanes: Annotated[
        int | None, typer.Option(callback=check_positive, help="Batch width; that of the run if left out.")
    ] = None,
    samples: Annotated[
        int, typer.Option(callback=check_positive, help="Number of certificates to derive again, drawn at random.")
    ] = 20,
    device: Device = "auto",
    models: Models = None,
    data_dir: DataDir = None,
    as_json: Json = False,
    *,
    about: RecalledFields,
) -> None:
    """Derive every break of a stored result again, without attacking; of certificates, some proofs too.

    Needs a result of `eval --save-adversarials`. Exit code 1 if something does not hold; every such entry is named.
    A break that was removed together with its point cannot be seen; `robbench reproduce` attacks again.
    """
    from robbench.certify.record import find_certified
    from robbench.recheck.recall import find_result

    folder = find_certified(result)
    announce(f"{folder or find_result(result)}: loading model and data")
    from robbench.certify.verify import verify_certified
    from robbench.recheck.verify import verify

    options = {"lanes": lanes, "device": device, "models": models or [], "data_dir": data_dir}
    fields = cast("VerifyFields", {**about, **options})
    v: Verification | CertifiedCheck
    if folder is not None:
        v = verify_certified(folder, model, samples=samples, **fields)
    else:
        v = verify(result, model, **fields)
    if as_json:
        print_json(v.as_json())
    else:
        for finding in v.refuted:
            print_text(f"refuted: {finding}")
        for finding in v.borderline:
            print_text(f"within rounding: {finding}")
        print_text(str(v))
        if folder is None:
            print_text(
                "A break that was removed together with its point cannot be seen; `robbench reproduce` attacks again."
            )
    if v.refuted:
        raise typer.Exit(1)
