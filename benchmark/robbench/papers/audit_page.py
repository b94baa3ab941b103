"""Writes docs/audit.md and its figure from an audit. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from robbench.papers.audit import Audit, AuditRow, Reference
from robbench.papers.trained import format_iterations
from robbench.report.escape import escape_markdown, make_markdown_table
from robbench.report.figures.canvas import OKABE_ITO, add_legend_below, make_figure
from robbench.report.figures.source import FigurePlan
from robbench.report.leaderboard import format_damage, format_percent, format_points, format_with_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plan_audit_figure", "render_audit_page"]

_MANY = 10.0  # points; the page counts the models that the usual number overstates by more
_TEST_IMAGES = 10_000  # of MNIST, and of CIFAR-10
_BASELINE = "Madry et al. 2018"  # the published model beside our adversarial training
_INTRO = """\
# Does the robustness of label smoothing and logit squeezing hold?

Shafahi et al. 2019 claim that label smoothing or logit squeezing with Gaussian noise can replace adversarial training.
This page audits Tables 5 and 6 of the paper. `robbench table audit` generates it from the cards and `results/`; do not
edit it."""
_READ = """\
Numbers are percentages of the n test images that stay correct, with 95 % Wilson intervals. **Paper** is the paper's PGD
figure. **Same attack** is ours under the paper's own attack, judged at the last point. The lower of the paper's attacks
counts: {attacks}.
**Best known** counts an image of the same n as robust only if no stored attack of any suite broke it. **Overstated** is
same attack minus best known, in points, and sorts the table. **Verdict** is that of `robbench sanity`
([sanity.md](sanity.md)); its own n follows where that is another one. A robust accuracy is an upper bound, because a
stronger attack can lower it. –: not measured. †: the weights are not in the repository; `robbench train NAME` makes
them."""
_PUBLISHED = """\
Numbers of others, in percent, of the full test set or of the images that the source names. **Usual number** is what the
authors of the model, or of the attack, gave for PGD."""
_PARTS = {"paper": "grey", "same attack": "orange", "best known": "vermillion", "AutoAttack": "blue"}
_LEGEND = {"paper": "the paper's PGD", "same attack": "same attack here, or usual number"}
_CAPTION = (
    "What to see: the left end of a line is the best known number. From there to the mark of the same attack is what "
    "that attack overstates. A paper's mark farther right can also come from more training than ours."
)


def render_audit_page(audit: Audit, references: Sequence[Reference], picture: str) -> str:
    """Return the page as markdown: first what weakens the audit, then what it finds, the figure and the numbers.

    Args:
        audit: the audit.
        references: published models, for comparison.
        picture: path of the figure, relative to the page.
    """
    attacks = "; ".join(
        f"in Table {c.table.number} {' and '.join(c.usual_attacks)}, {c.threat}" for c in audit.coverage
    )
    parts = [
        _INTRO,
        "## What this audit cannot say",
        "\n".join(f"- {text}" for text in _list_limits(audit, references)),
        "## What it finds",
        "\n".join(f"- {text}" for text in _list_findings(audit, references)),
        f"![The usual number and the best known worst case of each model]({picture})",
        "## The rows",
        _READ.format(attacks=attacks),
        make_markdown_table([_make_cells(row) for row in audit.rows]) if audit.rows else "No row has a result.",
        "## Published models, for comparison",
        _PUBLISHED,
        make_markdown_table([_make_reference_cells(r) for r in references]),
    ]
    return "\n".join(["\n\n".join(parts) + "\n", *format_damage(audit.damaged)])


def _make_cells(row: AuditRow) -> dict[str, str]:
    """Make the cells of a model. A new measurement is one more cell here."""
    autoattack = "–"
    if row.autoattack is not None:
        autoattack = format_percent(row.autoattack) + ("" if row.autoattack_n == row.n else f" (n {row.autoattack_n})")
    return {
        "Table: row": f"{row.table}: {row.labels}",
        "Model": row.model + ("" if row.card.shipped else " †"),
        "Iterations": format_iterations(row.card) if row.card.trained and row.card.recipe else "elsewhere",
        "n": str(row.n),
        "Paper": f"{row.paper:.1f}",
        "Same attack": "–" if row.usual is None else format_with_interval(row.usual),
        "AutoAttack": autoattack,
        "Best known": format_with_interval(row.worst),
        "Overstated": format_points(row.overstated),
        "Verdict": row.verdict,
    }


def _make_reference_cells(reference: Reference) -> dict[str, str]:
    return {
        "Model": reference.model,
        "Data set": f"{reference.dataset}, Linf {reference.eps}",
        "Clean": reference.clean.text,
        "Usual number": f"{reference.usual.text} ({reference.usual_attack})",
        "AutoAttack": "–" if reference.autoattack is None else reference.autoattack.text,
        "Best known": f"{reference.best.text} ({reference.best_attack})",
        "Overstated": format_points(reference.overstated),
        "Source": reference.source,
    }


def _list_limits(audit: Audit, references: Sequence[Reference]) -> Iterator[str]:
    """Yield what weakens the audit: missing rows, iterations, networks, images, weak baselines and damaged files."""
    covered = "; ".join(
        f"{c.measured} of the {c.rows} rows of Table {c.table.number} ({c.table.title})" for c in audit.coverage
    )
    yield (
        f"**Rows.** {covered} have a model with a result here. Rows that differ in iterations alone can share a model, "
        "which stands once below, with the iterations of one recipe; the recipe of another row can name more. The "
        "other rows are not judged."
    )
    groups = {c.table.dataset: [r for r in audit.rows if r.card.dataset == c.table.dataset] for c in audit.coverage}
    groups = {dataset: rows for dataset, rows in groups.items() if rows}
    if groups:
        precisions = Counter(r.card.trained.precision for rows in groups.values() for r in rows if r.card.trained)
        counts = ", ".join(f"{count} in {escape_markdown(precision)}" for precision, count in precisions.most_common())
        yield (
            "**Training.** The models are trained here from the paper's recipes. They are not the authors' models. "
            f"Each row is one run with one seed. Precision of the gradients: {counts}."
        )
        yield (
            f"**Iterations.** {'; '.join(_describe_iterations(*group) for group in groups.items())}. More training can "
            "change every number of ours."
        )
        networks = "; ".join(f"{d} {', '.join(sorted({r.network for r in rows}))}" for d, rows in groups.items())
        yield (
            f"**Networks.** Ours: {escape_markdown(networks)}. The paper's: mnist madry_mnist (the network of Madry et "
            "al.); cifar10 wide_resnet 28-10."
        )
        images = "; ".join(f"{dataset} {_format_range([r.n for r in rows])}" for dataset, rows in groups.items())
        fewer = [dataset for dataset, rows in groups.items() if min(r.n for r in rows) < _TEST_IMAGES]
        whole = f"Not the full test set: {', '.join(fewer)}" if fewer else "These are the full test sets"
        whole = "These are not the full test sets" if len(fewer) == len(groups) else whole
        yield f"**Images.** n a model: {images}. {whole}."
    published = {r.dataset: r.best.text for r in references if r.model == _BASELINE}
    baselines = [row for row in audit.rows if _is_adversarial(row) and row.card.dataset in published]
    if baselines:
        ours = "; ".join(
            f"{escape_markdown(row.model)} {format_percent(row.worst)} (theirs {published[row.card.dataset]})"
            for row in baselines
        )
        yield (
            f"**Baselines.** Our adversarially trained models are not those of {_BASELINE}. Best known robust "
            f"accuracy: {ours}."
        )
    if audit.damaged:
        yield f"**Damaged files.** {len(audit.damaged)} files count nowhere on this page. Its end names them."


def _describe_iterations(dataset: str, rows: Sequence[AuditRow]) -> str:
    trained = [(r.card.trained.iterations, r.card.recipe.iterations) for r in rows if r.card.trained and r.card.recipe]
    if not trained:
        return f"{dataset} not known"
    shares = _format_range([100 * done / planned for done, planned in trained], ".1f")
    full = sum(done >= planned for done, planned in trained)
    return f"{dataset} {shares} % of the recipe's ({full} of {len(rows)} models have all)"


def _format_range(values: Sequence[float], spec: str = "d") -> str:
    low, high = (format(value, spec) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _is_adversarial(row: AuditRow) -> bool:
    return row.card.recipe is not None and row.card.recipe.adversary is not None


def _list_findings(audit: Audit, references: Sequence[Reference]) -> Iterator[str]:
    """Yield what the rows say, in numbers."""
    claims = [row for row in audit.rows if not _is_adversarial(row)]
    if claims:
        best = max(claims, key=lambda row: row.worst.value)
        yield (
            f"Of the {len(claims)} models without adversarial training, none keeps more than "
            f"{format_with_interval(best.worst)} % under the best known attacks ({escape_markdown(best.model)}). The "
            f"paper reports up to {max(row.paper for row in claims):.1f} % for these rows under its own attack."
        )
    else:
        yield "No model without adversarial training has a result."
    gaps = [(row.overstated, row) for row in claims if row.overstated is not None]
    if gaps:
        points, most = gaps[0]
        far = sum(gap > _MANY for gap, _ in gaps)
        yield (
            f"The paper's own attack overstates {far} of {len(gaps)} of them by more than {_MANY:g} points. The "
            f"largest gap is {format_points(points)} points ({escape_markdown(most.model)})."
        )
    trained = [_describe_drop(row) for row in audit.rows if _is_adversarial(row)]
    if trained:
        yield f"Adversarial training, from the paper's attack to the best known: {'; '.join(trained)}."
    published = {r.dataset: float(r.best.text) for r in references if r.model == _BASELINE}
    weak = [
        f"{escape_markdown(row.model)} keeps {format_percent(row.worst)} %, that of {_BASELINE} {theirs:.1f} %"
        for row in audit.rows
        if _is_adversarial(row)
        and (theirs := published.get(row.card.dataset)) is not None
        and theirs - 100 * row.worst.value > _MANY
    ]
    if weak:
        yield (
            f"So an adversarially trained model of ours is no control where it is far from the published one: "
            f"{'; '.join(weak)}. Compare the claims with the published models."
        )
    far_off = [r for r in references if r.overstated > _MANY]
    near = [r.overstated for r in references if r.overstated <= _MANY]
    if far_off and near:
        drops = "; ".join(f"{r.model} on {r.dataset} from {r.usual.text} to {r.best.text}" for r in far_off)
        yield (
            f"Others found such gaps before: {drops}. The other {len(near)} published models below "
            f"lose at most {format_points(max(near))} points."
        )


def _describe_drop(row: AuditRow) -> str:
    usual = "not measured" if row.usual is None else format_percent(row.usual)
    return f"{escape_markdown(row.model)} from {usual} to {format_percent(row.worst)}"


def plan_audit_figure(audit: Audit, references: Sequence[Reference]) -> FigurePlan:
    """Plan the figure: one line per model, from the usual numbers down to the best known worst case."""
    rows = []
    for row in audit.rows:
        parts = {"paper": row.paper, "best known": 100 * row.worst.value}
        for part, accuracy in (("same attack", row.usual), ("AutoAttack", row.autoattack)):
            if accuracy is not None:
                parts[part] = 100 * accuracy.value
        rows += [(row.model, part, parts[part]) for part in _PARTS if part in parts]
    for published in references:
        known = {"same attack": published.usual, "best known": published.best, "AutoAttack": published.autoattack}
        name = f"{published.model}, {published.dataset}"
        rows += [(name, part, number.value) for part, number in known.items() if number is not None]
    numbers = pd.DataFrame(rows, columns=["model", "number", "percent"])
    count = len(audit.rows)

    def paint() -> Figure:
        names = list(dict.fromkeys(numbers["model"]))
        figure = make_figure(8.6, 1.6 + 0.3 * len(names))
        axes = figure.subplots()
        for i, name in enumerate(names):
            values = numbers[numbers["model"] == name]["percent"]
            axes.plot([values.min(), values.max()], [i, i], color="#cccccc", linewidth=2.5, zorder=1)
        for k, (part, colour) in enumerate(_PARTS.items()):
            chosen = numbers[numbers["number"] == part]
            # Equal numbers would lie on each other, so each kind has a height of its own.
            places = [names.index(name) + 0.2 * (k - (len(_PARTS) - 1) / 2) for name in chosen["model"]]
            marker = "x" if part == "AutoAttack" else "o"
            label, colour = _LEGEND.get(part, part), OKABE_ITO[colour]
            axes.scatter(chosen["percent"], places, color=colour, marker=marker, s=26, label=label, zorder=2)
        if 0 < count < len(names):
            axes.axhline(count - 0.5, color="#888888", linewidth=0.8)
            axes.text(100, count - 0.4, "published models", ha="right", va="top", fontsize=7.5, color="#444444")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("robust accuracy in percent")
        add_legend_below(figure, [axes], columns=4)
        return figure

    return FigurePlan(numbers, paint, caption=_CAPTION)
