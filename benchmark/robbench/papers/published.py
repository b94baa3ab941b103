"""The papers' tables: their rows and columns, and the cards of each row. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from robbench.core.errors import ResultError, unknown_name
from robbench.models.card import Entry
from robbench.models.families import read_table

__all__ = ["TABLES", "Column", "PaperNumber", "PaperRow", "PaperTable", "find_table", "read_paper_rows"]

_NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of numbers in a paper's table.

    Attributes:
        heading: printed heading; the name of the attack if the column is about one attack.
        csv: name of the column in the table's CSV file; empty if we do not have the paper's numbers.
        attacks: the attacks whose worst case is our accuracy. Empty means clean accuracy. None means not measured.
        on: data set -> attacks that replace `attacks` there.
        card_key: key of the column in `paper.figures` of cards, if it is not `csv`.
        deviation: CSV column of the paper's standard deviation over its runs.
        predicted: whether our accuracy is the prediction of the linear model, from `robbench measure linear`.
        worst: whether our accuracy is the worst case of the strongest suite.
    """

    heading: str
    csv: str
    attacks: tuple[str, ...] | None
    card_key: str = ""
    deviation: str = ""
    predicted: bool = False
    worst: bool = False
    on: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The key of this column in `paper.figures` of cards."""
        return self.card_key or self.csv


@dataclass(frozen=True, slots=True)
class PaperTable:
    """A table of a paper.

    Attributes:
        id: name of the table on the command line.
        source: the paper. The `paper.source` of its cards begins with this text.
        number: number of the table in the paper; empty if the table has none.
        title: title of the table.
        csv: file in `papers/`.
        labels: heading -> CSV column, for the labels of a row.
        columns: the columns of numbers.
        suite: the suite whose attacks give our accuracies.
        cards: tables of the paper whose cards are always shown.
        others: tables of the paper whose cards have the same numbers for another network. They are shown if they have a
            result.
        dataset: data set of all rows; empty if the CSV file or `models` gives it.
        models: first label of a row -> models of the row, if cards do not quote the table. The first model is always
            shown, the others are shown if they have a result.
        remark: what a reader must know about the paper's numbers or about our models.
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
    remark: str = ""

    @property
    def predicts(self) -> bool:
        """Whether the table has a column of the linear model."""
        return any(c.predicted for c in self.columns)


@dataclass(frozen=True, slots=True)
class PaperNumber:
    """A number in a paper's table: its text with the paper's marks, and its value; NaN if we lack it."""

    text: str
    value: float


@dataclass(frozen=True, slots=True)
class PaperRow:
    """A row of a paper's table, and the cards that quote its numbers."""

    labels: tuple[str, ...]
    dataset: str
    numbers: tuple[PaperNumber, ...]
    cards: tuple[Entry, ...] = field(default=())
    others: tuple[Entry, ...] = field(default=())


_SHAFAHI = "Shafahi et al. 2019"
_SEGUIN = "Seguin et al. 2021"
_MNIST = {"α": "alpha", "β": "beta", "σ": "sigma", "k": "iterations"}
_CIFAR10 = {"α": "alpha", "β": "beta", "σ · 255": "sigma_255", "k": "iterations"}
_QUOTED = {"madry_adv_tr": "Madry et al. adv. tr.", "madry2017": "Madry et al. 2017"}
_ACCURACY = (Column("Train", "train", None), Column("Test", "test", ()))


def _single(heading: str, csv: str, card_key: str = "") -> Column:
    return Column(heading, csv, (heading,), card_key)


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
# The adversarial accuracy of Seguin et al. is that of the first two attacks of AutoAttack, one after the other.
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
        remark="*: the paper quotes Madry et al. 2017, with one number with and without a random start."
        if columns is _BLACK_BOX
        else "",
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


# Every row is also in another table of the paper, and the cards quote that table.
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


