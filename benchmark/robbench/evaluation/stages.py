"""A stage of a suite on one model: the attack made, and run by the engine whoever it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robbench.attacks import EOT, Attack, Nearest, describe
from robbench.classifier.batch_width import BatchWidths
from robbench.classifier.checks import RANDOMIZED_DRAWS, choose_width, classify, compute_logits
from robbench.classifier.prepare import Target
from robbench.core import rng
from robbench.core.errors import CardError, ModelError, SuiteError
from robbench.core.threat import Ball
from robbench.core.types import Judge, Threat
from robbench.engine import engine
from robbench.evaluation.inputs import Images
from robbench.evaluation.options import Options
from robbench.evaluation.peers import MissingPackageError, Peer, build_peer, list_missing
from robbench.evaluation.targets import Targets
from robbench.evaluation.transfer import FixedPoints, Transfer, build_inner_attack, build_transfer, load_surrogate
from robbench.models.card import Registry
from robbench.suite import PEERS, Stage, Suite, build_attack

__all__ = ["ReadyStage", "count_classes", "ready_stages", "run_stage"]


@dataclass(frozen=True)
class ReadyStage:
    """A stage whose attack is made: one of the engine's, or what proposes points (a surrogate, another library)."""

    name: str
    attack: Attack | Transfer | Peer
    key: tuple[int, int]

    def describe(self) -> dict[str, Any]:
        """List what identifies it in a run."""
        return self.attack.describe() if isinstance(self.attack, Transfer | Peer) else describe(self.attack)

    @property
    def passes(self) -> int:
        """How many passes an image that stands takes."""
        attack = self.attack
        return attack.passes if isinstance(attack, Transfer | Peer) else attack.trials * (attack.steps + 1)


def ready_stages(suite: Suite, threat: Threat, target: Target, images: Images, options: Options) -> list[ReadyStage]:
    """Make the attacks of a suite.

    Raises:
        SuiteError: an attack is unknown, has wrong parameters, or is not made for the threat's norm; nothing is left of
            the suite; or a surrogate is given that no attack uses.
        RobbenchError: a surrogate cannot be loaded.
    """
    stages, own = [], suite.threats.get(images.dataset)
    norms = {t.norm for t in (suite.threats.values() if own is None else [own])}
    for s in suite.stages(images.dataset):
        if norms and threat.norm not in norms:
            s = _drop_step_size(s)
        attack: Attack | Transfer | Peer
        if s.kind.partition(":")[0] in PEERS:
            try:
                attack = build_peer(s)
            except MissingPackageError:
                if s.optional:
                    continue
                raise
            attack.check_classes(images.num_classes or count_classes(target, images))
        elif s.kind == Transfer.kind:
            found = _transfer(s, target, images, options)
            if found is None:
                continue
            attack = found
        else:
            attack = build_attack(s)
            attack = Nearest(inner=attack) if suite.judge == "nearest" else attack
        if threat.norm not in attack.norms:
            if s.optional:
                continue
            raise SuiteError(
                f"Attack {s.name!r} ({s.kind}) given a threat of norm {threat.norm}; it is made for: "
                f"{', '.join(attack.norms) or 'other distances'}. Choose another suite, or --norm and --eps."
            )
        if options.target is not None and not _can_target(attack):
            if s.optional:
                continue
            raise SuiteError(f"Attack {s.name!r} ({s.kind}) given with a target; it cannot be targeted. {_TARGETABLE}")
        stages.append(ReadyStage(s.name, attack, rng.make_key(options.seed, s.name)))
    if not stages:
        if all(s.kind == Transfer.kind for s in suite.stages(images.dataset)):
            raise SuiteError(
                f"Suite {suite.name!r} has transfer attacks only, and no model of data set {images.dataset!r} is "
                "registered. Give a model to perturb images with: --surrogate."
            )
        goal = "" if options.target is None else " with a target"
        missing = " ".join(list_missing(suite.stages(images.dataset)))
        advice = missing or "Choose another suite."
        raise SuiteError(f"No attack of the suite {suite.name!r} is made for {threat.norm}{goal}. {advice}")
    if options.surrogate is not None and not any(isinstance(stage.attack, Transfer) for stage in stages):
        raise SuiteError(
            f"surrogate: {options.surrogate} given, but no transfer attack runs in suite {suite.name!r}, so nothing "
            "would use it. Leave --surrogate out, or choose a suite with transfer attacks: blackbox, masked or sanity."
        )
    return stages


_WITH_STEP_SIZE = ("pgd", "fgsm", "mifgsm", "odi", Transfer.kind)
_TARGETABLE = "Attacks of other libraries, and those that see predicted classes alone, cannot. Choose another suite."


def _drop_step_size(s: Stage) -> Stage:
    """Let the attack choose its step from the radius: a step size of the suite is a length in the suite's norm.

    A step of 0.01 suits Linf 0.3. In L2, 40 such steps cross a fifth of a radius of 2.
    """
    if s.kind not in _WITH_STEP_SIZE:
        return s
    return replace(s, params={key: value for key, value in s.params.items() if key != "step_size"})


