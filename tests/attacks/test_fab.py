"""FAB: its projection against scipy, its minimal distance on linear models, and agreement with pyautoattack."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from scipy.stats import binomtest

from robbench.attacks import FAB
from robbench.attacks.base import others_by_rank
from robbench.attacks.boundary import between, bracket, narrowed, toward_plane
from robbench.core.errors import SuiteError
from robbench.core.threat import Ball, length
from robbench.core.types import NORMS, Problem
from support.attacks import differing, judged, queried, run_attack, smallest
from support.models import Linear, correct, hyperplane, labelled, network, trained

SETTINGS = settings(max_examples=80, deadline=None)
SIZE = 5
pixels = st.lists(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=16)), min_size=SIZE, max_size=SIZE)
normals = st.lists(
    st.one_of(st.just(0.0), st.floats(-3, 3, width=16).filter(lambda v: abs(v) > 0.01)), min_size=SIZE, max_size=SIZE
)
gaps = st.floats(-8, 8).filter(lambda v: abs(v) > 1e-3)


def lane(values):
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


def to_plane(norm, x, w, gap):
    return toward_plane(norm, lane(x), lane(w), torch.tensor([gap], dtype=torch.float64)).flatten().numpy()


def reach(x, w, gap):
    """How far the linear function can change towards zero inside the box."""
    x, toward = np.array(x), -np.sign(gap) * np.array(w)
    return float(np.where(toward > 0, toward * (1 - x), -toward * x).sum())


def shortest(norm, x, w, gap):
    """Length of the shortest move to the plane in the box, by a general solver."""
    x, w = np.array(x), np.array(w)
    if norm == "L2":
        # A strictly feasible start on the way to the corner, so that the solver has a gradient to go by.
        corner = np.where(-np.sign(gap) * w > 0, 1 - x, np.where(w == 0, 0, -x))
        start = corner * abs(gap) / reach(x, w, gap)
        found = minimize(
            lambda d: d @ d,
            start,
            jac=lambda d: 2 * d,
            bounds=list(zip(-x, 1 - x, strict=True)),
            constraints={"type": "eq", "fun": lambda d: gap + w @ d, "jac": lambda d: w},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert found.success, found.message
        return float(np.sqrt(found.fun))
    # Linear programs in (d, u) with |d| <= u: one u for all pixels, or one each.
    n = len(x)
    bound = np.ones((n, 1)) if norm == "Linf" else np.eye(n)
    found = linprog(
        np.concatenate([np.zeros(n), np.ones(bound.shape[1])]),
        A_ub=np.block([[np.eye(n), -bound], [-np.eye(n), -bound]]),
        b_ub=np.zeros(2 * n),
        A_eq=np.concatenate([w, np.zeros(bound.shape[1])])[None],
        b_eq=[-gap],
        bounds=[*zip(-x, 1 - x, strict=True), *[(0, None)] * bound.shape[1]],
    )
    assert found.success, found.message
    return float(found.fun)


@pytest.mark.parametrize("norm", NORMS)
@SETTINGS
@given(pixels, normals, gaps)
def test_the_move_to_the_plane_is_the_shortest_in_the_box(norm, x, w, gap):
    move = to_plane(norm, x, w, gap)
    assert ((np.array(x) + move >= -1e-12) & (np.array(x) + move <= 1 + 1e-12)).all()
    assert (move[np.array(w) == 0] == 0).all()
    room = reach(x, w, gap)
    if abs(gap) < room * (1 - 1e-9):
        assert gap + np.array(w) @ move == pytest.approx(0, abs=1e-9)
        assert length(norm, lane(move)).item() == pytest.approx(shortest(norm, x, w, gap), rel=1e-5, abs=1e-6)
    elif abs(gap) > room * (1 + 1e-9):
        corner = np.where(-np.sign(gap) * np.array(w) > 0, 1 - np.array(x), np.where(np.array(w) == 0, 0, -np.array(x)))
        assert move == pytest.approx(corner, abs=1e-9), "as close as the box lets it come"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_plane_gives_no_move_and_extreme_planes_give_finite_ones(norm, dtype):
    x = torch.tensor([0.0, 1.0, 0.5, 0.25], dtype=dtype).view(1, 1, 2, 2).repeat(7, 1, 1, 1)
    w = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=dtype).view(1, 1, 2, 2).repeat(7, 1, 1, 1)
    tiny = torch.finfo(dtype).tiny
    w[0] = 0
    w[1] *= tiny
    w[2] /= tiny * 1e3
    w[3].flatten()[0] = tiny
    gap = torch.tensor([1, 0.1, 0.1, 0.1, torch.nan, torch.inf, 0], dtype=dtype)
    move = toward_plane(norm, x, w, gap)
    assert move.isfinite().all()
    assert ((x + move >= 0) & (x + move <= 1)).all()
    still = (move == 0).flatten(1).all(1).tolist()
    assert [still[i] for i in (0, 4, 5)] == [True] * 3
    assert not still[1] and not still[3]
    assert 0 < float((w[6] * move[6]).sum()) < 1e-3, "a tie moves up a little, to the side where it is broken"


def test_targets_go_by_rank_and_wrap_around():
    logits = torch.tensor([[3.0, 9.0, 1.0, 5.0]])
    ball = Ball("Linf", 0.1)
    x = torch.full((1, 1, 2, 2), 0.5)
    seen, at_x = [], []
    for trial in range(10):
        p = Problem(x, torch.tensor([1]), torch.tensor([0]), torch.tensor([trial]), (1, 2), logits)
        s = FAB(targets=5, restarts=2).init(p, ball)
        seen.append(int(s["target"]))
        at_x.append(torch.equal(s["x"], x))
        assert float((s["x"] - x).abs().max()) == pytest.approx(0 if at_x[-1] else 0.05)
    assert seen == [3, 0, 2] * 3 + [3]
    assert at_x == [True] * 3 + [False] * 7
    assert others_by_rank(p).tolist() == [[3, 0, 2]]


def test_the_search_closes_in_on_the_boundary_of_a_curved_margin():
    x = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.int64)
    logits = torch.tensor([[0.0, 0.25], [0.0, 0.5]], dtype=torch.float64)
    s = bracket(Problem(x, ones, 0 * ones, 0 * ones, (0, 0), logits)) | {"x": torch.ones_like(x)}

    def margins(x):  # convex and concave; the boundary is at 1/2
        v = x.flatten()
        return torch.stack([v[0] ** 2 - 0.25, v[1].sqrt() - 0.5**0.5])

    s |= narrowed(s, ones < 0, ones > 0, margins(s["x"]))
    for _ in range(8):
        s["x"] = between(s)
        value = margins(s["x"])
        s |= narrowed(s, value <= 0, value > 0, value)
    assert (s["outer"] > 0.5).all()
    assert s["outer"].flatten().tolist() == pytest.approx([0.5, 0.5], abs=1e-3)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize(("trial", "steps", "rel"), [(0, 30, 1e-3), (18, 100, 2e-2)], ids=["from x", "restart"])
def test_the_smallest_distance_on_a_linear_model_is_its_radius(norm, classes, trial, steps, rel):
    """A restart comes back towards the clean image by at most a tenth per iteration, so it is less exact."""
    model, x, y, radius = hyperplane(norm, seed=classes, n=8, classes=classes)
    ball = Ball(norm, 3 * float(radius.max()))
    points, wrong = queried(model, FAB(steps=steps, restarts=3), x, y, ball, trial)
    found = smallest(points, wrong, x, ball)
    assert found.tolist() == pytest.approx(radius.tolist(), rel=rel)
    assert (found >= radius * (1 - 1e-9)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_box_in_the_way_does_not_matter(norm):
    """Half of the pixels cannot move towards the plane, and some soon meet the box: the radius is scipy's."""
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64, generator=generator).round(decimals=1)
    w = torch.randn(16, dtype=torch.float64, generator=generator)
    for one in x.split(1):
        flat = one.flatten().numpy()
        room = reach(flat, w.numpy(), 1.0)
        model = Linear(w, 0.6 * room - float(one.flatten() @ w))
        radius = shortest(norm, flat, w.numpy(), 0.6 * room)
        ball = Ball(norm, 10.0)
        points, wrong = queried(model, FAB(steps=30), one, torch.tensor([0]), ball)
        found = float(smallest(points, wrong, one, ball))
        # The segment that the final search takes is straight, the shortest move to a given plane bends at the box.
        assert radius * (1 - 1e-6) <= found <= radius * 1.005


