"""Fills the papers' tables with our results. Imports no torch.

A result counts only if it was measured on the present weights of its card and of the surrogates' cards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path

from robbench.core.errors import CardError, ResultError
from robbench.core.numbers import parse_threat
from robbench.core.stats import wilson
from robbench.core.types import Threat
from robbench.linear.record import LinearFile, linear_folder, read_linear_files, read_linearization
from robbench.masking.stored import UNCHECKED, VerdictIndex
from robbench.models.card import Entry, ModelCard, Registry
from robbench.papers.published import Column, PaperNumber, PaperRow, PaperTable, read_paper_rows
from robbench.papers.trained import find_same_training, format_iterations
from robbench.report.leaderboard import compute_overestimation, is_about_every_break
from robbench.report.linear import predict_accuracy
from robbench.results.places import locate_result
from robbench.results.reader import read_results, read_vouched_rows
from robbench.results.schema import Accuracy, AttackResult, ResultFile
from robbench.results.summary import find_robust_samples
from robbench.suite import load_suite

__all__ = ["Cell", "FilledRow", "FilledTable", "Missing", "MissingRun", "WorstCase", "fill_table", "format_network"]

_STRONG = "whitebox"  # the suite that is missing if a model has only results of the paper's suite or of weak suites
_WEAK = {"quick", "sanity"}


@dataclass(frozen=True, slots=True)
class Cell:
    """Our accuracy, None if it was not measured, the paper's number, and whether both are of one data set."""

    ours: Accuracy | None
    paper: PaperNumber
    is_comparable: bool = True

    @property
    def difference(self) -> float | None:
        """Our accuracy minus the paper's number, in points; None if one is missing or both are not comparable."""
        if self.ours is None or isnan(self.paper.value) or not self.is_comparable:
            return None
        return 100 * self.ours.value - self.paper.value


@dataclass(frozen=True, slots=True)
class WorstCase:
    """The worst case of the strongest suite.

    Attributes:
        accuracy: robust accuracy under all attacks of the suite.
        suite: name of the suite's folder in the results tree.
        n: number of images.
        attack: the attack of the suite with the lowest robust accuracy.
        verdict: verdict of `robbench sanity` on the model; `verdict_n` is its number of images, None without a verdict.
        overestimation: points between the usual PGD of the suite and its worst case; None without such an attack.
    """

    accuracy: Accuracy
    suite: str
    n: int
    attack: AttackResult
    verdict: str = UNCHECKED
    verdict_n: int | None = None
    overestimation: float | None = None


@dataclass(frozen=True, slots=True)
class MissingRun:
    """A run whose result is missing.

    Attributes:
        model: full name of the model.
        suite: suite of `robbench eval`; empty means `robbench measure linear`.
        overwrite: whether the run replaces a result of other weights.
        needs: models that must be trained before the run, unless their weights are here.
    """

    model: str
    suite: str
    overwrite: bool
    needs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Missing:
    """The missing runs of a row, or the reason why no run can fill it."""

    runs: tuple[MissingRun, ...] = ()
    reason: str = ""

    @property
    def train(self) -> list[str]:
        """The models that must be trained before the runs, each once."""
        return list(dict.fromkeys(name for run in self.runs for name in run.needs))


@dataclass(frozen=True, slots=True)
class FilledRow:
    """One row of the paper for one card. `model` is empty if no card quotes the row. `measured` has the results."""

    labels: tuple[str, ...]
    model: str
    network: str
    trained: str
    n: int | None
    cells: tuple[Cell, ...]
    worst: WorstCase | None
    missing: Missing
    measured: str = ""


@dataclass(frozen=True, slots=True)
class FilledTable:
    """A table of a paper with our results."""

    paper_table: PaperTable
    rows: tuple[FilledRow, ...]
    notes: tuple[str, ...]

    def list_possible_runs(self, registry: Registry) -> list[MissingRun]:
        """List the missing runs that need no training first on this machine, each once."""
        runs = dict.fromkeys(run for row in self.rows for run in row.missing.runs)
        return [run for run in runs if not any(registry.find(name).needs_training for name in run.needs)]


def fill_table(table: PaperTable, registry: Registry, results: Path) -> FilledTable:
    """Fill a paper's table with our results. Notes name damaged results, and models whose weights are not shipped.

    Raises:
        CardError: a card is invalid.
    """
    stored = _StoredResults(registry, results)
    rows: list[FilledRow] = []
    notes: list[str] = []
    for row in read_paper_rows(table, registry.entries()):
        entries = [*row.cards, *(e for e in row.others if stored.find_results(e)[0])]
        for entry in entries:
            filled, row_notes = _fill_row(table, row, entry, stored)
            rows.append(filled)
            notes += [*stored.list_damage(entry), *row_notes]
        if not entries:
            cells = tuple(Cell(None, number) for number in row.numbers)
            reason = f"no card of the registry quotes this row ({row.dataset}); add a card with the row's numbers"
            rows.append(FilledRow(row.labels, "", "", "", None, cells, None, Missing(reason=reason)))
    if unshipped := _list_unshipped(rows, registry):
        notes.append(
            "Weights that are not in the repository (robbench train NAME makes them; the results are of weights with "
            f"these SHA-256): {', '.join(unshipped)}."
        )
    return FilledTable(table, tuple(rows), tuple(dict.fromkeys(notes)))


