"""Every attack against closed-form truth: linear models whose exact break radius is known."""

from collections import Counter

import pytest
import torch

from robbench.attacks import APGD, ATTACKS, CW, FAB, FGSM, MIFGSM, ODI, PGD, DeepFool, Hunt, Relax
from robbench.attacks.base import target_class
from robbench.core import rng
from robbench.core.errors import SuiteError
from robbench.core.losses import LOSSES
from robbench.core.threat import Ball
from robbench.core.types import Problem
from robbench.engine.engine import query
from support.attacks import run_attack
from support.models import Linear, hyperplane

ALL = [
    FGSM(objective="ce"),
    FGSM(objective="margin"),
    PGD(objective="ce", steps=30),
    PGD(objective="margin", steps=30),
    PGD(objective="dlr", steps=30, random_start=False),
    APGD(objective="ce", steps=40),
    APGD(objective="dlr", steps=40),
    APGD(objective="margin", steps=50, restarts=2),
    APGD(objective="dlr_targeted", steps=40, targets=9),
    PGD(objective="margin_targeted", steps=30, targets=2),
    PGD(objective="ce_targeted", steps=30, targets=1, random_start=False),
    PGD(objective="ce_scaled", steps=30),
    PGD(objective="margin", steps=20, relative_step=2.0, anneal=True),
    Hunt(starts=2, targets=3, run=20, chase=20, probe=5),
    Relax(targets=3, restarts=2, widen=0.0),
    MIFGSM(objective="ce", steps=30),
    ODI(objective="margin", steps=32),
    FAB(targets=1, steps=12),
    DeepFool(candidates=3, iterations=6),
]


def name(value):
    return value if isinstance(value, str) else f"{value.kind}-{getattr(value, 'objective', '')}".rstrip("-")


def made_for(attacks):
    """Pair attacks with each norm they are made for."""
    return pytest.mark.parametrize(("attack", "norm"), [(a, n) for a in attacks for n in a.norms], ids=name)


@made_for(ALL)
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_breaks_a_linear_model_exactly_when_eps_exceeds_its_radius(attack, norm, classes):
    model, x, y, radius = hyperplane(norm, seed=len(norm) + classes, classes=classes)
    r = float(radius.mean())
    # Along the normal, until all have the same radius: one run is enough for all of them.
    with torch.no_grad():
        s = x.flatten(1) @ model.w + model.b
        x += ((r / radius - 1) * s / (model.w @ model.w))[:, None, None, None] * model.w.view(1, 1, 4, 4)
    assert r > 1e-3
    assert run_attack(model, attack, x, y, Ball(norm, r + 1e-4)).broken.all(), "misses"
    assert not run_attack(model, attack, x, y, Ball(norm, r - 1e-4)).broken.any(), "breaks what cannot be broken"


