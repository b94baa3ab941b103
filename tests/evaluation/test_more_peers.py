"""Attacks of adv-lib and foolbox as stages: refusals before anything runs, and what counts as a claim."""

import random
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from robbench.core.errors import SuiteError
from robbench.core.threat import Ball
from robbench.evaluation.peers import build_peer
from robbench.evaluation.run import evaluate
from robbench.suite import Stage
from support.models import small

INSTALLED = {"advlib": "adv_lib", "foolbox": "foolbox"}
X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))
Y = small()(X).argmax(1)


def made(kind, **params):
    try:
        return build_peer(Stage("a", kind, params))
    except SuiteError as error:
        if "is not installed" in str(error):
            pytest.skip(f"{kind} is not installed (robbench[more-peers])")
        raise


@pytest.mark.parametrize("kind", ["advlib:fmn", "foolbox:LinfBasicIterativeAttack"])
def test_it_is_judged_like_ours(tmp_path, kind):
    made(kind)
    path = tmp_path / "mine.toml"
    path.write_text(f'version = 1\n[[attack]]\nname = "a"\nkind = "{kind}"\nbatch = 4\n')
    result = evaluate(small(), str(path), x=X, y=Y, norm="Linf", eps="0.2")
    assert result.robust_accuracy.value == 0 and result.attacks[0].refuted == 0
    config = result.attacks[0].config
    assert config["kind"] == kind and config["batch_coupled"] == 4
    assert config["package"].split()[0] in ("adv-lib", "foolbox")


def test_every_generator_is_seeded_and_put_back(monkeypatch):
    """A library that draws from torch, NumPy and Python: the same points for the same seed."""

    class Noise:
        def __init__(self, model):
            pass

        def __call__(self, x, y):
            return x * 0 + torch.rand(()) + np.random.rand() + random.random()

    module = ModuleType("torchattacks")
    module.Noise = Noise
    monkeypatch.setitem(sys.modules, "torchattacks", module)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    peer, model, ball = made("torchattacks:Noise"), small(), Ball("Linf", 0.1)
    first, other = (peer.run(model, X, Y, ball, seed)[0] for seed in (1, 2))
    random.random(), np.random.rand(), torch.rand(())  # what came before does not matter
    states = random.getstate(), np.random.get_state()[1].copy(), torch.random.get_rng_state()
    again = peer.run(model, X, Y, ball, 1)[0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.random.get_rng_state(), states[2])


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("advlib:fnm", {}, "Unknown function of adv-lib 'fnm'. Did you mean fmn"),
        ("foolbox:LinfPDG", {}, "Unknown class of foolbox 'LinfPDG'"),
        ("advlib:fmn", {"stepz": 3}, "Unknown parameter 'stepz'. Did you mean steps"),
        ("advlib:fmn", {"targeted": True}, "Unknown parameter 'targeted'"),
        ("advlib:fmn", {"norm": 2}, "Unknown parameter 'norm'"),
        ("foolbox:LinfPGD", {"step": 3}, "Unknown parameter 'step'. Did you mean steps"),
        ("foolbox:VirtualAdversarialAttack", {}, "missing 1 required positional argument: 'steps'"),
        ("advlib:fmn", {"batch": 0}, "batch 0 given"),
        ("foolbox:GenAttack", {}, "needs a target class, which a suite cannot give"),
        ("foolbox:DatasetAttack", {}, "needs adversarial examples to start from"),
        ("foolbox:BinarizationRefinementAttack", {}, "needs starting points"),
    ],
)
def test_mistakes_are_named_when_the_stage_is_made(kind, params, message):
    made("advlib:fmn"), made("foolbox:LinfPGD")
    with pytest.raises(SuiteError, match=message):
        made(kind, **params)


@pytest.mark.parametrize(
    ("kind", "norm", "message"),
    [
        ("advlib:ddn", "Linf", "made for: L2"),
        ("advlib:sigma_zero", "Linf", "made for: L0"),
        ("advlib:fga", "Linf", "made for: other distances"),
        ("foolbox:L2FMNAttack", "L1", "made for: L2"),
        ("torchattacks:APGD", "L1", "made for: Linf, L2"),
        ("foolbox:SpatialAttack", "Linf", "made for: other distances"),
    ],
)
def test_another_norm_is_refused_before_anything_runs(tmp_path, monkeypatch, kind, norm, message):
    made(kind)
    path = tmp_path / "mine.toml"
    path.write_text(f'version = 1\n[[attack]]\nname = "a"\nkind = "{kind}"\n')
    monkeypatch.setattr("robbench.evaluation.run.Worker", None)
    with pytest.raises(SuiteError, match=message):
        evaluate(small(), str(path), x=X, y=Y, norm=norm, eps="0.1")


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("advlib:alma", {}, "alma given with a model of 2 classes; its DLR loss needs at least 3"),
        ("advlib:apgd", {}, "needs at least 3.*take loss_function"),
        ("advlib:apgd_targeted", {}, "needs at least 4"),
        ("torchattacks:APGDT", {}, "needs at least 4"),
    ],
)
def test_too_few_classes_are_refused_before_anything_runs(tmp_path, monkeypatch, kind, params, message):
    made(kind)
    path = tmp_path / "mine.toml"
    path.write_text(f'version = 1\n[[attack]]\nname = "a"\nkind = "{kind}"\n')
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2)).eval()
    monkeypatch.setattr("robbench.evaluation.run.Worker", None)
    with pytest.raises(SuiteError, match=message):
        evaluate(model, str(path), x=X, y=model(X).argmax(1), norm="L2", eps="0.1")


def test_a_failure_of_the_library_is_a_sentence():
    """Its filters are made for three channels."""
    with pytest.raises(SuiteError, match="torchattacks:PIFGSM fails: RuntimeError"):
        made("torchattacks:PIFGSM").run(small(), X, Y, Ball("Linf", 0.1), 0)


@pytest.mark.parametrize("library", INSTALLED)
def test_a_missing_package_is_named(monkeypatch, library):
    monkeypatch.setitem(sys.modules, INSTALLED[library], None)
    with pytest.raises(SuiteError, match=r"is not installed.*robbench\[more-peers\]"):
        build_peer(Stage("a", f"{library}:fmn", {}))
