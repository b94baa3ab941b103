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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
    environment: dict[str, Any] = {}
    """What else the last computation ran on: code revision, platform, threads, packages (`hardware.environment`)."""

    @field_validator("model", "dataset", "suite")
    @classmethod
    def _in_the_tree(cls, name: str) -> str:
        return check_path_component(
            name, "name"
        )  # they make a path, and a file from elsewhere must not lead out of the tree


def read_result(path: Path) -> ResultFile:
    """Read and validate a result.json.

    Raises:
        ResultError: not a result of this schema.
    """
    return read_validated(path, ResultFile, 2**26)


def read_validated(path: Path, kind: type[_Model], most: int) -> _Model:
    """Read a JSON file of at most `most` bytes.

    Raises:
        ResultError: it cannot be read, or is not what it should be; the first field that is not is named.
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
    """Print a result as the JSON that is stored and that `--json` shows."""
    return json.dumps(result.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
