"""Attacks of other libraries as stages of a suite. Robbench's judge judges the points that they return.

`kind = "torchattacks:PGD"` runs a class of torchattacks (extra `peers`). `kind = "autoattack:standard"` runs the
authors' code of AutoAttack in the package pyautoattack. Instead of `standard`, it may be `plus`, `rand` or one attack:
APGD-CE, APGD-DLR, APGD-T, FAB, FAB-T, SQUARE. Every other key of the stage is a parameter of that class.

These libraries draw random numbers from one global generator, and some take step sizes from the batch. The outcome of
an image therefore depends on its neighbours. So the batches are fixed: all correctly classified images among `batch`
consecutive official indices, with one seed per batch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robbench.core import rng
from robbench.core.errors import SuiteError, unknown_name
from robbench.core.threat import Ball
from robbench.core.types import NORMS, Norm
from robbench.suite import Stage

__all__ = ["PEERS", "Peer", "build_peer"]

Call = Callable[[Tensor, Tensor], Tensor]
PEERS = ("torchattacks", "autoattack")
_PACKAGES = {"torchattacks": ("torchattacks", "torchattacks"), "autoattack": ("pyautoattack", "pyautoattack")}
_VERSIONS = ("standard", "plus", "rand")
_OTHER_NORMS = {  # norms of torchattacks' classes without a parameter `norm`; all other such classes are for Linf
    "L2": ("PGDL2", "PGDRSL2", "CW", "DeepFool"),
    "L1": ("EADL1", "EADEN"),
    "L0": ("SparseFool", "OnePixel", "Pixle", "JSMA"),
}
_LEAST_CLASSES = {"standard": 4, "plus": 4, "apgd-t": 4, "rand": 3, "apgd-dlr": 3}  # AutoAttack's DLR losses
_SINGLE = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An attack of another library.

    Attributes:
        library: a member of `PEERS`.
        attack: name of the attack in that library.
        release: version of the package.
        batch: number of consecutive official indices per call.
        params: parameters from the suite.
    """

    version: ClassVar[int] = 1
    norms: ClassVar[tuple[Norm, ...]] = NORMS

    library: str
    attack: str
    release: str
    batch: int = 100
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def passes(self) -> int:
        """The number of passes is unknown. The plan counts one."""
        return 1

    def check_classes(self, classes: int) -> None:
        """Refuse a model with too few classes.

        Raises:
            SuiteError: the attack's loss is made of more logits than the model has.
        """
        least = _LEAST_CLASSES.get(self.attack.lower(), 2) if self.library == "autoattack" else 2
        if classes < least:
            raise SuiteError(
                f"{self.library}:{self.attack} given with a model of {classes} classes; its DLR loss needs at least "
                f"{least}. Use autoattack:APGD-CE, autoattack:FAB or autoattack:SQUARE, or the suite autoattack."
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
            seed: seed of the global generator, whose state is restored afterwards.

        Returns:
            The points of the library, [N, C, H, W] on the CPU, and which of them the model misclassifies in this batch,
            [N] bool.

        Raises:
            SuiteError: the attack does not have a parameter, or does not support the norm.
        """
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            with torch.no_grad():
                classes = model(x[:1]).shape[1]
            if self.library == "torchattacks":
                attack = _torchattack(self, model, ball, classes)
            else:
                attack = _autoattack(self, model, ball, seed, x.device, classes)
            x_adv = attack(x, y).detach()
            with torch.no_grad():
                claimed = model(x_adv).argmax(1) != y
        return x_adv.cpu(), claimed.cpu()

    def seed(self, key: tuple[int, int], chunk: int) -> int:
        """Derive the seed of a batch from the key of the stage and the number of the batch."""
        at = torch.tensor([chunk])
        return int(rng.bits(key, at, torch.zeros_like(at), 0, 1).item())


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


def _torchattack(peer: Peer, model: nn.Module, ball: Ball, classes: int) -> Call:
    cls = getattr(importlib.import_module("torchattacks"), peer.attack)
    allowed = list(inspect.signature(cls).parameters)[1:]
    own = next((norm for norm, names in _OTHER_NORMS.items() if peer.attack in names), "Linf")
    if "norm" not in allowed and own != ball.norm:
        raise SuiteError(f"torchattacks:{peer.attack} given a threat of norm {ball.norm}; this attack is for {own}")
    ours = {"eps": ball.eps, "norm": ball.norm, "n_classes": classes}
    given = peer.params | {key: value for key, value in ours.items() if key in allowed}
    for key in given:
        if key not in allowed:
            raise SuiteError(f"torchattacks:{peer.attack}: {unknown_name('parameter', key, allowed)}")
    made: Call = cls(model, **given)
    return made


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
        SuiteError: the package is not installed or has no such attack, or AutoAttack does not have a parameter.
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
    else:
        known = [n for n in package.__dict__ if n[0].isupper() and n not in ("LGV", "MultiAttack")]
        if name not in known:
            raise SuiteError(f"Attack {stage.name!r}: {unknown_name('class of torchattacks', name, known)}")
    return Peer(library=library, attack=name, release=release, batch=batch, params=params)


def _installed(stage: Stage, library: str) -> tuple[ModuleType, str]:
    module, distribution = _PACKAGES[library]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module), importlib.metadata.version(distribution)
    except ModuleNotFoundError as error:
        raise SuiteError(
            f"Attack {stage.name!r} ({stage.kind}) needs the package {error.name!r}, which is not installed: "
            'pip install "robbench[peers]"'
        ) from None
