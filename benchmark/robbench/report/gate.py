"""What a check found: for a terminal, as markdown for a job page, as JUnit XML, and as JSON. Never imports torch."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from robbench.core.numbers import parse_threat
from robbench.gate.decision import Decision, Finding, Outcome
from robbench.gate.paired import Comparison, Flip, Question
from robbench.report.escape import markdown_text

__all__ = ["as_json", "as_junit", "as_markdown", "as_text", "explain", "headline", "print_decision"]

_SHOWN = 10  # flipped images that a person is shown; the JSON lists all
_MARKS = {
    Outcome.PASSED: "✔ passed",
    Outcome.FAILED: "✘ FAILED",
    Outcome.TOLERATED: "✔ tolerated",
    Outcome.UNCERTAIN: "? uncertain",
    Outcome.EXPLAINED: "– other weights",
}


def headline(d: Decision) -> str:
    """Say the outcome in one line."""
    failed = sum(f.outcome is Outcome.FAILED for f in d.findings) + sum(len(c.removed) for c in d.comparisons)
    tests = sum(f.question.counted for f in d.findings) + sum(len(c.removed) for c in d.comparisons)
    models, n = len(d.comparisons), sum(c.n for c in d.comparisons)
    verdict = f"FAILED: {failed} of {tests} tests" if d.failed else f"passed: {tests} tests"
    what = f"{models} model{'s' if models > 1 else ''}, {n} images"
    tail = f"; {d.early}" if d.early else ""
    return f"Gate {verdict} ({what}, α = {d.policy.alpha:g}, allowed drop {d.policy.max_drop:g} points{tail})"


def _rows(c: Comparison, findings: list[Finding]) -> Iterator[dict[str, str]]:
    for f in findings:
        q = f.question
        low, high = q.interval
        yield {
            "Test": q.what if q.kind == "drop" else f"{q.what}: weaker?",
            "n": str(q.n),
            "Baseline": _percent(q.before, q.n),
            "Now": _percent(q.now, q.n),
            "Change [95 %]": f"{q.points:+.1f} [{low:+.1f}, {high:+.1f}]" if q.n else "–",
            "Lost": str(len(q.lost)),
            "Gained": str(len(q.gained)),
            "p": f"{f.p:.2g}",
            "Outcome": _MARKS[f.outcome] if q.counted else _MARKS[Outcome.EXPLAINED],
        }
    for name in c.removed:
        row = dict.fromkeys(("Test", "n", "Baseline", "Now", "Change [95 %]", "Lost", "Gained", "p"), "–")
        yield {**row, "Test": f"{name}: did not run", "Outcome": _MARKS[Outcome.FAILED]}


def _percent(count: int, n: int) -> str:
    return f"{100 * count / n:.1f}" if n else "–"


def _of(d: Decision, c: Comparison) -> list[Finding]:
    return [f for f in d.findings if any(f.question is q for q in c.questions)]


def _title(c: Comparison) -> str:
    suite = c.now.identity["suite"]["name"]
    threat = parse_threat(c.before.threat["norm"], c.before.threat["eps"])
    return f"{c.before.name} · {suite} · {threat}"


def explain(f: Finding) -> list[str]:
    """Say what a finding means, what may be the cause, and what to do; nothing for a test that passed."""
    q = f.question
    numbers = f"{len(q.lost)} images lost, {len(q.gained)} gained of {q.n} ({q.points:+.1f} points), p = {f.p:.2g}"
    if f.outcome is Outcome.PASSED:
        return []
    if f.outcome is Outcome.TOLERATED:
        return [f"{q.model}, {q.what}: fell, by no more than the drop that is allowed. {numbers}."]
    if f.outcome is Outcome.UNCERTAIN:
        return [
            f"{q.model}, {q.what}: fell by more than the drop that is allowed, but chance explains it. {numbers}. More "
            "images would tell."
        ]
    if f.outcome is Outcome.EXPLAINED:
        return [
            f"{q.model}, {q.what}: breaks fewer images than in the baseline, of other weights. {numbers}. If the new "
            "model stays, write a new baseline."
        ]
    return [*_failure(q, numbers), *_causes(f)]


def _failure(q: Question, numbers: str) -> list[str]:
    if q.kind == "drop":
        return [f"{q.model}, {q.what}: significantly lower than in the baseline. {numbers}."]
    return [
        f"{q.model}, {q.what}: the attack has become weaker; it breaks fewer of the images that both runs gave it. "
        f"{numbers}."
    ]


def _causes(f: Finding) -> list[str]:
    likely = [c for c in f.because if c.field in ("weights", "model", "attack", "suite", "seed", "engine", "code")]
    other = [c for c in f.because if c not in likely]
    lines = [f"What changed: {c}" for c in likely]
    if other:
        lines.append(f"Also different: {'; '.join(map(str, other))}")
    if not likely:
        lines.append(
            "Nothing else that a baseline records changed: suspect a library, the machine's arithmetic, or code that "
            "is not robbench's."
        )
    same_weights = not any(c.field in ("weights", "model") for c in f.because)
    if f.question.kind == "drop" and same_weights and any(c.field in ("attack", "suite") for c in likely):
        lines.append("The weights are the same: the attacks are stronger, and the baseline was too good to be true.")
    lines.append("If this is intended, write a new baseline with `robbench baseline`, and commit it.")
    return lines


def _flips(c: Comparison, question: Question) -> str:
    """Show the images behind a finding: which attack changed on each."""
    chosen = set(question.bad)
    flips = [flip for flip in c.flips if flip.sample in chosen]
    shown = "; ".join(f"{flip.sample} ({_said(flip, question)})" for flip in flips[:_SHOWN])
    more = f"; and {len(flips) - _SHOWN} more" if len(flips) > _SHOWN else ""
    return f"Images: {shown}{more}"


def _said(flip: Flip, question: Question) -> str:
    named = {question.what: flip.attacks[question.what]} if question.what in flip.attacks else flip.attacks
    by_change: dict[tuple[str, str], list[str]] = {}
    for name, pair in named.items():
        by_change.setdefault(pair, []).append(name)
    return ", ".join(f"{', '.join(names)}: {was} → {now}" for (was, now), names in by_change.items())


def _told(d: Decision, c: Comparison) -> Iterator[tuple[str, list[str]]]:
    """Yield what must be said about a model: a sentence, and the lines that belong to it."""
    for f in _of(d, c):
        if lines := explain(f):
            failed = f.outcome is Outcome.FAILED
            yield lines[0], [*lines[1:], *([_flips(c, f.question)] if failed else [])]
    for name in c.removed:
        yield (
            f"{c.before.name}, {name}: an attack of the baseline that did not run.",
            ["Put it back into the suite, or write a new baseline with `robbench baseline`, and commit it."],
        )


def _notes(d: Decision) -> Iterator[str]:
    n = min(c.before.n for c in d.comparisons)
    if d.early is None and 100 * d.resolution > d.policy.max_drop * n:
        yield (
            f"With {n} images, a worst case fails from a loss of {d.resolution} images on, if none is gained "
            f"({100 * d.resolution / n:.1f} points; allowed are {d.policy.max_drop:g}). More images see more."
        )


def print_decision(d: Decision, console: Console | None = None) -> None:
    """Print the tables, what failed and why, and the outcome."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200, file=console.file)
    for c in d.comparisons:
        rows = list(_rows(c, _of(d, c)))
        view = Table(title=escape(f"{_title(c)}: standing, % of n"), title_justify="left", pad_edge=False)
        for i, column in enumerate(rows[0]):
            view.add_column(column, justify="left" if i in (0, len(rows[0]) - 1) else "right")
        for row in rows:
            view.add_row(*map(escape, row.values()), style="bold red" if row["Outcome"].startswith("✘") else None)
        console.print(view)
        for sentence, lines in _told(d, c):
            console.print(escape(sentence), soft_wrap=True)
            for line in lines:
                console.print(f"  {escape(line)}", soft_wrap=True)
    for note in _notes(d):
        console.print(f"[yellow]note:[/yellow] {escape(note)}", soft_wrap=True)
    console.print(f"[bold]{escape(headline(d))}[/bold]", soft_wrap=True)


