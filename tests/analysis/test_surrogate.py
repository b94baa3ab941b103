"""The analytic model of Seguin et al. 2021, App. C, against numerical minimization of the cross-entropy."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar, root

from robbench.analysis.surrogate import (
    change_gap,
    change_gap_of_groups,
    change_logits,
    cross_entropy,
    expand_cross_entropy,
    find_least_beta,
    make_logits,
    printed_correct,
    printed_wrong,
    solve_correct,
    solve_wrong,
)

BETAS = (1.2, 2.0, 2.7)


def correct(beta, f, classes=10):
    return expand_cross_entropy(beta, make_logits(0, f, None, classes), 0)


def wrong(beta, g, psi, classes=10):
    return expand_cross_entropy(beta, make_logits(0, psi, g, classes), 1)


def central(function, at, h=1e-5):
    at = np.array(at, float)
    steps = h * np.eye(len(at))
    return np.array([(function(*(at + s)) - function(*(at - s))) / (2 * h) for s in steps])


@pytest.mark.parametrize("label", [0, 1])
def test_the_expansion_is_the_cross_entropy_up_to_fourth_order(label):
    v = np.r_[0, np.random.default_rng(0).normal(size=9)]
    z = make_logits(3.0, 0.0, None, 10)
    errors = [abs(expand_cross_entropy(3.0, t * v, label) - cross_entropy(z + t * v, label)) for t in (0.2, 0.1, 0.05)]
    assert errors[0] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize("beta", BETAS)
def test_minimizing_the_expansion_finds_the_stationary_points_of_correct_images(beta):
    solutions = solve_correct(beta, 10)
    assert len(solutions) == 2
    for f in solutions:
        assert central(lambda u: correct(beta, u), [f]) == pytest.approx([0], abs=1e-7)
        sign = np.sign(correct(beta, f + 1e-3) + correct(beta, f - 1e-3) - 2 * correct(beta, f))
        found = minimize_scalar(
            lambda u, s=sign: s * correct(beta, u), bracket=(f - 0.1, f + 0.03, f + 0.1), options={"xtol": 1e-10}
        )
        assert found.x == pytest.approx(f, abs=1e-6)
    assert solve_correct(np.log(18) + 0.01, 10) == [], "β above ln 2(K − 1)"
    assert len(solve_correct(np.log(18) - 0.01, 10)) == 2


@pytest.mark.parametrize("beta", [*BETAS, 3.5, 6.0])
def test_a_root_search_on_the_expansion_finds_the_stationary_points_of_misclassified_images(beta):
    solutions = solve_wrong(beta, 10)
    assert len(solutions) == 4
    for g, psi in solutions:
        gradient = lambda v: central(lambda a, b: wrong(beta, a, b), v, 1e-4)  # noqa: E731
        found = root(gradient, [g + 0.01, psi - 0.01], tol=1e-12)
        assert found.x == pytest.approx([g, psi], abs=1e-6)


@pytest.mark.parametrize("beta", [*BETAS, 3.5, 6.0])
def test_the_printed_solutions_are_not_stationary(beta):
    for f in printed_correct(beta, 10):
        assert abs(central(lambda u: correct(beta, u), [f])[0]) > 1e-3
    for g, psi in printed_wrong(beta, 10):
        assert np.linalg.norm(central(lambda a, b: wrong(beta, a, b), [g, psi])) > 1e-3


@pytest.mark.parametrize("beta", [1.0, 3.5, 8.0])
def test_the_cross_entropy_has_no_stationary_point(beta):
    for v in np.linspace(-8, beta, 30):
        assert cross_entropy(make_logits(beta, v - 0.1, None, 10), 0) < cross_entropy(make_logits(beta, v, None, 10), 0)
        less, same, more = (cross_entropy(make_logits(beta, psi, v, 10), 1) for psi in (v - 0.1, v, v + 0.1))
        assert less < same < more
        assert cross_entropy(make_logits(beta, v, v + 0.1, 10), 1) < same


def test_printed_values_by_hand():
    # K = 2 and e^−β = 1/2: w = 1/2, so f = 3 (−1 ± √(1 + 2/4 · 1/2 / (9/4))) = 3 (−1 ± √(10/9)).
    assert printed_correct(np.log(2), 2) == pytest.approx((np.sqrt(10) - 3, -np.sqrt(10) - 3))
    # K = 3 and e^−β = 1/4: w = 1/2, c = 1, κ = 3/2 √(1 + 2/3), and ψ = 2 (g/2 − 3/2).
    kappa = 1.5 * np.sqrt(5 / 3)
    plus, minus = printed_wrong(np.log(4), 3)
    assert plus == pytest.approx((-2 * (1 + kappa), -2 * (1 + kappa) - 3))
    assert minus == pytest.approx((-2 * (1 - kappa), -2 * (1 - kappa) - 3))
    assert printed_wrong(40.0, 10)[1] == pytest.approx((np.sqrt(3) - 1, -2)), "the limit of large β"


@pytest.mark.parametrize("classes", [10, 20, 100])
def test_the_least_beta_is_where_the_printed_solution_meets_it(classes):
    beta = find_least_beta(classes)
    assert printed_wrong(beta, classes)[1][0] == pytest.approx(beta, abs=1e-9)
    assert printed_wrong(beta - 0.1, classes)[1][0] > beta - 0.1
    for more in (0.1, 1, 10):
        assert max(printed_wrong(beta + more, classes)[1]) < beta + more


def test_the_paper_reads_3_5_where_its_equation_gives_2_8():
    assert find_least_beta(10) == pytest.approx(2.779, abs=1e-3)


def test_the_change_of_the_gap_is_the_mean_over_classes_of_the_change_of_the_logits():
    random = np.random.default_rng(0)
    z, omega = random.normal(size=(7, 5)), random.random(7)
    changes = []
    for label in range(5):
        d = change_logits(z, omega, label)
        changes.append(d[label] - np.delete(d, label).mean())
    assert change_gap(z, omega) == pytest.approx(np.mean(changes), abs=1e-12)
    assert change_gap(z, omega) < 0


def test_an_attacked_linear_model_changes_its_logits_by_eq_8():
    """z = W x with the Jacobian W = Zᵀ: the first step of FGSM moves the logits by W Wᵀ ∇L with ∇L ∝ 1 − K y."""
    z = np.random.default_rng(1).normal(size=(4, 3))
    label = 2
    gradient = np.ones(3) - 3 * np.eye(3)[label]
    assert change_logits(z, np.full(4, 0.1), label) == pytest.approx(0.1 * (z.T @ z @ gradient))


def test_the_change_of_the_gap_of_two_groups_is_eq_9_on_their_logits():
    right, misled, classes, error = (4.0, -0.5), (3.8, 1.2, -2.0), 10, 0.25
    z = np.stack(
        [make_logits(right[0], right[1], None, classes)] * 3 + [make_logits(misled[0], misled[2], misled[1], 10)]
    )
    omega = np.full(4, 0.1 / 4)
    exact = change_gap(z, omega)
    assert change_gap_of_groups(right, misled, error, 0.1, classes) == pytest.approx(exact, rel=1e-12)
    (beta, g, psi), cross = misled, 2 * 8 / 9
    printed = -0.1 * (0.75 * 4.5**2 + 0.25 * ((beta - g) ** 2 + cross * (beta - g) * (g - psi)))
    assert abs(printed - exact) > 0.1, "Eq. 10 as printed is another number"
