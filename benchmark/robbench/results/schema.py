"""result.json: its schema, and how it is read and printed. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import from_json

from robbench.core.errors import ResultError
from robbench.core.files import check_name, check_path_component, check_size, read_bounded
from robbench.core.numbers import parse_eps

__all__ = [
    "SCHEMA_VERSION",
    "Accuracy",
    "AttackResult",
    "Component",
    "Count",
    "Name",
    "ResultFile",
    "ThreatResult",
    "dump_result",
    "format_first_error",
    "read_result",
    "read_validated",
]

SCHEMA_VERSION = 2
_Model = TypeVar("_Model", bound=BaseModel)

Name = Annotated[str, AfterValidator(check_name)]
"""A name that tables and figures show."""
Component = Annotated[str, AfterValidator(lambda name: check_path_component(name, "name"))]
"""A name that is part of a path, which must stay in the results tree."""
Count = Annotated[int, Field(ge=1)]
"""A number of images or classes."""


class StrictModel(BaseModel):
    """A part of a stored file: a field that is not known is refused, and none is changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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

    norm: Literal["Linf", "L2", "L1"]
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
    lanes: int
    hardware: str
    versions: dict[str, str]
    date: str
    """UTC date of the last computation, ISO 8601."""
    paper: dict[str, Any] = {}
    """The figures that the model's card quotes from a paper."""
    environment: dict[str, Any] = {}
    """Software and hardware of the last computation: revision, platform, threads, packages (`machine.environment`)."""

    @field_validator("attacks")
    @classmethod
    def _check_unique(cls, attacks: list[AttackResult]) -> list[AttackResult]:
        if len({a.name for a in attacks}) < len(attacks):
            raise ValueError("two attacks of one name given; expected: unique names")
        return attacks


def read_result(path: Path) -> ResultFile:
    """Read and validate a result.json.

    Raises:
        ResultError: the file is not a result of this schema.
    """
    return read_validated(path, ResultFile, 2**26)


def read_validated(path: Path, kind: type[_Model], most: int, advice: str = "") -> _Model:
    """Read a JSON file of at most `most` bytes.

    Args:
        path: the file.
        kind: the schema.
        most: size limit in bytes.
        advice: a sentence for the end of an error message, which says how to make the file again.

    Raises:
        ResultError: the file cannot be read, or does not fit the schema. The message names the first wrong field.
    """
    try:
        data = read_bounded(path, most)
        check_size(_parse_json(data))
        value = kind.model_validate_json(data)
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
        return from_json(data)
    except ValueError as error:
        raise ValueError(f"the file: Invalid JSON: {error}") from None


def format_first_error(error: ValidationError) -> str:
    """Format the first error of a file: the field, and what is wrong with its value."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"])) or "the file"
    return f"{where[:200]}: {first['msg']}"


def dump_result(result: ResultFile) -> str:
    """Format a result as the JSON text of result.json and of `--json`."""
    return json.dumps(result.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
