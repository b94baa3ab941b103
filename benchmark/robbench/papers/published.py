"""The papers' tables: which rows and columns each holds, and which cards claim which row. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from robbench.core.errors import ResultError, unknown_name
from robbench.models.card import Entry
from robbench.models.families import read_table

__all__ = ["TABLES", "Column", "Figure", "PaperRow", "PaperTable", "find_table", "paper_rows"]

_NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of figures.

    Attributes:
        heading: as printed; where one attack stands for the column, its name.
        csv: name of the column in the table's CSV file.
        attacks: an image counts if it withstands all of these; none of them: clean accuracy; None: not measured here.
        figure: name of the column among the figures of a card.
        spread: CSV column of the paper's standard deviation over its runs.
        predicted: the accuracy that the linear model of robustness predicts, from `robbench measure linear`.
    """

    heading: str
    csv: str
    attacks: tuple[str, ...] | None
    figure: str = ""
    spread: str = ""
    predicted: bool = False

    @property
    def key(self) -> str:
        """How cards call this column."""
        return self.figure or self.csv


@dataclass(frozen=True, slots=True)
class PaperTable:
    """A table of a paper.

    Attributes:
        id: its name on the command line.
        source: the paper; the `paper.source` of cards begins with it.
        number: as the paper counts.
        title: what it holds.
        csv: file in `papers/`.
        labels: heading to CSV column, of what names a row.
        columns: the figures.
        suite: whose attacks stand for the columns.
        cards: cards of these tables of the paper are always shown.
        others: cards of these tables hold the same figures (another network) and are shown once they have a result.
        dataset: of all rows; empty where the CSV file has a column for it, or `models` says.
        models: by the first label of a row, the models that stand for it where the cards claim no such row: the first
            is always shown, the others once they have a result.
    """

    id: str
    source: str
    number: str
    title: str
    csv: str
    labels: Mapping[str, str]
    columns: tuple[Column, ...]
    suite: str
    cards: tuple[str, ...]
    others: tuple[str, ...] = ()
    dataset: str = ""
    models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def predicts(self) -> bool:
        """Whether the table has a column of the linear model."""
        return any(c.predicted for c in self.columns)


@dataclass(frozen=True, slots=True)
class Figure:
    """A published figure: as text, with the paper's own marks, and as a number (NaN never occurs)."""

    text: str
    value: float


@dataclass(frozen=True, slots=True)
class PaperRow:
    """A row of a paper's table, and the cards that claim its figures."""

    labels: tuple[str, ...]
    dataset: str
    figures: tuple[Figure, ...]
    cards: tuple[Entry, ...] = field(default=())
    others: tuple[Entry, ...] = field(default=())


_SHAFAHI = "Shafahi et al. 2019"
_SEGUIN = "Seguin et al. 2021"
_MNIST = {"α": "alpha", "β": "beta", "σ": "sigma", "k": "iterations"}
_CIFAR10 = {"α": "alpha", "β": "beta", "σ · 255": "sigma_255", "k": "iterations"}
_QUOTED = {"madry_adv_tr": "Madry et al. adv. tr.", "madry2017": "Madry et al. 2017"}
_ACCURACY = (Column("Train", "train", None), Column("Test", "test", ()))


def _single(heading: str, csv: str, figure: str = "") -> Column:
    return Column(heading, csv, (heading,), figure)


_MNIST_COLUMNS = (
    *_ACCURACY,
    _single("WB-PGD-40-xent", "wb_pgd40_xent"),
    _single("WB-PGD-40-CW", "wb_pgd40_cw"),
    _single("BB-FGSM-CW", "bb_fgsm_cw"),
    _single("BB-PGD-40-CW", "bb_pgd_cw"),
)
_WHITE_BOX = (
    *_ACCURACY,
    _single("WB-PGD-20-rand-xent", "pgd20_rand_xent"),
    _single("WB-PGD-20-rand-CW", "pgd20_rand_cw"),
    _single("WB-FGSM-xent", "fgsm_xent"),
    _single("WB-FGSM-CW", "fgsm_cw"),
)
_BLACK_BOX = (
    _single("BB-PGD-7-xent", "pgd7_xent", "bb_pgd7_xent"),
    _single("BB-PGD-7-CW", "pgd7_cw", "bb_pgd7_cw"),
    _single("BB-PGD-7-rand-xent", "pgd7_rand_xent", "bb_pgd7_rand_xent"),
    _single("BB-PGD-7-rand-CW", "pgd7_rand_cw", "bb_pgd7_rand_cw"),
    _single("BB-FGSM-xent", "fgsm_xent", "bb_fgsm_xent"),
    _single("BB-FGSM-CW", "fgsm_cw", "bb_fgsm_cw"),
)
# Their adversarial accuracy: the first two attacks of AutoAttack, one after the other.
_NATURAL_ADVERSARIAL = (
    Column("Natural", "natural_mean", (), "natural", "natural_std"),
    Column("Adversarial", "adversarial_mean", ("APGD-CE", "APGD-DLR"), "adversarial", "adversarial_std"),
)


def _shafahi(number: str, title: str, csv: str, columns: tuple[Column, ...], *cards: str) -> PaperTable:
    mnist = "mnist" in csv
    return PaperTable(
        id=f"shafahi2019-{number}",
        source=_SHAFAHI,
        number=number,
        title=title,
        csv=f"shafahi2019_table{number}_{csv}.csv",
        labels=_MNIST if mnist else _CIFAR10,
        columns=columns,
        suite="paper-mnist" if mnist else "paper-cifar10",
        cards=cards[:1],
        others=cards[1:],
        dataset="mnist" if mnist else "cifar10",
    )


