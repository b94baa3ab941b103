"""result.json: its schema, and how it is read and printed. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from robbench.core.errors import ResultError
from robbench.core.files import check_path_component, read_bounded

__all__ = [
    "SCHEMA_VERSION",
    "Accuracy",
    "AttackResult",
    "ResultFile",
    "ThreatResult",
    "dump_result",
    "read_result",
    "read_validated",
]

SCHEMA_VERSION = 2
_Model = TypeVar("_Model", bound=BaseModel)


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

    name: str
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


class ResultFile(_Strict):
    """result.json. Its numbers follow from outcomes.parquet, and `run_id` follows from `identity`."""

    schema_version: Literal[2]
    run_id: str
    """SHA-256 of `identity`. Batch width, device and number of samples are not part of it."""
    model: str
    dataset: str
    threat: ThreatResult
    suite: str
    n: int
    """Number of samples."""
    seed: int
    clean_accuracy: Accuracy
    robust_accuracy: Accuracy
    """Worst case: share of samples that are classified correctly and that no attack breaks."""
    attacks: list[AttackResult]
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

    @field_validator("model", "dataset", "suite")
    @classmethod
    def _check_component(cls, name: str) -> str:
        return check_path_component(name, "name")  # the names make a path, which must stay in the tree


def read_result(path: Path) -> ResultFile:
    """Read and validate a result.json.

    Raises:
        ResultError: the file is not a result of this schema.
    """
    return read_validated(path, ResultFile, 2**26)


def read_validated(path: Path, kind: type[_Model], most: int) -> _Model:
    """Read a JSON file of at most `most` bytes.

    Raises:
        ResultError: the file cannot be read, or does not fit the schema. The message names the first wrong field.
    """
    try:
        return kind.model_validate_json(read_bounded(path, most))
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ResultError(f"{path}: {where}: {first['msg']}.") from None


def dump_result(result: ResultFile) -> str:
    """Format a result as the JSON text of result.json and of `--json`."""
    return json.dumps(result.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
