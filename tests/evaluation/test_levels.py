"""Images of 8 bits: a break counts only if it holds after rounding, inside the ball."""

import math
import re

import pytest
import torch
from torch import nn

from robbench.attacks import CW, FGSM, PGD, DeepFool, HopSkipJump, Square
from robbench.core.errors import ResultError, RobbenchError
from robbench.core.files import digest
from robbench.core.threat import Ball
from robbench.evaluation.attack_images import attack_images
from robbench.evaluation.options import Options
from robbench.evaluation.run import evaluate
from robbench.gate.changes import check_comparable
from robbench.gate.measure import measure_entry, measure_entry_again
from robbench.masking.run import examine
from robbench.masking.stored import VerdictIndex
from robbench.models.spec import ModelSpec
from robbench.recheck.reproduce import reproduce
from robbench.recheck.verify import verify
from robbench.results.places import locate_result
from robbench.results.store import read_rows


class Between(nn.Module):
    """Right on every level of 8 bits, and wrong between the levels."""

    def forward(self, x):
        off = (torch.sin(math.pi * 255 * x) ** 2).flatten(1).mean(1)
        return torch.stack([0.1 - off, off - 0.1], 1)


def linear():
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).requires_grad_(False)
    w = torch.randn(48, generator=torch.Generator().manual_seed(0))
    net[1].weight.copy_(torch.stack([w, -w]) / 2)
    net[1].bias.zero_()
    return net.eval(), w


def pixels(n, low=60, high=196, shape=(3, 4, 4), seed=1):
    levels = torch.randint(low, high, (n, *shape), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 255


NET, W = linear()
X = pixels(60)
NET[1].bias.copy_(torch.tensor([-0.5, 0.5]) * (X.flatten(1) @ W).mean())
Y = NET(X).argmax(1)


def run(root, levels, net=NET, x=X, y=Y, suite=None, **options):
    options = {"eps": "0.0184", "norm": "Linf", **options}
    return evaluate(net, suite or [PGD(steps=10)], x=x, y=y, results=root, levels=levels, **options)


@pytest.mark.parametrize("attack", [PGD(steps=10), FGSM(), Square(steps=300)], ids=lambda a: type(a).__name__)
def test_a_linear_model_breaks_at_the_radius_of_whole_levels(attack):
    margin = NET(X)[:, 0].sub(NET(X)[:, 1]).abs().double()
    reach = {eps: margin < eps / 255 * W.abs().sum() for eps in (4.0, 4.7)}
    out = {levels: attack_images(NET, attack, X, Y, eps="0.0184", levels=levels) for levels in (None, 255)}
    assert (reach[4.7] & ~reach[4.0]).any(), "the radii tell the two apart"
    if not isinstance(attack, Square):
        assert torch.equal(out[None].broken, reach[4.7]) and torch.equal(out[255].broken, reach[4.0])
    assert out[255].broken.any() and not (out[255].broken & ~reach[4.0]).any()
    on = out[255].x_adv * 255
    assert torch.equal(on.round() / 255, out[255].x_adv)
    assert (out[255].distance[out[255].broken] <= 4 / 255 + 1e-6).all()


def test_a_break_between_levels_is_none():
    x = pixels(8)
    y = torch.zeros(8, dtype=torch.int64)
    for attack in (PGD(steps=8), FGSM(), Square(steps=60), HopSkipJump(steps=200), DeepFool(), CW(iterations=20)):
        norm = attack.norms[0]
        given = {"eps": "25/2550" if norm == "Linf" else "0.1", "norm": norm}
        free, whole = (attack_images(Between().eval(), attack, x, y, levels=n, **given) for n in (None, 255))
        assert free.broken.any() or not isinstance(attack, PGD | FGSM | Square), attack
        assert not whole.broken.any(), attack


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 3.6 / 255), ("L2", 0.05), ("L1", 0.2), ("L2", 1e-3)])
def test_rounding_stays_in_the_ball_where_levels_allow_it(norm, eps):
    x0 = pixels(200, 0, 256)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5))
    free = Ball(norm, eps)
    x = free.project(x0, x0 + noise * eps)
    ball = Ball(norm, eps, 255)
    rounded = ball.round(x0, x)
    assert free.contains(x0, x).all() and ball.contains(x0, rounded).all()
    assert ball.contains(x0, x).float().mean() < 0.1 and torch.equal(ball.round(x0, rounded), rounded)
    assert ((rounded - x).abs() <= 1.001 / 255).all()
    nearest = (x * 255).round() / 255
    kept = free.contains(x0, nearest)
    assert torch.equal(rounded[kept], nearest[kept]), "what stays in the ball is rounded to the nearest level"
    if eps > 0.01:
        assert not kept.all() and (rounded != x0).flatten(1).any(1).all()


def test_clean_pixels_off_the_levels():
    x0 = torch.full((4, 1, 2, 2), 100.4 / 255)
    x0[1], x0[3] = 100 / 255, 0.2 / 255
    for eps, allowed in ((0.3, [False, True, False, True]), (0.5, [True, True, True, True])):
        ball = Ball("Linf", eps / 255, 255)
        corners = [ball.round(x0, (x0 + s * eps / 255).clamp(0, 1)) for s in (-1, 1)]
        for at in corners:
            assert ball.contains(x0, at).tolist() == allowed, "no level lies within 0.3 of 100.4"
    wide = Ball("Linf", 1.5 / 255, 255)
    up = wide.round(x0, x0 + 1.5 / 255)
    assert (up * 255).round().flatten(1).amax(1).tolist() == [101, 101, 101, 1], (
        "the last level inside, not the nearest"
    )


