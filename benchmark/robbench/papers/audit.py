"""Audits the white-box claims of Shafahi et al. 2019: the paper's attack beside the best known one. Imports no torch.

The usual number is the robust accuracy under the paper's own attack: PGD on the cross-entropy and on the CW loss, each
alone, judged at the last point. Of the two, the lower one counts, for the paper's numbers as for ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from robbench.masking.stored import VerdictIndex
from robbench.models.card import ModelCard, Registry
from robbench.models.families import read_table
from robbench.papers.published import TABLES, Column, PaperNumber, PaperTable
from robbench.papers.tables import FilledRow, fill_table
from robbench.results.places import locate_result
from robbench.results.reader import Damage, read_results, read_vouched_robust
from robbench.results.schema import Accuracy, ResultFile
from robbench.results.summary import make_accuracy
from robbench.suite import load_suite

__all__ = ["Audit", "AuditRow", "Coverage", "Reference", "audit_claims", "read_references"]

_TABLES = ("shafahi2019-5", "shafahi2019-6")


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One row of the paper and a model trained for it. Our accuracies but `autoattack` are on the same images.

    Attributes:
        table: number of the paper's table.
        labels: labels of the row, such as `α 0.95, σ 0.3`.
        model: full name of the model.
        card: the card of the model.
        network: its network.
        paper: the paper's usual number, in percent.
        usual: ours under the same attack; None if the paper's suite was not run.
        autoattack: robust accuracy under the suite `autoattack`; None if it was not run.
        worst: share of images that no stored attack on these weights breaks at this radius.
        n: number of images.
        autoattack_n: number of images of `autoattack`.
        verdict: verdict of `robbench sanity`.
    """

    table: str
    labels: str
    model: str
    card: ModelCard
    network: str
    paper: float
    usual: Accuracy | None
    autoattack: Accuracy | None
    worst: Accuracy
    n: int
    autoattack_n: int | None
    verdict: str

    @property
    def overstated(self) -> float | None:
        """Points by which the usual number overstates the worst case; None if there is no usual number of ours."""
        return None if self.usual is None else 100 * (self.usual.value - self.worst.value)


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many rows of a paper's table have a model with a result.

    Attributes:
        table: the table.
        threat: the threat model of the table, such as `Linf 0.3`.
        rows: number of rows.
        measured: number of rows with a result.
    """

    table: PaperTable
    threat: str
    rows: int
    measured: int

    @property
    def usual_attacks(self) -> list[str]:
        """The headings of the columns of the paper's own attack."""
        return [column.heading for column in self.table.columns if _is_usual(column)]


@dataclass(frozen=True, slots=True)
class Audit:
    """The models with a result, the most overstated ones first; the coverage of each table; files that do not count."""

    rows: tuple[AuditRow, ...]
    coverage: tuple[Coverage, ...]
    damaged: tuple[Damage, ...]


@dataclass(frozen=True, slots=True)
class Reference:
    """A published model: its accuracies in percent, clean and under attacks, and their sources."""

    model: str
    dataset: str
    eps: str
    clean: PaperNumber
    usual: PaperNumber
    usual_attack: str
    autoattack: PaperNumber | None
    best: PaperNumber
    best_attack: str
    source: str

    @property
    def overstated(self) -> float:
        """Points by which the usual number overstates the best known worst case."""
        return self.usual.value - self.best.value


def read_references() -> list[Reference]:
    """Read the published numbers of `audit_references.csv`, the most overstated ones first."""
    found = [
        Reference(
            model=row["model"],
            dataset=row["dataset"],
            eps=row["eps"],
            clean=_read_number(row["clean"]),
            usual=_read_number(row["usual"]),
            usual_attack=row["usual_attack"],
            autoattack=_read_number(row["autoattack"]) if row["autoattack"] else None,
            best=_read_number(row["best"]),
            best_attack=row["best_attack"],
            source=row["source"],
        )
        for row in read_table("audit_references.csv")
    ]
    return sorted(found, key=lambda r: (-r.overstated, r.model, r.dataset))


def _read_number(text: str) -> PaperNumber:
    return PaperNumber(text, float(text))


