"""Runs in a results tree: what was asked for, what is finished, and what waits to be continued. Imports no torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from robbench.core.errors import ResultError
from robbench.core.files import digest
from robbench.results.locking import read_holder
from robbench.results.records import COLUMNS, read_run_rows
from robbench.results.schema import ResultFile, read_result, read_validated
from robbench.results.store import DESCRIPTION, list_result_paths

__all__ = ["Description", "Run", "find_runs", "read_description"]

DESCRIPTION_VERSION = 1
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


class Description(BaseModel):
    """run.json: what was asked for, as far as it takes to ask for it again.

    Paths are absolute: a run is continued from anywhere on the machine it was begun on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    version: Literal[1]
    model: str | None
    """A card's name or a source; None for a module that was handed over in Python."""
    own_images: bool
    """Whether the images were handed over in Python."""
    suite: str
    dataset: str | None
    name: str | None
    architecture: str | None
    mean: list[float] | None
    std: list[float] | None
    norm: str | None
    eps: str | None
    samples: Positive | None
    sample_seed: Natural | None
    seed: Natural
    lanes: Positive | None
    gradients: Literal["bfloat16"] | None = None  # not in descriptions written before there was a choice
    models: list[str]
    data_dir: str | None
    save_adversarials: bool
    n: Positive
    """Images asked for."""
    stages: Positive
    """Attacks of the suite."""
    date: str
    """When it was last begun, UTC, ISO 8601."""
    identity: dict[str, Any]

    def as_arguments(self) -> dict[str, Any]:
        """Return what `evaluate` was given."""
        return self.model_dump(exclude={"version", "own_images", "n", "stages", "date", "identity"})


def read_description(path: Path) -> Description:
    """Read and validate a run.json.

    Raises:
        ResultError: not readable, or not a description of this version.
    """
    return read_validated(path, Description, 2**24)


@dataclass(frozen=True)
class Run:
    """A run in a results tree.

    Attributes:
        folder: of its result.
        run_id: SHA-256 of its identity; empty where it cannot be read.
        state: "finished", "unfinished", "running" (another process works on it), or "damaged".
        done: share of its records that are on disk, in [0, 1].
        about: the summary or the description; None where it is damaged.
        note: what a person should know: how it goes on, or what is wrong.
    """

    folder: Path
    run_id: str
    state: str
    done: float
    about: ResultFile | Description | None
    note: str

    @property
    def resumable(self) -> Description | None:
        """What `eval --resume` asks for again; None where it is not to be continued on a file's word."""
        about = self.about
        return about if self.state == "unfinished" and isinstance(about, Description) and not self.note else None

    def as_row(self, root: Path) -> dict[str, str | float]:
        """Say it in one line."""
        about = self.about
        n = "" if about is None else str(about.n)
        return {
            "state": self.state,
            "result": str(self.folder.relative_to(root)),
            "images": n,
            "done": f"{100 * self.done:.0f} %",
            "date": "" if about is None else about.date[:16],
            "run": self.run_id[:8],
            "note": self.note,
        }


def find_runs(root: Path) -> list[Run]:
    """List all runs of a results tree: unfinished ones first, then finished ones, each ordered by path."""
    return [*_unfinished(root), *_finished(root)]


def _finished(root: Path) -> Iterator[Run]:
    for path in list_result_paths(root):
        aside = len(list(path.parent.glob("*.damaged*")))
        note = f"{aside} damaged files set aside" if aside else ""
        try:
            result = read_result(path)
        except ResultError as error:
            yield Run(path.parent, "", "damaged", 0.0, None, str(error))
            continue
        if not path.with_name("outcomes.parquet").exists():
            yield Run(path.parent, result.run_id, "damaged", 0.0, result, "outcomes.parquet is missing")
            continue
        yield Run(path.parent, result.run_id, "finished", 1.0, result, note)


def _unfinished(root: Path) -> Iterator[Run]:
    for partial in sorted(root.glob("*/*/*/.partial/*/")):
        folder = partial.parents[1]
        try:
            about = read_description(partial / DESCRIPTION)
            if digest(about.identity) != partial.name:
                raise ResultError(f"{partial / DESCRIPTION} describes another run.")
        except (ResultError, ValueError) as error:
            yield Run(folder, partial.name, "damaged", 0.0, None, f"{error} The command that began it goes on.")
            continue
        rows = 0
        for shard in partial.glob("*.parquet"):
            try:
                rows += len(read_run_rows(shard, partial.name, list(COLUMNS)))
            except ResultError:  # the run that goes on sets it aside, and says so
                continue
        holder = read_holder(root, folder)
        state = "running" if holder and _alive(holder) else "unfinished"
        yield Run(folder, partial.name, state, min(1.0, rows / (about.n * about.stages)), about, _hindrance(about))


def _hindrance(about: Description) -> str:
    """Say why a run is not continued on its description's word; empty if it is."""
    if about.model is None or about.own_images:
        return "begun in Python with a model or images of one's own: call evaluate again"
    if ":" in about.model and not about.model.startswith("file:"):
        return f"{about.model} is code or a download, not loaded on a file's word: give its command again"
    return ""


def _alive(holder: dict[str, Any]) -> bool:
    """Tell whether the process that holds a lock lives; of another machine's that is not known, and assumed."""
    if holder.get("host") != platform.node():
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except (ProcessLookupError, ValueError, KeyError, TypeError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
