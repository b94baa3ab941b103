"""Mean-field manifold analysis: known capacities, anchors against a general minimizer, and the published example."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import norm

from robbench.analysis.manifolds import analyze_manifolds, find_anchor, measure_manifold, simulate_capacity


def clouds(p, n, m, spread=1.0, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal(n) + spread * random.standard_normal((m, n)) for _ in range(p)]


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0])
def test_a_point_has_the_capacity_of_the_perceptron(margin):
    t = norm.ppf((np.arange(4000) + 0.5) / 4000)
    capacity, radius, dimension = measure_manifold(np.zeros((1, 1)), np.c_[t * 0, t], margin)
    expected = 1 / ((1 + margin**2) * norm.cdf(margin) + margin * norm.pdf(margin))  # ∫ Dt (t + κ)₊², Gardner 1988
    assert capacity == pytest.approx(expected, rel=1e-3)
    assert (radius, dimension) == (0, 0)


def test_a_segment_has_the_capacity_of_its_integral():
    """1/α = ∫ Dt₀ Dt ‖t − v‖², with the nearest v found by a general minimizer on a grid of quantiles."""
    radius, n = 0.7, 40
    q = norm.ppf((np.arange(n) + 0.5) / n)
    t = np.array([(a, b) for a in q for b in q])
    capacity = measure_manifold(np.array([[radius], [-radius]]), t)[0]
    cost = []
    for x, y in t:  # t lies in the cone of the points, projects on one of its rays, or has the margin
        if y >= abs(x) / radius:
            cost.append(x * x + y * y)
        else:
            cost.append(max(y + radius * abs(x), 0) ** 2 / (1 + radius**2))
    assert capacity == pytest.approx(1 / np.mean(cost), rel=1e-9)


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_anchors_are_those_of_a_general_minimizer(margin):
    random = np.random.default_rng(0)
    points = np.c_[random.standard_normal((6, 3)), np.ones(6)]
    for t in random.standard_normal((10, 4)):
        anchor, cost = find_anchor(points, t, margin)
        found = minimize(
            lambda v, t=t: ((v - t) ** 2).sum(), np.r_[np.zeros(3), -5], jac=lambda v, t=t: 2 * (v - t), method="SLSQP",
            constraints={"type": "ineq", "fun": lambda v: -margin - points @ v}, options={"ftol": 1e-14},
        )  # fmt: skip
        assert cost == pytest.approx(found.fun, abs=1e-6)
        if cost > 1e-6:
            assert anchor == pytest.approx((t - found.x) / (t - found.x)[-1], abs=1e-4)


def test_scale_rotation_and_origin_change_nothing_and_spread_lowers_the_capacity():
    points = clouds(6, 30, 5)
    base = analyze_manifolds(points, 30)
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((30, 30)))[0]
    moved = analyze_manifolds([3 * p @ turn + 7 for p in points], 30)
    assert moved.correlation == pytest.approx(base.correlation)
    assert moved.mean_capacity == pytest.approx(base.mean_capacity, rel=0.2), "other draws for the same cloud"
    narrow, wide = (analyze_manifolds(clouds(6, 30, 5, s), 100) for s in (0.1, 2.0))
    assert narrow.radius.max() < wide.radius.min()
    assert narrow.mean_capacity > 1 > 0.5 > wide.mean_capacity


def test_a_common_direction_of_all_centres_is_projected_out():
    random = np.random.default_rng(0)
    along = random.standard_normal(200)
    points = [c + 30 * a * along / 200**0.5 for c, a in zip(clouds(20, 200, 5, 0.1), random.standard_normal(20))]  # noqa: B905
    assert analyze_manifolds(clouds(20, 200, 5, 0.1), 5).removed == 0
    found = analyze_manifolds(points, 5)
    assert found.removed == 1
    assert found.correlation > 0.5
    assert found.radius.mean() > 0.05


def test_wrong_manifolds_are_refused():
    with pytest.raises(ValueError, match="two or more"):
        analyze_manifolds(clouds(1, 5, 4))
    with pytest.raises(ValueError, match="different centres"):
        analyze_manifolds([np.ones((3, 4)), np.ones((2, 4))])


def test_half_of_the_labels_of_random_points_need_half_as_many_features():
    """Cover 1965: P points in general position in P / 2 dimensions are separable for half of their labels."""
    points = [p[:1] for p in clouds(20, 60, 2, 0.0)]
    assert simulate_capacity(points, trials=60) == pytest.approx(2, rel=0.15)
    assert simulate_capacity(clouds(12, 60, 6, 0.5), trials=20) < 1.2
    assert np.isnan(simulate_capacity(clouds(20, 2, 4), trials=10))


@pytest.mark.parametrize(
    "draws", [pytest.param(10, marks=pytest.mark.whole), pytest.param(200, marks=pytest.mark.slow)]
)
def test_the_published_example_within_5_percent(draws):
    """The example of the authors' code: 0.04, 1.47, 36.17 and 0.01 for 100 Gaussian manifolds."""
    random = np.random.default_rng(0)
    found = analyze_manifolds([random.standard_normal((50, 5000)) for _ in range(100)], draws=draws)
    assert found.mean_capacity == pytest.approx(0.04, rel=0.05)
    assert found.radius.mean() == pytest.approx(1.47, rel=0.05)
    assert found.dimension.mean() == pytest.approx(36.17, rel=0.05)
    assert round(found.correlation, 2) == 0.01, "two published digits"
