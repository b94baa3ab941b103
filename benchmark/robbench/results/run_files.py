"""The runs of a results tree: their descriptions, and which are finished or can be resumed. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from robbench.core.errors import ModelError, ResultError
from robbench.core.files import digest
from robbench.core.words import format_count
from robbench.models.sources import parse_source
from robbench.results.adversarials import FILE as ADVERSARIALS
from robbench.results.judging_code import DESCRIPTION, MOST_DESCRIPTION_BYTES
from robbench.results.locking import is_locked
from robbench.results.places import drop_repeats, locate_result
from robbench.results.reader import list_result_paths, read_in_tree
from robbench.results.records import COLUMNS, read_run_rows
from robbench.results.schema import Answers, ResultFile, StrictModel, read_result, read_validated
from robbench.results.trust import explain_refusal
from robbench.suite import CUSTOM

__all__ = ["Description", "StoredRun", "find_runs", "read_description"]

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


class Description(StrictModel):
    """run.json: what was asked for, as far as it takes to ask for it again.

    Paths are absolute, so a run can be resumed from any folder of the machine.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    version: Literal[1]
    model: str | None
    """The name of a card, or a source; None for a module that was passed in Python."""
    own_images: bool
    """Whether the images were passed in Python."""
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
    fast_layers: bool = True  # the same
    one_by_one: bool = False  # the same
    target: str | list[int] | None = None  # the same
    levels: Positive | None = None  # the same
    data: str | None = None  # the same
    resize: Positive | None = None
    crop: Positive | None = None
    channels: Positive | None = None
    classes: str | dict[str, int] | None = None
    on_broken: Literal["stop", "skip"] | None = None
    output: str | int | None = None
    binary: bool | None = None
    surrogate: str | None = None
    models: list[str]
    data_dir: str | None
    save_adversarials: bool
    n: Positive
    """Number of images."""
    stages: Positive
    """Number of attacks of the suite."""
    date: str
    """Start of the last call, UTC, ISO 8601."""
    identity: dict[str, Any]
    answers: Answers = Field(default_factory=list)
    """As in result.json; empty in descriptions of older versions, like `code`."""
    code: str = ""

    def as_arguments(self) -> dict[str, Any]:
        """Return the arguments of `evaluate`."""
        return self.model_dump(exclude={"version", "own_images", "n", "stages", "date", "identity", "answers", "code"})


def read_description(path: Path) -> Description:
    """Read and validate a run.json.

    Raises:
        ResultError: the file cannot be read, or is not a description of this version.
    """
    return read_validated(path, Description, MOST_DESCRIPTION_BYTES)


@dataclass(frozen=True)
class StoredRun:
    """A run in a results tree.

    Attributes:
        folder: the folder of the result.
        run_id: SHA-256 of the identity; empty if the file cannot be read.
        state: "finished", "unfinished", "running" (a process works on it), or "damaged".
        done: share of the records that are on disk, in [0, 1].
        about: the summary or the description; None if that file is damaged.
        note: advice for the user: how to resume the run, or what is wrong.
    """

    folder: Path
    run_id: str
    state: str
    done: float
    about: ResultFile | Description | None
    note: str

    @property
    def resumable(self) -> Description | None:
        """The description that `eval --resume` uses; None if `eval --resume` must not resume this run."""
        about = self.about
        return about if self.state == "unfinished" and isinstance(about, Description) and not self.note else None

    def as_row(self, root: Path) -> dict[str, str | float]:
        """Return the columns of the run's line in `robbench runs`."""
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


def find_runs(root: Path) -> list[StoredRun]:
    """List all runs of a results tree: unfinished ones first, then finished ones, each ordered by path.

    A run that was killed after its result.json was written is finished. The next run there removes its shards.
    """
    return [*_unfinished(root), *_finished(root)]


def _finished(root: Path) -> Iterator[StoredRun]:
    runs = list(_read_finished(root))
    results = [run.about for run in runs if isinstance(run.about, ResultFile)]
    counting = {id(result) for result in drop_repeats(results)}
    for run in runs:
        if isinstance(run.about, ResultFile) and id(run.about) not in counting:
            run = replace(run, note=f"the same run as {locate_result(root, run.about).name}, which counts")
        yield run


def _read_finished(root: Path) -> Iterator[StoredRun]:
    for path in list_result_paths(root):
        aside = len(list(path.parent.glob("*.damaged*")))
        note = f"{format_count(aside, 'damaged file')} set aside" if aside else ""
        try:
            result = read_in_tree(root, path.parent)
        except ResultError as error:
            yield StoredRun(path.parent, "", "damaged", 0.0, None, str(error))
            continue
        yield StoredRun(path.parent, result.run_id, "finished", 1.0, result, note)


def _unfinished(root: Path) -> Iterator[StoredRun]:
    for partial in sorted(root.glob("*/*/*/.partial/*/")):
        folder = partial.parents[1]
        try:
            about = read_description(partial / DESCRIPTION)
            if digest(about.identity) != partial.name:
                raise ResultError(f"{partial / DESCRIPTION} describes another run.")
        except (ResultError, ValueError) as error:
            yield StoredRun(folder, partial.name, "damaged", 0.0, None, f"{error} The command that began it goes on.")
            continue
        if _is_finished(folder, partial.name, about):
            continue
        rows = 0
        for shard in partial.glob("*.parquet"):
            try:
                rows += len(read_run_rows(shard, partial.name, list(COLUMNS)))
            except ResultError:  # when the run is resumed, the shard is reported and set aside
                continue
        state = "running" if is_locked(root, folder) else "unfinished"
        yield StoredRun(
            folder, partial.name, state, min(1.0, rows / (about.n * about.stages)), about, _why_not_resumable(about)
        )


def _why_not_resumable(about: Description) -> str:
    """Explain why `eval --resume` must not resume a run; empty if it may."""
    if about.model is None or about.own_images:
        return "begun in Python with a model or images of one's own: call evaluate again"
    if about.suite == CUSTOM:
        return "begun in Python with a list of attacks: call evaluate again"
    for named, is_safe in ((about.surrogate, False), (about.model, about.architecture is not None)):
        try:
            source = None if named is None else parse_source(named)
        except ModelError:
            return "its model has an unknown source: give its command again"
        if source is not None and (source.has_code or not is_safe):
            return f"{explain_refusal(source.text)}: give its command again"
    return ""


def _is_finished(folder: Path, run_id: str, about: Description) -> bool:
    """Return whether the stored result holds everything that an unfinished run asks for."""
    try:
        stored = read_result(folder / "result.json")
    except ResultError:
        return False
    has_points = not about.save_adversarials or (folder / ADVERSARIALS).exists()
    return stored.run_id == run_id and stored.n >= about.n and has_points