_mnist_methods = partial(
    PaperTable, number="", labels={"Method": "method"}, suite="whitebox", cards=(), dataset="mnist"
)
_USUAL_PGD: Mapping[str, tuple[str, ...]] = {"digits": ("PGD-20-xent",)}
_LABEL_SMOOTHING = _mnist_methods(
    id="goibert2019",
    source="Goibert & Dohmatob 2019",
    title="ways to smooth labels",
    csv="goibert2019_mnist.csv",
    columns=(
        Column("Accuracy", "", ()),
        Column("FGSM", "", ("FGSM-xent",)),
        Column("BIM", "", ("PGD-40-xent",), on=_USUAL_PGD),
    ),
    models={
        "no smoothing": ("digits/natural", "mnist/natural"),
        "SLS": ("digits/ls03", "mnist/ls095"),
        "ALS": ("digits/als03",),
        "BLS": ("digits/bls03",),
        "SBLS": ("digits/sbls03",),
    },
    remark=(
        "The methods are the paper's. Its numbers are not in this repository, so its half of each cell is –. BIM is "
        "PGD on cross-entropy. The paper's other attacks, DeepFool and C&W, look for the nearest break."
    ),
)
_LOGIT_PAIRING = _mnist_methods(
    id="mosbach2018",
    source="Mosbach et al. 2018",
    title="logit pairing and logit squeezing",
    csv="mosbach2018_mnist.csv",
    columns=(
        Column("Accuracy", "accuracy", ()),
        Column("Baseline attack", "baseline", ("PGD-40-xent",), on=_USUAL_PGD),
        Column("Strongest attack", "strongest", None, worst=True),
    ),
    models={
        "Plain": ("digits/natural", "mnist/natural"),
        "CLP": ("digits/clp05_sigma03",),
        "LSQ": ("digits/lsq05_sigma03", "digits/lsq2_sigma03", "mnist/lsq05_sigma05"),
        "100% AT": ("digits/at", "mnist/at"),
    },
    remark=(
        "The paper's numbers are of MNIST at Linf 76.5/255, so rows of digits have no difference. Our baseline attack "
        "is PGD on cross-entropy, our strongest attack the worst case. The paper's has many steps and restarts."
    ),
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
    _LABEL_SMOOTHING,
    _LOGIT_PAIRING,
)
TABLES = {table.id: table for table in _ALL}
"""Id -> table, for all tables that results can fill."""


def find_table(name: str) -> PaperTable:
    """Return the table with an id. A number alone is the number of a table of Shafahi et al. 2019.

    Raises:
        ResultError: there is no such table. The error names the known tables.
    """
    table = f"shafahi2019-{name}" if name.isdecimal() else name
    if table not in TABLES:
        raise ResultError(unknown_name("table", name, [*TABLES, "all"]))
    return TABLES[table]


def read_paper_rows(table: PaperTable, entries: Sequence[Entry]) -> list[PaperRow]:
    """Read a table's rows and find the cards that quote this paper, this table and all numbers of the row.

    Cards are matched by numbers, not by parameters, because a paper that trained the same recipe twice has two rows.

    Raises:
        CardError: a card is invalid.
    """
    quoting = [e for e in entries if e.card.paper and e.card.paper.source.startswith(table.source)]
    rows = []
    for raw in read_table(table.csv):
        numbers = {column.key or column.heading: _parse_number(raw, column) for column in table.columns}
        labels = tuple(_QUOTED.get(raw[key], raw[key]) for key in table.labels.values())
        if table.models:
            rows.append(_row_of_models(table, labels, numbers, entries))
            continue
        dataset = table.dataset or raw["dataset"]
        claiming = [e for e in quoting if e.dataset == dataset and _has_numbers(e, numbers)]
        rows.append(
            PaperRow(
                labels=labels,
                dataset=dataset,
                numbers=tuple(numbers.values()),
                cards=tuple(e for e in claiming if _is_in_table(e, table.cards)),
                others=tuple(e for e in claiming if not _is_in_table(e, table.cards) and _is_in_table(e, table.others)),
            )
        )
    return rows


def _row_of_models(
    table: PaperTable, labels: tuple[str, ...], numbers: Mapping[str, PaperNumber], entries: Sequence[Entry]
) -> PaperRow:
    """Make a row whose models the table names. Models that no registry has are left out."""
    known, names = {e.full_name: e for e in entries}, table.models.get(labels[0], ())
    return PaperRow(
        labels=labels,
        dataset=table.dataset or names[0].partition("/")[0],
        numbers=tuple(numbers.values()),
        cards=tuple(known[n] for n in names[:1] if n in known),
        others=tuple(known[n] for n in names[1:] if n in known),
    )


def _parse_number(raw: Mapping[str, str], column: Column) -> PaperNumber:
    if not column.csv:
        return PaperNumber("–", float("nan"))
    number = _NUMBER.match(raw[column.csv])
    assert number is not None, f"{column.csv} = {raw[column.csv]!r} in a paper's table"
    text = raw[column.csv] + (f" ± {raw[column.deviation]}" if column.deviation else "")
    return PaperNumber(text, float(number[0]))


def _has_numbers(entry: Entry, numbers: Mapping[str, PaperNumber]) -> bool:
    claimed = entry.card.paper.figures if entry.card.paper else {}
    return all(claimed.get(key) == number.value for key, number in numbers.items())


def _is_in_table(entry: Entry, tables: Sequence[str]) -> bool:
    given = entry.card.paper.table if entry.card.paper else ""
    return not set(given.split(" and ")).isdisjoint(tables)
