"""The verdict does not depend on the logits' scale or the seed, and sees gradients that are wrong in part."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from robbench.attacks import PGD
from robbench.classifier.batch_width import BatchWidths
from robbench.core.losses import margin
from robbench.core.threat import Ball
from robbench.data.sets import load
from robbench.evaluation.inputs import Images, own_target
from robbench.evaluation.options import Options
from robbench.masking.binarization import FeatureExtractor
from robbench.masking.checks import run_checks
from robbench.masking.gradient_probe import GradientProbe
from robbench.masking.gradients import choose_points, measure_gradient_quality, measure_logit_scale, measure_randomness
from robbench.masking.measure import CheckBudget
from robbench.masking.measurements import Challenge
from robbench.masking.record import FollowUpResult
from robbench.masking.run import _Examination, examine
from robbench.masking.verdict import decide_verdict
from robbench.models.card import Registry
from robbench.models.load import load_model
from robbench.models.spec import ModelSpec
from support.masks import Cut, NoisyGradient, NoisyWhere, Reversed

pytestmark = pytest.mark.whole

USUAL = PGD(objective="ce_scaled", steps=20)


@cache
def digits(name):
    return load_model(Registry.default([]).find(f"digits/{name}")).module.eval()


class Affine(nn.Module):
    """Logits times a positive factor, plus an offset."""

    def __init__(self, inner, factor, offset):
        super().__init__()
        self.inner, self.factor, self.offset = inner, factor, offset

    def forward(self, x):
        return self.inner(x) * self.factor + self.offset


class Mean(nn.Module):
    """The mean of two networks. The second one gives no gradient."""

    def __init__(self, seen, detached):
        super().__init__()
        self.seen, self.detached = seen, detached

    def forward(self, x):
        return (self.seen(x) + self.detached(x).detach()) / 2


class Decoy(nn.Module):
    """The answer of one network with the gradient of another."""

    def __init__(self, answers, gradients):
        super().__init__()
        self.answers, self.gradients = answers, gradients

    def forward(self, x):
        decoy = self.gradients(x)
        return self.answers(x).detach() + (decoy - decoy.detach())


class EveryThird(nn.Module):
    """Passes images on. Every third backward pass gets noise for a gradient."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += x.requires_grad
        noise = torch.randn_like(x) * (self.calls % 3 == 0)
        return x + noise * (x - x.detach())


def always(x):
    return torch.ones(len(x), dtype=torch.bool)


def off_grid(x):
    """The digits' pixels are sixteenths; anything else is an attack's."""
    return ((x * 16) % 1 != 0).flatten(1).any(1)


def unsure(x):
    """Return whether the largest two logits are close, as near the end of an attack."""
    with torch.no_grad():
        top = digits("at")(x).topk(2, dim=1).values
    return top[:, 0] - top[:, 1] < 1.0


def columns(x):
    return (torch.arange(x.shape[3]) % 2 == 0).expand_as(x)


def third(x):
    """Choose all pixels of about a third of all images."""
    return ((97 * x.flatten(1).sum(1)) % 1 < 0.33).view(-1, 1, 1, 1).expand_as(x)


def probe(model, seed=0, count=24):
    images = Images.of(load("digits"))
    target = own_target(ModelSpec(model.eval(), name="mine"), torch.device("cpu"), images, Options())
    x, y = images.x(np.arange(2 * count)), images.y[: 2 * count]
    with torch.no_grad():
        right = np.flatnonzero((target.module(x).argmax(1) == y).numpy())[:count]
    widths = BatchWidths(target.module, tuple(x.shape[1:]), 64, x.dtype)
    return GradientProbe(target, x[right], y[right], images.index[right], Ball("Linf", 0.2), seed, widths)


