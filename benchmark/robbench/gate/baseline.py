"""A baseline: the verdicts of attacks on models, image by image, in one small text file to commit. Imports no torch.

```
{
 "schema_version": 1,
 "runs": [
  {
   "model": "at", "dataset": "digits", "given": {"model": "digits/at", ...}, "suite": "quick", "n": 899, ...
   "attacks": ["FGSM-xent", ...],
   "identity": {...},                     what was measured, as in result.json
   "code": {"engine/judge.py": "3f0c...", ...}  digests of the modules that compute verdicts
   "samples": "1021 934 ...",             official indices of the images, in the order of the run
   "verdicts": {"FGSM-xent": "rrbm...", ...}   one letter per image: m, b, r or s
  }
 ]
}
```
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator

from robbench.core.errors import ResultError
from robbench.core.files import digest, write_atomically
from robbench.core.numbers import parse_threat
from robbench.core.types import Status
from robbench.core.words import format_goal
from robbench.models.spec import ModelSpec
from robbench.results.schema import (
    Accuracy,
    Component,
    Count,
    Name,
    ResultFile,
    StrictModel,
    format_first_error,
    read_validated,
)
from robbench.results.selection import find_excess_draws, find_selection_error
from robbench.results.summary import make_accuracy

__all__ = ["STATUS_OF_LETTER", "Baseline", "BaselineEntry", "Given", "build_entry", "read_baseline", "write_baseline"]

_MOST_BYTES = 2**28  # far above any baseline; 100 attacks on a million images take 108 MB
_LETTERS = {Status.MISCLASSIFIED: "m", Status.BROKEN: "b", Status.ROBUST: "r", Status.SKIPPED: "s"}
STATUS_OF_LETTER = {letter: status for status, letter in _LETTERS.items()}
"""Letter in a baseline -> status of an image under an attack."""


class Given(StrictModel):
    """The arguments with which the user gave the model. The gate loads the model again from them."""

    model: str
    """A card's name or a source, as `robbench eval --model` accepts it."""
    dataset: str | None = None
    architecture: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    data: str | None = None
    resize: int | None = None
    crop: int | None = None
    channels: int | None = None
    classes: str | dict[str, int] | None = None
    on_broken: str | None = None
    output: str | int | None = None
    binary: bool | None = None

    @classmethod
    def of(cls, spec: ModelSpec) -> Self:
        """Make the part of a spec that a file can hold. A module is stored by its name, images by their path."""
        held = spec.describe()
        if not isinstance(spec.model, str):
            held["model"] = spec.name or type(spec.model).__name__
        return cls(**{key: value for key, value in held.items() if key != "name"})

    def make_spec(self) -> ModelSpec:
        """Return the spec that loads the model.

        Raises:
            RobbenchError: the fields do not fit together.
        """
        return ModelSpec(**self.model_dump())


class _Part(StrictModel):
    """A part of an identity. Identities hold more than the gate reads."""

    model_config = ConfigDict(extra="ignore")


class _Suite(_Part):
    name: Name
    judge: str
    mode: str


class _Threat(_Part):
    norm: str
    eps: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        parse_threat(self.norm, self.eps)
        return self


class _Attack(_Part):
    name: Name


class _Identity(_Part):
    """The parts of an identity that the gate reads."""

    model: dict[str, Any]
    weights: str | None
    suite: _Suite
    threat: _Threat
    attacks: list[_Attack]


def _check_identity(identity: dict[str, Any]) -> dict[str, Any]:
    """Refuse an identity without the parts that the gate reads. All its other parts stay as they are."""
    try:
        _Identity.model_validate(identity)
    except ValidationError as error:
        raise ValueError(format_first_error(error)) from None
    return identity


