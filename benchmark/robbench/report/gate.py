"""The decision of a gate check as text, as markdown for a job page, as JUnit XML, and as JSON. Imports no torch."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from rich.text import Text

from robbench.core.words import format_count
from robbench.gate.decision import Decision, GateFinding, GateOutcome
from robbench.gate.paired import Comparison, Flip, PairedTest
from robbench.report.console import TerminalConsole, make_console
from robbench.report.escape import escape_markdown, make_markdown_table
from robbench.report.tables import fits, print_rows, print_turned

__all__ = [
    "dump_decision", "explain_finding", "format_headline", "format_junit", "format_markdown", "format_text",
    "print_decision",
]  # fmt: skip

_SHOWN = 10  # flipped images in the text for people; the JSON lists all
_MARKS = {
    GateOutcome.PASSED: "✔ passed",
    GateOutcome.FAILED: "✘ FAILED",
    GateOutcome.TOLERATED: "✔ tolerated",
    GateOutcome.UNCERTAIN: "? uncertain",
    GateOutcome.EXPLAINED: "– other weights",
}


def format_headline(d: Decision) -> str:
    """Format the outcome of the check as one line."""
    return d.headline


def _rows(c: Comparison, findings: list[GateFinding]) -> Iterator[dict[str, str]]:
    for f in findings:
        t = f.test
        low, high = t.interval
        yield {
            "Test": t.what if t.kind == "drop" else f"{t.what}: weaker?",
            "n": str(t.n),
            "Baseline": _percent(t.before, t.n),
            "Now": _percent(t.now, t.n),
            "Change [95 %]": f"{t.points:+.1f} [{low:+.1f}, {high:+.1f}]" if t.n else "–",
            "Lost": str(len(t.lost)),
            "Gained": str(len(t.gained)),
            "p": f"{f.p:.2g}",
            "Outcome": _MARKS[f.outcome] if t.counted else _MARKS[GateOutcome.EXPLAINED],
        }
    for name in c.removed:
        row = dict.fromkeys(("Test", "n", "Baseline", "Now", "Change [95 %]", "Lost", "Gained", "p"), "–")
        yield {**row, "Test": f"{name}: did not run", "Outcome": _MARKS[GateOutcome.FAILED]}


def _percent(count: int, n: int) -> str:
    return f"{100 * count / n:.1f}" if n else "–"


def _findings_of(d: Decision, c: Comparison) -> list[GateFinding]:
    return [f for f in d.findings if any(f.test is t for t in c.tests)]


def _title(c: Comparison) -> str:
    return c.before.title


def explain_finding(f: GateFinding) -> list[str]:
    """List sentences with the meaning of a finding, possible causes and advice. A passed test has none."""
    t = f.test
    lost = format_count(len(t.lost), "image")
    numbers = f"{lost} lost, {len(t.gained)} gained of {t.n} ({t.points:+.1f} points), p = {f.p:.2g}"
    if f.outcome is GateOutcome.PASSED:
        return []
    if f.outcome is GateOutcome.TOLERATED:
        return [f"{t.model}, {t.what}: significantly lower, but within the allowed drop. {numbers}."]
    if f.outcome is GateOutcome.UNCERTAIN:
        return [
            f"{t.model}, {t.what}: lower by more than the allowed drop, but chance can explain it. {numbers}. Measure "
            "more images to be certain."
        ]
    if f.outcome is GateOutcome.EXPLAINED:
        return [
            f"{t.model}, {t.what}: the attack breaks fewer images than in the baseline, and the weights are new. "
            f"{numbers}. If you keep the new model, write a new baseline."
        ]
    return [_describe_failure(t, numbers), *_describe_causes(f)]


def _describe_failure(t: PairedTest, numbers: str) -> str:
    if t.kind == "drop":
        return f"{t.model}, {t.what}: significantly lower than in the baseline. {numbers}."
    return (
        f"{t.model}, {t.what}: the attack has become weaker; it breaks fewer of the images that both runs gave it. "
        f"{numbers}."
    )


def _describe_causes(f: GateFinding) -> list[str]:
    likely = [c for c in f.because if c.field in ("weights", "model", "attack", "suite", "seed", "engine", "code")]
    other = [c for c in f.because if c not in likely]
    lines = [f"What changed: {c}" for c in likely]
    if other:
        lines.append(f"Also different: {'; '.join(map(str, other))}")
    if not likely:
        lines.append(
            "Nothing else that a baseline records changed. Suspect a library, the machine's arithmetic, or code that "
            "is not robbench's."
        )
    same_weights = not any(c.field in ("weights", "model") for c in f.because)
    if f.test.kind == "drop" and same_weights and any(c.field in ("attack", "suite") for c in likely):
        lines.append("The weights are the same, so the attacks are stronger now. The baseline was too optimistic.")
    lines.append("If this is intended, write a new baseline with `robbench baseline`, and commit it.")
    return lines


def _list_images(c: Comparison, test: PairedTest) -> str:
    """List the images that changed for the worse, and which attacks changed on each."""
    chosen = set(test.bad)
    flips = [flip for flip in c.flips if flip.sample in chosen]
    shown = "; ".join(f"{flip.sample} ({_describe_flip(flip, test)})" for flip in flips[:_SHOWN])
    more = f"; and {len(flips) - _SHOWN} more" if len(flips) > _SHOWN else ""
    return f"Images: {shown}{more}"


def _describe_flip(flip: Flip, test: PairedTest) -> str:
    attacks = {test.what: flip.attacks[test.what]} if test.what in flip.attacks else flip.attacks
    by_change: dict[tuple[str, str], list[str]] = {}
    for name, pair in attacks.items():
        by_change.setdefault(pair, []).append(name)
    return ", ".join(f"{', '.join(names)}: {before} → {now}" for (before, now), names in by_change.items())


def _describe_findings(d: Decision, c: Comparison) -> Iterator[tuple[str, list[str]]]:
    """Yield a sentence and its lines of detail for each finding of a model that needs attention."""
    for f in _findings_of(d, c):
        if lines := explain_finding(f):
            failed = f.outcome is GateOutcome.FAILED
            yield lines[0], [*lines[1:], *([_list_images(c, f.test)] if failed else [])]
    for name in c.removed:
        yield (
            f"{c.before.name}, {name}: this attack of the baseline did not run.",
            ["Put it back into the suite, or write a new baseline with `robbench baseline`, and commit it."],
        )


def _notes(d: Decision) -> Iterator[str]:
    n = min(c.before.n for c in d.comparisons)
    if d.early is None and 100 * d.resolution > d.policy.max_drop * n:
        yield (
            f"With {format_count(n, 'image')} and none gained, a worst case fails if at least {d.resolution} are lost "
            f"({100 * d.resolution / n:.1f} points; the allowed drop is {d.policy.max_drop:g}). Measure more images to "
            "find smaller drops."
        )
    for c in d.comparisons:
        if c.flips and c.before.run_id == c.now.run_id and not c.changes:
            yield (
                f"{c.now.name}: this is the run of the baseline, by the same code on the same hardware, and the "
                f"verdicts of {format_count(len(c.flips), 'image')} differ. A file was edited, or the model is not "
                "deterministic."
            )
    for text in dict.fromkeys(change.text for c in d.comparisons for change in c.changes if change.field == "code"):
        yield f"The code that makes verdicts is not that of the baseline: {text}. `robbench baseline` writes a new one."


def print_decision(d: Decision, console: TerminalConsole | None = None) -> None:
    """Print the tables, the findings with their causes, and the outcome."""
    console = console or make_console()
    for c in d.comparisons:
        rows = list(_rows(c, _findings_of(d, c)))
        title = f"{_title(c)}: correct images, % of n"
        numbers = [column for column in rows[0] if column not in ("Test", "Outcome")]
        styled = [{k: Text(cell, _style(row)) for k, cell in row.items()} for row in rows]
        if fits(console, styled, numbers):
            print_rows(console, styled, title=title, right=numbers)
        else:
            print_turned(console, styled, title=title, first=len(rows[0]) - 1)
        for sentence, lines in _describe_findings(d, c):
            console.print(sentence, soft_wrap=True)
            for line in lines:
                console.print(f"  {line}", soft_wrap=True)
    for note in _notes(d):
        console.note(note)
    console.print(format_headline(d), style="bold", soft_wrap=True)


def _style(row: dict[str, str]) -> str:
    return "bold red" if row["Outcome"].startswith("✘") else ""


def format_text(d: Decision) -> str:
    """Return the text that `print_decision` prints."""
    page = io.StringIO()
    print_decision(d, make_console(file=page, force_terminal=False))
    return page.getvalue()


def format_markdown(d: Decision) -> str:
    """Format the decision as markdown for the page of a CI job."""
    parts = [f"## {'❌' if d.failed else '✅'} {escape_markdown(format_headline(d))}\n"]
    for c in d.comparisons:
        rows = list(_rows(c, _findings_of(d, c)))
        text = make_markdown_table(rows, ["left", *["right"] * (len(rows[0]) - 2), "left"])
        parts.append(f"### {escape_markdown(_title(c))}\n\nCorrect images, % of n.\n\n{text}\n")
        for sentence, lines in _describe_findings(d, c):
            items = [f"- {escape_markdown(line)}" for line in lines]
            parts.append("\n".join([f"**{escape_markdown(sentence)}**", "", *items]) + "\n")
    parts += [f"{escape_markdown(note)}\n" for note in _notes(d)]
    return "\n".join(parts)


_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def format_junit(d: Decision) -> str:
    """Format the decision as JUnit XML: a test suite per model, a test case per test."""
    root = ElementTree.Element("testsuites", name="robbench")
    for c in d.comparisons:
        findings = _findings_of(d, c)
        failures = sum(f.outcome is GateOutcome.FAILED for f in findings) + len(c.removed)
        tests = sum(f.test.counted for f in findings) + len(c.removed)
        counts = {"tests": str(tests), "failures": str(failures), "errors": "0", "skipped": "0"}
        suite = ElementTree.SubElement(root, "testsuite", {"name": _xml(_title(c)), **counts})
        for f in findings:
            if f.test.counted:
                kind = "drop" if f.test.kind == "drop" else "weaker attack"
                case = _case(suite, c, f"{f.test.what}: no {kind}")
                if f.outcome is GateOutcome.FAILED:
                    sentence, *lines = [*explain_finding(f), _list_images(c, f.test)]
                    ElementTree.SubElement(case, "failure", message=_xml(sentence)).text = _xml("\n".join(lines))
        for name in c.removed:
            case = _case(suite, c, f"{name}: runs")
            ElementTree.SubElement(case, "failure", message="An attack of the baseline did not run.")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(suite: ElementTree.Element, c: Comparison, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=_xml(f"robbench.{c.before.name}"), name=_xml(name))


def _xml(text: str) -> str:
    return _NOT_XML.sub("�", text)  # XML cannot hold these characters in any form


def dump_decision(d: Decision) -> dict[str, Any]:
    """Return the decision as JSON data."""
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
                "tests": [_dump_finding(f) for f in _findings_of(d, c)],
                "flips": [asdict(flip) for flip in c.flips],
            }
            for c in d.comparisons
        ],
    }


def _dump_finding(f: GateFinding) -> dict[str, Any]:
    t = f.test
    low, high = t.interval
    return {
        **asdict(t),
        "p": t.p,
        "p_adjusted": f.p if t.counted else None,
        "points": t.points,
        "points_low": low,
        "points_high": high,
        "outcome": f.outcome.value,
        "because": [asdict(c) for c in f.because],
    }
