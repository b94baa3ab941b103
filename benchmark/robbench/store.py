"""What is on disk: results, their schema, their identity, and the shards of a run in progress. Imports no torch.

```
results/<dataset>/<model>/<suite>/result.json        the summary (`ResultFile`)
results/<dataset>/<model>/<suite>/outcomes.parquet   one row per sample and attack (`COLUMNS`)
results/<dataset>/<model>/<suite>/adversarials.safetensors   the adversarial examples, if asked for
results/<dataset>/<model>/<suite>/.partial/<run_id>/ shards of a run that has not finished
```

A shard is `<name>.parquet`, with the adversarial examples of its breaks in `<name>.safetensors` if the run keeps them.
That file is written first, so where the rows are, it is.

A run with overrides lives in `<suite>@<first 8 of its run_id>` and so never meets the standard one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from robbench.adversarials import FILE, Points, held, merge, pack, read
from robbench.errors import ResultError
from robbench.files import digest, write_atomically
from robbench.types import Status

__all__ = [
    "COLUMNS",
    "SCHEMA_VERSION",
    "AttackResult",
    "ResultFile",
    "RunStore",
    "load_results",
    "read_result",
    "read_rows",
    "result_folder",
]

SCHEMA_VERSION = 2

COLUMNS = {
    "sample": "int64",  # official index
    "attack": "str",  # name of the stage
    "status": "str",  # misclassified, broken, robust, skipped
    "claimed": "bool",  # whether the attack itself says that it broke the image; ours say what the judge says
    "label": "int64",  # true class
    "prediction": "int64",  # class predicted at the break, or at the last queried point
    "trial": "int64",  # which restart broke it (or was the last)
    "step": "int64",  # after how many steps of that trial
    "forwards": "int64",
    "backwards": "int64",
    "distance": "float64",  # ‖x_adv − x‖ of the break, nan otherwise
    "zero_gradients": "int64",  # queries whose loss gradient was exactly zero
    "nonfinite": "int64",  # queries answered with NaN or infinity
    "seconds": "float64",  # share of the wall time
}
"""The columns of outcomes.parquet, in order."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Accuracy(_Strict):
    """A share of the n samples, in [0, 1], with its 95 % Wilson interval."""

    value: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)


class AttackResult(_Strict):
    """One attack: what it left standing and what it cost."""

    name: str
    robust_accuracy: Accuracy
    forwards: int
    """Forward passes, summed over samples."""
    backwards: int
    seconds: float
    """Wall time, of all runs that contributed."""
    config: dict[str, Any]
    """Kind, version and every hyperparameter."""
    refuted: int
    """Breaks that the attack (of another library) claims and the judge does not confirm."""
    zero_gradient_share: float
    """Share of gradient queries whose loss gradient was exactly zero: above 0 is a sign of masking."""


class ThreatResult(_Strict):
    """The threat model of the run."""

    norm: Literal["Linf", "L2", "L1"]
    eps: str
    """Exact, as a fraction or decimal."""


class ResultFile(_Strict):
    """result.json. Numbers in it are derived from outcomes.parquet; identity from `identity`."""

    schema_version: Literal[2]
    run_id: str
    """SHA-256 of `identity`: what was measured. Batch width, device and number of samples are not part of it."""
    model: str
    dataset: str
    threat: ThreatResult
    suite: str
    n: int
    """Number of samples."""
    seed: int
    clean_accuracy: Accuracy
    robust_accuracy: Accuracy
    """Worst case: correctly classified and broken by no attack."""
    attacks: list[AttackResult]
    judge: str
    mode: str
    overrides: dict[str, Any]
    """What differs from the standard suite; empty for a standard run."""
    flags: dict[str, str]
    """What a reader must know before trusting the numbers: name of the problem -> sentence."""
    identity: dict[str, Any]
    selection: str
    """Which samples: "first 256 of 899", or a seeded random subset."""
    forwards: int
    backwards: int
    seconds: float
    lanes: int
    hardware: str
    versions: dict[str, str]
    date: str
    """UTC date of the last computation, ISO 8601."""
    paper: dict[str, Any] = {}
    """The figures that the model's card quotes from a paper."""


