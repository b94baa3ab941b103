"""Writes docs/sanity-zoo.md from the measurements of `zoo_check.py`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from zoo import HONEST_UP_TO, MASKED_FROM, ZOO, ZooEntry

Record = Mapping[str, Mapping[str, Any]]

INTRODUCTION = """\
# The labelled zoo

Written by `python perf/zoo_check.py`; do not edit. The zoo (`perf/zoo/`) holds small models with known labels. A label
says whether the robust accuracy under the usual attack can be trusted, whatever the scale of the logits. Thresholds of
checks may be chosen on the calibration half. Only the held-out half shows how good a check is.

A model is **masked** if it answers at random; if its robust accuracy under the usual attack, PGD on the rescaled
cross-entropy from one start, is at least {masked} points above that under the best attack known here; or if its
backward pass is that of another function (straight-through rounding, noise, a part of the gradient: attacks may succeed
with it, but the defender chose the gradient that they follow). It is **honest** if the difference is at most {honest}
points and no other condition holds. Within each kind the entries are calibration and held-out in turn, independent of
their measurements."""

NOTES = """\
- **PGD**: percent of the n images that are robust under PGD on the rescaled cross-entropy with one start: 20 steps of
  ε/4 on the digits (Linf 0.2), 40 steps of 0.01 on MNIST (Linf 0.3). "none": the model has no gradient. An evaluation
  with PGD would report its clean accuracy.
- **best**: percent of the n images that are also robust under two annealed PGDs, the hunt, PGD-100 with steps of ε,
  transfer from the natural network, Square (1,000 queries) and, if the model has a stand-in with a usable gradient,
  the end points of PGD on the stand-in. It is an upper bound of the robust accuracy. **overstated**: PGD − best, in
  points.
- **not confirmed**: the rule does not give this label on these n images.
- For a model that answers at random, an image is broken if most of 11 answers are wrong.
- **pyautoattack**: its own checks that warn while it runs APGD-CE, APGD-T and Square (1,000 queries) on the first {aa}
  images. Its counters are reset for each model. "–" means no warning, "stops" an exception.
- **verdict**: that of this project's checks on the first {ours} images."""


BEGIN, END = "<!-- written by perf/zoo_check.py -->", "<!-- end -->"


def insert_summary(text: str, records: Mapping[str, Record], seed: int, versions: Mapping[str, str]) -> str:
    """Insert the table of the held-out half into another page, between the marks `BEGIN` and `END`.

    Args:
        text: text of the page.
        records: entry -> part (attack, autoattack, verdict) -> measurements.
        seed: seed of all attacks.
        versions: package -> version.

    Raises:
        ValueError: the page lacks the marks.
    """
    chosen = [entry for entry in ZOO if entry.half == "held-out" and entry.name in records]
    table = tabulate(
        [[row[i] for i in (0, 1, 3, 4, 6, 7, 8)] for row in (_row(e, records[e.name]) for e in chosen)],
        ["model", "label", "PGD", "best known", "pyautoattack's checks", "verdict", "decided by"],
        tablefmt="github",
        disable_numparse=True,
    )
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    one = records[chosen[0].name]
    sizes = f"PGD and best known: the first {one['attack']['n']} test images; checks: {one['verdict']['n']} of them"
    about = ", ".join(f"{name} {number}" for name, number in versions.items())
    caption = f"{_score(chosen, records)} {sizes}; seed {seed}; {about}."
    return f"{before}{BEGIN}\n\n{table}\n\n{caption}\n\n{END}{after}"


