"""The papers' tables filled with our results: a pure function of cards, results and the papers' figures. No torch.

A result counts only if it was measured on the weights that the card (and a surrogate's card) has now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from robbench.core.errors import CardError, ResultError
from robbench.core.numbers import parse_threat
from robbench.core.stats import wilson
from robbench.core.types import Threat
from robbench.linear.record import LinearFile, linear_folder, read_linear_files, read_linearization
from robbench.masking.record import UNCHECKED, VerdictIndex
from robbench.models.card import Entry, ModelCard, Registry
from robbench.papers.published import Column, Figure, PaperRow, PaperTable, paper_rows
from robbench.papers.trained import iterations
from robbench.report.leaderboard import compute_overestimation
from robbench.report.linear import predict_accuracy
from robbench.results.schema import Accuracy, AttackResult, ResultFile
from robbench.results.store import load_results, read_rows, result_folder
from robbench.results.summary import robust_samples
from robbench.suite import load_suite

__all__ = ["Cell", "Line", "Run", "Sheet", "Todo", "Worst", "fill", "network"]

_STRONG = "whitebox"  # the suite to ask for where only the paper's own columns have been measured,
_WEAK = {"quick", "sanity"}  # or only a first look, or what asks whether to believe it


@dataclass(frozen=True, slots=True)
class Cell:
    """Our figure, where there is one, beside the paper's."""

    ours: Accuracy | None
    paper: Figure

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's, in points."""
        return None if self.ours is None else 100 * self.ours.value - self.paper.value


@dataclass(frozen=True, slots=True)
class Worst:
    """What the strongest suite left standing, the one attack of it that left fewest, and whether to trust it.

    `overestimation`: points between the usual PGD of that suite and its worst case; None without such an attack.
    """

    accuracy: Accuracy
    suite: str
    n: int
    attack: AttackResult
    verdict: str = UNCHECKED
    overestimation: float | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A run to be made, once the models it `needs` are trained.

    `robbench eval -m MODEL --suite SUITE`, or `robbench measure linear -m MODEL` where the suite is empty.
    """

    model: str
    suite: str
    overwrite: bool
    needs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Todo:
    """What a line lacks; `reason` where no command can help."""

    runs: tuple[Run, ...] = ()
    reason: str = ""

    @property
    def train(self) -> list[str]:
        """The models to be trained before all of the runs can be made, each once."""
        return list(dict.fromkeys(name for run in self.runs for name in run.needs))


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the paper on one card; `model` is empty where no card claims the row."""

    labels: tuple[str, ...]
    model: str
    network: str
    trained: str
    n: int | None
    cells: tuple[Cell, ...]
    worst: Worst | None
    todo: Todo


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table of a paper, filled."""

    table: PaperTable
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        """The missing runs that need no training first, each once."""
        return list(dict.fromkeys(run for line in self.lines for run in line.todo.runs if not run.needs))


def fill(table: PaperTable, registry: Registry, results: Path) -> Sheet:
    """Set our results beside a paper's table.

    Raises:
        CardError: a card is invalid.
        ResultError: a stored result is damaged.
    """
    measured = _Measured(registry, results)
    lines: list[Line] = []
    notes: list[str] = []
    for row in paper_rows(table, registry.entries()):
        shown = [*row.cards, *(e for e in row.others if measured.of(e)[0])]
        for entry in shown:
            line, said = _line(table, row, entry, measured)
            lines.append(line)
            notes += said
        if not shown:
            cells = tuple(Cell(None, figure) for figure in row.figures)
            reason = f"no card of the registry claims this row ({row.dataset}); a card with the row's figures fills it"
            lines.append(Line(row.labels, "", "", "", None, cells, None, Todo(reason=reason)))
    return Sheet(table, tuple(lines), tuple(dict.fromkeys(notes)))


class _Measured:
    """The results tree, by card."""

    def __init__(self, registry: Registry, root: Path) -> None:
        self.registry, self.root = registry, root
        self.verdicts = VerdictIndex(root)
        self.results: dict[str, list[ResultFile]] = {}
        for r in load_results(root):
            self.results.setdefault(f"{r.dataset}/{r.model}", []).append(r)
        self.linear = read_linear_files(root)

    def of(self, entry: Entry) -> tuple[list[ResultFile], list[ResultFile]]:
        """Return a card's results, and those that were measured on other weights."""
        stored = self.results.get(entry.full_name, [])
        current = [r for r in stored if self._current(r, entry)]
        return current, [r for r in stored if r not in current]

    def _current(self, result: ResultFile, entry: Entry) -> bool:
        pairs = [(entry, result.identity.get("weights"))]
        for attack in result.attacks:
            if "surrogate" in attack.config:
                try:
                    pairs.append((self.registry.find(attack.config["surrogate"]), attack.config["surrogate_weights"]))
                except CardError:  # a surrogate that no registry has any more
                    return False
        return all(e.card.weights is not None and e.card.weights.sha256 == weights for e, weights in pairs)

    def prediction(self, entry: Entry, threat: Threat, n: int | None) -> Accuracy | None:
        """Return what Eq. 4 predicts on the first n images; None if these weights were not measured."""
        file = self.linear.get(entry.full_name)
        if file is None or entry.card.weights is None or file.identity.get("weights") != entry.card.weights.sha256:
            return None
        return predict_accuracy(read_linearization(linear_folder(self.root, file.dataset, file.model)), threat.eps, n)

    def surrogates(self, table: PaperTable, dataset: str) -> list[Entry]:
        """List the models that a table's black-box columns are made on."""
        named = [s.params["surrogate"] for s in load_suite(table.suite).stages(dataset) if s.kind == "transfer"]
        return [self.registry.find(n if "/" in n else f"{dataset}/{n}") for n in dict.fromkeys(named)]

    def left_standing(self, result: ResultFile, attacks: Sequence[str]) -> Accuracy | None:
        """Return the share of images that withstand all of these attacks; None if not each was tried on each image."""
        if not attacks:
            return result.clean_accuracy
        alone = {a.name: a.robust_accuracy for a in result.attacks}
        if result.mode != "full" or not set(attacks) <= set(alone):
            return None
        if len(attacks) == 1:
            return alone[attacks[0]]
        path = result_folder(self.root, result) / "outcomes.parquet"
        rows = read_rows(path)
        robust = robust_samples(rows[rows["attack"].isin(attacks)])
        if len(robust) != result.n:
            raise ResultError(f"{path} has {len(robust)} images, result.json {result.n}; make the result again.")
        low, high = wilson(int(robust.sum()), result.n)
        return Accuracy(value=float(robust.mean()), low=low, high=high)