@pytest.fixture(scope="module", autouse=True)
def on_few_images():
    few = CheckBudget(
        gradients=16, traces=8, unstable=4, curve=8, grid=8, binarization=4, linear=8, transfers=8, randomness=16
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robbench.masking.measure.CheckBudget", lambda: few)
        yield


@pytest.fixture(scope="module")
def base():
    """Measurements of an honest model, of which each test replaces a part."""
    return examine(digits("at"), samples=24, dataset="digits", device="cpu").measurements


def judge(base, **parts):
    checks = run_checks(base.model_copy(update=parts))
    return decide_verdict(checks), {c.name: c for c in checks}


def judge_gradient(base, model, seed=0):
    p = probe(model, seed)
    return judge(base, gradients=measure_gradient_quality(p, choose_points(p, USUAL)))


# ---- the scale of the logits


@pytest.mark.parametrize(
    ("factor", "offset", "seed"), [(0.01, 0.0, 0), (0.01, 50.0, 1), (1.0, -50.0, 2), (10.0, 0.0, 0), (100.0, 50.0, 1)]
)
@pytest.mark.parametrize(("name", "verdict"), [("at", "trustworthy"), ("ls095_sigma03", "suspicious")])
def test_no_verdict_depends_on_a_factor_an_offset_or_the_seed(name, verdict, factor, offset, seed):
    model = Affine(digits(name), factor, offset).eval()
    found = examine(model, samples=16, dataset="digits", device="cpu", seed=seed)
    assert found.verdict == verdict, found.decided_by


@pytest.mark.parametrize(("factor", "offset"), [(0.01, 0.0), (100.0, 0.0), (1.0, 50.0), (1000.0, -500.0)])
def test_no_measurement_of_the_gradient_depends_on_a_factor_or_an_offset(factor, offset):
    plain, scaled = probe(digits("at")), probe(Affine(digits("at"), factor, offset))
    for measure in (lambda p: measure_gradient_quality(p, choose_points(p, USUAL)), measure_logit_scale):
        one, other = measure(plain), measure(scaled)
        for field in ("cosine", "cosine_low", "nearby", "nonlinearity", "flat", "unavailable", "wrong_spread"):
            if hasattr(one, field):
                assert getattr(one, field) == pytest.approx(getattr(other, field), abs=5e-3), field
    layers = [FeatureExtractor(p.target.module, p.x[:8]).layer for p in (plain, scaled)]
    assert None not in layers and layers[0].in_features == layers[1].in_features


def test_probabilities_are_reported_and_decide_nothing(base):
    _, checks = judge(base, probabilities=True)
    assert (checks["probabilities"].status, checks["probabilities"].decides) == ("fail", "")


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_an_offset_does_not_hide_noise_on_the_logits(base, offset):
    class Noise(nn.Module):
        def forward(self, z):
            return z + 0.02 * torch.randn_like(z) + offset

    p = probe(nn.Sequential(digits("at"), Noise()))
    found = measure_randomness(p, choose_points(p, USUAL))
    assert found.change > 1e-4 and judge(base, randomness=found)[0][0] == "randomized"


# ---- gaps


def test_a_tanh_on_the_logits_is_flagged_by_what_hunts_by_margins():
    model = nn.Sequential(digits("at"), nn.Tanh()).eval()
    found = examine(model, samples=40, dataset="digits", device="cpu")
    assert found.verdict in ("suspicious", "masked") and "overestimation" in found.decided_by
    others = [c for c in found.measurements.challenges if c.role not in ("hunt", "transfer", "square")]
    hunt = next(c for c in found.measurements.challenges if c.role == "hunt")
    assert hunt.broken > max(c.broken for c in others)


@pytest.mark.parametrize(("best", "verdict"), [(0.41, "trustworthy"), (0.40, "suspicious"), (0.29, "masked")])
def test_a_gap_of_ten_points_is_flagged_whoever_found_it(base, best, verdict):
    """Here the control breaks as much. In floating point, 0.5 − 0.4 is a bit less than a tenth."""
    control = Challenge(name="c", role="control", given=100, broken=20, beyond=0, behind=0, alone=0)
    accuracy = base.pgd.model_copy
    (found, by), _ = judge(
        base, n=200, challenges=[control], pgd=accuracy(update={"value": 0.5}), best=accuracy(update={"value": best})
    )
    assert (found, by) == (verdict, [] if verdict == "trustworthy" else ["overestimation"])


@pytest.mark.parametrize(("alone", "status"), [(5, "pass"), (6, "fail")])
def test_what_square_alone_breaks_counts_once_it_is_no_chance(base, alone, status):
    control = Challenge(name="c", role="control", given=100, broken=0, beyond=0, behind=0, alone=0)
    square = Challenge(name="s", role="square", given=100, broken=alone, beyond=alone, behind=0, alone=alone)
    _, checks = judge(base, n=200, challenges=[control, square])
    assert checks["square"].status == status


def test_square_has_queries_enough_for_a_small_network():
    """A reversed gradient leaves most images of a small network to Square."""
    found = examine(Reversed(digits("natural"), always).eval(), samples=24, dataset="digits", device="cpu")
    square = next(c for c in found.measurements.challenges if c.role == "square")
    assert square.broken >= 0.9 * square.given and "square" in found.decided_by


# ---- gradients that change, or are those of another function


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: NoisyGradient(net, always),
        lambda net: NoisyGradient(net, off_grid),
        lambda net: NoisyGradient(net, unsure),
        lambda net: nn.Sequential(EveryThird(), net),
    ],
)
def test_a_gradient_with_noise_is_found_with_every_seed(base, wrap, seed):
    torch.manual_seed(seed)
    (verdict, by), _ = judge_gradient(base, wrap(digits("at")), seed)
    assert verdict == "suspicious" and "repeated_gradients" in by