def test_points_outside_the_ball_are_rounded_plainly():
    x0 = pixels(5)
    far = (x0 + 31.9 / 255).clamp(0, 1)
    for norm in ("Linf", "L2", "L1"):
        assert torch.equal(Ball(norm, 0.01, 255).round(x0, far), (far * 255).round() / 255)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1", "L0"])
def test_images_have_a_choice_where_two_points_on_levels_are_in_the_ball(norm):
    """Against all 5^4 points on four levels."""
    grid = torch.cartesian_prod(*[torch.arange(5) / 4] * 4).view(-1, 1, 2, 2)
    x0 = torch.rand(300, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    x0[:100] = (x0[:100] * 4).round() / 4
    x0[100:200, :, 0] = (x0[100:200, :, 0] * 4).round() / 4
    counts = set()
    for eps in (0.0, 0.06, 0.13, 0.2, 0.24, 0.26, 0.4, 0.7) if norm != "L0" else (0, 1, 2, 3):
        ball = Ball(norm, eps, 4)
        count = torch.stack([ball.contains(x.expand_as(grid), grid).sum() for x in x0])
        assert torch.equal(ball.has_choice(x0), count > 1), eps
        counts |= set(count.clamp(max=2).tolist())
    assert counts == {0, 1, 2} and Ball(norm, 0.0).has_choice(x0).all()


def test_images_that_no_attack_can_change_are_flagged(tmp_path):
    x = X[:6].clone()
    x[4:] = (x[4:] * 255 + 0.4) / 255  # off the levels: the nearest is 0.4 away, the next 0.6
    for levels, eps, fixed in (
        (255, 0.9, "^With levels 255, 4 of 6 .*: samples 0–3"),
        (255, 0.3, "6 of 6"),
        (1, 50, "6 of 6"),
        (255, 1.1, ""),
    ):
        result = run(tmp_path / f"{levels} {eps}", levels, x=x, y=NET(x).argmax(1), eps=str(eps / 255))
        assert ("levels" in result.flags) == bool(fixed), eps
        assert re.search(fixed, result.flags.get("levels", "")), result.flags
        outcome = attack_images(NET, PGD(steps=3), x, NET(x).argmax(1), eps=eps / 255, levels=levels)
        assert outcome.flags.get("levels") == result.flags.get("levels")
    assert "levels" not in run(tmp_path / "none", None, x=x, y=NET(x).argmax(1), eps="1/1000").flags


def test_levels_are_part_of_the_identity_only_where_they_are_given(tmp_path):
    plain, whole = run(tmp_path, None), run(tmp_path, 255)
    assert "levels" not in plain.identity and "levels" not in plain.overrides
    assert whole.identity["levels"] == 255 and whole.overrides["levels"] == "255"
    assert digest(whole.identity) == whole.run_id != plain.run_id
    assert whole.robust_accuracy.value > plain.robust_accuracy.value
    assert run(tmp_path, 127).run_id != whole.run_id
    rows = read_rows(locate_result(tmp_path, whole) / "outcomes.parquet")
    assert (rows.loc[rows["status"] == "broken", "distance"] <= 4 / 255 + 1e-6).all()


def test_verify_refutes_points_between_levels(tmp_path, monkeypatch):
    whole = run(tmp_path, 255, save_adversarials=True)
    folder = locate_result(tmp_path, whole)
    found = verify(folder, NET, x=X, y=Y)
    assert found.breaks > 0 and found.confirmed == found.breaks and not found.refuted
    again = reproduce(folder, NET, x=X, y=Y, suite=[PGD(steps=10)])
    assert not again.matters and not again.verdicts
    with monkeypatch.context() as patch:  # an engine that does not round
        patch.setattr(Ball, "round", lambda self, x0, x: x)
        patch.setattr(
            Ball, "contains", lambda self, x0, x: Ball(self.norm, self.eps).distance(x0, x) <= self.eps + 1e-6
        )
        cheat = run(tmp_path / "cheat", 255, save_adversarials=True)
    refuted = verify(locate_result(tmp_path / "cheat", cheat), NET, x=X, y=Y).refuted
    assert len(refuted) >= verify(folder, NET, x=X, y=Y).breaks


def test_the_gate_measures_with_the_levels_of_the_baseline(tmp_path):
    spec = ModelSpec(NET, x=X, y=Y)
    options = Options(eps="0.0184", norm="Linf", results=tmp_path)
    suite = [PGD(steps=10)]
    plain, whole = (
        measure_entry(spec, suite, options=o) for o in (options, Options(**{**vars(options), "levels": 255}))
    )
    with pytest.raises(ResultError, match="levels: 255 in the baseline, any value of a pixel now"):
        check_comparable(whole, plain)
    whole = whole.model_copy(update={"suite": "fast"})
    assert measure_entry_again(whole, options, spec=spec).identity["levels"] == 255


def test_sanity_measures_and_stores_levels(tmp_path):
    given = {"eps": "0.0184", "norm": "Linf", "results": tmp_path, "samples": 20}
    whole, plain = (examine(NET, x=X, y=Y, levels=levels, **given) for levels in (255, None))
    assert whole.measured["levels"] == 255 and "levels" not in plain.measured
    assert whole.measurements.best.value >= plain.measurements.best.value
    result = run(tmp_path / "other", 255, samples=20)
    verdicts = VerdictIndex(tmp_path)
    assert verdicts.find_file(result).measured == whole.measured
    assert verdicts.find_file(run(tmp_path / "other", None, samples=20)).measured == plain.measured


@pytest.mark.parametrize("levels", [0, -1, 1024, 2.5, True, "255"])
def test_other_levels_are_refused(levels):
    with pytest.raises(RobbenchError, match=r"levels: .* given; allowed"):
        Options(levels=levels)