def as_text(d: Decision) -> str:
    """Write what `print_decision` prints."""
    page = io.StringIO()
    print_decision(d, Console(file=page, highlight=False, force_terminal=False))
    return page.getvalue()


def as_markdown(d: Decision) -> str:
    """Write the summary for a job's page."""
    parts = [f"## {'❌' if d.failed else '✅'} {markdown_text(headline(d))}\n"]
    for c in d.comparisons:
        table = pd.DataFrame(list(_rows(c, _of(d, c)))).map(markdown_text)
        align = ("left", *["right"] * (table.shape[1] - 2), "left")
        text = table.to_markdown(index=False, disable_numparse=True, colalign=align)
        parts.append(f"### {markdown_text(_title(c))}\n\nStanding, % of n.\n\n{text}\n")
        for sentence, lines in _told(d, c):
            told = [f"**{markdown_text(sentence)}**", *(f"- {markdown_text(line)}" for line in lines)]
            parts.append("\n".join([told[0], "", *told[1:]]) + "\n")
    parts += [f"{markdown_text(note)}\n" for note in _notes(d)]
    return "\n".join(parts)


_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def as_junit(d: Decision) -> str:
    """Write JUnit XML: a test suite per model, a test case per test."""
    root = ElementTree.Element("testsuites", name="robbench")
    for c in d.comparisons:
        findings = _of(d, c)
        failures = sum(f.outcome is Outcome.FAILED for f in findings) + len(c.removed)
        tests = sum(f.question.counted for f in findings) + len(c.removed)
        counts = {"tests": str(tests), "failures": str(failures), "errors": "0", "skipped": "0"}
        suite = ElementTree.SubElement(root, "testsuite", {"name": _xml(_title(c)), **counts})
        for f in findings:
            if f.question.counted:
                kind = "drop" if f.question.kind == "drop" else "weaker attack"
                case = _case(suite, c, f"{f.question.what}: no {kind}")
                if f.outcome is Outcome.FAILED:
                    sentence, *lines = [*explain(f), _flips(c, f.question)]
                    ElementTree.SubElement(case, "failure", message=_xml(sentence)).text = _xml("\n".join(lines))
        for name in c.removed:
            case = _case(suite, c, f"{name}: runs")
            ElementTree.SubElement(case, "failure", message="An attack of the baseline did not run.")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(suite: ElementTree.Element, c: Comparison, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=_xml(f"robbench.{c.before.name}"), name=_xml(name))


def _xml(text: str) -> str:
    return _NOT_XML.sub("�", text)  # what XML cannot hold in any form


def as_json(d: Decision) -> dict[str, Any]:
    """Say it for machines."""
    return {
        "failed": d.failed,
        "policy": asdict(d.policy),
        "early": d.early,
        "resolution": d.resolution,
        "models": [
            {
                "model": c.before.name,
                "n": c.n,
                "run_id": {"baseline": c.before.run_id, "now": c.now.run_id},
                "changes": [asdict(x) for x in c.changes],
                "removed_attacks": c.removed,
                "tests": [_finding(f) for f in _of(d, c)],
                "flips": [asdict(flip) for flip in c.flips],
            }
            for c in d.comparisons
        ],
    }


def _finding(f: Finding) -> dict[str, Any]:
    q = f.question
    low, high = q.interval
    return {
        **asdict(q),
        "p": q.p,
        "p_adjusted": f.p if q.counted else None,
        "points": q.points,
        "points_low": low,
        "points_high": high,
        "outcome": f.outcome.value,
        "because": [asdict(c) for c in f.because],
    }
