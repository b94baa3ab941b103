"""The files of the gradient-masking checks: measurements, checks and verdict. Imports no torch.

```
results/<dataset>/<model>/sanity/sanity.json        `SanityFile`
results/<dataset>/<model>/sanity/landscape.parquet  the losses around the first images
results/<dataset>/<model>/sanity/sheet.png          one page to look at
```

The folder is that of the suite `sanity`. The verdict also depends on its result.json and outcomes.parquet.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from robbench.core.errors import ResultError
from robbench.core.files import digest_file
from robbench.masking.measurements import Measurements
from robbench.results.schema import Accuracy, Component, Count, Name, StrictModel, ThreatResult, read_validated

__all__ = [
    "FILE",
    "LANDSCAPE",
    "MOST_LANDSCAPE_BYTES",
    "PROBE_VERSION",
    "SHEET",
    "Advice",
    "CheckResult",
    "CheckStatus",
    "FollowUpResult",
    "SanityFile",
    "VerdictName",
    "digest_landscape",
    "dump_sanity",
    "extract_subject",
    "read_sanity",
    "sanity_folder",
]

FILE = "sanity.json"
LANDSCAPE = "landscape.parquet"
MOST_LANDSCAPE_BYTES = 2**28
"""Size limit of a landscape.parquet."""
SHEET = "sheet.png"
PROBE_VERSION = 3  # increased whenever a measurement changes

VerdictName = Literal["undecided", "trustworthy", "suspicious", "masked", "randomized"]
CheckStatus = Literal["pass", "warn", "fail", "not applicable"]


class CheckResult(StrictModel):
    """The result of one check. It follows from measurements and thresholds alone."""

    name: Name
    title: str
    value: float | None
    """None if the check does not apply."""
    threshold: str
    """The values that pass, in words."""
    status: CheckStatus
    reason: str
    """One sentence."""
    source: str
    decides: str = ""
    """The verdict that this status gives; empty if it gives none."""


class Advice(StrictModel):
    """The suite to run next."""

    suite: str
    """Name of the suite; empty if no further suite is needed."""
    reason: str
    gain: float
    """Robust accuracy under the usual PGD minus that under all attacks of this run, in points."""


class FollowUpResult(StrictModel):
    """The result of the advised suite."""

    suite: str
    run_id: str
    robust_accuracy: Accuracy
    """The lower one of the advised suite's accuracy and that under all attacks of the sanity run."""


class SanityFile(StrictModel):
    """The content of sanity.json."""

    schema_version: Literal[1]
    identity: dict[str, Any]
    """What the measurements depend on: the run_id of the suite's result, the number of images and `PROBE_VERSION`."""
    run_id: str
    """SHA-256 of `identity`."""
    folder: Component
    """Name of the folder of the results tree, below data set and model."""
    measured: dict[str, Any]
    """Model, weights, data, dtype and threat of the suite's result. The verdict holds for these only."""
    model: Component
    dataset: Component
    threat: ThreatResult
    n: Count
    seed: int
    verdict: VerdictName
    decided_by: list[Name] = Field(fail_fast=True)
    """Names of the checks that gave the verdict."""
    overestimation: float
    """Robust accuracy under the usual PGD minus that under all attacks of this run, in points."""
    advice: Advice
    acted: FollowUpResult | None
    checks: list[CheckResult] = Field(fail_fast=True)
    measurements: Measurements
    seconds: float
    hardware: str
    versions: dict[str, str]
    date: str
    landscape: str = ""
    """SHA-256 of landscape.parquet; empty in files of older versions."""

    @property
    def is_always_sealed(self) -> bool:
        """Versions that name the digest, or measure as the third one does, seal."""
        return bool(self.landscape) or self.identity.get("probes") not in (1, 2)


def dump_sanity(file: SanityFile) -> str:
    """Return the JSON text that `--json` prints."""
    return json.dumps(file.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def read_sanity(path: Path) -> SanityFile:
    """Read and validate a sanity.json.

    Raises:
        ResultError: the file cannot be read, does not have this schema, or was changed.
    """
    return read_validated(path, SanityFile, 2**26, advice="Remove it, and write it again with `robbench sanity`.")


def digest_landscape(folder: Path) -> str:
    """Return the SHA-256 of a folder's landscape.parquet; empty if there is none.

    Raises:
        ResultError: it cannot be read.
    """
    path = folder / LANDSCAPE
    try:
        return digest_file(path, MOST_LANDSCAPE_BYTES)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror or error}.") from None


def sanity_folder(root: Path, file: SanityFile) -> Path:
    """Return the folder of a results tree that holds a sanity.json."""
    return root / file.dataset / file.model / file.folder


def extract_subject(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a result's identity that a verdict depends on: model, weights, data, dtype, threat, levels."""
    subject = {key: identity.get(key) for key in ("model", "weights", "data", "dtype", "threat")}
    return subject | ({"levels": identity["levels"]} if "levels" in identity else {})
