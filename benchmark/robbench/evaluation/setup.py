"""The setup of a run: model, images, suite and options, and the identity that they determine."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from robbench.classifier.batch_width import default_lanes
from robbench.classifier.prepare import Target
from robbench.core.errors import DataError, SuiteError
from robbench.core.numbers import parse_threat
from robbench.core.threat import whole_box
from robbench.core.types import Norm, Threat
from robbench.evaluation.inputs import Images, select
from robbench.evaluation.options import Options
from robbench.evaluation.stages import ready_stages
from robbench.evaluation.worker import Place
from robbench.results.schema import SCHEMA_VERSION, ResultFile
from robbench.results.summary import summarize
from robbench.suite import Suite

__all__ = ["Setup"]

ENGINE_VERSION = 1  # increase it when the judge, the random numbers or the meaning of a record change


class Setup:
    """The model, the images, the suite and the options of a run. It checks that they fit together.

    Args:
        target: the model.
        images: the whole test set.
        suite: the attacks.
        options: all other options.
        device: device of the workers; None means the device of the target.

    Attributes:
        threat: the norm and the radius.
        stages: the attacks for this threat, in the order of the suite.
        positions: positions of the selected images in the test set, [n].
        index: official indices of the same images, [n].
        lanes: batch width.
        coarse: whether gradients are computed in bfloat16.

    Raises:
        RobbenchError: the parts do not fit together. The message says why.
    """

    def __init__(
        self, target: Target, images: Images, suite: Suite, options: Options, device: torch.device | None
    ) -> None:
        self.target, self.images, self.suite, self.options = target, images, suite, options
        self.coarse = options.gradients is not None
        if self.coarse and images.dtype != torch.float32:
            raise DataError(f"gradients in {options.gradients} given with images in {images.dtype}; allowed: float32.")
        self.threat = _choose_threat(suite, images.dataset, options)
        _check_radius(self.threat, math.prod(images.x(np.arange(1)).shape[1:]))
        self.stages = ready_stages(suite, self.threat, target, images, options)
        self.positions = select(len(images.y), options)
        self.index = images.index[self.positions]
        self.lanes = options.lanes or default_lanes(images.x(np.arange(1)).shape[1:], device or target.device)
        self._described = {s.name: s.describe() for s in self.stages}

    def title(self) -> str:
        """Return the title of the run for messages, such as `digits/at · quick · Linf 1/5`."""
        return f"{self.images.dataset}/{self.target.name} · {self.suite.name} · {self.threat}"

    def overrides(self) -> dict[str, str]:
        """Return what differs from the standard run of the suite: name -> value, in one spelling.

        It follows from the identity and the suite. Options that repeat the suite's own values are no overrides.
        """
        own, options = self.suite.threats.get(self.images.dataset), self.options
        changed: dict[str, str] = {"norm": self.threat.norm} if self.threat.norm != _choose_norm(own) else {}
        changed |= {"eps": self.threat.exact_eps} if self.threat != own else {}
        changed |= {"sample_seed": str(options.sample_seed)} if options.sample_seed is not None else {}
        changed |= {"gradients": options.gradients} if options.gradients is not None else {}
        changed |= {"one_by_one": "True"} if options.one_by_one else {}
        return changed | ({"seed": str(options.seed)} if options.seed else {})

    def identity(self) -> dict[str, Any]:
        """Return everything that determines a verdict. Batch width, device and number of samples do not."""
        return {
            "schema": SCHEMA_VERSION,
            "engine": ENGINE_VERSION,
            "model": self.target.identity,
            "weights": self.target.weights,
            "data": self.images.digest,
            "dtype": str(self.images.dtype),
            "suite": {"name": self.suite.name, "judge": self.suite.judge, "mode": self.suite.mode},
            "attacks": [{"name": name, **about} for name, about in self._described.items()],
            "threat": {"norm": self.threat.norm, "eps": str(self.threat.eps)},
            "seed": self.options.seed,
            "sample_seed": self.options.sample_seed,
        } | {key: value for key, value in self._asking().items() if value}

    def _asking(self) -> dict[str, Any]:
        """List how the model is asked, as far as it may change a verdict. Identities hold only what is not the rule."""
        return {"gradients": self.options.gradients, "one_by_one": self.options.one_by_one}

    def order_samples(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Put official indices into the order in which the run selects them: official order, or order of drawing."""
        order = self.images.index[select(len(self.images.y), self.options, everything=True)]
        kept: NDArray[np.int64] = order[np.isin(order, samples)]
        return kept

    def summarize(
        self, samples: NDArray[np.int64], rows: pd.DataFrame, flags: dict[str, str], place: Place, date: str
    ) -> ResultFile:
        """Make the result of these samples.

        Args:
            samples: official indices, [n].
            rows: records of these samples (`store.COLUMNS`). Records of other samples are ignored.
            flags: name of a problem -> sentence.
            place: hardware and software of the measurement.
            date: date of the measurement, UTC, ISO 8601.
        """
        total, options = len(self.images.y), self.options
        if options.sample_seed is not None:
            selection = f"{len(samples)} of {total} drawn with sample seed {options.sample_seed}"
        else:
            selection = f"all {total}" if len(samples) == total else f"first {len(samples)} of {total}"
        return summarize(
            rows[rows["sample"].isin(samples)],
            attacks=self._described,
            flags=flags,
            identity=self.identity(),
            model=self.target.name,
            dataset=self.images.dataset,
            threat=self.threat,
            suite=self.suite,
            seed=options.seed,
            overrides=self.overrides(),
            selection=selection,
            lanes=self.lanes,
            hardware=place.hardware,
            versions=place.versions,
            environment=place.environment,
            date=date,
            paper=dict(self.target.paper),
        )


def _choose_threat(suite: Suite, dataset: str, options: Options) -> Threat:
    if options.eps is None:
        return suite.threat(dataset)
    norm = options.norm or _choose_norm(suite.threats.get(dataset))
    try:
        return parse_threat(norm, options.eps)
    except ValueError as error:
        raise SuiteError(str(error)) from None


def _choose_norm(own: Threat | None) -> Norm:
    """Return the norm of a run without --norm. `own` is the suite's threat model for the data set, if it has one."""
    return own.norm if own is not None else "Linf"


def _check_radius(threat: Threat, pixels: int) -> None:
    """Refuse a radius that means nothing for images of so many pixels.

    Raises:
        SuiteError: no two images are further apart; the radius may be given in another unit.
    """
    diameter = whole_box(threat.norm, pixels)
    if threat.norm == "Linf" or threat.eps < diameter:  # `parse_threat` refuses an Linf radius above 1
        return
    scaled = f" {threat.eps_text} of 255 levels is {threat.norm} {float(threat.eps / 255):.4g}."
    raise SuiteError(
        f"eps: {threat.norm} {threat.eps_text} given; no two images of {pixels} values in [0, 1] are further "
        f"apart than {threat.norm} {diameter:.4g}, so every image is in reach. Is eps in pixel values 0 to 255? "
        f"Expected: a radius for pixels in [0, 1].{scaled}"
    )