@pytest.mark.parametrize(
    "model",
    [
        lambda: Cut(digits("at"), columns),
        lambda: Cut(digits("at"), third),
        lambda: Cut(digits("at"), lambda x: unsure(x).view(-1, 1, 1, 1).expand_as(x)),
        lambda: Mean(digits("trades"), digits("at")),
        lambda: Decoy(digits("at"), digits("trades")),
        lambda: Reversed(digits("at"), unsure),
    ],
)
def test_a_gradient_that_is_wrong_in_part_is_found_without_any_attack(base, model):
    (verdict, by), _ = judge_gradient(base, model())
    assert verdict == "suspicious" and {"finite_differences", "partial_gradients"} & set(by)


@pytest.mark.parametrize(
    ("median", "low", "by"),
    [
        (0.94, None, ["finite_differences"]),
        (0.971, 0.93, ["finite_differences"]),
        (0.999, 0.53, ["partial_gradients"]),
        (0.98, 0.95, []),
    ],
)
def test_the_bars_of_the_finite_differences(base, median, low, by):
    quality = base.gradients.model_copy(update={"cosine": median, "cosine_low": low})
    assert judge(base, gradients=quality)[0][1] == by


@pytest.mark.parametrize("name", ["natural", "trades", "ls095_sigma03"])
def test_the_gradient_of_a_trained_network_passes(base, name):
    (verdict, by), checks = judge_gradient(base, digits(name))
    assert verdict == "trustworthy", by
    assert checks["partial_gradients"].value > 0.97 and checks["repeated_gradients"].value == 0


# ---- randomness


@pytest.mark.parametrize("where", [off_grid, unsure, always])
def test_noise_away_from_the_images_is_randomized_and_sent_to_eot(base, where):
    p = probe(NoisyWhere(digits("at"), 0.2, where))
    found = measure_randomness(p, choose_points(p, USUAL))
    (verdict, by), _ = judge(base, randomness=found)
    assert (verdict, by) == ("randomized", ["randomized"])
    assert where is not off_grid or (found.flips, found.change) == (0, 0.0)


def test_a_model_that_is_random_off_the_pixel_grid_is_sent_to_eot():
    model = NoisyWhere(digits("natural"), 0.2, off_grid).eval()
    found = examine(model, samples=12, dataset="digits", device="cpu")
    assert (found.verdict, found.advice.suite) == ("randomized", "eot")


# ---- old records, and what --act reports


def test_what_an_old_record_lacks_is_not_measured(base):
    old = {"points": None, "flips_off": None, "change_off": None}
    quality = {"cosine_low": None, "unrepeatable": None}
    (verdict, _), checks = judge(
        base,
        randomness=base.randomness.model_copy(update=old),
        gradients=base.gradients.model_copy(update=quality),
    )
    assert verdict == "trustworthy" and "not measured" in checks["randomized"].reason
    for name in ("repeated_gradients", "partial_gradients"):
        assert (checks[name].status, checks[name].reason[:12]) == ("not applicable", "Not measured")


@pytest.mark.parametrize("shift", [-0.1, 0.1])
def test_the_lower_accuracy_is_reported_after_acting(monkeypatch, tmp_path, shift):
    model = nn.Sequential(digits("at"), nn.Tanh()).eval()
    best = examine(model, samples=12, dataset="digits", device="cpu", results=tmp_path).measurements.best
    other = best.model_copy(update={"value": best.value + shift})
    answer = FollowUpResult(suite="masked", run_id="0" * 64, robust_accuracy=other)
    monkeypatch.setattr(_Examination, "_act", lambda *_: answer)
    for _ in range(2):  # after the run, and read from the file
        found = examine(model, samples=12, dataset="digits", device="cpu", results=tmp_path, act=True)
        assert found.acted.robust_accuracy.value == min(best.value, other.value)


def test_the_points_of_the_probes_lie_in_the_ball():
    p = probe(digits("at"))
    clean, inside, surface, attacked = choose_points(p, USUAL)
    assert torch.equal(clean, p.x)
    for points in (inside, surface, attacked):
        assert float((points - p.x).abs().max()) <= 0.2 + 1e-6 and not torch.equal(points, p.x)
    assert float((margin(p.target.module(attacked), p.y) > margin(p.target.module(inside), p.y)).float().mean()) > 0.9
