"""Weaknesses of pyautoattack and torchattacks, each on a small example: `python perf/peer_weaknesses.py`.

Prints the versions, then per weakness whether the installed library has it, and what was seen. The tests check that
robbench has none of them.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyautoattack
import torch
import torchattacks
from pyautoattack.checks import check_dynamic
from pyautoattack.square import SquareAttack
from pyautoattack.state import EvaluationState
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from robbench.core.threat import Ball
from support.models import Linear, correct

Finding = tuple[bool, str]  # whether the weakness is there, and what was seen


def cascade(model: nn.Module, ball: Ball, **options: object) -> pyautoattack.AutoAttack:
    peer = pyautoattack.AutoAttack(model, eps=ball.eps, norm=ball.norm, seed=0, **options)
    peer.verbose = False
    return peer


def saved_state() -> Finding:
    """AutoAttack cannot resume from the state that it saved, and the state does not say of which run it is."""
    model, x, y, ball = correct("digits/at", 20)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.json"
        peer = cascade(model, ball, attacks=["apgd-ce"], version="custom")
        peer.apgd.n_iter = 2
        peer.run_standard_evaluation(x, y, batch_size=20, state_path=path)
        kind = type(EvaluationState.from_disk(path).attacks_to_run).__name__
        keys = sorted(json.loads(path.read_text()))
        try:
            peer.run_standard_evaluation(x, y, batch_size=20, state_path=path)
        except ValueError as error:
            return True, f"the list of attacks comes back as {kind}; resuming says {error!s:.60}; its keys: {keys}"
    return False, f"it resumed; its keys: {keys}"


def batch_in_square() -> Finding:
    """AutoAttack's Square seeds itself for every batch: the batch size decides which images break."""
    model, x, y, _ = correct("digits/at", 120)

    def broken(batch: int) -> np.ndarray:
        peer = SquareAttack(model, norm="Linf", eps=0.2, n_queries=60, seed=0, device="cpu")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            parts = [
                model(peer.perturb(x[i : i + batch], y[i : i + batch])).argmax(1) != y[i : i + batch]
                for i in range(0, len(x), batch)
            ]
        return torch.cat(parts).numpy()

    differ = int((broken(30) != broken(120)).sum())
    return differ > 0, f"batches of 30 and of 120 decide differently on {differ} of {len(x)} images"


class Asks(nn.Module):
    """Calls autograd while it answers."""

    def forward(self, x: Tensor) -> Tensor:
        """Return two pixels, and their gradients of 1 added."""
        with torch.enable_grad():
            at = x.clone().requires_grad_(True)
            return x.flatten(1)[:, :2] + torch.autograd.grad(at.sum(), at)[0].flatten(1)[:, :2]


def autograd_marks() -> Finding:
    """AutoAttack counts calls of autograd in a global that it never resets: one model marks every later one."""
    plain, x = Linear(torch.ones(4), 0.0), torch.rand(2, 1, 2, 2)

    def warned(model: nn.Module) -> int:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            check_dynamic(model, x)
        return len(heard)

    seen = [warned(plain), warned(Asks()), warned(plain)]
    return seen[0] < seen[2], f"warnings about a plain model before and after one that calls autograd: {seen[::2]}"


def three_classes() -> Finding:
    """AutoAttack fails on three classes: its targeted DLR loss takes the fourth largest logit."""
    model = Linear(torch.linspace(-1, 1, 16), 0.1, classes=3)
    x, y = torch.full((4, 1, 4, 4), 0.5), torch.zeros(4, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:  # a small radius, so that images are left for the targeted attack
            cascade(model, Ball("Linf", 1e-4)).run_standard_evaluation(x, y, batch_size=4)
        except (IndexError, RuntimeError) as error:
            return True, f"{type(error).__name__}: {error!s:.80}"
    return False, "it ran"


def tenth_of_steps() -> Finding:
    """The AutoAttack of torchattacks takes 10 steps where the authors take 100."""
    attacks = torchattacks.AutoAttack(Linear(torch.ones(4), 0.0))._autoattack.attacks
    steps = [attack.steps for attack in attacks if hasattr(attack, "steps")]
    return max(steps) < 100, f"steps: {steps}"


def saturated_pixels() -> Finding:
    """C&W of torchattacks cannot move pixels of exactly 0 or 1: its atanh of ±1 is infinite."""
    stuck = []
    for value in (0.0, 1.0):
        x = torch.full((1, 1, 4, 4), value)
        x[..., 2:] = 0.5
        w = torch.zeros(1, 1, 4, 4)
        w[..., :2] = 1.0 if value else -1.0  # only the saturated pixels matter
        model = Linear(w, 0.8 - float(x.flatten() @ w.flatten()))  # eight pixels by 0.1 each cross the plane
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torchattacks.CW(model, c=10, steps=100, lr=0.01)(x, torch.tensor([0]))
        stuck.append(torch.equal(found[..., :2], x[..., :2]))
    return any(stuck), f"pixels of 0 and of 1 stay where they are: {stuck}"


CHECKS: tuple[Callable[[], Finding], ...] = (
    saved_state, batch_in_square, autograd_marks, three_classes, tenth_of_steps, saturated_pixels,
)  # fmt: skip


def main() -> None:
    print(", ".join(f"{name} {version(name)}" for name in ("pyautoattack", "torchattacks", "torch", "robbench")))
    for check in CHECKS:
        there, seen = check()
        print(f"{'yes' if there else 'NO'}: {check.__doc__}\n    {seen}")


if __name__ == "__main__":
    main()
