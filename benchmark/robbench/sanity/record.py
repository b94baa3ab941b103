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

from pydantic import BaseModel, ConfigDict, ValidationError

from robbench.errors import ResultError
from robbench.store import Accuracy, ResultFile, ThreatResult

__all__ = [
    "FILE",
    "LANDSCAPE",
    "PROBE_VERSION",
    "SHEET",
    "UNCHECKED",
    "Acted",
    "Advice",
    "Binarization",
    "Challenge",
    "CheckResult",
    "CheckStatus",
    "Cost",
    "Curve",
    "Gradients",
    "Grid",
    "Linear",
    "Measurements",
    "Randomness",
    "Role",
    "SanityFile",
    "Scale",
    "Traces",
    "Transferred",
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
PROBE_VERSION = 1  # raised when what is measured, or how, changes
UNCHECKED = "unchecked"  # of a model without a sanity run on these weights and this threat

VerdictName = Literal["trustworthy", "suspicious", "masked", "randomized"]
CheckStatus = Literal["pass", "warn", "fail", "not applicable"]


Role = Literal["control", "single step", "noise", "more steps", "other loss", "other steps", "transfer", "square"]
"""What an attack of the suite differs in from the usual PGD."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Challenge(_Strict):
    """What one attack did with the images that the usual PGD left standing."""

    name: str
    role: Role
    given: int
    """How many images it was given."""
    broken: int
    beyond: int
    """Broken by it and not by the control, which is the usual PGD from another start."""
    behind: int
    """Broken by the control and not by it."""
    alone: int
    """Broken by it and by no attack that climbs the model's gradient."""


class Transferred(_Strict):
    """Points made on a surrogate, on the surrogate and on the model."""

    name: str
    images: int
    fooled: int
    """Images that the surrogate gets wrong there."""
    broken: int
    """Of these, how many the model gets wrong too."""


class Randomness(_Strict):
    """Answers to the same images, asked again."""

    draws: int
    images: int
    flips: int
    """Images whose prediction changed."""
    change: float
    """Largest change of the logits, as a share of their length."""


class Scale(_Strict):
    """Logits and cross-entropy gradients at the clean images that are classified correctly."""

    images: int
    unavailable: float
    """Share of images whose gradient does not exist or is exactly zero everywhere."""
    underflow: float
    """Share whose largest gradient entry is above zero and below 1e-20."""
    logit_range: float
    """Median over images of the largest minus the smallest logit."""
    log_odds: float
    """Median of the largest logit minus the mean of the others."""
    wrong_spread: float | None
    """Median of the standard deviation of the other logits over the log-odds; None with two classes."""
    confidence: float
    """Mean softmax probability of the prediction."""


class Gradients(_Strict):
    """The margin's gradient at random points of the ball, against finite differences and against its neighbours."""

    images: int
    directions: int
    radius: float
    """Length of a half step of the difference quotients, in the threat's norm."""
    cosine: float | None
    """Median over images; None where both are zero for all."""
    nearby: float | None
    """Median cosine between gradients at a point and at random points within `radius` of it."""
    nonlinearity: float | None
    """Median of |ΔL − δ·∇L| / |ΔL| for random δ of the whole radius of the threat, capped at 1."""
    flat: int
    """Images whose gradient is exactly zero there."""


class Traces(_Strict):
    """The usual PGD and one of twice its steps, without early stop: loss curves and what they tell."""

    images: int
    standing: int
    """How many of the images it broke at no step."""
    silent: int
    """Images broken on the way whose final point is not adversarial."""
    unfinished: float | None
    """Among images that stand: median share of the loss's whole rise that came in the last 10 of twice the steps."""
    unstable: float | None
    """Median over images of mean |ΔL| / |L|, capped at 1, over 100 neighbours of the final points."""
    loss: list[float]
    """Median cross-entropy at each step of the usual PGD."""
    loss_low: list[float]
    loss_high: list[float]
    """Deciles."""
    longer: list[float]
    """Median cross-entropy at each step with twice the steps."""
    share: list[float]
    """Share of images not broken until each step (the usual PGD)."""


class Curve(_Strict):
    """The usual PGD at other radii: whether each image is broken."""

    eps: list[float]
    """Increasing; the last is the whole box."""
    broken: list[list[bool]]
    """[radius][image]."""


class Grid(_Strict):
    """PGD on cross-entropy by step size and iterations (Mosbach et al. 2018)."""

    images: int
    sizes: list[float]
    """As shares of eps."""
    iterations: list[int]
    standing: list[list[int]]
    """[size][iterations]: images not broken."""
    usual: tuple[int, int]
    """Position of the usual cell."""
    beyond: int
    """Images broken in the strongest cell of all and not in the usual one."""
    behind: int


class Binarization(_Strict):
    """The binarization test (Zimmermann et al. 2022)."""

    images: int
    separable: int
    """For how many a linear readout tells the boundary point from all inner ones."""
    attack: int
    """Of these, how many the usual PGD or the annealed one breaks."""
    random: int
    """How many random sampling breaks."""
    features: int
    """Their number."""


class Linear(_Strict):
    """The linear estimate of the nearest boundary (Shafahi et al. 2019, Eq. 4) beside what was measured."""

    images: int
    defined: int
    """Images with a gradient gap that is not zero."""
    radius: float | None
    """Median estimate in the threat's norm."""
    predicted: int
    """Of the defined, how many the estimate calls robust at eps."""
    standing: int
    """How many of these images the usual PGD leaves standing."""


class Cost(_Strict):
    """What the measurements cost, over all images."""

    forwards: int
    """Forward passes alone."""
    pairs: int
    """Forward and backward passes together."""
    seconds: float


class Measurements(_Strict):
    """Everything that the checks look at."""

    n: int
    correct: int
    classes: int
    pgd: Accuracy
    """What the usual PGD on cross-entropy, one start, leaves standing."""
    best: Accuracy
    """What nothing of the suite broke."""
    differentiable: bool
    autograd_calls: int
    """Calls of autograd inside one forward pass."""
    probabilities: bool
    zero_gradients: float
    """Share of exactly zero gradients over all steps and images of the usual PGD and its control."""
    challenges: list[Challenge]
    randomness: Randomness
    scale: Scale
    gradients: Gradients
    traces: Traces
    curve: Curve
    grid: Grid
    binarization: Binarization
    linear: Linear
    transferred: list[Transferred]
    cost: dict[str, Cost]


class CheckResult(_Strict):
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


class Advice(_Strict):
    """What to run next."""

    suite: str
    """Empty: nothing more is needed."""
    reason: str
    gain: float
    """How many points lower the robust accuracy is to be expected, as measured by this run, than the usual PGD says."""


class Acted(_Strict):
    """What came out of the suite that was advised."""

    suite: str
    run_id: str
    robust_accuracy: Accuracy


class SanityFile(_Strict):
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