def _seguin(number: str, title: str, csv: str, labels: Mapping[str, str], dataset: str = "") -> PaperTable:
    return PaperTable(
        id=f"seguin2021-{number}",
        source=_SEGUIN,
        number=number,
        title=title,
        csv=f"seguin2021_table{number}_{csv}.csv",
        labels=labels,
        columns=_NATURAL_ADVERSARIAL,
        suite="whitebox",
        cards=(number,),
        dataset=dataset,
    )


# Every row is a recipe that the paper's other tables hold too, so the cards quote those.
_LINEAR_MODEL = PaperTable(
    id="shafahi2019-1",
    source=_SHAFAHI,
    number="1",
    title="attacks of one step beside the linear model of robustness (Eq. 4)",
    csv="shafahi2019_table1_linear_model.csv",
    labels={"Model": "model", "ε": "epsilon"},
    columns=(
        _single("FGSM-xent", "fgsm_xent"),
        _single("FGSM-CW", "fgsm_cw"),
        Column("Equation 4", "equation4", None, predicted=True),
    ),
    suite="whitebox",
    cards=(),
    models={
        "mnist natural": ("mnist/natural",),
        "mnist adversarially trained": ("mnist/at",),
        "cifar10 natural": ("cifar10/natural", "cifar10/natural_wrn28_10", "cifar10/natural_resnet18"),
        "cifar10 adversarially trained": ("cifar10/at", "cifar10/at_wrn28_10"),
    },
)

_ALL = (
    _LINEAR_MODEL,
    _shafahi("2", "MNIST, white-box and black-box, excerpt", "mnist", _MNIST_COLUMNS, "5"),
    _shafahi("3", "CIFAR-10, white-box, excerpt", "cifar10_whitebox", _WHITE_BOX, "3", "6"),
    _shafahi("4", "CIFAR-10, black-box, excerpt", "cifar10_blackbox", _BLACK_BOX, "4", "7"),
    _shafahi("5", "MNIST, white-box and black-box", "mnist", _MNIST_COLUMNS, "5"),
    _shafahi("6", "CIFAR-10, white-box", "cifar10_whitebox", _WHITE_BOX, "6", "3", "4"),
    _shafahi("7", "CIFAR-10, black-box", "cifar10_blackbox", _BLACK_BOX, "7", "3", "4"),
    _seguin("1", "standard and adversarial training", "accuracy", {"Model": "model", "Data set": "dataset"}),
    _seguin("2", "students of changed logits", "distillation", {"Student": "student"}, "cifar10"),
)
TABLES = {table.id: table for table in _ALL}
"""Every table that results can fill, by its name."""


def find_table(name: str) -> PaperTable:
    """Look a table up by its id; a number alone is that table of Shafahi et al. 2019.

    Raises:
        ResultError: unknown; the known ones are named.
    """
    name = f"shafahi2019-{name}" if name.isdecimal() else name
    if name not in TABLES:
        raise ResultError(unknown_name("table", name, [*TABLES, "all"]))
    return TABLES[name]


def paper_rows(table: PaperTable, entries: Sequence[Entry]) -> list[PaperRow]:
    """Read a table's rows and find their cards: same paper, same table, and every figure of the row.

    Figures, not parameters, tell the rows apart: a paper that trained the same recipe twice prints it twice.

    Raises:
        CardError: a card is invalid.
    """
    claims = [e for e in entries if e.card.paper and e.card.paper.source.startswith(table.source)]
    rows = []
    for raw in read_table(table.csv):
        figures = {column.key: _figure(raw, column) for column in table.columns}
        labels = tuple(_QUOTED.get(raw[key], raw[key]) for key in table.labels.values())
        if table.models:
            rows.append(_named(labels, figures, table.models[labels[0]], entries))
            continue
        dataset = table.dataset or raw["dataset"]
        mine = [e for e in claims if e.dataset == dataset and _same(e, figures)]
        rows.append(
            PaperRow(
                labels=labels,
                dataset=dataset,
                figures=tuple(figures.values()),
                cards=tuple(e for e in mine if _of(e, table.cards)),
                others=tuple(e for e in mine if not _of(e, table.cards) and _of(e, table.others)),
            )
        )
    return rows


def _named(
    labels: tuple[str, ...], figures: Mapping[str, Figure], names: Sequence[str], entries: Sequence[Entry]
) -> PaperRow:
    """Make a row whose models the table names; one that no registry has is left out."""
    known = {e.full_name: e for e in entries}
    return PaperRow(
        labels=labels,
        dataset=names[0].partition("/")[0],
        figures=tuple(figures.values()),
        cards=tuple(known[n] for n in names[:1] if n in known),
        others=tuple(known[n] for n in names[1:] if n in known),
    )


def _figure(raw: Mapping[str, str], column: Column) -> Figure:
    number = _NUMBER.match(raw[column.csv])
    assert number is not None, f"{column.csv} = {raw[column.csv]!r} in a paper's table"
    text = raw[column.csv] + (f" ± {raw[column.spread]}" if column.spread else "")
    return Figure(text, float(number[0]))


def _same(entry: Entry, figures: Mapping[str, Figure]) -> bool:
    claimed = entry.card.paper.figures if entry.card.paper else {}
    return all(claimed.get(key) == figure.value for key, figure in figures.items())


def _of(entry: Entry, numbers: Sequence[str]) -> bool:
    given = entry.card.paper.table if entry.card.paper else ""
    return not set(given.split(" and ")).isdisjoint(numbers)
