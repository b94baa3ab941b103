"""The setup of a run: model, images, suite and options, and the identity that they determine."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from robbench.classifier.batch_width import choose_lanes
from robbench.classifier.guard import Guarded
from robbench.classifier.prepare import Target
from robbench.core import version
from robbench.core.errors import DataError, SuiteError
from robbench.core.threat import Ball
from robbench.core.types import format_ids
from robbench.core.words import format_goal
from robbench.evaluation.arguments import check_suite_name, choose_norm, choose_threat
from robbench.evaluation.inputs import Images, identify, select
from robbench.evaluation.options import Options, name_target
from robbench.evaluation.peers import list_missing
from robbench.evaluation.stages import count_classes, ready_stages
from robbench.evaluation.targets import Targets
from robbench.evaluation.transfer import Transfer
from robbench.evaluation.worker import Place
from robbench.models.adapters import find_adapter
from robbench.results.schema import SCHEMA_VERSION, ResultFile
from robbench.results.selection import describe_selection
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
        left_out: names of the transfer attacks that are left out, because no surrogate is there.
        positions: positions of the selected images in the test set, [n].
        index: official indices of the same images, [n].
        lanes: batch width.
        coarse: whether gradients are computed in bfloat16.
        targets: what gives each image its target; None if every other class is a break.
        answers: what the model answers to a few fixed images, as results hold it; empty until it is asked.

    Raises:
        RobbenchError: the parts do not fit together. The message says why.
    """

    def __init__(
        self, target: Target, images: Images, suite: Suite, options: Options, device: torch.device | None
    ) -> None:
        check_suite_name(suite)
        self.target, self.images, self.suite, self.options = target, images, suite, options
        self.coarse = options.gradients is not None
        if self.coarse and images.dtype != torch.float32:
            raise DataError(f"gradients in {options.gradients} given with images in {images.dtype}; allowed: float32.")
        self.threat = choose_threat(suite, images.dataset, options, math.prod(images.shape))
        self.stages = ready_stages(suite, self.threat, target, images, options)
        self.targets = None if options.target is None else self._make_targets(options.target)
        ready = {stage.name for stage in self.stages}
        transfers = [s.name for s in suite.stages(images.dataset) if s.kind == Transfer.kind]
        # With a target, a transfer may also be left out because its attack has none.
        self.left_out = [name for name in transfers if name not in ready] if options.target is None else []
        self._refuse_gradients()
        self.positions = select(len(images.y), options)
        self.index = images.index[self.positions]
        shape, device = images.shape, device or target.device
        self.lanes = choose_lanes(options.lanes, len(self.positions), shape, device)
        self.answers: list[str] = []
        self._described = {s.name: s.describe() for s in self.stages}

    def _make_targets(self, rule: str | tuple[int, ...]) -> Targets:
        """Make the targets, and check them."""
        classes = self.images.num_classes or count_classes(self.target, self.images)
        targets = Targets(rule, classes, self.options.seed)
        targets.check(self.images)
        return targets

    def _refuse_gradients(self) -> None:
        """Refuse attacks that need a gradient on a model that is no torch network, before any of them starts.

        Refuse a precision of gradients, too, where no attack takes a gradient.
        """
        if self.coarse and not any(getattr(s.attack, "needs_grad", False) for s in self.stages):
            raise SuiteError(
                f"gradients: {self.options.gradients} given, but no attack of suite {self.suite.name!r} takes a "
                "gradient, so nothing would use it. Leave --gradients out."
            )
        if not isinstance(self.target.module, Guarded) or find_adapter(self.target.module) is None:
            return
        needing = [s.name for s in self.stages if getattr(s.attack, "needs_grad", False)]
        if needing:
            kind = type(find_adapter(self.target.module)).__name__.removesuffix("Model").lower()
            raise SuiteError(
                f"The model ({kind}) has no gradient, and {', '.join(needing[:3])}{' …' * bool(needing[3:])} need one. "
                "Attack it by queries alone: --suite queries."
            )

    def title(self) -> str:
        """Return the title of the run for messages, such as `digits/at · quick · Linf 1/5`."""
        goal = f"{self.threat}{format_goal(self._asking())}"
        return f"{self.images.dataset}/{self.target.name} · {self.suite.name} · {goal}"

    def find_gaps(self) -> dict[str, str]:
        """Return a flag for each reason why attacks are left out or images cannot be attacked: name -> sentence."""
        gaps = {}
        if self.left_out:
            gaps["transfer_left_out"] = (
                f"{', '.join(self.left_out)} of the suite were left out: no surrogate of {self.images.dataset!r} is "
                "registered. --surrogate MODEL (in Python surrogate=) names one."
            )
        if missing := list_missing(self.suite.stages(self.images.dataset)):
            gaps["peers_left_out"] = f"Attacks of the suite were left out. {' '.join(missing)}"
        return gaps | self._find_fixed_images()

    def _find_fixed_images(self) -> dict[str, str]:
        """Flag images that no attack can change, because the ball holds one point on levels at most."""
        ball, n = Ball.of(self.threat, self.options.levels), len(self.positions)
        if ball.levels is None:
            return {}
        parts = np.array_split(self.positions, -(-n // self.lanes)) if n else []
        free = np.concatenate([ball.has_choice(self.images.x(at)).numpy() for at in parts])
        if free.all():
            return {}
        return {
            "levels": f"With levels {ball.levels}, {n - int(free.sum())} of {n} images have no other point within "
            f"{self.threat}, so no attack can change them, and they count as robust wherever the model is right: "
            f"{format_ids(self.index[~free])}. Give more levels or a larger radius."
        }

    def overrides(self) -> dict[str, str]:
        """Return what differs from the standard run of the suite: name -> value, in one spelling.

        It follows from the identity and the suite. Options that repeat the suite's own values are no overrides.
        """
        own, options = self.suite.threats.get(self.images.dataset), self.options
        changed: dict[str, str] = {"norm": self.threat.norm} if self.threat.norm != choose_norm(own) else {}
        if self.threat != own and self.suite.judge != "nearest":  # whose radius follows from the norm
            changed["eps"] = self.threat.exact_eps
        changed |= {"sample_seed": str(options.sample_seed)} if options.sample_seed is not None else {}
        changed |= {"gradients": options.gradients} if options.gradients is not None else {}
        changed |= {"one_by_one": "True"} if options.one_by_one else {}
        changed |= {"target": name_target(options.target)} if options.target is not None else {}
        changed |= {"levels": str(options.levels)} if options.levels is not None else {}
        used = next((s.attack.name for s in self.stages if isinstance(s.attack, Transfer)), None)
        changed |= {"surrogate": used} if used is not None and options.surrogate is not None else {}
        return changed | ({"seed": str(options.seed)} if options.seed else {})

    def identity(self) -> dict[str, Any]:
        """Return everything that determines a verdict. Batch width, device and number of samples do not."""
        return {
            "schema": SCHEMA_VERSION,
            "engine": ENGINE_VERSION,
            **identify(self.target, self.images),
            "suite": {"name": self.suite.name, "judge": self.suite.judge, "mode": self.suite.mode},
            "attacks": [{"name": name, **about} for name, about in self._described.items()],
            "threat": {"norm": self.threat.norm, "eps": str(self.threat.eps)},
            "seed": self.options.seed,
            "sample_seed": self.options.sample_seed,
        } | {key: value for key, value in self._asking().items() if value}

    def _asking(self) -> dict[str, Any]:
        """List how the model is asked, and how images were read. Identities hold only what is not the rule."""
        options = self.options
        target = None if options.target is None else name_target(options.target)
        return {
            "gradients": options.gradients,
            "one_by_one": options.one_by_one,
            "target": target,
            "levels": options.levels,
            "images": dict(self.images.about),
        }

    def order_samples(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Put official indices into the order in which the run selects them, up to the first that is not among them."""
        order = self.images.index[select(len(self.images.y), self.options, everything=True)]
        lacking = np.flatnonzero(~np.isin(order, samples))
        kept: NDArray[np.int64] = order[: lacking[0]] if len(lacking) else order
        return kept

    def summarize(
        self,
        samples: NDArray[np.int64],
        rows: pd.DataFrame,
        flags: dict[str, str],
        place: Place,
        date: str,
        wall_seconds: float | None = None,
    ) -> ResultFile:
        """Make the result of these samples.

        Args:
            samples: official indices, [n].
            rows: records of these samples (`store.COLUMNS`). Records of other samples are ignored.
            flags: name of a problem -> sentence.
            place: hardware and software of the measurement.
            date: date of the measurement, UTC, ISO 8601.
            wall_seconds: wall time of the measurement; None where nothing was computed.
        """
        options = self.options
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
            selection=describe_selection(len(samples), len(self.images.y), options.sample_seed),
            lanes=self.lanes,
            hardware=place.hardware,
            versions=place.versions,
            environment=place.environment,
            date=date,
            answers=self.answers,
            code=version.digest_judging_code(),
            wall_seconds=wall_seconds,
            paper=dict(self.target.paper),
        )