def _can_target(attack: Attack | Transfer | Peer) -> bool:
    """Tell whether an attack looks for a given class."""
    if isinstance(attack, Transfer | EOT):
        return _can_target(attack.inner)
    return not isinstance(attack, Peer) and getattr(attack, "can_target", True)


def count_classes(target: Target, images: Images) -> int:
    """Ask the model about one image, and count the logits."""
    with torch.no_grad():
        logits: Tensor = target.module(images.x(np.arange(1)).to(target.device))
    return logits.shape[1]


def _transfer(s: Stage, target: Target, images: Images, options: Options) -> Transfer | None:
    """Make a transfer.

    Returns:
        None where its surrogate is not there and the suite calls the stage optional, or where no model of the data set
        is registered: images of the user's own have no surrogate but the one that the user names.
    """
    first, registry = images.x(np.arange(min(2, len(images.y)))), Registry.default([Path(m) for m in options.models])
    if options.surrogate is not None:
        classes = images.num_classes or count_classes(target, images)
        surrogate = load_surrogate(options.surrogate, images.dataset, classes, target.device, first, options)
        return Transfer(*surrogate, build_inner_attack(s))
    optional = s.optional or all(entry.dataset != images.dataset for entry in registry.entries())
    try:
        return build_transfer(s, images.dataset, target.device, first, registry, options.fast_layers)
    except (CardError, ModelError):
        if optional:
            return None
        raise


def run_stage(
    stage: ReadyStage,
    target: Target,
    images: Images,
    x: Tensor,
    y: Tensor,
    index: NDArray[np.int64],
    ball: Ball,
    *,
    widths: BatchWidths,
    judge: Judge,
    deterministic: bool,
    on_rows: Callable[[engine.Rows], None],
    on_narrow: Callable[[int, str], None],
    keep_adversarials: bool = False,
    targets: Targets | None = None,
) -> NDArray[np.int64]:
    """Run a stage on images that the model classifies correctly.

    Args:
        stage: what to run.
        target: the model.
        images: the whole test set: an attack of another library is given fixed batches of it.
        x: images to attack, [N, C, H, W] on the CPU.
        y: labels [N].
        index: official indices [N].
        ball: threat.
        widths: of the lanes.
        judge: which points count.
        deterministic: whether the model answers the same thing twice.
        on_rows: called with rows as they finish.
        on_narrow: called when memory ran out.
        keep_adversarials: whether the rows are to hold the points.
        targets: what gives each image its target; None if every other class is a break.

    Returns:
        Official indices of the samples that were broken.
    """
    broken, goals = [], None
    if targets is not None:
        logits = compute_logits(target, x, choose_width(widths, len(x))) if targets.needs_logits else None
        goals = targets.choose(images, index, logits)
    for attack, at, claims in _points(stage, target, images, x, y, index, ball, widths, goals):
        rows = engine.attack_samples(
            target.module,
            attack,
            x[at],
            y[at],
            index[at],
            ball,
            key=stage.key,
            widths=widths,
            judge=judge,
            detect_cycles=deterministic,
            draws=1 if deterministic else RANDOMIZED_DRAWS,
            on_rows=on_rows,
            on_narrow=on_narrow,
            keep_adversarials=keep_adversarials,
            claims=claims,
            target=None if goals is None else goals[at],
        )
        broken.append(rows.sample[rows.broken])
    return np.concatenate(broken)


def _points(
    stage: ReadyStage,
    target: Target,
    images: Images,
    x: Tensor,
    y: Tensor,
    index: NDArray[np.int64],
    ball: Ball,
    widths: BatchWidths,
    goals: Tensor | None,
) -> Iterator[tuple[Attack, NDArray[np.int64], dict[int, bool]]]:
    """Yield what the engine runs, on which of the images, and what is claimed beforehand."""
    attack = stage.attack
    if isinstance(attack, Transfer):
        for at, given in attack.propose(x, y, index, ball, stage.key, widths.lanes, goals):
            yield given, at, {}
    elif isinstance(attack, Peer):
        for chunk in np.unique(index // attack.batch):
            at = np.flatnonzero(index // attack.batch == chunk)
            yield _peer_batch(attack, int(chunk), target, images, ball, stage.key, widths.lanes, at)
    else:
        yield attack, np.arange(len(y)), {}


def _peer_batch(
    attack: Peer,
    chunk: int,
    target: Target,
    images: Images,
    ball: Ball,
    key: tuple[int, int],
    lanes: int,
    at: NDArray[np.int64],
) -> tuple[Attack, NDArray[np.int64], dict[int, bool]]:
    """Let a peer attack all correctly classified images of its batch, whichever of them were asked for."""
    positions = np.flatnonzero(images.index // attack.batch == chunk)
    x, y = images.x(positions), images.y[positions]
    prediction, _ = classify(target, x, y, images.num_classes, lanes)
    right = prediction == y.numpy()
    sample = images.index[positions[right]]
    x_adv, claimed = attack.run(
        target.module,
        x[right].to(target.device),
        y[right].to(target.device),
        ball,
        attack.seed(key, chunk),
    )
    claims = dict(zip(sample.tolist(), claimed.tolist(), strict=True))
    return FixedPoints(x_adv, torch.from_numpy(sample)), at, claims
