"""The attacks that both robbench and another library have, with the same budget."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.attacks import CW, FGSM, PGD, Attack
from robbench.core import rng
from robbench.core.threat import Ball
from robbench.engine import engine
from robbench.suite import build_attack, load_suite
from sides import BATCH, SharedInput

L2 = {"digits": 1.0, "mnist": 2.0, "cifar10": 0.5}  # eps of C&W; the other attacks have the threat of the suites
CW_STEPS = 50  # torchattacks' default; it uses a single c


@dataclass(frozen=True, eq=False)
class Duel:
    """One comparison of an attack.

    Attributes:
        name: name of the row.
        peer: name of the other library.
        stages: our attacks. Several attacks run as a cascade.
        ball: the ball that adversarial examples must be in.
        theirs: (model, images, labels) -> adversarial examples of the other library.
    """

    name: str
    peer: str
    stages: list[tuple[str, Attack]]
    ball: Ball
    theirs: Callable[[nn.Module, Tensor, Tensor], Tensor]

    def run_ours(self, g: SharedInput, model: nn.Module) -> tuple[Tensor, NDArray[np.bool_], tuple[int, int]]:
        """Run our side. Return the points, which images our records call broken, and the charged passes."""
        x_adv, broken = g.x.clone(), np.zeros(len(g.y), bool)
        passes = np.zeros(2, np.int64)
        for name, attack in self.stages:
            left = np.flatnonzero(~broken)
            if not len(left):
                break
            rows = engine.attack_samples(
                model, attack, g.x[left], g.y[left], g.index[left], self.ball, key=rng.make_key(g.seed, name),
                widths=g.widths, keep_adversarials=True,
            )  # fmt: skip
            assert rows.x_adv is not None
            at = left[np.searchsorted(g.index[left], rows.sample)]
            x_adv[at], broken[at] = rows.x_adv, rows.broken
            passes += rows.forwards.sum(), rows.backwards.sum()
        return x_adv, broken, (int(passes[0]), int(passes[1]))

    def run_theirs(self, g: SharedInput, model: nn.Module) -> Tensor:
        """Run the other side and return its points."""
        torch.manual_seed(g.seed)
        return self.theirs(model, g.x.to(g.device), g.y.to(g.device)).detach().cpu()


def list_duels(g: SharedInput) -> list[Duel]:
    """List all comparisons, with the budgets of the suites for this data set."""
    return [*_torchattacks(g), *_autoattack(g)]


def _torchattacks(g: SharedInput) -> list[Duel]:
    import torchattacks

    built = {s.name: build_attack(s) for s in load_suite("whitebox").stages(g.dataset)}
    fgsm = FGSM(objective="ce")
    (pgd,) = (a for a in built.values() if type(a) is PGD and a.objective == "ce")
    step = pgd.relative_step * g.ball.eps if pgd.step_size is None else pgd.step_size
    cw = CW(search_steps=1, iterations=CW_STEPS, initial_c=1.0, lr=0.01)
    library: Any = torchattacks
    makers: list[tuple[str, Attack, Ball, Callable[[nn.Module], Any]]] = [
        ("FGSM", fgsm, g.ball, lambda m: library.FGSM(m, eps=g.ball.eps)),
        (f"PGD-{pgd.steps}", pgd, g.ball, lambda m: library.PGD(m, eps=g.ball.eps, alpha=step, steps=pgd.steps)),
        ("C&W L2", cw, Ball("L2", L2[g.dataset]), lambda m: library.CW(m, c=1, kappa=0, steps=CW_STEPS, lr=0.01)),
    ]

    def batched(make: Callable[[nn.Module], Any]) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        def theirs(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            attack = make(model)
            return torch.cat([attack(*pair) for pair in zip(x.split(BATCH), y.split(BATCH), strict=True)])

        return theirs

    return [Duel(name, "torchattacks", [(name, ours)], ball, batched(make)) for name, ours, ball, make in makers]


def run_autoattack(
    g: SharedInput, model: nn.Module, x: Tensor, y: Tensor, only: str = "", batch: int = BATCH
) -> Tensor:
    """Run AutoAttack's standard version, or one of its attacks, with the authors' code."""
    from pyautoattack import AutoAttack

    attack: Any = AutoAttack(model, norm=g.ball.norm, eps=g.ball.eps, seed=g.seed, device=g.device)
    if only:
        attack.attacks_to_run = [only.lower()]
    attack.verbose = False
    points: Tensor = attack.run_standard_evaluation(x, y, batch_size=batch)[0]
    return points


def _autoattack(g: SharedInput) -> list[Duel]:
    stages = [(s.name, build_attack(s)) for s in load_suite("autoattack").stages(g.dataset)]
    dlr = [(s.name, build_attack(s)) for s in load_suite("whitebox").stages(g.dataset) if s.name == "APGD-DLR"]
    single = [
        Duel(
            name, "pyautoattack", [(name, attack)], g.ball, lambda m, x, y, only=name: run_autoattack(g, m, x, y, only)
        )
        for name, attack in [*stages, *dlr]
    ]
    return [*single, Duel("all four", "pyautoattack", stages, g.ball, lambda m, x, y: run_autoattack(g, m, x, y))]
