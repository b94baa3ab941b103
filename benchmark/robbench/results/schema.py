"""result.json: its schema, and how it is read and printed. Imports no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from robbench.core.errors import ResultError
from robbench.core.files import check_name, check_path_component, check_size, digest, parse_json, read_json
from robbench.core.numbers import parse_eps
from robbench.core.types import Norm

__all__ = [
    "DESCRIPTION_VERSION",
    "MOST_RESULT_BYTES",
    "SCHEMA_VERSION",
    "Accuracy",
    "Answers",
    "AttackResult",
    "Component",
    "Count",
    "Name",
    "ResultFile",
    "ThreatResult",
    "dump_result",
    "dump_sealed",
    "format_first_error",
    "is_intact",
    "read_result",
    "read_validated",
    "replace_characters",
    "seal",
]

SCHEMA_VERSION = 2
DESCRIPTION_VERSION = 1  # of run.json (`run_files.Description`)
MOST_RESULT_BYTES = 2**26
"""Size limit of a result.json."""
_SEAL, _CODE = "sha256", "code"

Name = Annotated[str, AfterValidator(check_name)]
"""A name that tables and figures show."""
Component = Annotated[str, AfterValidator(lambda name: check_path_component(name, "name"))]
"""A name that is part of a path, which must stay in the results tree."""
Count = Annotated[int, Field(ge=1)]
"""A number of images or classes."""


class StrictModel(BaseModel):
    """A part of a stored file: a field that is not known is refused, and none is changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def is_always_sealed(self) -> bool:
        """Whether every version of robbench that writes such content seals it (`seal`)."""
        return False


def _check_numbers(text: str) -> str:
    logits, bar, spread = text.partition("|")
    for number in logits.split():
        float(number)
    if bar and not 0 <= float(spread) < math.inf:
        raise ValueError(f"spread {spread.strip()} given; allowed: a finite number from 0 on")
    return text


_Model = TypeVar("_Model", bound=StrictModel)

Answers = list[Annotated[str, AfterValidator(_check_numbers)]]
"""The model's logits for a few fixed images, one line of numbers per image (`classifier.answers`).

The spread of random answers follows after a "|"."""


class _Strict(StrictModel):
    """A part of result.json, which holds finite numbers only."""

    model_config = ConfigDict(allow_inf_nan=False)


class Accuracy(_Strict):
    """A share of the n samples, in [0, 1], with the 95 % Wilson interval."""

    value: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)


class AttackResult(_Strict):
    """One attack: its robust accuracy and its cost."""

    name: Name
    robust_accuracy: Accuracy
    forwards: int
    """Forward passes, summed over samples."""
    backwards: int
    seconds: float
    """Wall time, summed over all calls that computed parts of the run."""
    config: dict[str, Any]
    """Kind, version and all hyperparameters."""
    refuted: int
    """Breaks that an attack of another library reports and the judge does not confirm."""
    zero_gradient_share: float
    """Share of gradient queries whose loss gradient was exactly zero. A share above 0 is a sign of masking."""


class ThreatResult(_Strict):
    """The threat model of the run."""

    norm: Norm
    eps: str
    """The exact radius, as a fraction or decimal."""

    @field_validator("eps")
    @classmethod
    def _check_eps(cls, eps: str) -> str:
        parse_eps(eps)
        return eps


class ResultFile(_Strict):
    """result.json. Its numbers follow from outcomes.parquet, and `run_id` follows from `identity`."""

    schema_version: Literal[2]
    run_id: str
    """SHA-256 of `identity`. Batch width, device and number of samples are not part of it."""
    model: Component
    dataset: Component
    threat: ThreatResult
    suite: Component
    n: Count
    """Number of samples."""
    seed: int
    clean_accuracy: Accuracy
    robust_accuracy: Accuracy
    """Worst case: share of samples that are classified correctly and that no attack breaks."""
    attacks: list[AttackResult] = Field(fail_fast=True)
    judge: str
    mode: str
    overrides: dict[str, Any]
    """The changes to the standard suite; empty for a standard run."""
    flags: dict[str, str]
    """Warnings about the numbers: name of the problem -> sentence."""
    identity: dict[str, Any]
    selection: str
    """The choice of samples: "first 256 of 899", or a seeded random subset."""
    forwards: int
    backwards: int
    seconds: float
    """Wall time of the attacks, summed over all calls that computed parts of the run, and over parallel workers."""
    lanes: int
    hardware: str
    versions: dict[str, str]
    date: str
    """UTC date of the last computation, ISO 8601."""
    paper: dict[str, Any] = {}
    """The figures that the model's card quotes from a paper."""
    wall_seconds: float | None = None
    """Wall time of the last computation, with loading the model, the checks of it, and all waiting."""
    environment: dict[str, Any] = {}
    """Software and hardware of the last computation: revision, platform, threads, packages (`machine.environment`)."""
    answers: Answers = []
    """What the model answered to a few fixed images; empty in results of older versions."""
    code: str = ""
    """`version.digest_judging_code()` of the code that judged. Empty in results of older versions, and read as empty
    unless the file is as it was written (`seal`)."""

    @property
    def is_always_sealed(self) -> bool:
        """Versions that measured the wall time seal."""
        return self.wall_seconds is not None

    @model_validator(mode="before")
    @classmethod
    def _replace_characters(cls, fields: Any) -> Any:
        """Replace what is no Unicode text, such as half of a character in a file's name: no run may be lost by it."""
        return replace_characters(fields) if isinstance(fields, dict) else fields

    @property
    def has_radius(self) -> bool:
        """Whether breaks were looked for within a radius, and not the nearest break at any distance."""
        return self.judge != "nearest"

    @field_validator("attacks")
    @classmethod
    def _check_unique(cls, attacks: list[AttackResult]) -> list[AttackResult]:
        if len({a.name for a in attacks}) < len(attacks):
            raise ValueError("two attacks of one name given; expected: unique names")
        return attacks


