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

from pydantic import ValidationError

from robbench.core.errors import ResultError
from robbench.masking.measurements import Measurements
from robbench.results.schema import Accuracy, ResultFile, StrictModel, ThreatResult

__all__ = [
    "FILE",
    "LANDSCAPE",
    "PROBE_VERSION",
    "SHEET",
    "UNCHECKED",
    "Advice",
    "CheckResult",
    "CheckStatus",
    "FollowUpResult",
    "SanityFile",
    "VerdictIndex",
    "VerdictName",
    "dump_sanity",
    "extract_subject",
    "read_sanity",
    "sanity_folder",
]

FILE = "sanity.json"
LANDSCAPE = "landscape.parquet"
SHEET = "sheet.png"
PROBE_VERSION = 3  # increased whenever a measurement changes
UNCHECKED = "unchecked"  # the verdict on a model without a sanity run on these weights and this threat

VerdictName = Literal["trustworthy", "suspicious", "masked", "randomized"]
CheckStatus = Literal["pass", "warn", "fail", "not applicable"]


class CheckResult(StrictModel):
    """The result of one check. It follows from measurements and thresholds alone."""

    name: str
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
    folder: str
    """Name of the folder of the results tree, below data set and model."""
    measured: dict[str, Any]
    """Model, weights, data, dtype and threat of the suite's result. The verdict holds for these only."""
    model: str
    dataset: str
    threat: ThreatResult
    n: int
    seed: int
    verdict: VerdictName
    decided_by: list[str]
    """Names of the checks that gave the verdict."""
    overestimation: float
    """Robust accuracy under the usual PGD minus that under all attacks of this run, in points."""
    advice: Advice
    acted: FollowUpResult | None
    checks: list[CheckResult]
    measurements: Measurements
    seconds: float
    hardware: str
    versions: dict[str, str]
    date: str


def dump_sanity(file: SanityFile) -> str:
    """Return the JSON text that is stored and that `--json` prints."""
    return json.dumps(file.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def read_sanity(path: Path) -> SanityFile:
    """Read and validate a sanity.json.

    Raises:
        ResultError: the file does not have this schema.
    """
    try:
        return SanityFile.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ResultError(f"{path}: {where}: {first['msg']}. Write it again with `robbench sanity`.") from None


def sanity_folder(root: Path, file: SanityFile) -> Path:
    """Return the folder of a results tree that holds a sanity.json."""
    return root / file.dataset / file.model / file.folder


def extract_subject(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a result's identity that a verdict depends on: model, weights, data, dtype and threat."""
    return {key: identity.get(key) for key in ("model", "weights", "data", "dtype", "threat")}


class VerdictIndex:
    """The verdicts of a results tree, to be found by model, weights, data and threat."""

    def __init__(self, root: Path | None) -> None:
        self._by_model: dict[tuple[str, str], list[SanityFile]] = {}
        for path in sorted(root.glob(f"*/*/sanity*/{FILE}")) if root is not None else ():
            file = read_sanity(path)
            self._by_model.setdefault((file.dataset, file.model), []).append(file)

    def find(self, result: ResultFile) -> str:
        """Return the verdict on the same weights, data and threat as a result, or "unchecked" if there is none.

        If there are several (with other seeds), the one on the most images counts.
        """
        subject = extract_subject(result.identity)
        files = [f for f in self._by_model.get((result.dataset, result.model), []) if f.measured == subject]
        return max(files, key=lambda f: (f.n, f.run_id)).verdict if files else UNCHECKED
