"""Targeted evaluation: which class each image is driven to, what is recorded, and what goes on from a stored result."""

import numpy as np
import pytest
import torch
from torch import nn

from robbench.attacks import FGSM, PGD, HopSkipJump, RayS
from robbench.core.errors import DataError, ResultError, RobbenchError, SuiteError
from robbench.core.files import digest
from robbench.evaluation.attack_images import attack_images
from robbench.evaluation.options import Options
from robbench.evaluation.run import evaluate
from robbench.evaluation.targets import Targets
from robbench.gate.changes import check_comparable
from robbench.gate.measure import measure_entry, measure_entry_again
from robbench.masking.run import examine
from robbench.models.spec import ModelSpec
from robbench.recheck.reproduce import reproduce
from robbench.recheck.verify import verify
from robbench.results.places import locate_result
from robbench.results.store import read_rows


def even():
    """A linear model whose ten classes are all near in the middle of the box."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False)
    net[1].weight.copy_(torch.randn(10, 64, generator=torch.Generator().manual_seed(0)))
    net[1].bias.copy_(-0.5 * net[1].weight.sum(1))
    return net.eval()


NET = even()
X = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(3))
Y = NET(X).argmax(1)
ATTACKS = [PGD(objective="margin", steps=10), FGSM()]


def run(root, target, suite=ATTACKS, **options):
    return evaluate(NET, suite, x=X, y=Y, eps="0.12", norm="Linf", results=root, target=target, **options)


def stored(root, result):
    return locate_result(root, result), read_rows(locate_result(root, result) / "outcomes.parquet")


def least_likely():
    return NET(X).scatter(1, Y[:, None], torch.inf).argmin(1).numpy()


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("next", lambda: (Y.numpy() + 1) % 10),
        ("least-likely", least_likely),
        (3, lambda: np.where(Y.numpy() == 3, 4, 3)),
        ("9", lambda: np.where(Y.numpy() == 9, 0, 9)),
        (((Y + 5) % 10).tolist(), lambda: (Y.numpy() + 5) % 10),
        ((Y + 7) % 10, lambda: (Y.numpy() + 7) % 10),
        (np.asarray((Y + 2) % 10), lambda: (Y.numpy() + 2) % 10),
    ],
    ids=["next", "least-likely", "class", "text", "list", "tensor", "array"],
)
def test_a_break_is_a_prediction_of_the_target(tmp_path, target, expected):
    result = run(tmp_path, target)
    _, rows = stored(tmp_path, result)
    broken = rows[rows["status"] == "broken"]
    assert 0 < len(broken) < 80
    assert (broken["prediction"] == expected()[broken["sample"]]).all()
    assert {"target"} <= set(result.overrides) and result.identity["target"] == result.overrides["target"]
    untargeted = run(tmp_path, None)
    assert untargeted.robust_accuracy.value < result.robust_accuracy.value
    assert "target" not in untargeted.identity and digest(untargeted.identity) == untargeted.run_id != result.run_id


def test_random_targets_depend_on_seed_and_image_alone(tmp_path):
    goals = {}
    for seed, samples in ((0, 40), (0, 15), (1, 40)):
        root = tmp_path / f"{seed}-{samples}"
        _, rows = stored(root, run(root, "random", seed=seed, samples=samples))
        broken = rows[rows["status"] == "broken"]
        goals[seed, samples] = dict(zip(broken["sample"], broken["prediction"], strict=True))
    assert goals[0, 15].items() <= goals[0, 40].items()
    assert any(goals[1, 40].get(i, goal) != goal for i, goal in goals[0, 40].items())


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("nxt", RobbenchError, "target: 'nxt' given; allowed: least-likely, random, next, the number of a class"),
        (-1, RobbenchError, "target: -1 given"),
        (True, RobbenchError, "target: True given"),
        (1.5, RobbenchError, "target: 1.5 given"),
        ([0.5] * 40, RobbenchError, "target: .* given"),
        (10, DataError, "target: 10 given; allowed: a class from 0 to 9, or least-likely"),
        ([1, 2], DataError, "target: 2 classes given for 40 images"),
        ([10] * 40, DataError, r"target\[0\]: 10 given; allowed: 0 to 9"),
        (Y.tolist(), DataError, r"target\[0\]: \d given, which is the true class of this image"),
    ],
)
def test_wrong_targets_are_refused_before_anything_runs(tmp_path, monkeypatch, target, error, message):
    monkeypatch.setattr("robbench.evaluation.run.Worker", None)
    with pytest.raises(error, match=message):
        run(tmp_path, target)


@pytest.mark.parametrize(
    "suite", [[RayS(steps=3)], [HopSkipJump(steps=3)], "kind = 'autoattack:APGD-CE'", "kind = 'rays'\neot = 2"]
)
def test_attacks_that_cannot_be_targeted_say_so(tmp_path, monkeypatch, suite):
    monkeypatch.setattr("robbench.evaluation.run.Worker", None)
    norm = "L2" if suite == [HopSkipJump(steps=3)] else "Linf"
    if isinstance(suite, str):
        (tmp_path / "mine.toml").write_text(f"version = 1\n[[attack]]\nname = 'a'\n{suite}\n")
        suite = str(tmp_path / "mine.toml")
    with pytest.raises(SuiteError, match="given with a target; it cannot be targeted"):
        evaluate(NET, suite, x=X, y=Y, eps="0.1", norm=norm, target="next")


def test_a_suite_leaves_out_an_optional_one(tmp_path):
    text = (
        "version = 1\n[[attack]]\nname = 'a'\nkind = 'fgsm'\n[[attack]]\nname = 'b'\nkind = 'rays'\noptional = true\n"
    )
    (tmp_path / "mine.toml").write_text(text)
    assert [a.name for a in run(tmp_path, "next", str(tmp_path / "mine.toml")).attacks] == ["a"]


def test_the_sanity_checks_refuse_a_target(tmp_path):
    with pytest.raises(RobbenchError, match="--target given with the sanity checks"):
        examine("digits/at", samples=8, target="next")


def test_one_attack_on_a_batch_takes_targets():
    goal = (Y + 1) % 10
    outcome = attack_images(NET, ATTACKS[0], X, Y, eps=0.12, target=goal)
    assert 0 < outcome.broken.sum() < 40
    assert torch.equal(NET(outcome.x_adv).argmax(1)[outcome.broken], goal[outcome.broken])


def test_it_extends_and_goes_on_as_it_was_begun(tmp_path):
    whole = run(tmp_path / "a", "least-likely")
    run(tmp_path / "b", "least-likely", samples=15)
    parts = run(tmp_path / "b", "least-likely")
    a, b = (stored(tmp_path / n, r)[0] / "outcomes.parquet" for n, r in (("a", whole), ("b", parts)))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.whole
@pytest.mark.parametrize("target", ["next", "least-likely", "random", "3"])
def test_a_stored_result_is_verified_and_reproduced(tmp_path, target):
    result = evaluate("digits/at", "quick", samples=30, results=tmp_path, target=target, save_adversarials=True)
    folder = locate_result(tmp_path, result)
    checked = verify(folder)
    assert not checked.refuted and checked.confirmed == checked.breaks
    assert reproduce(folder).matters == []


@pytest.mark.whole
def test_a_break_of_another_class_is_refuted(tmp_path):
    """The records of an untargeted run, sold as targeted ones."""
    result = evaluate("digits/at", "quick", samples=30, results=tmp_path, target="next", save_adversarials=True)
    folder = locate_result(tmp_path, result)
    choose = Targets.choose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Targets, "choose", lambda *a, **k: (choose(*a, **k) + 1) % 10)
        refuted = verify(folder).refuted
    assert any("is recorded; the target is" in m.what for m in refuted)


def test_a_list_of_targets_must_be_given_again(tmp_path):
    goal = ((Y + 1) % 10).tolist()
    result = run(tmp_path, goal, save_adversarials=True)
    folder = locate_result(tmp_path, result)
    with pytest.raises(ResultError, match=r"The result has a target for each image .* Give the same list"):
        verify(folder, NET, x=X, y=Y)
    with pytest.raises(ResultError, match="Give the same list"):
        verify(folder, NET, x=X, y=Y, target=((Y + 2) % 10).tolist())
    checked = verify(folder, NET, x=X, y=Y, target=goal)
    assert checked.breaks > 0 and not checked.refuted
    untargeted = locate_result(tmp_path, run(tmp_path, None, save_adversarials=True))
    with pytest.raises(ResultError, match="target given; the result has no target"):
        verify(untargeted, NET, x=X, y=Y, target=goal)


def test_a_gate_measures_with_the_target_again_and_names_another_one(tmp_path):
    options = Options(results=tmp_path, samples=12, sample_seed=0, eps="0.2", norm="Linf", target="next")
    before = measure_entry(ModelSpec("digits/at"), "quick", options)
    again = measure_entry_again(before, Options(results=tmp_path / "again"))
    assert again.identity == before.identity and again.verdicts == before.verdicts
    other = measure_entry(ModelSpec("digits/at"), "quick", Options(results=tmp_path, samples=12, sample_seed=0))
    with pytest.raises(ResultError, match="target"):
        check_comparable(before, other)