def read_result(path: Path, changed: bool = False) -> ResultFile:
    """Read and validate a result.json. Whether its numbers follow from the records is asked by `reader.read_vouched`.

    Args:
        path: the file.
        changed: whether a file is read that was changed after it was written.

    Raises:
        ResultError: the file is not a result of this schema, or it was changed.
    """
    return read_validated(path, ResultFile, MOST_RESULT_BYTES, changed=changed)


def dump_sealed(content: BaseModel) -> bytes:
    """Return the bytes of a JSON file for `read_validated`: the fields, and their digest as `sha256`."""
    return seal(content.model_dump(mode="json"))


def seal(fields: dict[str, Any]) -> bytes:
    """Return the bytes of a JSON file with these fields and their digest (`dump_sealed`)."""
    fields = replace_characters(fields)
    return (json.dumps({**fields, _SEAL: digest(fields)}, indent=2, ensure_ascii=False) + "\n").encode()


def replace_characters(value: Any) -> Any:
    """Replace what is no Unicode text in JSON values by question marks. No file could hold it."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, list):
        return [replace_characters(inner) for inner in value]
    if isinstance(value, dict):
        return {replace_characters(key): replace_characters(inner) for key, inner in value.items()}
    return value


def is_intact(fields: dict[str, Any]) -> bool:
    """Return whether the fields of a JSON file hold the digest of all others, as `seal` writes it."""
    return fields.get(_SEAL) == _digest({key: value for key, value in fields.items() if key != _SEAL})


def read_validated(path: Path, kind: type[_Model], most: int, *, changed: bool = False, advice: str = "") -> _Model:
    """Read a JSON file of at most `most` bytes. Files of older versions have no digest, and no `code` is read of them.

    Args:
        path: the file.
        kind: the schema.
        most: size limit in bytes.
        changed: whether a file is read whose digest is not that of its fields.
        advice: a sentence for the end of an error message, which says how to make the file again.

    Raises:
        ResultError: the file cannot be read, does not fit the schema, or was changed. The message names the first wrong
            field.
    """
    try:
        data = read_json(path, most)
        fields = _parse_json(data)
        check_size(fields)
        if not isinstance(fields, dict):
            raise ValueError("expected: a JSON object")
        intact = is_intact(fields)
        is_sealed = fields.pop(_SEAL, None) is not None
        if not intact:
            fields.pop(_CODE, None)  # decides which records are used again, so a mere statement does not count
        value = kind.model_validate_json(json.dumps(fields))
        if not (intact or changed) and (is_sealed or value.is_always_sealed):
            raise ValueError("not as it was written (SHA-256)")
    except OSError as error:
        problem = f"{path} cannot be read: {error.strerror or error}."
    except ValidationError as error:
        problem = f"{path}: {format_first_error(error)}."
    except ValueError as error:
        problem = f"{path}: {error}."
    else:
        return value
    raise ResultError(f"{problem} {advice}".rstrip())


def _parse_json(data: bytes) -> Any:
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"the file: Invalid JSON: {error}") from None


def format_first_error(error: ValidationError) -> str:
    """Format the first error of a file: the field, and what is wrong with its value."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"])) or "the file"
    return f"{where[:200]}: {first['msg']}"


def _digest(fields: dict[str, Any]) -> str:
    try:
        return digest(fields)
    except ValueError:  # NaN and infinity are in no file that has a digest
        return ""


def dump_result(result: ResultFile) -> str:
    """Format a result as the JSON text of `--json`."""
    return json.dumps(result.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
