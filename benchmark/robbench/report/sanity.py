"""The output of `robbench sanity` on a terminal, and what `robbench.sanity` returns. Imports no torch."""

from __future__ import annotations

from rich.text import Text

from robbench.core.words import format_count
from robbench.masking.record import CheckResult, SanityFile
from robbench.report.console import fit_terminal, make_console
from robbench.report.escape import escape_control, escape_html
from robbench.report.leaderboard import format_with_interval
from robbench.report.progress import format_duration
from robbench.report.tables import print_rows
from robbench.report.verdict import describe_status, describe_verdict

__all__ = ["SanityResult", "format_verdict", "print_sanity"]

_COLUMNS = ("Check", "Value", "Passes if", "Status", "What was seen")
_WIDE = 140  # characters from which the table holds a sentence for each check
_IN_PYTHON = "Call `robbench.sanity` again with act=True, and it runs this suite too."

_STATUS_STYLE = {"pass": "green", "warn": "yellow", "fail": "red", "not applicable": "dim"}
# The colour is that of the statement about the number. A model of 0 % can have a number that is right.
_VERDICT_STYLE = {
    "undecided": "yellow", "trustworthy": "green", "suspicious": "yellow", "masked": "red", "randomized": "red",
}  # fmt: skip


def format_verdict(file: SanityFile) -> str:
    """Format in one line what the usual PGD leaves, whether that number can be trusted, and what all attacks leave."""
    return "".join(_word_verdict(file))


def _word_verdict(file: SanityFile) -> tuple[str, str, str]:
    """Return `format_verdict` in three parts. The second says whether the number can be trusted."""
    m = file.measurements
    by = f" by {', '.join(file.decided_by)}" if file.decided_by else ""
    return (
        f"{file.dataset}/{file.model}, {file.threat.norm} {file.threat.eps}: the usual PGD leaves "
        f"{format_with_interval(m.pgd)} % of {format_count(file.n, 'image')}: ",
        describe_verdict(file.verdict),
        f". Verdict on it: {file.verdict}{by}. Everything together leaves {format_with_interval(m.best)} %.",
    )


class SanityResult(SanityFile):
    """What `robbench.sanity` returns: the content of sanity.json. `print` and notebooks show its summary."""

    @classmethod
    def of(cls, file: SanityFile) -> SanityResult:
        """Make a result of the content of sanity.json."""
        return cls(**{name: getattr(file, name) for name in SanityFile.model_fields})

    def __repr__(self) -> str:
        """Return the verdict in one line."""
        return f"<SanityResult {escape_control(format_verdict(self))}>"

    def __str__(self) -> str:
        """Return the verdict, a line for each check that did not pass, and what to do next."""
        checks = [f"  {c.name}: {_format_value(c)}, {_format_status(c)}. {c.reason}" for c in _list_found(self)]
        lines = [format_verdict(self), *checks, _count_checks(self), *_list_advice(self, _IN_PYTHON)]
        return fit_terminal(escape_control("\n".join(lines)))

    def _repr_html_(self) -> str:
        """Return the same as HTML. All text is escaped."""
        head = "".join(f'<th style="text-align:left">{name}</th>' for name in _COLUMNS)
        rows = "".join(
            "<tr>" + "".join(f'<td style="text-align:left">{escape_html(str(cell))}</td>' for cell in row) + "</tr>"
            for row in (_make_row(c).values() for c in _list_found(self))
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>" if rows else ""
        after = "".join(f"<p>{escape_html(t)}</p>" for t in (_count_checks(self), *_list_advice(self, _IN_PYTHON)))
        return f"<div><p><b>{escape_html(format_verdict(self))}</b></p>{table}{after}</div>"


def print_sanity(file: SanityFile, again: str, every: bool = True) -> None:
    """Print the verdict, the checks, and the suite to run next.

    Args:
        file: the content of sanity.json.
        again: says how to run the suite that is advised.
        every: print all checks; False prints only checks that did not pass.

    A narrow terminal gets only the sentences of checks that did not pass.
    """
    console = make_console()
    before, statement, after = _word_verdict(file)
    coloured = (statement, _VERDICT_STYLE[file.verdict])
    console.print(Text.assemble(before, coloured, after, style="bold"), soft_wrap=True)
    shown = file.checks if every else _list_found(file)
    rows = [_make_row(c) for c in shown]
    if console.width >= _WIDE:
        if rows:
            print_rows(console, rows, right=("Value",))
    else:
        if rows:
            print_rows(console, [{k: row[k] for k in _COLUMNS[:-1]} for row in rows], right=("Value",))
        for c in _list_found(file):
            console.print(f"{c.name}: {c.reason}", soft_wrap=True)
        if every:
            console.print("A wider terminal, or --json, says what each check saw.", style="dim")
    for text in _list_advice(file, again):
        console.print(text, soft_wrap=True)
    passes = sum(c.pairs + c.forwards / 3 for c in file.measurements.cost.values()) / file.n
    console.print(
        f"{passes:.0f} forward-backward pairs an image (three forward passes count as one), "
        f"{format_duration(file.seconds)}."
    )


def _list_found(file: SanityFile) -> list[CheckResult]:
    """Return the checks that warn or fail."""
    return [c for c in file.checks if c.status in ("warn", "fail")]


def _count_checks(file: SanityFile) -> str:
    passed = sum(c.status == "pass" for c in file.checks)
    left_out = sum(c.status == "not applicable" for c in file.checks)
    return f"{passed} of {format_count(len(file.checks), 'check')} passed, {left_out} did not apply."


def _list_advice(file: SanityFile, again: str) -> list[str]:
    """Say which suite to run next, how (`again`), and what it gave if it has run."""
    texts = []
    if file.advice.suite:
        texts.append(
            f"Next: --suite {file.advice.suite}. {file.advice.reason} The usual PGD overestimates by "
            f"{file.advice.gain:.1f} points already." + (f" {again}" if file.acted is None else "")
        )
    if file.verdict == "undecided":
        texts.append(file.advice.reason)
    if file.acted is not None:
        accuracy = format_with_interval(file.acted.robust_accuracy)
        texts.append(f"The lower of this run and suite {file.acted.suite}, on the same images: {accuracy} %.")
    return texts


def _format_value(c: CheckResult) -> str:
    return "–" if c.value is None else f"{c.value:.3g}"


def _format_status(c: CheckResult) -> str:
    return describe_status(c) + (f" → {c.decides}" if c.decides else "")


def _make_row(c: CheckResult) -> dict[str, str | Text]:
    cells = (c.name, _format_value(c), c.threshold, Text(_format_status(c), _STATUS_STYLE[c.status]), c.reason)
    return dict(zip(_COLUMNS, cells, strict=True))