def _line(table: PaperTable, row: PaperRow, entry: Entry, measured: _Measured) -> tuple[Line, list[str]]:
    """Make the line of a card, and what a reader must know about it."""
    current = measured.of(entry)[0]
    threat = load_suite(table.suite).threat(row.dataset)
    same = [r for r in current if r.attacks and _threat(r) == threat]
    columns = next((r for r in same if r.suite == table.suite and not r.overrides), None)
    # Few images make a wide interval: by its upper end, luck on them rarely passes for strength.
    # Of equals, one that is not the paper's own suite.
    strongest = min(
        same, key=lambda r: (r.robust_accuracy.high, -r.n, r.suite == table.suite, r.suite, r.run_id), default=None
    )
    n = columns.n if columns else None
    prediction = measured.prediction(entry, threat, n) if table.predicts else None

    def ours(column: Column) -> Accuracy | None:
        if column.predicted:
            return prediction
        return None if columns is None or column.attacks is None else measured.left_standing(columns, column.attacks)

    cells = tuple(Cell(ours(c), figure) for c, figure in zip(table.columns, row.figures, strict=True))
    have = [r.suite for r in same if r.suite != table.suite or r is columns]
    line = Line(
        labels=row.labels,
        model=entry.full_name,
        network=network(entry.card.architecture.name, entry.card.architecture.args),
        trained=_trained(entry.card),
        n=n,
        cells=cells,
        worst=None if strongest is None else _worst(strongest, measured),
        todo=Todo(tuple(_missing(table, row, entry, have, measured, prediction))),
    )
    notes = list(_notes(table, row, entry, [r for r in (columns, strongest) if r], measured))
    if prediction is not None:
        notes += _linear_notes(entry.full_name, measured.linear[entry.full_name], n)
    return line, notes


def _threat(result: ResultFile) -> Threat:
    try:
        return parse_threat(result.threat.norm, result.threat.eps)
    except ValueError as error:
        raise ResultError(f"The result of {result.dataset}/{result.model}, suite {result.suite}: {error}") from None


def _missing(
    table: PaperTable,
    row: PaperRow,
    entry: Entry,
    have: Sequence[str],
    measured: _Measured,
    prediction: Accuracy | None,
) -> Iterator[Run]:
    """List the runs a line lacks: those that fill its columns, and one that is stronger than these."""
    stale = {r.suite for r in measured.of(entry)[1] if not r.overrides}
    if table.suite not in have:
        models = [*measured.surrogates(table, row.dataset), entry]
        needs = dict.fromkeys(e.full_name for e in models if e.card.weights is None)
        yield Run(entry.full_name, table.suite, table.suite in stale, tuple(needs))
    if table.predicts and prediction is None:
        needs = dict.fromkeys([entry.full_name] if entry.card.weights is None else [])
        yield Run(entry.full_name, "", entry.full_name in measured.linear, tuple(needs))
    if table.suite != _STRONG and set(have) <= {table.suite, *_WEAK}:
        needs = dict.fromkeys([entry.full_name] if entry.card.weights is None else [])
        yield Run(entry.full_name, _STRONG, _STRONG in stale, tuple(needs))


def _worst(result: ResultFile, measured: _Measured) -> Worst:
    lowest = min(result.attacks, key=lambda a: a.robust_accuracy.value)
    folder, verdict = result_folder(measured.root, result).name, measured.verdicts.find(result)
    return Worst(result.robust_accuracy, folder, result.n, lowest, verdict, compute_overestimation(result))


def _notes(
    table: PaperTable, row: PaperRow, entry: Entry, used: Sequence[ResultFile], measured: _Measured
) -> Iterator[str]:
    """Say what a reader must know about the results that a line shows."""
    for result in {r.run_id: r for r in used}.values():
        for flag, text in sorted(result.flags.items()):
            yield f"{entry.full_name}, suite {result.suite}: {flag}: {text}"
    if any(r.suite == table.suite for r in used) and entry in measured.surrogates(table, row.dataset):
        yield (
            f"{entry.full_name} is the surrogate of the black-box columns: on itself these are white-box attacks, "
            "which the paper's figures in this row are not."
        )


def _linear_notes(model: str, file: LinearFile, n: int | None) -> Iterator[str]:
    """Say what a reader must know about a prediction that stands beside attacks on n images."""
    if n is None or file.n < n:
        yield f"{model}: Equation 4 is of the first {file.n} images."
    for flag, text in sorted(file.flags.items()):
        yield f"{model}, Equation 4: {flag}: {text}"


def network(name: str, args: Mapping[str, object]) -> str:
    """Name an architecture with its sizes: `wide_resnet 16-4`."""
    return " ".join([name, *(["-".join(str(v) for v in args.values())] if args else [])])


def _trained(card: ModelCard) -> str:
    if card.weights is None:
        return "not trained"
    return iterations(card) if card.trained and card.recipe else "elsewhere"