@pytest.mark.parametrize("norm", NORMS)
def test_every_point_stays_in_the_box(norm):
    net = network()
    x, y = labelled(net, 30)
    points, _ = queried(net, FAB(steps=25, restarts=2), x.round(decimals=1), y, Ball(norm, 2.0), trial=10)
    assert all(((v >= 0) & (v <= 1)).all() for v in points)


class Holed(Linear):
    """Answers NaN in a slab between the images and the plane."""

    def forward(self, x):
        logits = super().forward(x)
        return torch.where((logits.amax(1, keepdim=True) < 0.2) & (logits[:, :1] > 0.1), torch.nan, logits)


def test_nan_answers_do_not_spread():
    model = Holed(torch.ones(4, dtype=torch.float64), -1.0)
    x = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    points, _ = queried(model, FAB(steps=20, eta=1.0), x, torch.tensor([0]), Ball("L2", 1.0))
    assert all(v.isfinite().all() for v in points)


@pytest.mark.whole
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.2), ("L2", 1.0), ("L1", 3.0)])
def test_float64_records_do_not_depend_on_width_or_order(norm, eps):
    """Points follow the gradients' values, not their signs: another batch shape may move a distance's last bits."""
    net, x, y = trained(24)
    attack, ball = FAB(targets=2, steps=12, restarts=2), Ball(norm, eps)
    base = run_attack(net, attack, x, y, ball, lanes=64)
    assert 0 < base.broken.sum() < len(y)
    for lanes in (3, 64):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(lanes))
        other = run_attack(net, attack, x[order], y[order], ball, sample=order.numpy(), lanes=lanes)
        assert set(differing(base, other)) <= {"distance"}, lanes
        assert other.distance == pytest.approx(base.distance, rel=1e-9, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("name", "norm", "eps"),
    [("digits/at", "Linf", 0.2), ("digits/ls095_sigma03", "Linf", 0.2), ("digits/at", "L2", 1.0)],
)
def test_agrees_with_pyautoattack(name, norm, eps, seed):
    """Without the final search, which the peer lacks."""
    from pyautoattack.fab_pt import FABAttack_PT

    model, x, y, _ = correct(name, 300)
    ball, attack = Ball(norm, eps), FAB(targets=4, restarts=2, searches=0)
    a = run_attack(model, attack, x, y, ball, lanes=128, seed=seed).broken
    peer = FABAttack_PT(
        model, norm=norm, n_restarts=attack.restarts, n_iter=attack.steps, eps=eps, seed=seed, targeted=True,
        n_target_classes=attack.targets, device="cpu",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # it seeds the global generator
        b = judged(model, x, y, peer.perturb(x, y), ball)
    only_ours, only_theirs = int((a & ~b).sum()), int((b & ~a).sum())
    p = binomtest(only_ours, only_ours + only_theirs).pvalue if only_ours + only_theirs else 1.0
    told = f"{(~a).sum()} and {(~b).sum()} of {len(a)} stand; only ours broke {only_ours}, only theirs {only_theirs}"
    assert p > 0.01, told
    assert only_ours + only_theirs <= 0.1 * len(a), told
    assert 0 < a.sum() < len(a), told


@pytest.mark.slow
def test_the_final_search_finds_classes_on_the_way():
    """On this model the nearest point of the target class often has a third class between it and the image."""
    model, x, y, ball = correct("digits/ls095_sigma03", 150)
    without, searched = (
        run_attack(model, FAB(targets=2, searches=n), x, y, ball, lanes=128).broken for n in (0, FAB().searches)
    )
    gained, lost = int((searched & ~without).sum()), int((without & ~searched).sum())
    assert gained >= lost + 5, (gained, lost)


@pytest.mark.parametrize(
    "given",
    [
        {"targets": 0},
        {"steps": 0},
        {"restarts": 0},
        {"searches": -1},
        {"searches": 100},
        {"alpha_max": 1.1},
        {"eta": 0.9},
        {"beta": 1.0},
        {"beta": 0.0},
    ],
    ids=str,
)
def test_meaningless_parameters_are_refused(given):
    with pytest.raises(SuiteError, match=next(iter(given))):
        FAB(**given)
