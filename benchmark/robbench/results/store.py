"""Store runs on disk: the result, its identity, and the shards of an unfinished run. Imports no torch.

```
results/<dataset>/<model>/<suite>/result.json        the summary (`ResultFile`)
results/<dataset>/<model>/<suite>/outcomes.parquet   one row per sample and attack (`records.COLUMNS`)
results/<dataset>/<model>/<suite>/timings.parquet    wall time of each row
results/<dataset>/<model>/<suite>/adversarials.safetensors   the adversarial examples (--save-adversarials)
results/<dataset>/<model>/<suite>/.partial/<run_id>/ an unfinished run: run.json and shards
```

A shard is `<name>.parquet`. If the run keeps adversarial examples, those of the shard are in `<name>.safetensors`. That
file is written first, so it exists whenever the rows exist. `run.json` describes the run (`run_files.Description`).

A run with overrides has the folder `<suite>@<first 8 digits of its run_id>`, so it never shares one with the standard
run. A run that a folder of its model holds already stays there (`locate_run`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from robbench.core.errors import ResultError
from robbench.core.files import check_path_component, digest, set_aside, write_atomically
from robbench.core.types import Status
from robbench.results.adversarials import FILE, Points, list_entries, merge, pack, read
from robbench.results.records import (
    COLUMNS,
    TIMING_COLUMNS,
    TIMINGS,
    make_empty_rows,
    pack_rows,
    read_rows,
    read_run_id,
)
from robbench.results.recovery import Note, read_sound_records, read_sound_shards, set_aside_unsound_points, shard_name
from robbench.results.schema import ResultFile, dump_result, read_result

__all__ = [
    "COLUMNS",
    "DESCRIPTION",
    "RunStore",
    "describe_other_run",
    "drop_repeats",
    "list_differences",
    "load_results",
    "locate_result",
    "locate_run",
    "make_empty_rows",
    "read_rows",
]

DESCRIPTION = "run.json"


class RunStore:
    """One run on disk: `results/<dataset>/<model>/<suite>` and its shards."""

    def __init__(
        self, root: Path, dataset: str, model: str, suite: str, identity: dict[str, Any], standard: bool
    ) -> None:
        self.identity = identity
        self.run_id = digest(identity)
        try:
            names = [
                check_path_component(name, what)
                for name, what in ((dataset, "dataset"), (model, "name"), (suite, "suite"))
            ]
        except ValueError as error:
            raise ResultError(f"{error}: it is the name of a folder in the results.") from None
        self.folder = locate_run(root / names[0] / names[1], names[2], self.run_id, standard)
        if not self.folder.resolve().is_relative_to(root.resolve()):
            raise ResultError(
                f"{self.folder} leads out of the results tree, to {self.folder.resolve()}; remove the link."
            )
        self.partial = self.folder / ".partial" / self.run_id

    @property
    def result_path(self) -> Path:
        """Path of the summary."""
        return self.folder / "result.json"

    @property
    def outcomes_path(self) -> Path:
        """Path of the per-sample records."""
        return self.folder / "outcomes.parquet"

    @property
    def adversarials_path(self) -> Path:
        """Path of the adversarial examples."""
        return self.folder / FILE

    @property
    def keeps_adversarials(self) -> bool:
        """Whether this run has stored adversarial examples."""
        return bool(self._adversarial_files())

    @property
    def _attacks(self) -> list[str]:
        return [a["name"] for a in self.identity["attacks"]]

    def _adversarial_files(self) -> list[Path]:
        """List the files with adversarial examples, in the order in which `open` reads the rows."""
        shards = sorted(p for p in self.partial.glob("*.safetensors") if p.with_suffix(".parquet").exists())
        # Without a result.json, adversarials.safetensors may belong to another run that was killed before its end.
        merged = self.adversarials_path.exists() and self.result_path.exists()
        return [*shards, *([self.adversarials_path] if merged else [])]

    def open(self, overwrite: bool = False, note: Note = lambda text: None) -> pd.DataFrame:
        """Return all rows that this run has already computed, finished or not. A new run has an empty frame.

        Files that are damaged, of another run or of an older format are renamed to `*.damaged`. `note` is called with a
        text for each of them.

        Raises:
            ResultError: the folder holds a different run. The message names the differing fields. With `overwrite` the
                different run is removed instead.
        """
        stored = self._read_stored(note)
        if stored is not None and stored.run_id != self.run_id:
            if not overwrite:
                raise ResultError(describe_other_run(self.folder, stored.identity, self.identity))
            shutil.rmtree(self.folder)
            stored = None
        for text in self._describe_other_runs():
            note(text)
        merged = None
        if stored is not None or read_run_id(self.outcomes_path) == self.run_id:  # the run was killed before its end
            merged = read_sound_records(self.folder, self.run_id, self._attacks, stored is not None, note)
        if stored is not None and merged is None:
            set_aside(self.result_path, self.folder)  # the records of this summary are gone
        shards = read_sound_shards(self.partial, self.run_id, self._attacks, note)
        for path in self._adversarial_files():
            set_aside_unsound_points(path, self.run_id, self.folder, note)
        # A break may be stored twice: first without its adversarial example, then computed again with it. The row with
        # the point must win, so shards with points come first.
        first = [rows for path, rows in shards.items() if path.with_suffix(".safetensors").exists()]
        last = [rows for path, rows in shards.items() if not path.with_suffix(".safetensors").exists()]
        frames = [*first, *([] if merged is None else [merged]), *last]
        if not frames:
            return make_empty_rows()
        # If the run was killed between writing the result and removing its shards, equal rows are stored twice.
        return pd.concat(frames, ignore_index=True).drop_duplicates(["sample", "attack"], ignore_index=True)

    def _read_stored(self, note: Note) -> ResultFile | None:
        """Read result.json if it exists. A damaged one is set aside."""
        if not self.result_path.exists():
            return None
        try:
            return read_result(self.result_path)
        except ResultError as error:
            name = set_aside(self.result_path, self.folder).name
            note(f"{error} Set aside as {name}; the file is made again.")
            return None

    def _describe_other_runs(self) -> Iterator[str]:
        """Describe the other unfinished runs in this folder and their differences. They are not changed."""
        for path in sorted(self.partial.parent.glob(f"*/{DESCRIPTION}")):
            with contextlib.suppress(
                OSError, ValueError, KeyError, TypeError
            ):  # `robbench runs` reports a damaged file
                other = json.loads(path.read_text(encoding="utf-8"))["identity"]
                if path.parent != self.partial and digest(other) != self.run_id:
                    yield (
                        f"{self.folder} holds a different unfinished run, whose records are not used. What "
                        "differs:\n" + "\n".join(_list_lines(other, self.identity))
                    )

    def begin(self, description: dict[str, Any]) -> None:
        """Write run.json, before anything is computed."""
        text = json.dumps({**description, "identity": self.identity}, indent=2, ensure_ascii=False)
        write_atomically(self.partial / DESCRIPTION, f"{text}\n".encode())

    def find_unstored_breaks(self, rows: pd.DataFrame) -> pd.Series[bool]:
        """Return a mask of the rows that are breaks without a stored adversarial example."""
        stored = pd.concat([rows.loc[[], ["sample", "attack"]], *map(list_entries, self._adversarial_files())])
        keys = pd.MultiIndex.from_frame(rows[["sample", "attack"]])
        return (rows["status"] == Status.BROKEN) & ~keys.isin(pd.MultiIndex.from_frame(stored))

    def commit(self, rows: pd.DataFrame, points: Sequence[Points] = ()) -> Path:
        """Write the rows and points as a shard. They are not computed again after this."""
        data = pack_rows(rows, self.run_id, list(COLUMNS))
        path = self.partial / f"{shard_name(data)}.parquet"
        if points:
            write_atomically(path.with_suffix(".safetensors"), self._pack(points))
        write_atomically(path, data)
        return path

    def finish(self, rows: pd.DataFrame, result: ResultFile, leftover: pd.DataFrame, keep: bool = False) -> None:
        """Write the merged records and the summary, and remove the shards. Rows of incomplete samples stay in a shard.

        Args:
            rows: the records of complete samples.
            result: the summary of `rows`.
            leftover: the records of incomplete samples.
            keep: whether to store the adversarial examples.
        """
        points = [p for path in self._adversarial_files() for p in read(path).points] if keep else []
        if keep:
            broken = rows[rows["status"] == Status.BROKEN]
            write_atomically(self.adversarials_path, self._pack(merge(points, broken)))
        else:
            self.adversarials_path.unlink(missing_ok=True)  # left by another run that was killed before its end
        write_atomically(self.folder / TIMINGS, pack_rows(rows, self.run_id, TIMING_COLUMNS))
        write_atomically(self.outcomes_path, pack_rows(rows, self.run_id))
        write_atomically(self.result_path, dump_result(result).encode())
        if len(leftover):
            kept = self.commit(leftover, merge(points, leftover))
            for path in self.partial.iterdir():
                if path.stem != kept.stem and path.name != DESCRIPTION:
                    path.unlink()
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # another unfinished run may still have shards there
            self.partial.parent.rmdir()

    def _pack(self, points: Sequence[Points]) -> bytes:
        return pack(points, self.run_id, self._attacks)

    def require_identity(self, identity: dict[str, Any], what: str) -> None:
        """Check that an identity is the identity of this run.

        Raises:
            ResultError: it is not. The message names every differing field.
        """
        if digest(identity) != self.run_id:
            lines = "\n".join(_list_lines(identity, self.identity))
            raise ResultError(
                f"{what} cannot be computed with the present model, data and code. What differs:\n{lines}\n"
                "Nothing was computed."
            )


def describe_other_run(folder: Path, stored: dict[str, Any], here: dict[str, Any]) -> str:
    """Return the message for a folder that holds a different run: the differences, and what to do."""
    return (
        f"{folder} holds the result of a different run. What differs:\n"
        + "\n".join(_list_lines(stored, here))
        + "\nNothing was computed or overwritten. Use --overwrite to replace it, or --results DIR for another tree."
    )


def _list_lines(stored: dict[str, Any], here: dict[str, Any]) -> list[str]:
    return [
        f"  {field}: stored {_shorten(a)}, this run {_shorten(b)}" for field, a, b in list_differences("", stored, here)
    ]


def list_differences(field: str, given: Any, expected: Any) -> Iterator[tuple[str, Any, Any]]:
    """Compare two JSON values. Yield the path of every field that differs, and both of its values."""
    if isinstance(given, dict) and isinstance(expected, dict):
        for key in dict.fromkeys([*given, *expected]):
            yield from list_differences(f"{field}.{key}".lstrip("."), given.get(key), expected.get(key))
    elif isinstance(given, list) and isinstance(expected, list) and len(given) == len(expected):
        for i, pair in enumerate(zip(given, expected, strict=True)):
            yield from list_differences(f"{field}[{i}]", *pair)
    elif given != expected:
        yield field, given, expected


def _shorten(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


def locate_run(model: Path, suite: str, run_id: str, standard: bool) -> Path:
    """Return the folder that holds a run, or the folder where it belongs if no folder holds it.

    Older versions stored a run twice if its overrides were the suite's own values. The folder with more images counts.
    If both have equally many, the folder `<suite>` counts.

    Args:
        model: the folder of the model.
        suite: name of the suite.
        run_id: identity of the run.
        standard: whether the run has no overrides.
    """
    folders = [model / suite, model / f"{suite}@{run_id[:8]}"]
    held = [(n, folder) for folder in folders if (n := _count_images(folder, run_id)) is not None]
    if held:
        return max(held, key=lambda pair: pair[0])[1]
    return folders[0] if standard else folders[1]


def _count_images(folder: Path, run_id: str) -> int | None:
    """Count the images of a run's result in a folder: 0 if it is unfinished there, None if the folder lacks the run."""
    with contextlib.suppress(ResultError):  # there is no result.json, or it is damaged
        stored = read_result(folder / "result.json")
        if stored.run_id == run_id:
            return stored.n
    is_begun = (folder / ".partial" / run_id).is_dir() or read_run_id(folder / "outcomes.parquet") == run_id
    return 0 if is_begun else None


def locate_result(root: Path, result: ResultFile) -> Path:
    """Return the folder of a result in a results tree."""
    return locate_run(root / result.dataset / result.model, result.suite, result.run_id, not result.overrides)


def load_results(root: Path) -> list[ResultFile]:
    """Read the results of a results tree, ordered by path, without repeats."""
    return drop_repeats(read_result(path) for path in list_result_paths(root))


def drop_repeats(results: Iterable[ResultFile]) -> list[ResultFile]:
    """Keep one result of each run of a model: the one on the most images; of equal ones, the first."""
    kept: dict[tuple[str, str, str], ResultFile] = {}
    for result in results:
        key = (result.dataset, result.model, result.run_id)
        if key not in kept or kept[key].n < result.n:
            kept[key] = result
    return list(kept.values())


def list_result_paths(root: Path) -> Iterable[Path]:
    """List all result.json files of a results tree, ordered by path."""
    return sorted(root.glob("*/*/*/result.json"))
