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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from robbench.core import version
from robbench.core.errors import ResultError, RobbenchError
from robbench.core.files import (
    check_path_component,
    digest,
    refuse_links,
    remove_temporaries,
    set_aside,
    write_atomically,
)
from robbench.core.types import Status
from robbench.results.adversarials import FILE, Points, list_entries, merge, pack, read
from robbench.results.differences import describe_other_run, list_lines
from robbench.results.judging_code import DESCRIPTION, load_description, name_code, read_began, set_aside_unknown_code
from robbench.results.places import locate_run
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
from robbench.results.schema import ResultFile, dump_sealed, read_result, replace_characters, seal

__all__ = [
    "COLUMNS",
    "DESCRIPTION",
    "RunStore",
    "make_empty_rows",
    "read_rows",
]


class RunStore:
    """One run on disk: `results/<dataset>/<model>/<suite>` and its shards.

    Attributes:
        code: digest of the present judging code.
        outdated: the stored result whose records `open` left out, because other code judged them.
    """

    def __init__(
        self, root: Path, dataset: str, model: str, suite: str, identity: dict[str, Any], standard: bool
    ) -> None:
        if replace_characters(identity) != identity:
            raise ResultError(
                "A name in the description of this run, such as that of a class or of an attack, is not Unicode text, "
                "so no file can hold it. Rename it."
            )
        self.identity = identity
        self.run_id = digest(identity)
        self.code = version.digest_judging_code()
        self.outdated: ResultFile | None = None
        try:
            names = [
                check_path_component(name, what)
                for name, what in ((dataset, "dataset"), (model, "name"), (suite, "suite"))
            ]
        except ValueError as error:
            raise ResultError(f"{error}: it is the name of a folder in the results.") from None
        self.folder = locate_run(root / names[0] / names[1], names[2], self.run_id, standard)
        self.partial = self.folder / ".partial" / self.run_id
        refuse_links(root, self.partial)

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

    def open(
        self,
        overwrite: bool = False,
        note: Note = lambda text: None,
        suffices: Callable[[pd.DataFrame], bool] = lambda rows: True,
    ) -> pd.DataFrame:
        """Return all rows that this run has already computed, finished or not. A new run has an empty frame.

        Files that are damaged, of another run or of an older format are renamed to `*.damaged`, and so are unfinished
        runs of other or unknown judging code. `note` is called with a text for each of them. Rows of different judging
        code never come together: the rows of a finished result of other code are returned alone, or not at all.

        Args:
            overwrite: remove a different run from the folder.
            note: called with messages.
            suffices: called with the rows of a finished result of other judging code. Returns whether the caller
                computes no further rows; otherwise these rows are left out.

        Raises:
            ResultError: the folder holds a different run, and `overwrite` is not given. The message names the
                differing fields.
        """
        for place in (self.folder, self.partial):
            remove_temporaries(place)
        stored = self._read_stored(note)
        if stored is not None and not self._is_own(stored):
            if not overwrite:
                raise ResultError(describe_other_run(self.folder, stored.identity, self.identity))
            shutil.rmtree(self.folder)
            stored = None
        for text in self._describe_other_runs():
            note(text)
        set_aside_unknown_code(self.partial, self.run_id, self.code, stored is not None, note)
        merged = None
        # Without a result.json, the run was killed before it wrote one.
        if stored is not None or read_run_id(self.outcomes_path) == self.run_id:
            merged = read_sound_records(self.folder, self.run_id, self._attacks, stored is not None, note)
        if stored is not None and merged is None:
            set_aside(self.result_path, self.folder)  # the records of this summary are gone
            stored = None
        shards = read_sound_shards(self.partial, self.run_id, self._attacks, note)
        for path in self._adversarial_files():
            set_aside_unsound_points(path, self.run_id, self.folder, note)
        if stored is not None and merged is not None:
            self._remove_merged_shards(merged, shards, stored)
        if stored is not None and merged is not None and stored.code != self.code:
            # A run that was killed between its last writes leaves new records beside the old summary.
            if merged["sample"].nunique() == stored.n and suffices(merged):
                return merged
            note(
                f"{self.result_path}: {name_code(stored.code)} judged its {stored.n} images. They are computed again, "
                "because records of different judging code are not mixed. The stored result stays until then."
            )
            self.outdated, merged = stored, None
        # A break may be stored twice: first without its adversarial example, then computed again with it. The row with
        # the point must win, so shards with points come first.
        first = [rows for path, rows in shards.items() if path.with_suffix(".safetensors").exists()]
        last = [rows for path, rows in shards.items() if not path.with_suffix(".safetensors").exists()]
        frames = [*first, *([] if merged is None else [merged]), *last]
        if not frames:
            return make_empty_rows()
        # If the run was killed between writing its records and its summary, equal rows are stored twice.
        return pd.concat(frames, ignore_index=True).drop_duplicates(["sample", "attack"], ignore_index=True)

    def list_answers(self) -> dict[Path, list[str]]:
        """Return the answers of the model (`ResultFile.answers`) that the records of this run belong to.

        The keys are the paths of result.json and of run.json, as far as they hold records of this run.
        """
        found = {}
        with contextlib.suppress(OSError, ResultError):  # `open` reports a damaged file
            if (stored := read_result(self.result_path, changed=True)).run_id == self.run_id:
                found[self.result_path] = list(stored.answers)
        if any(self.partial.glob("*.parquet")):
            found[self.partial / DESCRIPTION] = read_began(self.partial)[0]
        return found

    def discard(self, path: Path) -> None:
        """Remove the result, or the unfinished run, that a key of `list_answers` stands for."""
        shutil.rmtree(self.folder if path == self.result_path else self.partial, ignore_errors=True)

    def _remove_merged_shards(self, merged: pd.DataFrame, shards: dict[Path, pd.DataFrame], stored: ResultFile) -> None:
        """Remove the shards whose rows and points are in the merged files: the run was killed before it removed them.

        Args:
            merged: the rows of outcomes.parquet.
            shards: the sound shards and their rows; the removed ones are taken out.
            stored: the summary of `merged`.
        """
        points = list_entries(self.adversarials_path) if self.adversarials_path.exists() else merged[:0]
        for path, rows in list(shards.items()):
            own = path.with_suffix(".safetensors")
            if _has_all(merged, rows) and (not own.exists() or _has_all(points, list_entries(own))):
                path.unlink()
                own.unlink(missing_ok=True)
                del shards[path]
        n = load_description(self.partial).get("n", 0)
        if not shards and isinstance(n, int) and n <= stored.n:
            self._remove_partial()

    def _remove_partial(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # another unfinished run may still have shards there
            self.partial.parent.rmdir()

    def _read_stored(self, note: Note) -> ResultFile | None:
        """Read result.json if it exists. A damaged one is set aside."""
        if not self.result_path.exists():
            return None
        try:
            return read_result(self.result_path, changed=True)
        except ResultError as error:
            name = set_aside(self.result_path, self.folder).name
            note(f"{error} Set aside as {name}; the file is made again.")
            return None

    def _is_own(self, stored: ResultFile) -> bool:
        """Return whether a result is of this run, though its run_id or its identity may have been changed."""
        with contextlib.suppress(ValueError):  # NaN in an identity
            return self.run_id in (stored.run_id, digest(stored.identity))
        return stored.run_id == self.run_id

    def _describe_other_runs(self) -> Iterator[str]:
        """Describe the other unfinished runs in this folder and their differences. They are not changed."""
        own = json.loads(json.dumps(self.identity))
        for path in sorted(self.partial.parent.glob(f"*/{DESCRIPTION}")):
            other = load_description(path.parent).get("identity")
            if path.parent != self.partial and isinstance(other, dict) and other != own:
                yield (
                    f"{self.folder} holds a different unfinished run, whose records are not used. What "
                    "differs:\n" + "\n".join(list_lines(other, self.identity))
                )

    def begin(self, description: dict[str, Any]) -> None:
        """Write run.json, before anything is computed."""
        write_atomically(self.partial / DESCRIPTION, seal({**description, "identity": self.identity}))

    def forget_refused(self, kind: object, error: object, trace: object) -> None:
        """Remove an unfinished run that an error refused before it had a record. The arguments are those of `__exit__`.

        The folder of this run must be locked.
        """
        if not isinstance(error, RobbenchError) or not self.partial.is_dir():
            return
        if {path.name for path in self.partial.iterdir()} <= {DESCRIPTION}:
            self._remove_partial()
            with contextlib.suppress(OSError):  # a folder holds something else
                for place in (self.folder, *self.folder.parents[:2]):
                    place.rmdir()

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
        if self.outdated is not None and self.outdated.n > result.n:  # it holds more than what replaces it
            for path in (self.outcomes_path, self.folder / TIMINGS, self.adversarials_path, self.result_path):
                if path.exists():
                    set_aside(path, self.folder)
        if keep:
            broken = rows[rows["status"] == Status.BROKEN]
            write_atomically(self.adversarials_path, self._pack(merge(points, broken)))
        else:
            self.adversarials_path.unlink(missing_ok=True)  # left by another run that was killed before its end
        write_atomically(self.folder / TIMINGS, pack_rows(rows, self.run_id, TIMING_COLUMNS))
        write_atomically(self.outcomes_path, pack_rows(rows, self.run_id))
        write_atomically(self.result_path, dump_sealed(result))
        if len(leftover):
            kept = self.commit(leftover, merge(points, leftover))
            for path in self.partial.iterdir():
                if path.stem != kept.stem and path.name != DESCRIPTION:
                    path.unlink()
            return
        self._remove_partial()

    def _pack(self, points: Sequence[Points]) -> bytes:
        return pack(points, self.run_id, self._attacks)

    def require_identity(self, identity: dict[str, Any], what: str) -> None:
        """Check that an identity is the identity of this run.

        Raises:
            ResultError: it is not. The message names every differing field.
        """
        if digest(identity) != self.run_id:
            lines = "\n".join(list_lines(identity, self.identity))
            raise ResultError(
                f"{what} cannot be computed with the present model, data and code. What differs:\n{lines}\n"
                "Nothing was computed."
            )


def _has_all(known: pd.DataFrame, rows: pd.DataFrame) -> bool:
    """Return whether every sample and attack of `rows` is in `known`."""
    keys, wanted = (pd.MultiIndex.from_frame(frame[["sample", "attack"]]) for frame in (known, rows))
    return bool(wanted.isin(keys).all())