class BaselineEntry(StrictModel):
    """The verdicts of one suite on one model, and everything needed to measure them again."""

    model: Component
    dataset: Component
    given: Given
    suite: str
    """A suite's name, or the path of a suite file as the user gave it."""
    n: Count
    seed: int
    sample_seed: Annotated[int, Field(ge=0)] | None
    """The images are the first n of the random order with this seed. None means the official order."""
    surrogate: str | None = None
    """The model that transfer attacks use, as the user named it. None means the suite's own."""
    selection: str
    clean_accuracy: Accuracy
    robust_accuracy: Accuracy
    run_id: str
    identity: Annotated[dict[str, Any], AfterValidator(_check_identity)]
    versions: dict[str, str]
    hardware: str
    date: str
    code: dict[str, str]
    """File of the package -> first 16 hexadecimal digits of its SHA-256. Empty for a stored result of other
    or unknown code."""
    attacks: list[Name] = Field(fail_fast=True)
    """Names of the attacks, in the order of the suite."""
    samples: str
    """Official indices of the images, in the order of the run, separated by spaces."""
    verdicts: dict[str, str]
    """Attack -> one letter per image: m misclassified, b broken, r robust, s skipped (broken by an earlier attack)."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        ids = self.samples.split()
        if not all(s.isdecimal() and len(s) < 19 for s in ids) or len({int(s) for s in ids}) != self.n:
            raise ValueError(f"samples holds {len(set(ids))} different indices; expected n = {self.n}")
        if list(self.verdicts) != self.attacks:
            raise ValueError(f"verdicts of {list(self.verdicts)} given; expected one line for each of {self.attacks}")
        for name, letters in self.verdicts.items():
            if len(letters) != self.n or set(letters) - set(STATUS_OF_LETTER):
                raise ValueError(f"verdicts of {name}: expected {self.n} letters out of {''.join(STATUS_OF_LETTER)}")
        return self

    @property
    def name(self) -> str:
        """The full name of the model, such as `digits/at`."""
        return f"{self.dataset}/{self.model}"

    @property
    def has_transfer(self) -> bool:
        """Whether an attack of the entry perturbs images with a surrogate."""
        return any(attack.get("kind") == "transfer" for attack in self.identity["attacks"])

    @property
    def threat(self) -> dict[str, str]:
        """The norm and the exact radius, such as {"norm": "Linf", "eps": "1/5"}."""
        return {key: self.identity["threat"][key] for key in ("norm", "eps")}

    @property
    def title(self) -> str:
        """Model, suite, threat and target, such as `digits/at · quick · Linf 0.2`."""
        goal = f"{parse_threat(**self.threat)}{format_goal(self.identity)}"
        return f"{self.name} · {self.identity['suite']['name']} · {goal}"

    def index(self) -> NDArray[np.int64]:
        """Return the official indices of the images, [n]."""
        return np.array(self.samples.split(), dtype=np.int64)

    def letters(self) -> dict[str, NDArray[np.str_]]:
        """Return the verdicts: attack -> one letter per image, [n] (see `STATUS_OF_LETTER`)."""
        return {name: np.array(list(letters)) for name, letters in self.verdicts.items()}

    def find_contradiction(self) -> str:
        """Explain which field does not follow from the verdicts and the identity; empty if all of them do."""
        try:
            is_own = digest(self.identity) == self.run_id
        except ValueError:  # NaN or infinity
            is_own = False
        if not is_own:
            return f"run_id is not the digest of the identity of {self.name}"
        if self.sample_seed != self.identity.get("sample_seed") or self.seed != self.identity.get("seed"):
            return f"seed or sample_seed of {self.name} is not that of its identity"
        error = find_selection_error(
            self.index(),
            selection=self.selection,
            sample_seed=self.sample_seed,
            dataset=self.dataset,
            data=self.identity.get("data"),
        )
        if error:
            return f"samples of {self.name}: {error}"
        if problem := self._find_verdict_error():
            return f"verdicts of {self.name}: {problem}"
        for field, lost in (("clean_accuracy", "m"), ("robust_accuracy", "mb")):
            left = sum(not set(letters) & set(lost) for letters in zip(*self.verdicts.values(), strict=True))
            if getattr(self, field) != make_accuracy(left, self.n):
                return f"{field} of {self.name} does not follow from its verdicts"
        return ""

    def _find_verdict_error(self) -> str:
        """Explain what verdicts no run writes, or why nothing could be compared with them; empty if all is well."""
        if self.attacks != [attack["name"] for attack in self.identity["attacks"]]:
            return "the attacks are not those of the identity"
        if not self.attacks:
            return "there is no attack, so nothing could be compared"
        # Rows of bytes, [attacks, n].
        letters = np.array([np.frombuffer(row.encode(), np.uint8) for row in self.verdicts.values()])
        missed, broken, skipped = (letters == ord(letter) for letter in "mbs")
        if (missed.any(axis=0) != missed.all(axis=0)).any():
            return "an image is misclassified (m) under one attack and not under another"
        if (skipped & ~np.logical_or.accumulate(broken, axis=0)).any():
            return "an image is skipped (s) that no earlier attack broke (b)"
        return "all images are misclassified (m), so nothing could be compared" if missed.all() else ""


class Baseline(StrictModel):
    """The content of a baseline file: one entry per model."""

    schema_version: Literal[1]
    runs: list[BaselineEntry] = Field(fail_fast=True)

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [r.name for r in self.runs]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"runs of {names} given; expected at least one, and each model once")
        return self


def build_entry(
    result: ResultFile, rows: pd.DataFrame, given: Given, *, suite: str, sample_seed: int | None, code: dict[str, str]
) -> BaselineEntry:
    """Build the entry of a baseline from a result and its records.

    Args:
        result: the content of result.json.
        rows: the records of exactly the images of the result, in the order of the run (`store.COLUMNS`).
        given: how the user named the model.
        suite: how the user named the suite.
        sample_seed: seed of the random order of the images; None for the official order.
        code: `version.digest_verdict_code()`; empty if another version of robbench may have made the result.

    Raises:
        ResultError: the record of an attack on an image is missing.
    """
    attacks = [a.name for a in result.attacks]
    if rows.duplicated(["sample", "attack"]).any():
        raise ResultError(
            f"The records of {result.dataset}/{result.model} hold an image twice under one attack. Evaluate the model "
            "again with --overwrite."
        )
    order = rows["sample"].drop_duplicates()
    wide = rows.pivot(index="sample", columns="attack", values="status").reindex(index=order, columns=attacks)
    if wide.isna().any(axis=None) or len(wide) != result.n:
        raise ResultError(
            f"The records of {result.dataset}/{result.model} are not complete: {len(wide)} images with records under "
            f"{', '.join(attacks)}; result.json counts {result.n}."
        )
    kept = {
        "model", "dataset", "n", "seed", "selection", "clean_accuracy", "robust_accuracy", "run_id", "identity",
        "versions", "hardware", "date",
    }  # fmt: skip
    try:
        return BaselineEntry(
            **{name: getattr(result, name) for name in kept},
            given=given,
            suite=suite,
            sample_seed=sample_seed,
            surrogate=result.overrides.get("surrogate"),
            code=code,
            attacks=attacks,
            samples=" ".join(map(str, order)),
            verdicts={name: "".join(_LETTERS[Status(s)] for s in wide[name]) for name in attacks},
        )
    except ValueError as error:  # of the schema, or of an unknown status
        problem = format_first_error(error) if isinstance(error, ValidationError) else str(error)
        raise ResultError(f"The result of {result.dataset}/{result.model} makes no baseline. {problem}.") from None


def write_baseline(path: Path, entries: Sequence[BaselineEntry]) -> None:
    """Write a baseline file. The same entries give the same bytes."""
    baseline = Baseline(schema_version=1, runs=list(entries))
    text = json.dumps(baseline.model_dump(mode="json"), indent=1, ensure_ascii=False)
    write_atomically(path, f"{text}\n".encode())


def read_baseline(path: Path) -> Baseline:
    """Read and validate a baseline.

    Raises:
        ResultError: the file cannot be read, does not have this schema, or contradicts itself.
    """
    advice = f"Expected: a baseline. Write one: robbench baseline --model NAME --out {path}"
    baseline = read_validated(path, Baseline, _MOST_BYTES, advice=advice)
    problem = find_excess_draws((entry.selection, entry.sample_seed) for entry in baseline.runs)
    if problem:
        raise ResultError(f"{path}: {problem}. {advice}")
    # Entries of one random order come together, so that it is drawn once.
    for entry in sorted(baseline.runs, key=lambda e: (e.sample_seed or 0, e.selection.partition(" of ")[2])):
        if problem := entry.find_contradiction():
            raise ResultError(f"{path}: {problem}. {advice}")
    return baseline