@made_for([*ALL, CW(search_steps=6, iterations=100)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_moves_saturated_pixels(attack, norm, value):
    """Every pixel lies exactly on the box; only moving inwards crosses the hyperplane."""
    x = torch.full((1, 1, 4, 4), value)
    inwards = 1.0 if value == 0 else -1.0
    w = torch.full((16,), -inwards)
    eps = {"Linf": 0.1, "L2": 0.4, "L1": 1.0}[norm]
    reach = {"Linf": 1.6, "L2": 1.6, "L1": 1.0}[norm]
    for share, broken in ((0.9, True), (1.1, False)):
        model = Linear(w, share * reach - float(x.flatten(1) @ w))
        rows = run_attack(model, attack, x, torch.tensor([0]), Ball(norm, eps), lanes=1, keep_adversarials=True)
        assert bool(rows.broken[0]) is broken
        if broken:
            assert (rows.x_adv != x).any()


def test_fgsm_is_one_full_step_from_x():
    model, x, y, _ = hyperplane("Linf", seed=1)
    rows = run_attack(model, FGSM(), x, y, Ball("Linf", 1e-9))
    assert rows.step.tolist() == [1] * len(y)
    assert rows.forwards.tolist() == [2] * len(y)
    assert rows.backwards.tolist() == [1] * len(y)


def falling(steps):
    """Run APGD on a loss that only falls, so that its start stays best; returns the start and the states after it."""
    attack, ball = APGD(objective="margin", steps=steps), Ball("Linf", 0.1)
    _, x, y, _ = hyperplane("Linf", seed=2, n=1)
    p = Problem(x=x, y=y, sample=torch.zeros(1, dtype=torch.int64), trial=torch.zeros(1, dtype=torch.int64), key=(0, 0))
    states = [attack.init(p, ball)]
    grad, logits = torch.ones_like(x), torch.zeros(1, 2, dtype=x.dtype)
    for t in range(steps):
        loss = torch.tensor([-float(t)], dtype=x.dtype)
        states.append(attack.step(p, ball, states[-1], torch.tensor([t]), logits, loss, grad))
    return states[0]["x"], states[1:]


def test_apgd_halves_the_step_at_the_published_checkpoints():
    """p_{j+1} = p_j + max(p_j − p_{j−1} − 0.03, 0.06) from p_1 = 0.22, times 100 steps (Croce & Hein 2020, Sec. 3)."""
    sizes = [float(s["size"]) for s in falling(100)[1]]
    changes = [t for t in range(1, 100) if sizes[t] != sizes[t - 1]]
    assert changes == [22, 41, 57, 70, 80, 87, 93, 99]
    assert [sizes[t] / sizes[t - 1] for t in changes] == [0.5] * 8


def test_apgd_returns_to_the_best_point_when_it_halves_the_step():
    start, states = falling(10)
    assert [float(s["size"]) for s in states[:4]] == pytest.approx([0.2, 0.2, 0.1, 0.05])  # windows of 2, then 1 steps
    assert torch.equal(states[3]["x_best"], start)
    assert torch.equal(states[3]["x_old"], start), "the step at a checkpoint starts from the best point"


@pytest.mark.parametrize(
    ("cls", "given", "message"),
    [
        (PGD, {"objective": "xent"}, "objective"),
        (PGD, {"steps": 0}, "at least 1"),
        (PGD, {"restarts": 3, "random_start": False}, "repeat"),
        (APGD, {"steps": 0}, "at least 1"),
        (APGD, {"objective": "logit"}, "Did you mean|Known"),
        (PGD, {"objective": "ce", "targets": 3}, "it has no target"),
        (PGD, {"objective": "margin_targeted", "targets": 0}, "at least 1"),
        (MIFGSM, {"decay": -0.1}, "decay"),
        (ODI, {"steps": 2}, "odi_steps 2 given with steps 2"),
        (ODI, {"odi_step": 0.0}, "above 0"),
    ],
)
def test_meaningless_budgets_are_refused(cls, given, message):
    with pytest.raises(SuiteError, match=message):
        cls(**given)


def test_table_names_match_kinds():
    assert all(cls.kind == kind for kind, cls in ATTACKS.items())


def lanes(n, trial=None, logits=None, key=(1, 2)):
    zeros = torch.zeros(n, dtype=torch.int64)
    x = torch.full((n, 1, 2, 2), 0.5, dtype=torch.float64)
    return Problem(
        x=x, y=zeros, sample=torch.arange(n), trial=zeros if trial is None else trial, key=key, logits=logits
    )


def test_targets_are_the_wrong_classes_by_clean_logit():
    logits = torch.tensor([[9.0, 1.0, 5.0, 3.0]]).repeat(8, 1)
    p = lanes(8, trial=torch.arange(8), logits=logits)
    assert target_class(p, 3).tolist() == [2, 3, 1, 2, 3, 1, 2, 3], "then the restarts"
    assert target_class(p, 5).tolist() == [2, 3, 1, 2, 3, 1, 2, 3], "there are three wrong classes; they come again"
    assert APGD(objective="dlr_targeted", targets=9, restarts=2).trials == 18
    assert APGD(objective="dlr_targeted").needs_logits and not APGD(objective="dlr").needs_logits


def test_momentum_adds_normalized_gradients():
    attack, ball, p = MIFGSM(decay=0.5, step_size=0.1), Ball("L2", 10.0), lanes(1)
    one, other = torch.tensor([[[[4.0, 0], [0, 0]]]]).double(), torch.tensor([[[[0, 2.0], [0, 0]]]]).double()
    s = attack.init(p, ball)
    assert torch.equal(s["x"], p.x)
    for grad in (one, other):
        s = attack.step(p, ball, s, torch.zeros(1), None, None, grad)
    assert s["g"].flatten().tolist() == [2.0, 4.0, 0, 0], "0.5 · 4 / mean 1 and 2 / mean 0.5"
    direction = torch.tensor([2.0, 4.0]).double() / torch.tensor(20.0).double().sqrt()
    moved = (s["x"] - p.x).flatten()[:2]
    assert torch.allclose(moved, 0.1 * torch.tensor([1.0, 0]).double() + 0.1 * direction)


def test_output_diversified_starts_follow_random_weights_first():
    attack, ball = ODI(steps=4, odi_steps=2, objective="margin"), Ball("Linf", 0.2)
    p = lanes(500, trial=torch.arange(500))
    s, logits = attack.init(p, ball), torch.tensor([[3.0, 1.0, 0.0]]).double().repeat(500, 1)
    first = attack.loss(logits, p, s)
    u = rng.uniform(p.key, p.sample, p.trial, 1 << 30, 3).double()
    assert torch.allclose(first, ((2 * u - 1) * logits).sum(1)), "the same weights at every step of a start"
    assert first.std() > 1
    grad = torch.ones_like(p.x)
    after = attack.step(p, ball, s, torch.zeros(500), logits, first, grad)
    assert torch.allclose(after["x"], (s["x"] + 0.2).clamp(max=0.7)), "steps of eps"
    assert torch.equal(attack.loss(logits, p, after), first)
    last = attack.step(p, ball, after, torch.ones(500), logits, first, -grad)
    assert attack.loss(logits, p, last).unique().tolist() == [-2.0], "then the margin"
    near = attack.step(p, ball, last, torch.ones(500), logits, first, grad)
    assert torch.allclose(near["x"], last["x"] + 0.05), "steps of a quarter of eps"


def test_rescaled_cross_entropy_sees_squeezed_and_blown_up_logits_alike():
    z, y = torch.tensor([[2.0, 1.0, 0.0, 1.0], [0.0, 3.0, 1.0, 1.0]]), torch.tensor([0, 0])
    loss = LOSSES["ce_scaled"]
    expected = torch.nn.functional.cross_entropy(torch.tensor([[10.0, 5.0, 0.0, 5.0]]), torch.tensor([0]))
    assert float(loss(z, y)[0]) == pytest.approx(float(expected))
    for scale in (1e-3, 1e3):
        assert torch.allclose(loss(z * scale, y), loss(z, y), rtol=1e-4)
    assert loss(torch.zeros(1, 4), torch.tensor([0])).isfinite().all()


def test_annealing_lets_the_step_fall_along_half_a_cosine():
    model = Linear(torch.ones(4, dtype=torch.float64), 0.0)
    x = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    lane = torch.zeros(1, dtype=torch.int64)
    p = Problem(x=x, y=lane, sample=lane, trial=lane, key=rng.make_key(0, "test"))
    attack = PGD(steps=4, step_size=0.01, anneal=True, random_start=False)
    state = attack.init(p, Ball("Linf", 0.5))
    moved = []
    for t in range(4):
        before = state["x"]
        answer = query(model, attack, p, state, True)
        state = attack.step(p, Ball("Linf", 0.5), state, lane + t, *answer)
        moved.append(float((before - state["x"]).max()))
    assert moved == pytest.approx([0.01, 0.01 * (1 + 0.5**0.5) / 2, 0.005, 0.01 * (1 - 0.5**0.5) / 2])
    assert PGD().memoryless
    assert not attack.memoryless, "coming back to a point with a smaller step is no circle"


def followed(attack, margins, slopes=None):
    """The queries of each run of a hunt, and its prey, where x moves the margins of classes 1, 2 … by these slopes."""
    bias = torch.tensor([0.0, *margins], dtype=torch.float64)
    slope = torch.tensor([0.0, *(slopes or [0.0] * len(margins))], dtype=torch.float64)

    def model(x):
        return (x.flatten(1)[:, :1] - 0.5) * slope + bias

    x = torch.full((2, 1, 1, 1), 0.5, dtype=torch.float64)
    lanes = torch.zeros(2, dtype=torch.int64)
    p = Problem(x=x, y=lanes, sample=torch.arange(2), trial=lanes, key=rng.make_key(0, "test"), logits=model(x))
    state, runs = attack.init(p, Ball("Linf", 0.1)), Counter()
    for t in range(attack.steps + 1):
        runs[int(state["at"][0])] += 1
        state = attack.step(p, Ball("Linf", 0.1), state, lanes + t, *query(model, attack, p, state, True))
        assert state["done"].any() == state["done"].all()
        if state["done"].all():
            break
    return [runs[k] for k in range(max(runs) + 1)], int(state["prey"][0])


def test_a_hunt_gives_up_on_targets_that_lag_behind_and_chases_the_nearest():
    attack = Hunt(starts=2, targets=3, run=8, chase=12, probe=3, hopeless=4.0)
    assert followed(attack, [-1.0, -1.9, -2.1]) == ([9, 9, 9, 9, 3, 13], 0), "1.9 is less than twice as far as 1"
    assert followed(attack, [-1.0, -1.9, -1.99]) == ([9, 9, 9, 9, 9, 13], 0)
    # Within 0.1 of the image, the second class comes as near as 0.6, and leaves the third behind.
    assert followed(attack, [-1.0, -1.1, -1.3], [0.0, 5.0, 0.0]) == ([9, 9, 9, 9, 3, 13], 1)
    assert attack.steps + 1 == 9 + 9 + 9 + 9 + 9 + 13


@pytest.mark.parametrize(("hopeless", "runs"), [(0.9, 1), (1.1, 3), (2.1, 4)])
def test_a_hunt_gives_up_where_the_margin_hardly_moves(hopeless, runs):
    """All of the clean margin is left: more than the share after the starts, or than half of it after the targets."""
    assert len(followed(Hunt(starts=1, targets=2, run=8, probe=3, hopeless=hopeless), [-1.0, -1.0])[0]) == runs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"starts": 0}, "starts 0 given; allowed: at least 1"),
        ({"probe": 40}, "probe 40 given with run 40; allowed: 1 to run − 1"),
        ({"odi_steps": 0}, "odi_steps 0 given with run 40"),
        ({"lag": 0.5}, "lag 0.5 given; allowed: at least 1"),
        ({"hopeless": 0.0}, "hopeless 0.0 given; it must be above 0"),
    ],
)
def test_a_hunt_refuses_what_means_nothing(given, message):
    with pytest.raises(SuiteError, match=message):
        Hunt(**given)
