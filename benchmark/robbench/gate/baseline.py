"""A baseline on disk: what runs found, image by image, in one small text file to commit. Imports no torch.

```
{
 "schema_version": 1,
 "runs": [
  {
   "model": "at", "dataset": "digits", "given": {"model": "digits/at", ...}, "suite": "quick", "n": 899, ...
   "attacks": ["FGSM-xent", ...],
   "identity": {...},                     what was measured, as in result.json
   "code": {"engine/lanes.py": "3f0c...", ...}  digests of the modules that verdicts come from
   "samples": "1021 934 ...",             official indices, in the order of the run
   "verdicts": {"FGSM-xent": "rrbm...", ...}   a letter per image: m, b, r or s
  }
 ]
}
```
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import ValidationError, model_validator

from robbench.core.errors import ResultError
from robbench.core.files import write_atomically
from robbench.core.types import Status
from robbench.models.spec import ModelSpec
from robbench.results.schema import Accuracy, ResultFile, StrictModel

__all__ = ["STATUS", "Baseline", "Given", "Run", "read_baseline", "record", "write_baseline"]

_LETTERS = {Status.MISCLASSIFIED: "m", Status.BROKEN: "b", Status.ROBUST: "r", Status.SKIPPED: "s"}
STATUS = {letter: status for status, letter in _LETTERS.items()}
"""What a letter stands for."""


class Given(StrictModel):
    """How the model was named, so that it can be measured again with the same words."""

    model: str
    """A card's name or a source, as `robbench eval --model` takes it."""
    dataset: str | None = None
    architecture: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    @classmethod
    def of(cls, spec: ModelSpec) -> Self:
        """Keep what a file can hold of a spec: of a module its name, and of images nothing."""
        if isinstance(spec.model, str):
            mean, std = (None if v is None else list(v) for v in (spec.mean, spec.std))
            return cls(model=spec.model, dataset=spec.dataset, architecture=spec.architecture, mean=mean, std=std)
        return cls(model=spec.name or type(spec.model).__name__, dataset=spec.dataset)

    def spec(self) -> ModelSpec:
        """Return the spec of the model with this name.

        Raises:
            RobbenchError: the fields do not go together.
        """
        return ModelSpec(**self.model_dump())


class Run(StrictModel):
    """One model under one suite."""

    model: str
    dataset: str
    given: Given
    suite: str
    """A suite's name, or the path of a suite file as it was given."""
    n: int
    seed: int
    sample_seed: int | None
    """The images are the first n of this random order; None: of the official order."""
    selection: str
    clean_accuracy: Accuracy
    robust_accuracy: Accuracy
    run_id: str
    identity: dict[str, Any]
    versions: dict[str, str]
    hardware: str
    date: str
    code: dict[str, str]
    """File of the package -> first 16 hexadecimal digits of its SHA-256; empty where a stored result was read."""
    attacks: list[str]
    """In the order of the suite."""
    samples: str
    """Official indices of the images, in the order of the run, with spaces between."""
    verdicts: dict[str, str]
    """Attack -> a letter per image: m misclassified, b broken, r robust, s skipped (broken by an earlier attack)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        ids = self.samples.split()
        if not all(s.isdecimal() for s in ids) or len(set(ids)) != self.n:
            raise ValueError(f"samples holds {len(set(ids))} different indices; expected n = {self.n}")
        if list(self.verdicts) != self.attacks:
            raise ValueError(f"verdicts of {list(self.verdicts)} given; expected one line for each of {self.attacks}")
        for name, letters in self.verdicts.items():
            if len(letters) != self.n or set(letters) - set(STATUS):
                raise ValueError(f"verdicts of {name}: expected {self.n} letters out of {''.join(STATUS)}")
        return self

    @property
    def name(self) -> str:
        """The model as people call it: `digits/at`."""
        return f"{self.dataset}/{self.model}"

    @property
    def threat(self) -> dict[str, str]:
        """Norm and exact radius."""
        return {key: self.identity["threat"][key] for key in ("norm", "eps")}

    def index(self) -> NDArray[np.int64]:
        """Return the official indices of the images, [n]."""
        return np.array(self.samples.split(), dtype=np.int64)

    def letters(self) -> dict[str, NDArray[np.str_]]:
        """Return the verdicts: attack -> a letter per image, [n] (`STATUS` says what it stands for)."""
        return {name: np.array(list(letters)) for name, letters in self.verdicts.items()}


class Baseline(StrictModel):
    """The file: one run per model."""

    schema_version: Literal[1]
    runs: list[Run]

    @model_validator(mode="after")
    def _unique(self) -> Self:
        names = [r.name for r in self.runs]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"runs of {names} given; expected at least one, and each model once")
        return self


def record(
    result: ResultFile, rows: pd.DataFrame, given: Given, *, suite: str, sample_seed: int | None, code: dict[str, str]
) -> Run:
    """Take what a baseline keeps of a result.

    Args:
        result: the summary.
        rows: the records of its images, and of no others, in their order (`store.COLUMNS`).
        given: how the model was named.
        suite: how the suite was named.
        sample_seed: of the run.
        code: `version.digest_verdict_code()`, or nothing where this code did not make the result.

    Raises:
        ResultError: an image lacks a record of an attack.
    """
    attacks = [a.name for a in result.attacks]
    order = rows["sample"].drop_duplicates()
    wide = rows.pivot(index="sample", columns="attack", values="status").reindex(index=order, columns=attacks)
    if wide.isna().any(axis=None) or len(wide) != result.n:
        raise ResultError(
            f"The records of {result.dataset}/{result.model} are not complete: {len(wide)} images with records under "
            f"{', '.join(attacks)}; result.json counts {result.n}."
        )
    return Run(
        model=result.model,
        dataset=result.dataset,
        given=given,
        suite=suite,
        n=result.n,
        seed=result.seed,
        sample_seed=sample_seed,
        selection=result.selection,
        clean_accuracy=result.clean_accuracy,
        robust_accuracy=result.robust_accuracy,
        run_id=result.run_id,
        identity=result.identity,
        versions=result.versions,
        hardware=result.hardware,
        date=result.date,
        code=code,
        attacks=attacks,
        samples=" ".join(map(str, order)),
        verdicts={name: "".join(_LETTERS[Status(s)] for s in wide[name]) for name in attacks},
    )


def write_baseline(path: Path, runs: Sequence[Run]) -> None:
    """Write a baseline; the same runs give the same bytes."""
    baseline = Baseline(schema_version=1, runs=list(runs))
    text = json.dumps(baseline.model_dump(mode="json"), indent=1, ensure_ascii=False)
    write_atomically(path, f"{text}\n".encode())


def read_baseline(path: Path) -> Baseline:
    """Read and validate a baseline.

    Raises:
        ResultError: no such file, or not a baseline of this schema.
    """
    try:
        return Baseline.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(
            f"No baseline at {path} ({error.strerror}). Write one: robbench baseline --model NAME --out {path}"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ResultError(f"{path} is no baseline: {where}: {first['msg']}") from None