def _list_unshipped(rows: Sequence[FilledRow], registry: Registry) -> list[str]:
    """List the models of a table with results of weights that are not shipped, with the first digits of the SHA-256."""
    names = dict.fromkeys(row.measured for row in rows if row.worst is not None)
    cards = {name: registry.find(name).card for name in names}
    return [f"{name} {card.weights.sha256[:12]}" for name, card in cards.items() if card.weights and not card.shipped]


class _StoredResults:
    """The results, verdicts and linear measurements of a results tree, to be found by card."""

    def __init__(self, registry: Registry, root: Path) -> None:
        self.registry, self.root = registry, root
        self.verdicts = VerdictIndex(root)
        self.results: dict[str, list[ResultFile]] = {}
        stored = read_results(root)
        for r in stored.results:
            self.results.setdefault(f"{r.dataset}/{r.model}", []).append(r)
        self.linear, damaged_linear = read_linear_files(root)
        self.damaged = [*stored.damaged, *self.verdicts.list_damaged(), *damaged_linear]

    def list_damage(self, entry: Entry) -> list[str]:
        """Describe the damaged files of a model. No number is taken from them."""
        return [str(d) for d in self.damaged if d.name.startswith(f"{entry.full_name}/")]

    def find_results(self, entry: Entry) -> tuple[list[ResultFile], list[ResultFile]]:
        """Return the results on a card's present weights, and the results on other weights."""
        stored = self.results.get(entry.full_name, [])
        current = [r for r in stored if self._is_current(r, entry)]
        return current, [r for r in stored if r not in current]

    def _is_current(self, result: ResultFile, entry: Entry) -> bool:
        pairs = [(entry, result.identity.get("weights"))]
        for attack in result.attacks:
            if "surrogate" in attack.config:
                try:
                    pairs.append((self.registry.find(attack.config["surrogate"]), attack.config["surrogate_weights"]))
                except CardError:  # no registry has the surrogate any more
                    return False
        return all(e.card.weights is not None and e.card.weights.sha256 == weights for e, weights in pairs)

    def predict(self, entry: Entry, threat: Threat, n: int | None) -> Accuracy | None:
        """Return the accuracy that Eq. 4 predicts on the first n images; None if the weights were not measured."""
        file = self.linear.get(entry.full_name)
        if file is None or entry.card.weights is None or file.identity.get("weights") != entry.card.weights.sha256:
            return None
        return predict_accuracy(read_linearization(linear_folder(self.root, file.dataset, file.model)), threat.eps, n)

    def find_surrogates(self, table: PaperTable, dataset: str) -> list[Entry]:
        """Return the surrogates of a table's black-box columns."""
        names = [s.params["surrogate"] for s in load_suite(table.suite).stages(dataset) if s.kind == "transfer"]
        return [self.registry.find(n if "/" in n else f"{dataset}/{n}") for n in dict.fromkeys(names)]

    def compute_accuracy(self, result: ResultFile, attacks: Sequence[str]) -> Accuracy | None:
        """Return the robust accuracy under all of these attacks; None if an attack was not tried on every image."""
        if not attacks:
            return result.clean_accuracy
        alone = {a.name: a.robust_accuracy for a in result.attacks}
        if result.mode != "full" or not set(attacks) <= set(alone):
            return None
        if len(attacks) == 1:
            return alone[attacks[0]]
        rows = read_vouched_rows(locate_result(self.root, result))
        robust = find_robust_samples(rows[rows["attack"].isin(attacks)])
        low, high = wilson(int(robust.sum()), result.n)
        return Accuracy(value=float(robust.mean()), low=low, high=high)


