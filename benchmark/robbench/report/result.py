"""The result of `robbench.evaluate`: the content of result.json, with its records, and printed for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
import pandas as pd
from pydantic import GetCoreSchemaHandler, PrivateAttr
from pydantic_core import CoreSchema, core_schema

from robbench.core.errors import ResultError, unknown_name
from robbench.core.numbers import parse_threat
from robbench.core.words import format_count
from robbench.masking.stored import VerdictIndex
from robbench.report.console import find_width, fit_terminal
from robbench.report.distance import find_distances, list_quartiles, summarize_distances
from robbench.report.escape import escape_control, escape_html
from robbench.report.leaderboard import (
    NO_IMAGE_LEFT,
    format_attacks,
    format_group_title,
    format_percent,
    format_with_interval,
)
from robbench.report.terminal import summarize_result
from robbench.results.adversarials import Points, merge, read
from robbench.results.schema import Accuracy, AttackResult, ResultFile

__all__ = ["AttackResults", "Result", "Results"]

_COLUMNS = ("Attack", "Robust, % [95 %]", "Forward passes", "Backward passes")


class AttackResults(list[AttackResult]):
    """The attacks of a result, by position or by name: `result.attacks[0]`, `result.attacks["APGD-CE"]`."""

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> AttackResult: ...

    @overload
    def __getitem__(self, key: slice) -> list[AttackResult]: ...

    def __getitem__(self, key: SupportsIndex | str | slice) -> AttackResult | list[AttackResult]:
        """Return an attack, or those of a slice.

        Raises:
            ResultError: no attack has this name. The message names those that there are.
        """
        if not isinstance(key, str):
            return super().__getitem__(key)
        for attack in self:
            if attack.name == key:
                return attack
        raise ResultError(unknown_name("attack of this result", key, [a.name for a in self]))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate it as a list of attacks."""
        return core_schema.no_info_after_validator_function(cls, handler(list[AttackResult]))


class Result(ResultFile):
    """The result of an evaluation: every field of result.json (`results.schema.ResultFile`), and its records.

    `print(result)` shows a sentence and a table. A notebook shows them as HTML.
    """

    attacks: AttackResults
    _read_records: Callable[[], pd.DataFrame] = PrivateAttr()
    _points: Path | None = PrivateAttr()
    _root: Path | None = PrivateAttr()

    @classmethod
    def of(
        cls,
        file: ResultFile,
        read_records: Callable[[], pd.DataFrame],
        points: Path | None = None,
        root: Path | None = None,
    ) -> Result:
        """Make a result of the content of result.json.

        Args:
            file: the content.
            read_records: returns the rows of the images of this result.
            points: the file of the adversarial examples; None if there is no results tree.
            root: the results tree.
        """
        result = cls(**{name: getattr(file, name) for name in ResultFile.model_fields})
        result._read_records, result._points, result._root = read_records, points, root
        return result

    @property
    def worst_case(self) -> Accuracy:
        """The robust accuracy over all attacks: a share in [0, 1], with its 95 % interval."""
        return self.robust_accuracy

    @property
    def verdict(self) -> str:
        """The verdict of `robbench.sanity` on the same weights, data and threat, from the results tree of this result.

        It is trustworthy, suspicious, masked, randomized or undecided. Without such a run it is unchecked.
        """
        return VerdictIndex(self._root).find(self)

    @property
    def verdict_n(self) -> int | None:
        """The number of images that the verdict was measured on; None without a verdict."""
        return VerdictIndex(self._root).find_n(self)

    @property
    def records(self) -> pd.DataFrame:
        """The records: a row for each image and attack, with the columns of outcomes.parquet (docs/files.md)."""
        return self._read_records()

    @property
    def distances(self) -> pd.DataFrame:
        """The distance of the nearest break of each image under each attack, and `nearest`, the smallest.

        0: the model misclassifies the image. Infinite: not broken. The index holds official indices. Only a suite with
        the judge `nearest`, such as `distance`, looks for near breaks. All distances are upper bounds.

        Raises:
            ResultError: the suite has another judge.
        """
        if self.has_radius:
            raise ResultError(
                f'distances: the suite {self.suite!r} looks for breaks at a radius. Use suite="distance".'
            )
        return find_distances(self.records)

    def adversarials(self) -> list[Points]:
        """Read the adversarial examples of the breaks.

        Returns:
            One group for each number format. `sample` [m] has the official indices of the images, `attack` [m] the
            names of the attacks, and `x` [m, C, H, W] the points, in [0, 1].

        Raises:
            ResultError: the evaluation did not store them, or the file is damaged.
        """
        if self._points is None or not self._points.exists():
            raise ResultError(
                "The adversarial examples of this result are not stored. "
                'Evaluate with results="DIR" and save_adversarials=True.'
            )
        stored = read(self._points)
        if stored.run_id != self.run_id or stored.altered:
            raise ResultError(f"{self._points}: damaged, or of another run. Evaluate again with overwrite=True.")
        rows = self.records
        groups = [group for group in merge(stored.points, rows[["sample", "attack"]]) if len(group)]
        # Copies, because torch warns of arrays that cannot be written to.
        return [
            replace(g, sample=g.sample.copy(), x=g.x.astype(np.promote_types(g.x.dtype, np.float32))) for g in groups
        ]

    def __repr__(self) -> str:
        """Return the sentence in one line."""
        return f"<Result {escape_control(self._summarize())}>"

    def __str__(self) -> str:
        """Return a sentence and a table with a row for each attack. They fit the terminal, if stdout is one."""
        lines = [self._summarize(), *_make_text_table(self._list_columns(), self._list_rows()), *self._list_flags()]
        return fit_terminal(escape_control("\n".join(lines)))

    def _repr_html_(self) -> str:
        """Return the same as HTML. Names and flags are escaped."""
        return (
            f"<div><p><b>{escape_html(format_group_title(self))}</b></p><p>{escape_html(self._summarize())}</p>"
            f"{_make_html_table(self._list_columns(), self._list_rows())}{_make_html_flags(self._list_flags())}</div>"
        )

    def _list_columns(self) -> tuple[str, ...]:
        return _COLUMNS if self.has_radius else tuple(list_quartiles(self.distances)[0])

    def _summarize(self) -> str:
        if not self.has_radius:
            return summarize_distances(self, self.distances)
        return summarize_result(self, f"{self._describe_verdict()}, {format_count(self.n, 'image')}")

    def _describe_verdict(self) -> str:
        return VerdictIndex(self._root).describe(self)

    def _list_rows(self) -> Iterable[tuple[str, ...]]:
        if not self.has_radius:
            yield from (tuple(row.values()) for row in list_quartiles(self.distances))
            return
        accuracies = format_attacks(self)
        for a in self.attacks:
            left = accuracies[a.name] == NO_IMAGE_LEFT
            accuracy = NO_IMAGE_LEFT if left else format_with_interval(a.robust_accuracy)
            yield a.name, accuracy, f"{a.forwards}", f"{a.backwards}"
        totals = (f"{self.forwards}", f"{self.backwards}")
        yield "worst case", format_with_interval(self.robust_accuracy), *totals

    def _list_flags(self) -> list[str]:
        return [f"{name}: {text}" for name, text in self.flags.items()]


