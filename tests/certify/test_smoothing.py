"""Randomized smoothing: the closed form of a linear model, Clopper-Pearson, draws that can be made again, tampering."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy.stats import binom

from robbench.certify.radius import least_probability, smoothing_radius
from robbench.certify.record import read_certified, summarize_certified, write_certified
from robbench.certify.run import certify
from robbench.certify.smoothing import Smoothing
from robbench.certify.verify import verify_certified
from robbench.core import rng
from robbench.core.errors import ResultError, RobbenchError
from robbench.evaluation.inputs import resolve
from robbench.evaluation.options import Options
from robbench.models.spec import ModelSpec
from support.models import hyperplane, images, small

X = images(12)
NET = small()
Y = NET(X).argmax(1)


def make(root, lanes=None, draws=300, samples=12):
    method = Smoothing(sigma=0.2, draws=draws, choice=50, alpha=0.01)
    file = certify(
        ModelSpec(NET, X, Y, name="net"), method, Options(samples=samples, results=root, lanes=lanes)
    )  # fmt: skip
    (folder,) = (root / "custom" / "net" / "certified").iterdir()
    return file, folder


def test_the_radius_of_a_linear_model_is_its_distance_within_the_confidence_bound(tmp_path):
    model, x, y, distance = hyperplane("L2", seed=3, n=8)
    sigma, draws = float(distance.max()) / 1.5, 20_000
    method = Smoothing(sigma=sigma, draws=draws)
    file = certify(ModelSpec(model.eval(), x, y, name="plane"), method, Options(samples=8, results=tmp_path))
    (folder,) = (tmp_path / "custom" / "plane" / "certified").iterdir()
    rows = read_certified(folder)[1]
    assert file.counts.get("wrong", 0) == 0
    for row, true in zip(rows.to_dict("records"), distance.tolist(), strict=True):
        # Of a linear model, the smoothed class has the probability Φ(distance / σ), so the true radius is the distance.
        probability = NormalDist().cdf(true / sigma)
        assert row["radius"] <= true
        assert abs(row["count"] / draws - probability) < 5 * (probability * (1 - probability) / draws) ** 0.5
        if row["radius"]:
            low = smoothing_radius(int(binom.ppf(1e-6, draws, probability)), draws, 0.001, sigma)
            assert row["radius"] >= low


def test_the_bound_is_that_of_clopper_and_pearson():
    for count, draws, alpha in ((990, 1000, 0.001), (100, 100, 0.01), (51, 100, 0.05), (1, 7, 0.2)):
        low = least_probability(count, draws, alpha)
        assert binom.sf(count - 1, draws, low) == pytest.approx(alpha, rel=1e-6)
    assert least_probability(100, 100, 0.01) == pytest.approx(0.01 ** (1 / 100))
    assert least_probability(0, 10, 0.1) == 0.0
    assert smoothing_radius(50, 100, 0.001, 1.0) == 0.0
    with pytest.raises(ValueError, match="expected 0 <= count <= draws"):
        least_probability(11, 10, 0.1)


def test_a_certificate_is_wrong_as_rarely_as_alpha_says():
    true, alpha, generator = 0.8, 0.1, np.random.default_rng(0)
    bounds = [least_probability(int(c), 200, alpha) for c in generator.binomial(200, true, 2000)]
    assert 0.05 < np.mean(np.array(bounds) > true) < 0.115


def test_draws_are_those_of_the_generator_and_the_choice_uses_others():
    method = Smoothing(sigma=0.1)
    drawn = method.draw(5, 3, X[0])
    number = torch.arange(5, 8)
    expected = rng.normal(rng.make_key(0, "smoothing"), torch.zeros_like(number), number, 0, 64)
    assert torch.equal(drawn.flatten(1), expected)
    assert not torch.equal(method.draw(2**31, 3, X[0]), method.draw(0, 3, X[0]))
    assert not torch.equal(Smoothing(sigma=0.1, seed=1).draw(0, 3, X[0]), method.draw(0, 3, X[0]))


def test_the_class_is_chosen_by_draws_that_are_not_counted(monkeypatch):
    used, real = [], Smoothing.draw
    monkeypatch.setattr(Smoothing, "draw", lambda self, first, count, x: used.append((first, count)) or real(
        self, first, count, x
    ))  # fmt: skip
    target, _ = resolve(ModelSpec(NET, X, Y, name="net"), Options())
    Smoothing(sigma=0.2, draws=90, choice=40).decide(target, X[0], 0, 0, 10)
    assert used == [(2**31 + b, 10) for b in range(0, 40, 10)] + [(b, 10) for b in range(0, 90, 10)]


def test_counts_do_not_depend_on_the_batch_width_and_a_longer_run_goes_on(tmp_path):
    first, folder = make(tmp_path / "a", lanes=64)
    second, other = make(tmp_path / "b", lanes=7)
    columns = ["sample", "verdict", "prediction", "count", "radius"]
    assert read_certified(folder)[1][columns].equals(read_certified(other)[1][columns])
    make(tmp_path / "c", samples=5)
    third, longer = make(tmp_path / "c")
    assert third.counts == first.counts == second.counts
    assert read_certified(longer)[1][columns].equals(read_certified(folder)[1][columns])


def test_verify_counts_again_and_finds_forged_votes(tmp_path):
    _, folder = make(tmp_path)
    checked = verify_certified(folder, NET, samples=50, x=X, y=Y)
    assert checked.derived == 12 and checked.refuted == checked.borderline == []
    _, rows = read_certified(folder)
    at = int(rows["count"].argmin())
    rows.loc[at, "count"] = 300
    rows.loc[at, "radius"] = smoothing_radius(300, 300, 0.01, 0.2)
    rows.loc[at, "verdict"] = "proven" if rows.loc[at, "prediction"] == rows.loc[at, "label"] else "wrong"
    file, _ = read_certified(folder)
    kept = {n: getattr(file, n) for n in ("model", "dataset", "total", "selection", "hardware", "versions", "date")}
    write_certified(
        folder, summarize_certified(rows, file.identity, {**kept, "answers": [], "files": {}}), rows, None
    )  # fmt: skip
    read_certified(folder)
    (found,) = verify_certified(folder, NET, samples=50, x=X, y=Y).refuted
    assert found.sample == at and "300 votes" in str(found)
    rows.loc[at, "radius"] = 0.5
    write_certified(folder, summarize_certified(rows, file.identity, {**kept, "answers": [], "files": {}}), rows, None)
    with pytest.raises(ResultError, match=r"radius 0\.5 does not follow"):
        read_certified(folder)


@pytest.mark.parametrize("values", [{"sigma": 0}, {"alpha": 0.6}, {"draws": 0}, {"choice": 0}, {"alpha": 0.0}])
def test_settings_that_mean_nothing_are_refused(values):
    with pytest.raises(RobbenchError, match="given; allowed"):
        Smoothing(**({"sigma": 0.1} | values))