class RunStore:
    """One run on disk: `results/<dataset>/<model>/<suite>` and its shards."""

    def __init__(
        self, root: Path, dataset: str, model: str, suite: str, identity: dict[str, Any], standard: bool
    ) -> None:
        self.identity = identity
        self.run_id = digest(identity)
        self.folder = root / dataset / model / (suite if standard else f"{suite}@{self.run_id[:8]}")
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

    def _adversarial_files(self) -> list[Path]:
        """List the files with adversarial examples, in the order in which `open` reads their rows."""
        shards = sorted(p for p in self.partial.glob("*.safetensors") if p.with_suffix(".parquet").exists())
        # Without a result beside it, it may be a different run's that was killed before its end.
        merged = self.adversarials_path.exists() and self.result_path.exists()
        return [*shards, *([self.adversarials_path] if merged else [])]

    def open(self, overwrite: bool = False) -> pd.DataFrame:
        """Return every row this run has already computed (finished or not); an empty frame for a new run.

        Raises:
            ResultError: the folder holds a different run; the differing fields are named. `overwrite` removes it.
        """
        frames = []
        if self.result_path.exists():
            stored = read_result(self.result_path)
            if stored.run_id != self.run_id:
                if not overwrite:
                    raise ResultError(self._mismatch(stored))
                shutil.rmtree(self.folder)
            else:
                frames.append(read_rows(self.outcomes_path))
        # A break that was stored without its adversarial example and computed again is there twice, and its row must be
        # the one that the point belongs to: shards with points come first.
        shards = sorted(self.partial.glob("*.parquet"))
        first = [s for s in shards if s.with_suffix(".safetensors").exists()]
        frames = [*map(read_rows, first), *frames, *(read_rows(s) for s in shards if s not in first)]
        if not frames:
            return empty_rows()
        # A kill between writing the result and removing its shards leaves rows twice; they are equal.
        return pd.concat(frames, ignore_index=True).drop_duplicates(["sample", "attack"], ignore_index=True)

    def without_adversarials(self, rows: pd.DataFrame) -> pd.Series[bool]:
        """Tell which of these rows are breaks whose adversarial example is not stored."""
        stored = pd.concat([rows.loc[[], ["sample", "attack"]], *map(held, self._adversarial_files())])
        keys = pd.MultiIndex.from_frame(rows[["sample", "attack"]])
        return (rows["status"] == Status.BROKEN) & ~keys.isin(pd.MultiIndex.from_frame(stored))

    def commit(self, rows: pd.DataFrame, points: Sequence[Points] = ()) -> None:
        """Write a shard: from now on these rows are never computed again."""
        name = digest([rows["attack"].tolist(), rows["sample"].tolist(), bool(points)])[:16]
        if points:
            write_atomically(self.partial / f"{name}.safetensors", self._pack(points))
        write_atomically(self.partial / f"{name}.parquet", rows.to_parquet(index=False))

    def finish(self, rows: pd.DataFrame, result: ResultFile, leftover: pd.DataFrame, keep: bool = False) -> None:
        """Write the merged records and the summary, and drop the shards but for rows of incomplete samples.

        Args:
            rows: the records of complete samples.
            result: their summary.
            leftover: the other records.
            keep: whether the adversarial examples are stored too.
        """
        points = [p for path in self._adversarial_files() for p in read(path).points] if keep else []
        if keep:
            broken = rows[rows["status"] == Status.BROKEN]
            write_atomically(self.adversarials_path, self._pack(merge(points, broken)))
        else:
            self.adversarials_path.unlink(missing_ok=True)  # a different run's, killed before its end
        write_atomically(self.outcomes_path, rows.to_parquet(index=False))
        write_atomically(self.result_path, dump_result(result).encode())
        shutil.rmtree(self.partial, ignore_errors=True)
        if len(leftover):
            self.commit(leftover, merge(points, leftover))
        with contextlib.suppress(OSError):  # other unfinished work may still have shards there
            self.partial.parent.rmdir()

    def _pack(self, points: Sequence[Points]) -> bytes:
        return pack(points, self.run_id, [a["name"] for a in self.identity["attacks"]])

    def _mismatch(self, stored: ResultFile) -> str:
        lines = [
            f"  {key}: stored {_short(stored.identity.get(key))}, this run {_short(self.identity.get(key))}"
            for key in sorted({*stored.identity, *self.identity})
            if stored.identity.get(key) != self.identity.get(key)
        ]
        return (
            f"{self.folder} holds the result of a different run. What differs:\n" + "\n".join(lines) + "\n"
            "Nothing was computed or overwritten. Use --overwrite to replace it, or --results DIR for another tree."
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


def empty_rows() -> pd.DataFrame:
    """Make a frame with the columns of outcomes.parquet and no rows."""
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in COLUMNS.items()})


def read_rows(path: Path) -> pd.DataFrame:
    """Read the records of a run or of a shard.

    Raises:
        ResultError: not readable, or without the columns of `COLUMNS`.
    """
    try:
        rows = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} cannot be read ({error}). Remove it, and its samples are computed again.") from None
    if list(rows.columns) != list(COLUMNS):
        raise ResultError(f"{path} has the columns {list(rows.columns)}; expected {list(COLUMNS)}.")
    return rows


def read_result(path: Path) -> ResultFile:
    """Read and validate a result.json.

    Raises:
        ResultError: not a result of this schema.
    """
    try:
        return ResultFile.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ResultError(f"{path}: {where}: {first['msg']}") from None


def dump_result(result: ResultFile) -> str:
    """Print a result as the JSON that is stored and that `--json` shows."""
    return json.dumps(result.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def result_folder(root: Path, result: ResultFile) -> Path:
    """Name the folder of a results tree that holds a result."""
    suite = result.suite if not result.overrides else f"{result.suite}@{result.run_id[:8]}"
    return root / result.dataset / result.model / suite


def load_results(root: Path) -> list[ResultFile]:
    """Read every result below a results tree, ordered by path."""
    return [read_result(path) for path in result_paths(root)]


def result_paths(root: Path) -> Iterable[Path]:
    """List every result.json of a results tree, ordered."""
    return sorted(root.glob("*/*/*/result.json"))
