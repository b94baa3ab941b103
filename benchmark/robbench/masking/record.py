"""What the gradient-masking checks store: measurements, checks, verdict, and where they lie. Imports no torch.

```
results/<dataset>/<model>/sanity/sanity.json        `SanityFile`
results/<dataset>/<model>/sanity/landscape.parquet  the losses around the first images
results/<dataset>/<model>/sanity/sheet.png          one page to look at
```

The folder is that of the suite `sanity`, whose result.json and outcomes.parquet the verdict rests on too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
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
    "Acted",
    "Advice",
    "CheckResult",
    "CheckStatus",
    "SanityFile",
    "VerdictName",
    "Verdicts",
    "dump_sanity",
    "read_sanity",
    "sanity_folder",
    "subject",
]

FILE = "sanity.json"
LANDSCAPE = "landscape.parquet"
SHEET = "sheet.png"
PROBE_VERSION = 2  # raised when what is measured, or how, changes
UNCHECKED = "unchecked"  # of a model without a sanity run on these weights and this threat

VerdictName = Literal["trustworthy", "suspicious", "masked", "randomized"]
CheckStatus = Literal["pass", "warn", "fail", "not applicable"]


class CheckResult(StrictModel):
    """One check: a pure function of measurements and thresholds."""

    name: str
    title: str
    value: float | None
    """None where it does not apply."""
    threshold: str
    """What the value must be to pass, in words."""
    status: CheckStatus
    reason: str
    """One sentence."""
    source: str
    decides: str = ""
    """The verdict that this status asks for, if any."""


class Advice(StrictModel):
    """What to run next."""

    suite: str
    """Empty: nothing more is needed."""
    reason: str
    gain: float
    """How many points lower the robust accuracy is to be expected, as measured by this run, than the usual PGD says."""


class Acted(StrictModel):
    """What came out of the suite that was advised."""

    suite: str
    run_id: str
    robust_accuracy: Accuracy


class SanityFile(StrictModel):
    """sanity.json."""

    schema_version: Literal[1]
    identity: dict[str, Any]
    """The run_id of the suite's result, the images it holds, and the versions of measurements and thresholds."""
    run_id: str
    """SHA-256 of `identity`."""
    folder: str
    """Name of the folder of the results tree, below data set and model."""
    measured: dict[str, Any]
    """What the suite's result says of model, weights and data: the verdict holds for these alone."""
    model: str
    dataset: str
    threat: ThreatResult
    n: int
    seed: int
    verdict: VerdictName
    decided_by: list[str]
    """Names of the checks that decided it."""
    overestimation: float
    """The usual PGD minus the best of this run, in points."""
    advice: Advice
    acted: Acted | None
    checks: list[CheckResult]
    measurements: Measurements
    seconds: float
    hardware: str
    versions: dict[str, str]
    date: str


def dump_sanity(found: SanityFile) -> str:
    """Print it as the JSON that is stored and that `--json` shows."""
    return json.dumps(found.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def read_sanity(path: Path) -> SanityFile:
    """Read and validate a sanity.json.

    Raises:
        ResultError: not one of this schema.
    """
    try:
        return SanityFile.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ResultError(f"{path}: {where}: {first['msg']}. Make it again: `robbench sanity`.") from None


def sanity_folder(root: Path, found: SanityFile) -> Path:
    """Name the folder of a results tree that holds it."""
    return root / found.dataset / found.model / found.folder


def subject(identity: dict[str, Any]) -> dict[str, Any]:
    """Take from a result's identity what a verdict is about: the function, the data and the threat."""
    return {key: identity.get(key) for key in ("model", "weights", "data", "dtype", "threat")}


class Verdicts:
    """The verdicts of a results tree, by what they are about."""

    def __init__(self, root: Path | None) -> None:
        self._found: dict[tuple[str, str], list[SanityFile]] = {}
        for path in sorted(root.glob(f"*/*/sanity*/{FILE}")) if root is not None else ():
            found = read_sanity(path)
            self._found.setdefault((found.dataset, found.model), []).append(found)

    def of(self, result: ResultFile) -> str:
        """Return the verdict on a result's model: on the same weights, data and threat; else "unchecked".

        Of several (other seeds), the one on the most images counts.
        """
        about = subject(result.identity)
        fitting = [s for s in self._candidates(result) if s.measured == about]
        return max(fitting, key=lambda s: (s.n, s.run_id)).verdict if fitting else UNCHECKED

    def _candidates(self, result: ResultFile) -> Iterator[SanityFile]:
        yield from self._found.get((result.dataset, result.model), [])