def _fill_row(table: PaperTable, row: PaperRow, entry: Entry, stored: _StoredResults) -> tuple[FilledRow, list[str]]:
    """Fill the row of a card. Return it with its notes."""
    same = None if entry.card.weights else find_same_training(entry.card, stored.registry.entries())
    if same is not None and stored.find_results(same)[0]:
        filled, notes = _fill_row(table, row, same, stored)
        assert entry.card.recipe is not None and same.card.trained is not None, "the same training has a recipe"
        notes.append(
            f"{entry.full_name} shows the results of {same.full_name}, trained for {same.card.trained.iterations:,} "
            "iterations. The recipes differ in the number of iterations alone."
        )
        trained = f"{format_iterations(same.card, entry.card.recipe.iterations)}; see {same.name}"
        return replace(filled, model=entry.full_name, trained=trained), notes
    current = stored.find_results(entry)[0]
    threat = load_suite(table.suite).threat(entry.dataset)
    comparable = [r for r in current if r.attacks and _threat(r) == threat and is_about_every_break(r)]
    columns = next((r for r in comparable if r.suite == table.suite and not r.overrides), None)
    # Fewer images than those of the columns may be harder ones, so that their share says little about the suite.
    # Of equal results, prefer one that is not the paper's suite.
    n = columns.n if columns else None
    strongest = min(
        [r for r in comparable if n is None or r.n >= n],
        key=lambda r: (r.robust_accuracy.high, -r.n, r.suite == table.suite, r.suite, r.run_id),
        default=None,
    )
    prediction = stored.predict(entry, threat, n) if table.predicts else None
    worst = None if strongest is None else _find_worst_case(strongest, stored)

    def find_ours(column: Column) -> Accuracy | None:
        if column.worst:
            return worst.accuracy if worst else None
        attacks = column.on.get(entry.dataset, column.attacks)
        if column.predicted or columns is None or attacks is None:
            return prediction if column.predicted else None
        return stored.compute_accuracy(columns, attacks)

    same_data = entry.dataset == row.dataset
    cells = tuple(Cell(find_ours(c), number, same_data) for c, number in zip(table.columns, row.numbers, strict=True))
    suites = [r.suite for r in comparable if r.suite != table.suite or r is columns]
    filled = FilledRow(
        labels=row.labels,
        model=entry.full_name,
        network=format_network(entry.card.architecture.name, entry.card.architecture.args),
        trained=_format_training(entry.card),
        n=n,
        cells=cells,
        worst=worst,
        missing=Missing(tuple(_list_missing_runs(table, entry, suites, stored, prediction))),
        measured=entry.full_name,
    )
    notes = list(_list_notes(table, entry, [r for r in (columns, strongest) if r], stored))
    if prediction is not None:
        notes += _list_linear_notes(entry.full_name, stored.linear[entry.full_name], n)
    return filled, notes


def _threat(result: ResultFile) -> Threat:
    try:
        return parse_threat(result.threat.norm, result.threat.eps)
    except ValueError as error:
        raise ResultError(f"The result of {result.dataset}/{result.model}, suite {result.suite}: {error}") from None


def _list_missing_runs(
    table: PaperTable,
    entry: Entry,
    suites: Sequence[str],
    stored: _StoredResults,
    prediction: Accuracy | None,
) -> Iterator[MissingRun]:
    """Yield the missing runs of a row: those that fill its columns, and one with a strong suite."""
    stale = {r.suite for r in stored.find_results(entry)[1] if not r.overrides}
    if table.suite not in suites:
        models = [*stored.find_surrogates(table, entry.dataset), entry]
        yield MissingRun(entry.full_name, table.suite, table.suite in stale, _list_needs(models))
    if table.predicts and prediction is None:
        yield MissingRun(entry.full_name, "", entry.full_name in stored.linear, _list_needs([entry]))
    if table.suite != _STRONG and set(suites) <= {table.suite, *_WEAK}:
        yield MissingRun(entry.full_name, _STRONG, _STRONG in stale, _list_needs([entry]))


def _list_needs(models: Sequence[Entry]) -> tuple[str, ...]:
    """List the models that must be trained on a machine that has the repository alone, each once.

    The tables are the same on every machine. So it does not count whether weights that are not shipped are here.
    """
    return tuple(dict.fromkeys(e.full_name for e in models if e.card.weights is None or not e.card.shipped))


def _find_worst_case(result: ResultFile, stored: _StoredResults) -> WorstCase:
    lowest = min(result.attacks, key=lambda a: a.robust_accuracy.value)
    folder = locate_result(stored.root, result).name
    verdict = stored.verdicts.find(result), stored.verdicts.find_n(result)
    return WorstCase(result.robust_accuracy, folder, result.n, lowest, *verdict, compute_overestimation(result))


def _list_notes(table: PaperTable, entry: Entry, used: Sequence[ResultFile], stored: _StoredResults) -> Iterator[str]:
    """Yield notes about the results of a row."""
    for result in {r.run_id: r for r in used}.values():
        for flag, text in sorted(result.flags.items()):
            yield f"{entry.full_name}, suite {result.suite}: {flag}: {text}"
    if any(r.suite == table.suite for r in used) and entry in stored.find_surrogates(table, entry.dataset):
        yield (
            f"{entry.full_name} is the surrogate of the black-box columns. On this model itself they are white-box "
            "attacks, unlike the paper's numbers in this row."
        )


def _list_linear_notes(model: str, file: LinearFile, n: int | None) -> Iterator[str]:
    """Yield notes about a prediction of Eq. 4 that is compared with attacks on n images."""
    if n is None or file.n < n:
        yield f"{model}: Equation 4 uses the first {file.n} images."
    for flag, text in sorted(file.flags.items()):
        yield f"{model}, Equation 4: {flag}: {text}"


def format_network(name: str, args: Mapping[str, object]) -> str:
    """Format an architecture with its sizes, such as `wide_resnet 16-4`."""
    return " ".join([name, *(["-".join(str(v) for v in args.values())] if args else [])])


def _format_training(card: ModelCard) -> str:
    if card.weights is None:
        return "not trained"
    return format_iterations(card) if card.trained and card.recipe else "elsewhere"
