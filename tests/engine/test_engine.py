"""The judge believes nothing, and the scheduler equals the plain loop whatever the width and the order."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from robbench.attacks import APGD, FGSM, PGD, Hunt, Relax
from robbench.attacks.base import Searching
from robbench.classifier.batch_width import BatchWidths, default_lanes
from robbench.core import rng
from robbench.core.errors import ModelError
from robbench.core.threat import Ball
from robbench.core.types import Problem
from robbench.data.sets import load
from robbench.engine import engine
from robbench.engine import lanes as lanes_module
from robbench.engine.query import query
from robbench.engine.trials import TrialQueue
from robbench.models.card import Registry
from robbench.models.load import load_model
from robbench.suite import build_attack, load_suite
from support.attacks import Scripted, differing, run_attack
from support.models import Linear, labelled, network

BALL = Ball("Linf", 0.15)


ATTACKS = [
    FGSM(),
    PGD(objective="margin", steps=7, restarts=3),
    APGD(objective="ce", steps=25),
    APGD(objective="dlr", steps=25, restarts=2),
    Hunt(starts=2, targets=3, run=10, chase=20, probe=3),
    Relax(targets=4, restarts=3),
]
IDS = ["fgsm", "pgd", "apgd-ce", "apgd-dlr", "hunt", "relax"]


@pytest.mark.whole
@pytest.mark.parametrize("attack", ATTACKS, ids=IDS)
def test_float64_records_do_not_depend_on_width_or_order(attack):
    net = network(torch.float64)
    x, y = labelled(net, 150, torch.float64)
    ball = Ball("Linf", 0.2)
    ids = np.arange(150) * 7
    base = run_attack(net, attack, x, y, ball, sample=ids, lanes=16)
    assert 0 < base.broken.sum() < 150, "the comparison must see both outcomes"
    for width, seed in ((64, 1), (256, 2), (5, 3)):
        order = torch.randperm(150, generator=torch.Generator().manual_seed(seed))
        other = run_attack(net, attack, x[order], y[order], ball, sample=ids[order.numpy()], lanes=width)
        assert not differing(base, other), (width, differing(base, other))


def test_a_trial_may_end_early():
    model = Linear(torch.ones(64, dtype=torch.float64), 0.0, classes=4)
    x = torch.full((3, 1, 8, 8), 0.9, dtype=torch.float64)
    # Too far from the plane: given up after its starts, with one last query.
    rows = run_attack(model, Hunt(starts=2, run=4, probe=2), x, torch.zeros(3, dtype=torch.int64), BALL, lanes=2)
    assert not rows.broken.any()
    assert rows.forwards.tolist() == [1 + 5 + 5 + 1] * 3
    assert rows.backwards.tolist() == [5 + 5] * 3
    assert rows.trial.tolist() == [0] * 3
    assert rows.step.tolist() == [10] * 3


@pytest.mark.whole
@pytest.mark.parametrize("stage", load_suite("whitebox").stages("digits"), ids=lambda s: s.name)
def test_the_suite_on_a_trained_model_does_not_depend_on_width_or_order(stage):
    net = copy.deepcopy(load_model(Registry.default().find("digits/at")).module).double()
    data = load("digits")
    x = torch.from_numpy(data.x[:100]).double() / data.scale
    y = torch.from_numpy(data.y[:100])
    correct = net(x).argmax(1) == y
    x, y, ids = x[correct], y[correct], data.index[:100][correct.numpy()]
    attack, ball = build_attack(stage), Ball("Linf", 0.2)
    base = run_attack(net, attack, x, y, ball, sample=ids, lanes=64)
    assert 0 < base.broken.sum() < len(y)
    for lanes in (16, 256):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(lanes))
        other = run_attack(net, attack, x[order], y[order], ball, sample=ids[order.numpy()], lanes=lanes)
        assert not differing(base, other), lanes


@pytest.mark.whole
@pytest.mark.parametrize("attack", ATTACKS, ids=IDS)
def test_float32_records_at_one_width_do_not_depend_on_order_or_neighbours(attack):
    """At one width, no verdict may flip. `perf/flips.py` measures how many flip between widths."""
    net = network()
    x, y = labelled(net, 200)
    ball = Ball("Linf", 0.2)
    base = run_attack(net, attack, x, y, ball, lanes=64)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(5))
    shuffled = run_attack(net, attack, x[order], y[order], ball, sample=order.numpy(), lanes=64)
    assert not differing(base, shuffled)
    shards = [
        run_attack(net, attack, x[i : i + 50], y[i : i + 50], ball, sample=np.arange(i, i + 50), lanes=64)
        for i in range(0, 200, 50)
    ]
    assert np.array_equal(np.concatenate([s.broken for s in shards]), base.broken)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_scheduler_equals_the_plain_loop(norm):
    net = network(torch.float64)
    x, y = labelled(net, 20, torch.float64)
    ball = Ball(norm, {"Linf": 0.05, "L2": 0.3, "L1": 1.5}[norm])
    attack = PGD(objective="ce", steps=6)
    p = Problem(
        x=x, y=y, sample=torch.arange(20), trial=torch.zeros(20, dtype=torch.int64), key=rng.make_key(0, "test")
    )
    final = engine.perturb(net, attack, p, ball)
    rows = run_attack(net, attack, x, y, ball, lanes=8, judge="final", keep_adversarials=True)
    broken = torch.from_numpy(rows.broken)
    assert torch.equal(broken, net(final).argmax(1) != y)
    assert torch.allclose(rows.x_adv[broken], final[broken])
    assert (rows.forwards == 7).all() and (rows.backwards == 6).all()
    assert np.array_equal(rows.prediction, net(final).argmax(1).numpy())


def test_any_iterate_is_at_least_as_strong_as_the_final_one():
    net = network()
    x, y = labelled(net, 60)
    attack = PGD(objective="ce", steps=5, relative_step=0.9)
    worst = run_attack(net, attack, x, y, Ball("Linf", 0.02))
    final = run_attack(net, attack, x, y, Ball("Linf", 0.02), judge="final")
    assert (worst.broken | ~final.broken).all()
    assert (worst.forwards <= final.forwards).all()


def threshold_model():
    """Says class 1 as soon as the mean pixel reaches 0.6, for any input."""
    return Linear(-torch.ones(4) / 4, 0.6)


@pytest.mark.parametrize(
    ("points", "broken", "step"),
    [
        ((0.9,), False, 0),  # outside the ball
        ((1.5,), False, 0),  # outside the box
        ((float("nan"),), False, 0),
        ((float("inf"),), False, 0),
        ((0.5, 0.9, 0.61), True, 2),  # the allowed one counts
        ((0.61, 0.5, 0.9), True, 0),  # the first success is latched
        ((0.5, 0.55), False, 1),
    ],
)
def test_only_allowed_points_count(points, broken, step):
    x = torch.full((1, 1, 2, 2), 0.5)
    rows = run_attack(threshold_model(), Scripted(points=points), x, torch.tensor([0]), BALL, lanes=1)
    assert bool(rows.broken[0]) is broken
    assert rows.step[0] == step
    assert rows.forwards[0] == step + 1
    assert np.isnan(rows.distance[0]) != broken


@pytest.mark.parametrize(
    ("points", "forwards"), [((0.5,) * 9, 1), ((0.45, 0.5) * 5, 2), ((0.41, 0.43) + (0.5, 0.55) * 4, 4)]
)
def test_going_in_circles_ends_a_trial(points, forwards):
    class Circling(Scripted):
        memoryless = True

    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    rows = run_attack(threshold_model(), Circling(points=points, trials=2), x, y, BALL, lanes=2)
    assert not rows.broken[0] and rows.forwards[0] == 2 * forwards
    for options in ({"judge": "final"}, {"detect_cycles": False}):
        rows = run_attack(threshold_model(), Circling(points=points, trials=2), x, y, BALL, lanes=2, **options)
        assert rows.forwards[0] == 2 * len(points)


@pytest.mark.whole
@pytest.mark.parametrize("objective", ["ce", "margin"])
def test_cycles_save_passes_and_change_no_verdict(objective):
    net = load_model(Registry.default().find("digits/at")).module
    data = load("digits")
    x, y = torch.from_numpy(data.x[:200]).float() / data.scale, torch.from_numpy(data.y[:200])
    correct = net(x).argmax(1) == y
    x, y = x[correct], y[correct]
    attack, ball = PGD(objective=objective, steps=40), Ball("Linf", 0.2)
    with_, without = (run_attack(net, attack, x, y, ball, lanes=64, detect_cycles=d) for d in (True, False))
    assert set(differing(with_, without)) == {"step", "forwards", "backwards"}
    assert np.array_equal(with_.step[with_.broken], without.step[without.broken])
    assert with_.forwards.sum() < 0.9 * without.forwards.sum()


def test_the_record_names_the_winning_trial():
    x = torch.full((1, 1, 2, 2), 0.5)

    class SecondTry(Scripted):
        def init(self, p, ball):
            return {"x": p.x + 0.11 * (p.trial == 1).view(-1, 1, 1, 1)}

    rows = run_attack(threshold_model(), SecondTry(points=(0.5,), trials=3), x, torch.tensor([0]), BALL, lanes=2)
    assert (rows.broken[0], rows.trial[0], rows.forwards[0], rows.prediction[0]) == (True, 1, 2, 1)


class Poisoned(nn.Module):
    """Answers NaN where a pixel exceeds 0.55."""

    def forward(self, x):
        s = 0.6 - x.flatten(1).mean(1)
        s = torch.where(x.flatten(1).amax(1) > 0.55, torch.nan, s)
        return torch.stack([s, -s], dim=1)


def test_a_nan_answer_is_no_break_and_is_counted():
    x = torch.full((3, 1, 2, 2), 0.5)
    rows = run_attack(Poisoned(), PGD(steps=4), x, torch.zeros(3, dtype=torch.int64), BALL, lanes=2)
    assert not rows.broken.any()
    assert (rows.nonfinite > 0).all()


class Flat(nn.Module):
    """Correct and without any gradient: quantized input."""

    def forward(self, x):
        s = 0.6 - x.flatten(1).round().mean(1) + 0 * x.flatten(1).sum(1)
        return torch.stack([s, -s], dim=1)


def test_zero_gradients_are_counted():
    rows = run_attack(Flat(), PGD(steps=4), torch.full((3, 1, 2, 2), 0.2), torch.zeros(3, dtype=torch.int64), BALL)
    assert (rows.zero_gradients == 1).all(), "no gradient, no step: the trial goes in circles at once"
    rows = run_attack(Flat(), APGD(steps=4), torch.full((3, 1, 2, 2), 0.2), torch.zeros(3, dtype=torch.int64), BALL)
    assert (rows.zero_gradients == 4).all()


def test_a_model_without_a_gradient_is_named():
    class Detached(nn.Module):
        def forward(self, x):
            s = 0.6 - x.detach().flatten(1).mean(1)
            return torch.stack([s, -s], dim=1)

    with pytest.raises(ModelError, match="autograd"):
        run_attack(Detached(), PGD(steps=4), torch.full((1, 1, 2, 2), 0.2), torch.tensor([0]), BALL)


class Hungry(nn.Module):
    """Runs out of memory above a batch of `most`, as the allocators word it."""

    def __init__(self, net, most, error):
        super().__init__()
        self.net, self.most, self.error, self.widths = net, most, error, []

    def forward(self, x):
        self.widths.append(len(x))
        if len(x) > self.most:
            raise self.error
        return self.net(x)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["cuda", "cpu"],
)
def test_out_of_memory_halves_the_lanes_and_goes_on(error):
    net = network(torch.float64)
    x, y = labelled(net, 30, torch.float64)
    attack, ball = PGD(steps=5, restarts=2), Ball("Linf", 0.03)
    told = []
    hungry = Hungry(net, 6, error)
    rows = run_attack(hungry, attack, x, y, ball, lanes=32, on_narrow=lambda w, why: told.append((w, why)))
    assert [w for w, _ in told] == [16, 8, 4]
    assert all("allocate" in why for _, why in told)
    assert not differing(rows, run_attack(net, attack, x, y, ball, lanes=4)), "counts start again with the sample"


def test_out_of_memory_at_one_lane_is_an_error():
    net = network()
    x, y = labelled(net, 2)
    with pytest.raises(ModelError, match="single lane"):
        run_attack(Hungry(net, 0, torch.OutOfMemoryError("CUDA out of memory.")), PGD(), x, y, BALL, lanes=4)


def test_errors_other_than_out_of_memory_pass_through():
    net = network()
    x, y = labelled(net, 2)
    with pytest.raises(RuntimeError, match="kaput"):
        run_attack(Hungry(net, 0, RuntimeError("kaput")), PGD(), x, y, BALL, lanes=4)


def test_finished_rows_survive_an_interrupt():
    net = network()
    x, y = labelled(net, 40)
    seen = []

    def stop_after_ten(rows):
        seen.extend(rows.sample.tolist())
        if len(seen) >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_attack(net, FGSM(), x, y, BALL, lanes=5, on_rows=stop_after_ten)
    assert len(seen) == len(set(seen)) == 10


class Fickle(nn.Module):
    """Gives other bits at some widths."""

    def __init__(self, at):
        super().__init__()
        self.net, self.at, self.seen = network(), at, []

    def forward(self, x):
        self.seen.append(len(x))
        return self.net(x) * (1 + 1e-6 * (len(x) in self.at))


class OneByOne(Fickle):
    """Gives other bits at these widths and at no other, whatever the processor."""

    def forward(self, x):
        return torch.cat([self.net(row) for row in x.split(1)]) * (1 + 1e-6 * (len(x) in self.at))


def test_only_widths_that_change_no_bit_are_used():
    full = BatchWidths(OneByOne({96, 48}), (1, 8, 8), 128, torch.float32)
    wanted = {128: 128, 121: 128, 97: 104, 96: 104, 57: 60, 48: 52, 33: 36, 20: 20, 16: 16, 9: 9, 1: 1}
    assert {left: full.fit(left) for left in wanted} == wanted
    none = BatchWidths(OneByOne(range(128)), (1, 8, 8), 128, torch.float32)
    assert none.fit(1) == 128
    odd = BatchWidths(OneByOne(()), (1, 8, 8), 7, torch.float32)
    assert odd.fit(6) == 7


def test_a_model_that_fails_on_images_that_are_none_is_asked_at_full_width():
    class Picky(nn.Module):
        def forward(self, x):
            raise ValueError("no digit")

    widths = BatchWidths(Picky(), (1, 8, 8), 32, torch.float32)
    assert widths.fit(3) == 32
    assert not widths.has_same_bits(32, 2)


def test_the_tail_shrinks_to_such_widths():
    net = Fickle({*range(128)} - {64, 16})
    x, y = labelled(net, 150)
    widths = BatchWidths(net, (1, 8, 8), 128, torch.float32)
    ball, attack = Ball("Linf", 0.2), PGD(objective="margin", steps=30)
    run_attack(net, attack, x, y, ball, widths=widths)  # checks the widths
    net.seen.clear()
    rows = run_attack(net, attack, x, y, ball, widths=widths)
    assert {128} < set(net.seen) <= {128, 64, 16}
    assert not differing(rows, run_attack(net.net, attack, x, y, ball, lanes=128))


SHORT = APGD(objective="dlr_targeted", targets=3, restarts=4, steps=3)


@pytest.mark.parametrize("attack", [SHORT, PGD(objective="ce", steps=5, restarts=12)], ids=["apgd-t", "pgd"])
def test_trials_beside_each_other_change_no_record_and_take_fewer_rounds(attack, monkeypatch):
    net = Fickle(())
    net.double()
    x, y = labelled(net, 40, torch.float64)
    ball = Ball("Linf", 0.2)
    widths = BatchWidths(net, (1, 8, 8), 256, torch.float64)
    run_attack(net, attack, x, y, ball, widths=widths)  # checks the widths
    net.seen.clear()
    beside = run_attack(net, attack, x, y, ball, widths=widths, keep_adversarials=True)
    seen = list(net.seen)
    later = seen.index(min(seen))
    assert max(seen[later:]) > min(seen), "the batch grows again once samples have withstood a trial"
    monkeypatch.setattr(engine, "TrialQueue", lambda *args, ahead: TrialQueue(*args, ahead=False))
    net.seen.clear()
    in_turn = run_attack(net, attack, x, y, ball, widths=widths, keep_adversarials=True)
    assert not differing(beside, in_turn)
    assert torch.equal(beside.x_adv, in_turn.x_adv)
    assert 0 < beside.broken.sum() < 40 and beside.trial[beside.broken].max() > 1
    assert len(seen) < 0.6 * len(net.seen)


def test_an_attack_may_keep_the_step_it_is_told():
    class Keeping(Scripted):
        def init(self, p, ball):
            return super().init(p, ball) | {"told": torch.full_like(p.y, -1)}

        def step(self, p, ball, s, t, logits, loss, grad):
            assert torch.equal(s["told"], t - 1)
            return super().step(p, ball, s, t, logits, loss, grad) | {"told": t}

    x = torch.full((1, 1, 2, 2), 0.5)
    rows = run_attack(threshold_model(), Keeping(points=(0.5, 0.51) * 4), x, torch.tensor([0]), BALL, lanes=1)
    assert rows.forwards[0] == 8


def test_the_default_width_falls_with_the_size_of_images():
    cpu = torch.device("cpu")
    assert [default_lanes(s, cpu) for s in ((1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 224, 224))] == [
        256,
        128,
        32,
        8,
    ]


@dataclass(frozen=True, kw_only=True)
class FromLogits(Scripted):
    """Proposes the clean logits, written into the first pixels."""

    needs_logits: ClassVar[bool] = True
    points: tuple[float, ...] = (0.0, 0.0)

    def init(self, p, ball):
        return {"x": torch.zeros_like(p.x), "seen": p.logits.clone()}

    def step(self, p, ball, s, t, logits, loss, grad):
        assert torch.equal(s["seen"], p.logits)
        x = torch.zeros_like(s["x"])
        x.flatten(1)[:, :2] = p.logits[:, :2]
        return {"x": x, "seen": s["seen"]}


@pytest.mark.parametrize("lanes", [1, 3, 16])
def test_an_attack_that_asks_for_clean_logits_gets_them(lanes):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(9, 1, 2, 2, generator=generator, dtype=torch.float64)
    w = torch.randn(4, generator=generator, dtype=torch.float64)
    model = Linear(w, 0.0)
    with torch.no_grad():
        clean = model(x)
    y = clean.argmax(1)
    asked = []
    model.register_forward_hook(lambda _m, given, _out: asked.append(given[0].clone()))
    rows = run_attack(model, FromLogits(), x, y, Ball("Linf", 0.0), lanes=lanes)
    assert (rows.forwards == 3).all(), "one for the logits, two queries"
    points = {tuple(row[:2].tolist()) for batch in asked for row in batch.flatten(1)}
    assert {tuple(row.tolist()) for row in clean} <= points


def test_gradients_that_nobody_uses_are_not_computed_and_change_no_verdict(monkeypatch):
    net = network(torch.float64)
    x, y = labelled(net, 60, torch.float64)
    attack, ball = Relax(targets=4, restarts=3, search=30), Ball("Linf", 0.2)
    seen = []

    def note(model, attack, p, s, with_grad, bfloat16=False):
        seen.append(with_grad)
        return query(model, attack, p, s, with_grad, bfloat16)

    monkeypatch.setattr(lanes_module, "query", note)
    base = run_attack(net, attack, x, y, ball, lanes=16)
    assert set(seen) == {True, False}
    for width in (5, 64):
        assert not differing(base, run_attack(net, attack, x, y, ball, lanes=width))
    monkeypatch.setattr(lanes_module, "Sparing", Searching)  # no attack is known to spare gradients
    wasteful = run_attack(net, attack, x, y, ball, lanes=16)
    assert differing(base, wasteful) == ["backwards"]
    stands = ~base.broken
    assert (base.backwards[stands] < wasteful.backwards[stands]).all()