class Results(list[Result]):
    """The results at several radii: a list. `print` shows a sentence for each, and a notebook a table."""

    def __str__(self) -> str:
        """Return a sentence for each result, and the flags."""
        return fit_terminal(escape_control("\n".join([*(r._summarize() for r in self), *self._list_flags()])))

    def _repr_html_(self) -> str:
        """Return a table with a row for each result, and the flags. All text is escaped."""
        rows = [
            (
                r.model,
                str(parse_threat(r.threat.norm, r.threat.eps)),
                format_percent(r.clean_accuracy),
                format_with_interval(r.robust_accuracy),
                r._describe_verdict(),
                f"{r.n}",
            )
            for r in self
        ]
        head = ("Model", "Threat", "Clean, %", "Worst case, % [95 %]", "Verdict", "n")
        return f"<div>{_make_html_table(head, rows)}{_make_html_flags(self._list_flags())}</div>"

    def _list_flags(self) -> list[str]:
        return list(dict.fromkeys(flag for r in self for flag in r._list_flags()))


def _make_text_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Make the lines of a table, or of a block for each row where the table is wider than the terminal."""
    rows, most = list(rows), find_width()
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    if most is not None and sum(widths) + 2 * (len(widths) - 1) > most:
        blocks = ([name, *map("  {}: {}".format, head[1:], cells)] for name, *cells in rows)
        return [line for block in blocks for line in block]
    lines = []
    for first, *others in (head, *rows):
        numbers = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *numbers]))
    return lines


def _make_html_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Make a table whose first column is aligned on the left and all others on the right."""

    def make_row(cells: Iterable[str], tag: str) -> str:
        return "".join(
            f'<{tag} style="text-align:{"right" if i else "left"}">{escape_html(cell)}</{tag}>'
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{make_row(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{make_row(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def _make_html_flags(flags: Iterable[str]) -> str:
    return "".join(f"<p>⚠ {escape_html(flag)}</p>" for flag in flags)