def _is_usual(column: Column) -> bool:
    return column.heading.startswith("WB-PGD")


def audit_claims(registry: Registry, root: Path) -> Audit:
    """Audit the rows of Tables 5 and 6 that have a model with a result. No number is taken from a damaged file.

    Args:
        registry: the cards.
        root: the results tree.

    Raises:
        CardError: a card is invalid.
    """
    stored, verdicts = read_results(root), VerdictIndex(root)
    rows, coverage = [], []
    for table in (TABLES[name] for name in _TABLES):
        filled = fill_table(table, registry, root).rows
        measured = [row for row in filled if row.worst is not None]
        rows += [
            _audit_row(table, row, registry.find(row.model).card, stored.results, root, verdicts)
            for row in measured
            if row.model == row.measured  # a model stands once in the audit
        ]
        distinct = [len({row.labels + tuple(c.paper.text for c in row.cells) for row in f}) for f in (filled, measured)]
        threat = load_suite(table.suite).threat(table.dataset)
        coverage.append(Coverage(table, str(threat), *distinct))
    rows.sort(key=lambda r: (r.overstated is None, -(r.overstated or 0.0), r.table, r.model))
    return Audit(tuple(rows), tuple(coverage), (*stored.damaged, *verdicts.list_damaged()))


def _audit_row(
    table: PaperTable,
    row: FilledRow,
    card: ModelCard,
    results: Sequence[ResultFile],
    root: Path,
    verdicts: VerdictIndex,
) -> AuditRow:
    cells = [cell for column, cell in zip(table.columns, row.cells, strict=True) if _is_usual(column)]
    base = _find_base(table, row, card, results, root)
    same = [r for r in results if r.attacks and _is_comparable(r, base)]
    worst = _count_unbroken(base, same, root)
    autoattack = next((r for r in same if r.suite == "autoattack" and not r.overrides), None)
    return AuditRow(
        table=table.number,
        labels=", ".join(_list_labels(table, row)),
        model=row.model,
        card=card,
        network=row.network,
        paper=min(cell.paper.value for cell in cells),
        usual=min((cell.ours for cell in cells if cell.ours), key=lambda accuracy: accuracy.value, default=None),
        autoattack=autoattack.robust_accuracy if autoattack else None,
        worst=worst,
        n=base.n,
        autoattack_n=autoattack.n if autoattack else None,
        verdict=verdicts.describe(base),
    )


def _find_base(
    table: PaperTable, row: FilledRow, card: ModelCard, results: Sequence[ResultFile], root: Path
) -> ResultFile:
    """Return the result whose images count: that of the paper's suite, else the one of the table's worst case."""
    assert row.worst is not None and card.weights is not None, "the row has a result on the card's weights"
    own = [r for r in results if f"{r.dataset}/{r.model}" == row.model]
    if row.n is None:
        return next(r for r in own if locate_result(root, r).name == row.worst.suite)
    sha = card.weights.sha256
    return next(r for r in own if r.suite == table.suite and not r.overrides and r.identity.get("weights") == sha)


def _is_comparable(result: ResultFile, other: ResultFile) -> bool:
    """Return whether two results are of the same weights, data and threat. Then each break holds for both."""
    same = all(result.identity.get(key) == other.identity.get(key) for key in ("model", "weights", "data"))
    return same and result.threat == other.threat


def _count_unbroken(base: ResultFile, results: Sequence[ResultFile], root: Path) -> Accuracy:
    """Return the share of the images of a result that no attack of any result breaks."""
    robust = read_vouched_robust(locate_result(root, base))
    for result in results:
        robust = robust & read_vouched_robust(locate_result(root, result)).reindex(robust.index, fill_value=True)
    return make_accuracy(int(robust.sum()), len(robust))


def _list_labels(table: PaperTable, row: FilledRow) -> Iterator[str]:
    """Yield the labels of a row that are neither empty nor zero, with their headings."""
    for heading, value in zip(table.labels, row.labels, strict=True):
        if heading == "k" or not value[:1].isdigit():
            yield from [value] if value else []
        elif float(value):
            yield f"{heading} {value}"
