"""The result of `robbench.evaluate`: the content of result.json, with its records, and printed for people."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
import pandas as pd
from pydantic import GetCoreSchemaHandler, PrivateAttr
from pydantic_core import CoreSchema, core_schema

from robbench.core.errors import ResultError, unknown_name
from robbench.report.distance import find_distances, list_quartiles, summarize_distances
from robbench.report.escape import escape_control
from robbench.report.leaderboard import format_group_title, format_with_interval
from robbench.report.terminal import summarize_result
from robbench.results.adversarials import Points, merge, read
from robbench.results.schema import Accuracy, AttackResult, ResultFile

__all__ = ["AttackResults", "Result"]

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

    @classmethod
    def of(cls, file: ResultFile, read_records: Callable[[], pd.DataFrame], points: Path | None) -> Result:
        """Make a result of the content of result.json.

        Args:
            file: the content.
            read_records: returns the rows of the images of this result.
            points: the file of the adversarial examples; None if there is no results tree.
        """
        result = cls(**{name: getattr(file, name) for name in ResultFile.model_fields})
        result._read_records, result._points = read_records, points
        return result

    @property
    def worst_case(self) -> Accuracy:
        """The robust accuracy over all attacks: a share in [0, 1], with its 95 % interval."""
        return self.robust_accuracy

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

    def __str__(self) -> str:
        """Return a sentence and a table with a row for each attack."""
        rows = [self._list_columns(), *self._list_rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for first, *others in rows:
            numbers = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *numbers]))
        return escape_control("\n".join([self._summarize(), *lines, *self._list_flags()]))

    def _repr_html_(self) -> str:
        """Return the same as HTML. Names and flags are escaped."""
        head = "".join(f'<th style="text-align:{_align(i)}">{c}</th>' for i, c in enumerate(self._list_columns()))
        rows = "".join(
            "<tr>"
            + "".join(f'<td style="text-align:{_align(i)}">{_escape(c)}</td>' for i, c in enumerate(row))
            + "</tr>"
            for row in self._list_rows()
        )
        flags = "".join(f"<p>⚠ {_escape(flag)}</p>" for flag in self._list_flags())
        return (
            f"<div><p><b>{_escape(format_group_title(self))}</b></p><p>{_escape(self._summarize())}</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{flags}</div>"
        )

    def _list_columns(self) -> tuple[str, ...]:
        return _COLUMNS if self.has_radius else tuple(list_quartiles(self.distances)[0])

    def _summarize(self) -> str:
        if not self.has_radius:
            return summarize_distances(self, self.distances)
        return summarize_result(self, f"{self.n} images")

    def _list_rows(self) -> Iterable[tuple[str, ...]]:
        if not self.has_radius:
            yield from (tuple(row.values()) for row in list_quartiles(self.distances))
            return
        for a in self.attacks:
            yield a.name, format_with_interval(a.robust_accuracy), f"{a.forwards}", f"{a.backwards}"
        totals = (f"{self.forwards}", f"{self.backwards}")
        yield "worst case", format_with_interval(self.robust_accuracy), *totals

    def _list_flags(self) -> list[str]:
        return [f"{name}: {text}" for name, text in self.flags.items()]


def _align(column: int) -> str:
    return "right" if column else "left"


def _escape(text: str) -> str:
    return html.escape(escape_control(text))
