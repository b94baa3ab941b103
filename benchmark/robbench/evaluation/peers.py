"""Attacks of other libraries as stages of a suite. Robbench's judge judges the points that they return.

`kind = "torchattacks:PGD"` runs a class of torchattacks (extra `peers`), `foolbox:LinfPGD` a class of foolbox, and
`advlib:fmn` a function of adv-lib (both: extra `more-peers`). `kind = "autoattack:standard"` runs the authors' code of
AutoAttack in the package pyautoattack. Instead of `standard`, it may be `plus`, `rand` or one attack: APGD-CE,
APGD-DLR, APGD-T, FAB, FAB-T, SQUARE. Every other key of the stage is a parameter of that class or function.

These libraries draw random numbers from one global generator, and some take step sizes from the batch. The outcome of
an image therefore depends on its neighbours. So the batches are fixed: all correctly classified images among `batch`
consecutive official indices, with one seed per batch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import logging
import random
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from robbench.classifier.guard import out_of_memory
from robbench.core import rng
from robbench.core.errors import RobbenchError, SuiteError, unknown_name
from robbench.core.threat import Ball
from robbench.core.types import NORMS, Norm
from robbench.evaluation.more_peers import (
    ADVLIB_BOUNDED,
    Call,
    call_advlib,
    call_foolbox,
    list_attacks,
    list_norms,
    list_parameters,
)
from robbench.suite import PEERS, Stage

__all__ = ["MissingPackageError", "Peer", "build_peer", "list_missing"]

_PACKAGES = {  # module, distribution, how to install it
    "torchattacks": ("torchattacks", "torchattacks", 'pip install "robbench[peers]"'),
    "autoattack": ("pyautoattack", "pyautoattack", 'pip install "robbench[peers]"'),
    # Of the packages that adv-lib asks for, its attacks use torch and tqdm alone, and visdom can hardly be built today.
    "advlib": ("adv_lib", "adv-lib", 'pip install --no-deps adv-lib==0.2.8 (or "robbench[more-peers]")'),
    "foolbox": ("foolbox", "foolbox", 'pip install foolbox (or "robbench[more-peers]")'),
}
_VERSIONS = ("standard", "plus", "rand")
_OTHER_NORMS = {  # norms of torchattacks' classes without a parameter `norm`; all other such classes are for Linf
    "L2": ("PGDL2", "PGDRSL2", "CW", "DeepFool"),
    "L1": ("EADL1", "EADEN"),
    "L0": ("SparseFool", "OnePixel", "Pixle", "JSMA"),
}
_LEAST_CLASSES = {  # their losses compare so many logits
    "autoattack": {"standard": 4, "plus": 4, "apgd-t": 4, "rand": 3, "apgd-dlr": 3},
    "torchattacks": {"apgdt": 4, "autoattack": 4},
    "advlib": {"alma": 3, "apgd": 3, "apgd_targeted": 4},
}
_SINGLE = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")


class MissingPackageError(SuiteError):
    """The package of an attack of another library is not installed."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An attack of another library.

    Attributes:
        library: a member of `suite.PEERS`.
        attack: name of the attack in that library.
        release: version of the package.
        batch: number of consecutive official indices per call.
        params: parameters from the suite.
        norms: the norms that it is made for.
        is_bounded: whether it takes the radius. If not, it looks for the nearest break.
    """

    version: ClassVar[int] = 2  # 2: what it claims are points on the levels of the ball, within eps

    library: str
    attack: str
    release: str
    batch: int = 100
    params: dict[str, Any] = field(default_factory=dict)
    norms: tuple[Norm, ...] = NORMS
    is_bounded: bool = True

    @property
    def passes(self) -> int:
        """The number of passes is unknown. The plan counts one."""
        return 1

    def check_classes(self, classes: int) -> None:
        """Refuse a model with too few classes.

        Raises:
            SuiteError: the attack's loss is made of more logits than the model has.
        """
        least = _LEAST_CLASSES.get(self.library, {}).get(self.attack.lower(), 2)
        if classes < least and self.params.get("loss_function", "dlr") == "dlr":
            raise SuiteError(
                f"{self.library}:{self.attack} given with a model of {classes} classes; its DLR loss needs at least "
                f"{least}. Use autoattack:APGD-CE, autoattack:FAB or autoattack:SQUARE, or the suite autoattack. apgd "
                'and apgd_targeted of advlib take loss_function = "ce".'
            )

    def describe(self) -> dict[str, Any]:
        """Return the attack's part of a run's identity."""
        return {
            "kind": f"{self.library}:{self.attack}",
            "version": self.version,
            "package": f"{_PACKAGES[self.library][1]} {self.release}",
            "batch_coupled": self.batch,
            **self.params,
        }

    def run(self, model: nn.Module, x: Tensor, y: Tensor, ball: Ball, seed: int) -> tuple[Tensor, Tensor]:
        """Attack one batch.

        Args:
            model: in eval mode, on the device of x.
            x: correctly classified images [N, C, H, W] in [0, 1].
            y: labels [N].
            ball: the threat model.
            seed: seed of the global generators of torch, NumPy and Python, whose states are restored afterwards.

        Returns:
            The points of the library, rounded to the levels of the ball, [N, C, H, W] on the CPU, and which of them the
            model misclassifies in this batch, [N] bool. A point of an attack without a radius that lies beyond eps is
            not claimed.

        Raises:
            SuiteError: the attack fails.
        """
        with _seeded(seed, x.device), warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            with torch.no_grad():
                classes = model(x[:1]).shape[1]
            try:
                x_adv = _make_call(self, model, ball, seed, x.device, classes)(x, y).detach()
            except Exception as error:  # a library may raise anything
                if isinstance(error, RobbenchError) or out_of_memory(error):
                    raise
                raise SuiteError(f"{self.library}:{self.attack} fails: {type(error).__name__}: {error}") from error
            x_adv = ball.round(x, x_adv)
            with torch.no_grad():
                claimed = model(x_adv).argmax(1) != y
            if not self.is_bounded:
                claimed &= ball.contains(x, x_adv)
        return x_adv.cpu(), claimed.cpu()

    def seed(self, key: tuple[int, int], chunk: int) -> int:
        """Derive the seed of a batch from the key of the stage and the number of the batch."""
        at = torch.tensor([chunk])
        return int(rng.bits(key, at, torch.zeros_like(at), 0, 1).item())


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators that libraries draw from, and put their states back."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # the libraries draw from this generator
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("auto-attack")
    before = logger.disabled
    logger.disabled = True
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.disabled = before


def _make_call(peer: Peer, model: nn.Module, ball: Ball, seed: int, device: torch.device, classes: int) -> Call:
    package = importlib.import_module(_PACKAGES[peer.library][0])
    if peer.library == "advlib":
        return call_advlib(package, peer.attack, peer.params, model, ball, classes)
    if peer.library == "foolbox":
        return call_foolbox(package, peer.attack, peer.params, model, ball)
    if peer.library == "autoattack":
        return _autoattack(peer, model, ball, seed, device, classes)
    cls = getattr(package, peer.attack)
    ours = {"eps": ball.eps, "norm": ball.norm, "n_classes": classes}
    allowed = _list_torchattacks_parameters(cls)
    made: Call = cls(model, **peer.params | {key: value for key, value in ours.items() if key in allowed})
    return made


def _list_torchattacks(package: ModuleType) -> list[str]:
    return [n for n in package.__dict__ if n[0].isupper() and n not in ("LGV", "MultiAttack")]


def _list_torchattacks_parameters(cls: Any) -> list[str]:
    return list(inspect.signature(cls).parameters)[1:]


def _list_torchattacks_norms(cls: Any) -> tuple[Norm, ...]:
    if "norm" in _list_torchattacks_parameters(cls):
        return ("Linf", "L2")  # the library knows no other norm there
    own = next((norm for norm, names in _OTHER_NORMS.items() if cls.__name__ in names), "Linf")
    return tuple(norm for norm in NORMS if norm == own)


def _autoattack(peer: Peer, model: nn.Module, ball: Ball, seed: int, device: torch.device, classes: int) -> Call:
    library = importlib.import_module("pyautoattack")
    name = peer.attack.lower()
    # AutoAttack's checks pass the seed to numpy, which takes 31 bits.
    common = {"norm": ball.norm, "eps": ball.eps, "device": device, "seed": seed % 2**31}
    if name in _VERSIONS:
        made = library.AutoAttack(model, version=name, **common)
    else:
        made = library.AutoAttack(model, version="custom", attacks=[name], **common)
        # The budget of the standard version: one restart.
        made.apgd.n_restarts = made.fab.n_restarts = made.apgd_targeted.n_restarts = made.square.n_restarts = 1
    # Nine targets, as in the standard version. The library fails if there are fewer other classes than targets.
    made.fab.n_target_classes = made.apgd_targeted.n_target_classes = min(9, classes - 1)
    made.verbose = False

    def attack(x: Tensor, y: Tensor) -> Tensor:
        x_adv: Tensor = made.run_standard_evaluation(x, y, batch_size=len(x))[0]
        return x_adv

    return attack


def build_peer(stage: Stage) -> Peer:
    """Make a stage's attack of another library.

    Raises:
        MissingPackageError: the package is not installed.
        SuiteError: it has no such attack, or the attack does not have a parameter.
    """
    library, _, name = stage.kind.partition(":")
    package, release = _installed(stage, library)
    params = dict(stage.params)
    batch = params.pop("batch", 100)
    if not isinstance(batch, int) or batch < 1:
        raise SuiteError(f"Attack {stage.name!r}: batch {batch!r} given; allowed: an integer of at least 1")
    if library == "autoattack":
        known: list[str] = [*_VERSIONS, *(n.upper() for n in _SINGLE)]
        if name.lower() not in (*_VERSIONS, *_SINGLE):
            raise SuiteError(f"Attack {stage.name!r}: {unknown_name('attack of AutoAttack', name, known)}")
        if params:
            raise SuiteError(f"Attack {stage.name!r}: {', '.join(params)} given; AutoAttack has its published budgets")
        return Peer(library=library, attack=name, release=release, batch=batch)
    known = _list_torchattacks(package) if library == "torchattacks" else list_attacks(library, package)
    if name not in known:
        noun = "function of adv-lib" if library == "advlib" else f"class of {library}"
        raise SuiteError(f"Attack {stage.name!r}: {unknown_name(noun, name, known)}")
    is_torchattacks = library == "torchattacks"
    cls = getattr(package, name, None)
    allowed = _list_torchattacks_parameters(cls) if is_torchattacks else list_parameters(library, package, name)
    for key in params:
        if key not in allowed:
            raise SuiteError(f"Attack {stage.name!r} ({stage.kind}): {unknown_name('parameter', key, allowed)}")
    norms = _list_torchattacks_norms(cls) if is_torchattacks else list_norms(library, package, name, params)
    # Of foolbox, the points are cut to the radius. FAB of adv-lib takes one and may go beyond.
    is_bounded = "eps" in allowed if is_torchattacks else library == "foolbox" or name in ADVLIB_BOUNDED
    return Peer(
        library=library, attack=name, release=release, batch=batch, params=params, norms=norms, is_bounded=is_bounded
    )


def list_missing(stages: Iterable[Stage]) -> list[str]:
    """Say which optional attacks of other libraries cannot run here, because their package is not installed."""
    sentences = []
    for stage in stages:
        library = stage.kind.partition(":")[0]
        if stage.optional and library in PEERS:
            try:
                _installed(stage, library)
            except MissingPackageError as error:
                sentences.append(str(error))
    return sentences


def _installed(stage: Stage, library: str) -> tuple[ModuleType, str]:
    module, distribution, install = _PACKAGES[library]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if library == "advlib" and "visdom" not in sys.modules and importlib.util.find_spec("visdom") is None:
                sys.modules["visdom"] = ModuleType("visdom")  # imported for plots, never used by attacks
            package = importlib.import_module(module)
            if library in ("advlib", "foolbox"):
                importlib.import_module(f"{module}.attacks")
            return package, importlib.metadata.version(distribution)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"Attack {stage.name!r} ({stage.kind}) needs the package {error.name!r}, which is not installed: {install}."
        ) from None