def render_page(records: Mapping[str, Record], seed: int, versions: Mapping[str, str]) -> str:
    """Return the page as markdown.

    Args:
        records: entry -> part (attack, autoattack, verdict) -> measurements.
        seed: seed of all attacks.
        versions: package -> version.
    """
    measured = [entry for entry in ZOO if entry.name in records]
    parts = [INTRODUCTION.format(masked=MASKED_FROM, honest=HONEST_UP_TO)]
    for half in ("calibration", "held-out"):
        chosen = [entry for entry in measured if entry.half == half]
        parts += [f"## {half.capitalize()} half", _table(chosen, records), _score(chosen, records)]
    first = next((r for r in records.values() if "autoattack" in r), records[measured[0].name])
    about = ", ".join(f"{k} {v}" for k, v in versions.items())
    sizes = sorted({int(records[e.name]["attack"]["n"]) for e in measured})
    line = (
        f"n = {', '.join(map(str, sizes))} (the first test images), seed {seed}; {first['attack']['hardware']}; {about}"
    )
    notes = NOTES.format(aa=first.get("autoattack", {"n": 0})["n"], ours=first["verdict"]["n"])
    reasons = tabulate(
        [(e.name, e.dataset, e.kind, e.why, e.source) for e in measured],
        ["model", "data set", "kind", "why", "source"],
        tablefmt="github",
    )
    left_out = ", ".join(entry.name for entry in ZOO if entry.name not in records)
    line += f"\n\nNot measured here: {left_out}." if left_out else ""
    return "\n\n".join([*parts, notes, line, "## What they are", reasons]) + "\n"


def _table(entries: Sequence[ZooEntry], records: Mapping[str, Record]) -> str:
    headers = ["model", "label", "clean", "PGD", "best", "overstated", "pyautoattack", "verdict", "decided by"]
    rows = [_row(entry, records[entry.name]) for entry in entries]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _row(entry: ZooEntry, record: Record) -> tuple[str, ...]:
    n, clean = record["attack"]["n"], record["attack"]["clean"]
    apparent, best = count_apparent_and_best(record["attack"])
    pgd = "none" if next(iter(record["attack"]["left"].values())) is None else f"{100 * apparent / n:.1f}"
    autoattack = record.get("autoattack")
    if autoattack is None:
        theirs = "not run"
    else:
        theirs = "stops" if "stopped" in autoattack else ", ".join(autoattack["warnings"]) or "–"
    ours = record["verdict"]
    doubt = "" if is_confirmed(entry, record["attack"]) else " (not confirmed)"
    return (
        entry.name,
        entry.label + doubt,
        f"{100 * clean / n:.1f}",
        pgd,
        f"{100 * best / n:.1f}",
        f"{100 * (apparent - best) / n:.1f}",
        theirs,
        ours["verdict"],
        ", ".join(ours["deciding"]) or "–",
    )


def count_apparent_and_best(attack: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of robust images under the usual attack and under all known attacks."""
    left = [attack["clean"] if value is None else value for value in attack["left"].values()]
    return left[0], min(left)


def is_confirmed(entry: ZooEntry, attack: Mapping[str, Any]) -> bool:
    """Return whether the rule gives the entry's label on these measurements."""
    if "randomized" in attack["flags"] or entry.kind.startswith("random") or not entry.own_gradient:
        return entry.label == "masked"
    apparent, best = count_apparent_and_best(attack)
    points = 100 * (apparent - best) / attack["n"]
    return points >= MASKED_FROM if entry.label == "masked" else points <= HONEST_UP_TO


def _score(entries: Sequence[ZooEntry], records: Mapping[str, Record]) -> str:
    checked = [entry for entry in entries if "autoattack" in records[entry.name]]
    lines = [_count("pyautoattack", checked, records, _warned)]
    if any(records[e.name]["verdict"]["verdict"] != "unchecked" for e in entries):
        lines.append(_count("robbench", entries, records, lambda r: r["verdict"]["verdict"] != "trustworthy"))
    return " ".join(lines)


def _warned(record: Record) -> bool:
    return bool(record["autoattack"]["warnings"]) or "stopped" in record["autoattack"]


def _count(
    who: str, entries: Sequence[ZooEntry], records: Mapping[str, Record], flags: Callable[[Record], bool]
) -> str:
    counts = []
    for label in ("masked", "honest"):
        flagged = [flags(records[e.name]) for e in entries if e.label == label]
        counts.append(f"{sum(flagged)} of {len(flagged)} {label}")
    return f"{who} flags {counts[0]} and {counts[1]} models."
