"""Weaknesses that the libraries in use have, each shown to be there and shown to be absent here.

That torchattacks' C&W cannot move saturated pixels is shown in test_cw.py. A test that fails because a library has no
longer its weakness brings good news: delete it.
"""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_peers import correct
from torch import nn

from conftest import Linear, run_attack
from robbench.attacks import APGD, Square
from robbench.core.threat import Ball
from robbench.evaluation.run import evaluate
from robbench.masking.gradients import count_autograd_calls
from robbench.suite import build_attack, load_suite

pyautoattack = pytest.importorskip("pyautoattack", reason="pyautoattack is not installed (robbench[peers])")
from pyautoattack.checks import check_dynamic  # noqa: E402
from pyautoattack.square import SquareAttack  # noqa: E402
from pyautoattack.state import EvaluationState  # noqa: E402


def cascade(model, ball, **options):
    peer = pyautoattack.AutoAttack(model, eps=ball.eps, norm=ball.norm, seed=0, **options)
    peer.verbose = False
    return peer


def test_what_autoattack_saves_it_cannot_go_on_with(tmp_path):
    """It writes a set as text and reads the text back; here an interrupted run goes on with the same records."""
    model, x, y, ball = correct("digits/at", 20)
    path = tmp_path / "state.json"
    peer = cascade(model, ball, attacks=["apgd-ce"], version="custom")
    peer.apgd.n_iter = 2
    peer.run_standard_evaluation(x, y, batch_size=20, state_path=path)
    assert isinstance(EvaluationState.from_disk(path).attacks_to_run, str)
    with pytest.raises(ValueError, match="different set of attacks"):
        peer.run_standard_evaluation(x, y, batch_size=20, state_path=path)
    assert not {"seed", "eps", "norm", "model"} & {key.strip("_") for key in json.loads(path.read_text())}

    class Stop(Exception):
        pass

    def stop(*args):
        raise Stop

    call = {"model": "digits/at", "suite": "quick", "samples": 20}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr("robbench.evaluation.run.Run.finish", stop)
        evaluate(**call, results=tmp_path / "r")
    evaluate(**call, results=tmp_path / "r")
    evaluate(**call, results=tmp_path / "whole")
    at = "digits/at/quick/outcomes.parquet"
    assert (tmp_path / "r" / at).read_bytes() == (tmp_path / "whole" / at).read_bytes()


def test_the_batch_decides_with_autoattacks_square_and_not_with_ours():
    """It seeds itself again for every batch, so an image's random numbers depend on where it lies in which batch."""
    model, x, y, _ = correct("digits/at", 120)
    ball, steps = Ball("Linf", 0.2), 60

    def theirs(batch):
        peer = SquareAttack(model, norm="Linf", eps=ball.eps, n_queries=steps, seed=0, device="cpu")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return np.concatenate(
                [
                    (model(peer.perturb(x[i : i + batch], y[i : i + batch])).argmax(1) != y[i : i + batch]).numpy()
                    for i in range(0, len(x), batch)
                ]
            )

    def ours(lanes):
        return run_attack(model, Square(steps=steps), x, y, ball, lanes=lanes).broken

    assert (theirs(30) != theirs(120)).any()
    assert np.array_equal(ours(16), ours(256))


def test_a_model_that_asks_autograd_marks_every_later_one_in_autoattack():
    """It counts calls in a dictionary of its module and never sets it back; here each model has a count of its own."""

    class Asks(nn.Module):
        def forward(self, x):
            with torch.enable_grad():
                at = x.clone().requires_grad_(True)
                return x.flatten(1)[:, :2] + torch.autograd.grad(at.sum(), at)[0].flatten(1)[:, :2]

    plain, x = Linear(torch.ones(4), 0.0), torch.rand(2, 1, 2, 2)

    def told(model):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            check_dynamic(model, x)
        return len(heard)

    assert not told(plain)
    assert told(Asks()) and told(plain)
    of = [SimpleNamespace(x=x, target=SimpleNamespace(module=model, device="cpu")) for model in (Asks(), plain)]
    assert count_autograd_calls(of[0]) and not count_autograd_calls(of[1])


def test_autoattack_fails_on_three_classes_and_ours_does_not():
    """The targeted DLR loss divides by a difference to the fourth largest logit."""
    w = torch.linspace(-1, 1, 16)
    x, y = torch.full((4, 1, 4, 4), 0.5), torch.zeros(4, dtype=torch.int64)
    model, ball = Linear(w, 0.1, classes=3), Ball("Linf", 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((IndexError, RuntimeError)):
            # A small radius, so that something is left for it.
            cascade(model, Ball("Linf", 1e-4)).run_standard_evaluation(x, y, batch_size=4)
    assert run_attack(model, APGD(objective="dlr_targeted", steps=10, targets=2), x, y, ball).broken.all()


def test_the_autoattack_of_torchattacks_takes_a_tenth_of_the_steps():
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed (robbench[peers])")
    theirs = torchattacks.AutoAttack(Linear(torch.ones(4), 0.0))._autoattack.attacks
    assert [attack.steps for attack in theirs if hasattr(attack, "steps")] == [10, 10, 10]
    ours = [build_attack(stage) for stage in load_suite("autoattack").stages("digits")]
    assert [attack.steps for attack in ours] == [100, 100, 100, 5000]
