"""Runs, relaxed cycles and searches: where their points lie, what they climb, and when they give up."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from robbench.attacks import Brief, Relax
from robbench.attacks.odi import weighted
from robbench.core.errors import SuiteError
from robbench.core.losses import dlr
from robbench.core.threat import Ball
from robbench.engine.query import query
from support.attacks import differing, run_attack
from support.models import correct, labelled, network
from support.relax import EPS, Slopes, follow, leaves, list_targets


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_only_the_first_part_of_a_cycle_leaves_the_ball_and_its_radius_shrinks(norm):
    attack = Relax(starts=0, targets=2, restarts=0, search=0, patience=9.0, hopeless=9.0, widen=0.5)
    p, ball, states = follow(attack, Slopes([-1.0, -2.0, -3.0], [1.0, 1.0, 1.0]), norm)
    left = {True: [], False: []}
    for s in states:
        taken, distance = int(s["taken"]), float(ball.distance(p.x, s["x"]))
        first = s["at"] > 0 and 0 < taken < attack.outside
        assert distance <= EPS[norm] * (1 + (0.5 * (1 - taken / attack.outside) if first else 0)) + 1e-9
        left[bool(first)].append(distance > EPS[norm] + 1e-9)
    assert any(left[True])
    assert not any(left[False])


def test_targets_are_the_classes_that_any_point_came_closest_to():
    # Within 0.1 of the image, class 3 comes from the last place to -0.5, class 2 to -2.
    attack = Relax(restarts=0, search=0, patience=9.0)
    states = follow(attack, Slopes([-1.0, -2.0, -3.0], [0.0, 0.0, 25.0]))[2]
    targets = list_targets(attack, states)
    assert targets[0] == 3
    assert targets[1:] == [1, 2]


def test_an_error_outside_the_ball_is_followed_by_its_projection():
    # The hyperplane is 0.12 away, and the ball has a radius of 0.1.
    model = Slopes([-1.2, -9.0, -9.0], [10.0, 0.0, 0.0])
    attack = Relax(starts=0, targets=1, restarts=0, search=0, hopeless=9.0)
    p, ball, states = follow(attack, model)
    caught = [
        (before, after)
        for before, after in pairwise(states)
        if before["at"] == 1 and before["taken"] < attack.outside and model(before["x"]).argmax(1) != 0
    ]
    assert caught
    for before, after in caught:
        assert torch.equal(after["x"], ball.project(p.x, before["x"]))
        assert int(after["taken"]) == attack.outside


def test_a_cycle_towards_a_target_that_is_behind_ends_early():
    attack = Relax(starts=0, targets=4, restarts=1, search=0, patience=99.0, lag=2.0, hopeless=0.3)
    # Within 0.1 of the image, 0.2 is left of class 1, 0.25 of class 2, 0.35 of class 3, and 0.5 of class 4.
    states = follow(attack, Slopes([-1.0, -1.0, -1.0, -1.0], [8.0, 7.5, 6.5, 5.0]), classes=5)[2]
    taken = [max(int(s["taken"]) for s in states if s["at"] == k) for k in range(1, 5)]
    assert list_targets(attack, states) == [1, 2, 3, 4, 1]
    assert taken == [attack.cycle, attack.cycle, attack.cycle, attack.outside + 3]
    # Class 3 is not behind with a larger lag, or if as much may be left of any target.
    early, late = attack.outside + 3, attack.cycle
    for changed, ends in ((attack, early), (replace(attack, lag=4.0), late), (replace(attack, hopeless=0.4), late)):
        states = follow(changed, Slopes([-1.0, -1.0, -1.0], [9.0, 8.5, 6.5]))[2]
        assert max(int(s["taken"]) for s in states if s["at"] == 3) == ends, changed


@pytest.mark.parametrize("starts", [0, 1])
@pytest.mark.parametrize(("reached", "cycles"), [(0.7, 0), (0.4, 1), (0.24, 3), (0.11, 8), (0.09, 10), (0.001, 13)])
def test_the_closer_an_image_came_the_more_cycles_it_gets(reached, cycles, starts):
    """Within 0.1 of the image, class 1 comes from -1 to the negative of this. Cycles + 2, times this, may come to 1."""
    attack = Relax(starts=starts, targets=3, restarts=10, search=0, patience=1.0, least=0)
    states = follow(attack, leaves(reached))[2]
    assert len(list_targets(attack, states)) == cycles
    longest = [max(int(s["taken"]) for s in states if s["at"] == starts + k) for k in range(1, cycles + 1)]
    assert longest[3:4] in ([], [2 * attack.cycle], [2 * attack.cycle + 1]), "restarts take twice the steps"


@pytest.mark.parametrize(
    ("first", "others", "runs", "cycles"),
    [
        (0.5, 0.5, 3, 0),
        (0.3, 0.28, 3, 0),
        (0.28, 0.3, 3, 0),
        (0.2, 0.2, 5, 2),  # less is left than 0.28 of the patience
        (0.5, 0.35, 5, 1),  # 0.15 apart
        (0.7, 0.5, 5, 2),  # the first one left more than 0.6
        (0.65, 0.65, 5, 2),
    ],
)
def test_an_image_is_given_up_after_three_runs_that_agree(first, others, runs, cycles):
    attack = Relax(starts=4, targets=3, restarts=0, search=0, patience=0.75, least=2)
    states = follow(attack, leaves(first), later=leaves(others))[2]
    assert len({int(s["at"]) for s in states if s["at"] <= attack.starts}) == runs
    assert len(list_targets(attack, states)) == cycles


@pytest.mark.parametrize(("apart", "cycles"), [(0.45, 4), (0.35, 0)])
def test_an_image_whose_runs_end_far_apart_gets_four_cycles(apart, cycles):
    attack = Relax(starts=2, targets=3, restarts=2, search=0, patience=0.2, least=0)
    states = follow(attack, leaves(0.5), later=leaves(0.5 + apart))[2]
    assert len(list_targets(attack, states)) == cycles


def test_a_run_from_a_start_climbs_a_weighting_for_one_step_and_then_the_ratio_of_logits():
    attack = Relax(starts=2, targets=1, restarts=0, search=0)
    model = Slopes([-1.0, -2.0, -3.0], [5.0, 1.0, 1.0])
    p, _, states = follow(attack, model)
    drawn = []
    for s in states:
        if 0 < s["at"] <= attack.starts:
            logits = model(s["x"])
            loss = attack.loss(logits, p, s)
            if s["taken"] == 0:
                assert torch.equal(loss, weighted(logits, p, s["at"]))
                drawn.append(float(loss))
            else:
                torch.testing.assert_close(loss, dlr(logits, p.y), rtol=1e-10, atol=0)  # its 1e-12 is another share
    assert len(set(drawn)) == attack.starts


def test_restarts_take_the_three_closest_targets_by_turns():
    # Of class 4, 0.02 is left, of class 3 0.04, of class 2 0.06, and 0.08 of class 1.
    attack = Relax(targets=4, restarts=6, search=0)
    states = follow(attack, Slopes([-1.0] * 4, [9.2, 9.4, 9.6, 9.8]), classes=5)[2]
    assert list_targets(attack, states)[4:] == [4, 3, 2, 4, 3, 2]


def test_every_second_restart_begins_near_the_best_point():
    attack = Relax(starts=0, targets=1, restarts=4, search=0)
    p, ball, states = follow(attack, Slopes([-1.0], [9.9]), classes=2)
    for restart in range(1, 5):
        state = next(s for s in states if s["at"] == 1 + restart)
        begin = ball.random(p, step=state["at"])
        if restart % 2 == 0:
            begin = state["peak"] + 0.3 * (begin - state["peak"])
        assert torch.allclose(state["x"], begin, atol=1e-12), restart


def test_no_step_uses_a_gradient_that_it_does_not_want():
    """Zeros and noise in place of the gradient at these points lead to the same state."""
    attack = Relax(targets=2, restarts=2, search=20, patience=9.0, hopeless=9.0)
    model = Slopes([-1.0, -2.0, -3.0], [5.0, 4.0, 3.0])
    p, ball, states = follow(attack, model)
    unwanted = [s for s in states[:-1] if not attack.wants_gradient(s)]
    cycles = attack.targets + attack.restarts
    assert len(unwanted) == 1 + attack.starts + 2 * cycles + attack.search - 1, "the last query has no step"
    for s, after in pairwise(states):
        if not attack.wants_gradient(s):
            logits, loss, grad = query(model, attack, p, s, with_grad=False)
            noise = torch.randn(grad.shape, generator=torch.Generator().manual_seed(1), dtype=grad.dtype)
            for other in (grad, noise):
                new = attack.step(p, ball, s, torch.zeros_like(p.y), logits, loss, other)
                assert all(torch.equal(new[name], after[name]) for name in after)


@pytest.mark.parametrize(
    "attack", [Relax(targets=4, restarts=3), Brief(steps=96, hopeless=1.0)], ids=["relax", "brief"]
)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_no_scale_or_offset_of_the_logits_changes_a_record(attack, norm):
    net = network(torch.float64)
    x, y = labelled(net, 60, torch.float64)
    wide = isinstance(attack, Brief)  # without gradients it needs more room
    ball = Ball(norm, {"Linf": 0.4 if wide else 0.2, "L2": 2.5 if wide else 1.0}[norm])
    base = run_attack(net, attack, x, y, ball)
    assert 0 < base.broken.sum() < 60
    assert len(np.unique(base.forwards[~base.broken])) > 1, "the rules to give up must act"
    for factor in (2.0**-10, 2.0**10):  # powers of two round nothing
        scaled = torch.nn.Sequential(net, Scale(factor, 0.0))
        assert not differing(base, run_attack(scaled, attack, x, y, ball))
    for factor, offset in ((1e-3, 0.0), (1e3, 0.0), (1.0, 100.0)):
        other = run_attack(torch.nn.Sequential(net, Scale(factor, offset)), attack, x, y, ball)
        assert np.array_equal(base.broken, other.broken), (factor, offset)
        assert other.forwards.sum() == pytest.approx(base.forwards.sum(), rel=0.1)


def test_where_a_short_search_ends_does_not_depend_on_width_or_order():
    net = network(torch.float64)
    x, y = labelled(net, 60, torch.float64)
    attack, ball = Brief(steps=96, hopeless=1.0), Ball("Linf", 0.4)
    base = run_attack(net, attack, x, y, ball, lanes=16)
    assert 0 < base.broken.sum() < 60
    for lanes in (5, 64):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(lanes))
        other = run_attack(net, attack, x[order], y[order], ball, sample=order.numpy(), lanes=lanes)
        assert not differing(base, other)


class Scale(torch.nn.Module):
    """Multiplies logits by a factor, and adds a number."""

    def __init__(self, factor, offset):
        super().__init__()
        self.factor, self.offset = factor, offset

    def forward(self, logits):
        return self.factor * logits + self.offset


@pytest.mark.parametrize(("reached", "queries"), [(0.9, 4), (0.5, 16), (0.3, 32), (0.01, 64)])
def test_a_short_search_ends_at_the_first_look_that_finds_it_far(reached, queries):
    """Class 1 comes from -1 to the negative of this, and the looks ask for 0.8, 0.4 and 0.2."""
    attack = Brief(steps=64, hopeless=0.8)
    model = Slopes([-1.0], [10 * (1 - reached)])
    states = follow(attack, model, classes=2)[2]
    assert len(states) - 1 == queries
    kept = max(float(model(s["x"])[0, 1]) for s in states)
    assert float(model(states[-1]["x"])[0, 1]) == kept, "the last query is the best point"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Relax(targets=0), "targets 0 given; allowed: at least 1"),
        (lambda: Relax(inside=0), "inside 0 given; allowed: at least 1"),
        (lambda: Relax(run=1), "run 1 given; allowed: at least 2"),
        (lambda: Relax(starts=-1), "starts -1 given; allowed: at least 0"),
        (lambda: Relax(search=-1), "search -1 given; allowed: at least 0"),
        (lambda: Relax(restarts=-1), "restarts -1 given; allowed: at least 0"),
        (lambda: Relax(least=-1), "least -1 given; allowed: at least 0"),
        (lambda: Relax(widen=-0.5), "widen -0.5 given; allowed: at least 0"),
        (lambda: Relax(hopeless=0.0), "hopeless 0.0 given; it must be above 0"),
        (lambda: Relax(patience=-1.0), "patience -1.0 given; it must be above 0"),
        (lambda: Relax(lag=0.5), "lag 0.5 given; allowed: at least 1"),
        (lambda: Brief(steps=0), "steps 0"),
        (lambda: Brief(hopeless=0.0), "hopeless 0.0 given; it must be above 0"),
        (lambda: Brief(p_init=2.0), "p_init 2.0 given"),
    ],
)
def test_what_means_nothing_is_refused(make, message):
    with pytest.raises(SuiteError, match=message):
        make()


@pytest.mark.whole
@pytest.mark.parametrize("attack", [Relax(), Brief(hopeless=0.4)])
def test_verdicts_on_a_trained_model_are_those_of_scaled_logits(attack):
    """In float32, where factors round: the same verdicts, and passes within a tenth."""
    module, x, y, ball = correct("digits/at", 40)
    base = run_attack(module, attack, x, y, ball)
    assert 0 < base.broken.sum() < len(y)
    for factor, offset in (*((10.0**k, 0.0) for k in range(-3, 4) if k), (1.0, 100.0)):
        other = run_attack(torch.nn.Sequential(module, Scale(factor, offset)), attack, x, y, ball)
        assert np.array_equal(base.broken, other.broken), (factor, offset)
        assert other.forwards.sum() == pytest.approx(base.forwards.sum(), rel=0.1)
