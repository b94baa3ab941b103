"""Attacks of adv-lib and foolbox as stages: exact radii, refusals before anything runs, and what counts as a claim."""

import random
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from robbench.core.errors import SuiteError
from robbench.core.threat import Ball
from robbench.evaluation.more_peers import list_attacks, list_norms
from robbench.evaluation.peers import build_peer
from robbench.evaluation.run import evaluate
from robbench.suite import Stage
from support.attacks import judged
from support.models import Linear, hyperplane, small
from support.models import equally_far as same_radius

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


def equally_far(norm, classes):
    """Images of a linear model, moved along its normal until all have the same radius, in float32."""
    model, x, y, radius = hyperplane(norm, seed=3, n=6, classes=classes)
    r = float(radius.mean())
    with torch.no_grad():
        s = x.flatten(1) @ model.w + model.b
        x += ((r / radius - 1) * s / (model.w @ model.w))[:, None, None, None] * model.w.view(1, 1, 4, 4)
    return model.float().eval(), x.float(), y, r


NEAR = [
    ("advlib:apgd", "Linf", {"loss_function": "ce"}),
    ("advlib:apgd", "L2", {"loss_function": "ce"}),
    ("advlib:fab", "Linf", {}),
    ("advlib:fab", "L2", {}),
    ("advlib:fab", "L1", {}),
    ("advlib:fmn", "Linf", {"steps": 50}),
    ("advlib:fmn", "L1", {"steps": 50}),
    ("advlib:sdf", "L2", {}),
    ("advlib:tr", "L2", {}),
    ("foolbox:LinfBasicIterativeAttack", "Linf", {}),
    ("foolbox:L2BasicIterativeAttack", "L2", {}),
    ("foolbox:SparseL1DescentAttack", "L1", {}),
    ("foolbox:L2AdamBasicIterativeAttack", "L2", {}),
    ("foolbox:LinfAdamBasicIterativeAttack", "Linf", {}),
    ("foolbox:L2MomentumIterativeFastGradientMethod", "L2", {}),
    ("foolbox:LinfMomentumIterativeFastGradientMethod", "Linf", {}),
    ("foolbox:L2FastGradientAttack", "L2", {}),
    ("foolbox:LinfFastGradientAttack", "Linf", {}),
    ("foolbox:DDNAttack", "L2", {}),
    ("foolbox:L2DeepFoolAttack", "L2", {}),
    ("foolbox:LinfDeepFoolAttack", "Linf", {}),
    ("foolbox:LInfFMNAttack", "Linf", {}),
    ("foolbox:L2FMNAttack", "L2", {}),
    ("foolbox:L1FMNAttack", "L1", {}),
]
FAR = [  # whose steps are of fixed lengths, or whose distances are exact within 5 %
    ("advlib:alma", "L2", {}),
    ("advlib:apgd_targeted", "Linf", {"loss_function": "ce"}),
    ("advlib:apgd_targeted", "L2", {"loss_function": "ce"}),
    ("advlib:carlini_wagner_l2", "L2", {"max_iterations": 300}),
    ("advlib:ddn", "L2", {"levels": 1000000}),
    ("advlib:df", "Linf", {}),
    ("advlib:df", "L2", {}),
    ("advlib:pdgd", "L2", {}),
    ("advlib:pdpgd", "Linf", {}),
    ("advlib:pdpgd", "L2", {}),
    ("advlib:pgd_linf", "Linf", {"steps": 200}),
    ("advlib:tr", "Linf", {}),
    ("foolbox:LinfPGD", "Linf", {"steps": 200}),
    ("foolbox:L2PGD", "L2", {"steps": 200}),
    ("foolbox:L2CarliniWagnerAttack", "L2", {"steps": 300, "binary_search_steps": 5}),
    ("torchattacks:FGSM", "Linf", {}),
    ("torchattacks:BIM", "Linf", {}),
    ("torchattacks:PGD", "Linf", {"steps": 100}),
    ("torchattacks:MIFGSM", "Linf", {}),
    ("torchattacks:PGDL2", "L2", {}),
    ("torchattacks:DeepFool", "L2", {}),
    ("torchattacks:APGD", "Linf", {}),
    ("torchattacks:APGD", "L2", {}),
    ("torchattacks:FAB", "Linf", {}),
    ("torchattacks:FAB", "L2", {}),
    ("autoattack:APGD-CE", "Linf", {}),
    ("autoattack:APGD-CE", "L2", {}),
    ("autoattack:APGD-DLR", "Linf", {}),
    ("autoattack:FAB", "Linf", {}),
    ("autoattack:FAB", "L2", {}),
    ("autoattack:FAB-T", "Linf", {}),
    ("autoattack:FAB-T", "L2", {}),
]
MORE_CLASSES = {"advlib:alma": 3, "autoattack:APGD-DLR": 3}  # the libraries' own limits
ELSEWHERE = {
    "sigma_zero": "L0, in test_distance.py",
    "carlini_wagner_linf": "a minute for six images, and nothing within 5 %",
}


def test_every_function_of_adv_lib_is_tested():
    made("advlib:fmn")
    package = sys.modules["adv_lib"]
    with_norm = {n for n in list_attacks("advlib", package) if list_norms("advlib", package, n, {})}
    assert with_norm == {kind.partition(":")[2] for kind, _, _ in NEAR + FAR if "advlib" in kind} | set(ELSEWHERE)


@pytest.mark.parametrize(("kind", "norm", "params"), FAR)
def test_it_finds_the_radius_of_linear_models_within_5_percent(kind, norm, params):
    peer = made(kind, **params)
    for classes in (2, 3, 10):
        if classes < MORE_CLASSES.get(kind, 2):
            continue
        plane, x, y, r = same_radius(norm, 4)
        model = Linear(plane.w.detach(), plane.b.detach(), classes).float().eval()
        for share, expected in ((1.05, 4), (0.95, 0)):
            ball = Ball(norm, r * share)
            x_adv, _ = peer.run(model, x.float(), y, ball, 0)
            assert judged(model, x.float(), y, x_adv.float(), ball).sum() == expected, (classes, share)


@pytest.mark.parametrize(("kind", "norm", "params"), NEAR)
def test_it_finds_the_exact_radius_of_linear_models(kind, norm, params):
    peer = made(kind, **params)
    assert norm in peer.norms
    for classes in (2, 3, 10):
        model, x, y, r = equally_far(norm, classes)
        for share, expected in ((1.025, 6), (0.98, 0)):
            ball = Ball(norm, r * share)
            x_adv, claimed = peer.run(model, x, y, ball, 0)
            assert judged(model, x, y, x_adv, ball).sum() == expected, (classes, share)
            assert claimed.sum() == expected, "a point beyond the radius is no claim"


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


@pytest.mark.parametrize(("kind", "params"), [("advlib:alma", {}), ("advlib:apgd", {}), ("foolbox:GenAttack", {})])
def test_a_failure_of_the_library_is_a_sentence(kind, params):
    """ALMA and the DLR loss need three classes, GenAttack a target."""
    peer = made(kind, **params)
    model, x, y, r = equally_far(peer.norms[0], 2)
    with pytest.raises(SuiteError, match=r"fails|needs at least 3"):
        peer.run(model, x, y, Ball(peer.norms[0], r), 0)


@pytest.mark.parametrize("library", INSTALLED)
def test_a_missing_package_is_named(monkeypatch, library):
    monkeypatch.setitem(sys.modules, INSTALLED[library], None)
    with pytest.raises(SuiteError, match=r"is not installed.*robbench\[more-peers\]"):
        build_peer(Stage("a", f"{library}:fmn", {}))
