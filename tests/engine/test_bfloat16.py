"""Gradients in bfloat16: they choose where to go, and the precision of the images says what breaks."""

import json
import shutil
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from robbench.attacks import APGD, CW, EOT, FAB, FGSM, PGD, DeepFool, Hunt, Relax
from robbench.classifier.batch_width import BatchWidths
from robbench.classifier.guard import in_bfloat16
from robbench.classifier.prepare import prepare
from robbench.core.errors import DataError, ModelError, RobbenchError
from robbench.core.threat import Ball
from robbench.data.sets import load
from robbench.evaluation import worker
from robbench.evaluation.progress import Silent
from robbench.evaluation.run import evaluate
from robbench.models.card import Registry
from robbench.models.load import load_model
from robbench.recheck.reproduce import reproduce
from robbench.results.records import read_rows
from robbench.results.schema import read_result
from support.attacks import Scripted, run_attack
from support.commands import run
from support.models import small

BALL = Ball("Linf", 0.15)


class TwoFaced(nn.Module):
    """Says class 1 from a mean pixel of 0.6 on; asked in bfloat16, from `coarse` on."""

    def __init__(self, coarse):
        super().__init__()
        self.coarse, self.asked = coarse, []

    def forward(self, x):
        rough = torch.is_autocast_enabled("cpu")
        self.asked.append("bfloat16" if rough else "float32")
        s = (self.coarse if rough else 0.6) - x.flatten(1).mean(1)
        return torch.stack([s, -s], dim=1)


@dataclass(frozen=True, kw_only=True)
class Told(Scripted):
    """Asks for gradients, and notes which of its points it was told are wrong."""

    needs_grad: ClassVar[bool] = True
    told: list[bool]
    memoryless: bool = False

    def loss(self, logits, p, s):
        return logits[:, 1] - logits[:, 0]

    def step(self, p, ball, s, t, logits, loss, grad):
        assert torch.equal(loss, self.loss(logits, p, s)), "loss and logits are of the same answer"
        self.told.append(bool(logits.argmax(1)[0] != p.y[0]))
        return super().step(p, ball, s, t, logits, loss, grad)


def scripted(model, points, **options):
    attack = Told(points=points, told=[], memoryless=options.pop("memoryless", False))
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    widths = BatchWidths(model, (1, 2, 2), 1, torch.float32, bfloat16=True)
    return run_attack(model, attack, x, y, BALL, widths=widths, **options), attack.told


def test_what_only_bfloat16_gets_wrong_is_no_break():
    model = TwoFaced(coarse=0.52)
    rows, told = scripted(model, (0.5, 0.55, 0.51, 0.55))
    assert not rows.broken[0] and rows.prediction[0] == 0
    assert told == [False, False, False], "the attack is told what is so"
    assert (rows.forwards[0], rows.backwards[0]) == (5, 3), "the doubted point is asked about twice, and counted"
    assert model.asked == ["bfloat16", "bfloat16", "float32", "bfloat16", "float32"]


def test_what_bfloat16_misses_breaks_at_the_last_point():
    rows, told = scripted(TwoFaced(coarse=0.9), (0.5, 0.62, 0.5, 0.62))
    assert rows.broken[0] and rows.step[0] == 3 and rows.prediction[0] == 1
    assert told == [False, False, False], "on the way it looks right"


def test_a_break_that_both_see_is_taken_at_once():
    rows, _ = scripted(TwoFaced(coarse=0.6), (0.5, 0.62, 0.5, 0.5))
    assert rows.broken[0] and (rows.step[0], rows.forwards[0]) == (1, 3)


def test_points_outside_the_ball_are_not_asked_about_again():
    model = TwoFaced(coarse=0.6)
    rows, told = scripted(model, (0.5, 0.9, 0.5))
    assert not rows.broken[0] and told == [False, True]
    assert model.asked == ["bfloat16", "bfloat16", "float32"]


def test_the_final_point_alone_is_judged_where_the_suite_says_so():
    model = TwoFaced(coarse=0.6)
    rows, _ = scripted(model, (0.5, 0.62, 0.5), judge="final")
    assert not rows.broken[0] and model.asked == ["bfloat16", "bfloat16", "float32"]


def test_going_in_circles_ends_with_a_judged_point():
    rows, _ = scripted(TwoFaced(coarse=0.9), (0.62,) * 9, memoryless=True)
    assert rows.broken[0] and rows.forwards[0] == 2, "bfloat16 sees nothing wrong with 0.62"


def test_a_trial_that_ends_beside_others_is_judged_in_full_precision():
    """A batch in which some lanes step on and others are at their last point is asked in bfloat16."""
    model = TwoFaced(coarse=0.9)
    widths = BatchWidths(model, (1, 2, 2), 2, torch.float32, bfloat16=True)
    x = torch.stack([torch.full((1, 2, 2), v) for v in (0.5, 0.59, 0.5, 0.5, 0.595)])

    @dataclass(frozen=True, kw_only=True)
    class Ending(Told):
        def init(self, p, ball):
            return {"x": p.x}

        def step(self, p, ball, s, t, logits, loss, grad):
            near = p.x.flatten(1).mean(1) > 0.55  # these say at once that they are done
            return {"x": (s["x"] + 0.06).clamp(max=0.64), "done": near}

    attack = Ending(points=(0.5,) * 5, told=[])
    rows = run_attack(model, attack, x, torch.zeros(5, dtype=torch.int64), BALL, widths=widths)
    assert rows.broken.all() and rows.step.tolist() == [4, 1, 4, 4, 1]
    assert (rows.forwards == rows.step + 1).all(), "whoever shared the batch"


def digits_at(n):
    module = load_model(Registry.default().find("digits/at")).module
    data = load("digits")
    x, y = torch.from_numpy(data.x[:n]).float() / data.scale, torch.from_numpy(data.y[:n])
    net = prepare(module, torch.device("cpu"), x[:2])
    right = net(x).argmax(1) == y
    return net, x[right], y[right]


ATTACKS = [
    FGSM(),
    PGD(objective="margin", steps=20),
    APGD(objective="dlr_targeted", targets=3, steps=20),
    Hunt(starts=2, targets=3, run=10, chase=20, probe=3),
    Relax(targets=4, restarts=3),
]


PRECISE = [
    FAB(targets=2, steps=5),
    EOT(inner=DeepFool(iterations=3), draws=2),
    CW(search_steps=2, iterations=40, lr=0.05, initial_c=1.0),
]


@pytest.mark.whole
@pytest.mark.parametrize("attack", PRECISE, ids=lambda a: a.kind)
def test_what_small_differences_lead_astray_keeps_to_full_precision(attack):
    net, x, y = digits_at(60)
    ball = Ball("Linf", 0.2) if "Linf" in attack.norms else Ball("L2", 1.5)
    full = run_attack(net, attack, x, y, ball, lanes=32)
    coarse = run_attack(net, attack, x, y, ball, widths=BatchWidths(net, x.shape[1:], 32, x.dtype, bfloat16=True))
    for name in ("broken", "step", "forwards", "backwards", "distance"):
        assert np.array_equal(getattr(full, name), getattr(coarse, name), equal_nan=name == "distance"), name


@pytest.mark.whole
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.kind)
def test_every_break_holds_in_full_precision_and_few_are_missed(attack):
    net, x, y = digits_at(120)
    ball = Ball("Linf", 0.2)
    full = run_attack(net, attack, x, y, ball, lanes=32)
    widths = BatchWidths(net, x.shape[1:], 32, x.dtype, bfloat16=True)
    rows = run_attack(net, attack, x, y, ball, widths=widths, keep_adversarials=True)
    logits = torch.cat([net(part) for part in rows.x_adv.split(32)])
    wrong = (logits.argmax(1) != y).numpy()
    assert np.array_equal(wrong, rows.broken) and np.array_equal(
        logits.argmax(1).numpy()[wrong], rows.prediction[wrong]
    )
    assert bool(ball.contains(x, rows.x_adv)[torch.from_numpy(rows.broken)].all())
    assert rows.broken.sum() >= full.broken.sum() - 4 and full.broken.sum() > 20


@pytest.mark.whole
def test_records_do_not_depend_on_order_or_on_widths_that_give_the_same_bits():
    net, x, y = digits_at(100)
    attack, ball = APGD(objective="ce", steps=20), Ball("Linf", 0.2)
    widths = BatchWidths(net, x.shape[1:], 16, x.dtype, bfloat16=True)
    first = run_attack(net, attack, x, y, ball, widths=widths)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    other = run_attack(net, attack, x[order], y[order], ball, sample=order.numpy(), widths=widths)
    for name in ("broken", "step", "forwards", "backwards", "prediction", "distance"):
        assert np.array_equal(getattr(first, name), getattr(other, name), equal_nan=name == "distance"), name


def test_a_model_that_fails_in_bfloat16_alone_says_so(problem):
    class Strict(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            logits = self.inner(x)
            if logits.dtype != torch.float32:
                raise TypeError("no kernel for BFloat16")
            return logits

    model, x, y = problem
    with pytest.raises(ModelError, match=r"no kernel for BFloat16 .*in bfloat16; without --gradients"):
        evaluate(Strict(model).eval(), "quick", x=x, y=y, norm="Linf", eps=0.2, gradients="bfloat16")
    assert evaluate(Strict(model).eval(), "quick", x=x, y=y, norm="Linf", eps=0.2).n == len(y)


@pytest.mark.parametrize(("offset", "flagged"), [(0, False), (100, True)])
def test_logits_too_close_together_for_bfloat16_are_flagged(problem, offset, flagged):
    class Lifted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + offset

    model, x, y = problem
    found = evaluate(Lifted(model).eval(), "quick", x=x, y=y, norm="Linf", eps=0.2, gradients="bfloat16")
    assert ("bfloat16" in found.flags) is flagged, found.flags
    assert "bfloat16" not in evaluate(Lifted(model).eval(), "quick", x=x, y=y, norm="Linf", eps=0.2).flags


class Wavering(nn.Module):
    """Gives other bits in bfloat16 at some widths."""

    def __init__(self, at):
        super().__init__()
        self.net, self.at = small(), at

    def forward(self, x):
        logits = torch.cat([self.net(row) for row in x.split(1)])
        return logits * (1 + 1e-2 * (len(x) in self.at and torch.is_autocast_enabled("cpu")))


def test_the_bits_of_bfloat16_count_when_a_width_is_chosen():
    model = Wavering({16, 20})
    assert BatchWidths(model, (1, 8, 8), 32, torch.float32).fit(16) == 16
    assert BatchWidths(model, (1, 8, 8), 32, torch.float32, bfloat16=True).fit(16) == 24


@pytest.mark.parametrize("gradients", [None, "bfloat16"])
def test_an_autocast_of_the_callers_own_is_refused(problem, gradients):
    """It would make every answer coarse, those of the judge too."""
    model, x, y = problem
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RobbenchError, match=r"inside torch\.autocast"):
        evaluate(model, "quick", x=x, y=y, norm="Linf", eps=0.2, gradients=gradients)


def test_a_model_asked_in_bfloat16_is_not_called_coarse(problem):
    model, x, _ = problem
    guarded = prepare(model, torch.device("cpu"), x[:2])
    with in_bfloat16(x.device):
        assert guarded(x[:2]).dtype == torch.float32
    assert guarded.flags == {}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    options = {"samples": 30, "results": root, "save_adversarials": True}
    return (
        root,
        evaluate("digits/at", "quick", **options),
        evaluate("digits/at", "quick", gradients="bfloat16", **options),
    )


@pytest.mark.whole
def test_it_is_a_run_of_its_own_and_says_so(made):
    root, full, coarse = made
    assert coarse.run_id != full.run_id and "gradients" not in full.identity
    assert coarse.overrides == {"gradients": "bfloat16"} == {"gradients": coarse.identity["gradients"]}
    folders = sorted(p.name for p in root.glob("digits/at/*"))
    assert folders == ["quick", f"quick@{coarse.run_id[:8]}"]
    assert abs(coarse.robust_accuracy.value - full.robust_accuracy.value) < 0.1


@pytest.mark.whole
def test_its_breaks_are_verified_and_it_reproduces(made):
    root, _, coarse = made
    place = root / f"digits/at/quick@{coarse.run_id[:8]}"
    assert "0 mismatches" in run("verify", place).stdout
    found = reproduce(place)
    assert (found.verdicts, found.details) == ([], [])


@pytest.mark.whole
def test_an_unfinished_run_goes_on_in_bfloat16(made, tmp_path):
    root, _, coarse = made
    place = f"digits/at/quick@{coarse.run_id[:8]}"

    class Stops(Silent):
        def progress(self, name, finished, broken):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate("digits/at", "quick", samples=30, gradients="bfloat16", results=tmp_path, reporter=Stops())
    run("eval", "--resume", "--results", tmp_path)
    again = read_result(tmp_path / place / "result.json")
    assert again.run_id == coarse.run_id
    now, before = (read_rows(r / place / "outcomes.parquet") for r in (tmp_path, root))
    assert now.drop(columns="seconds", errors="ignore").equals(before.drop(columns="seconds", errors="ignore"))


@pytest.mark.whole
def test_eval_and_plan_take_gradients_in_bfloat16(tmp_path):
    args = ("-m", "digits/at", "-s", "quick", "--samples", "20", "--results", tmp_path)
    found = json.loads(run("eval", *args, "--gradients", "bfloat16", "--json").stdout)
    assert found["overrides"] == {"gradients": "bfloat16"}
    assert "allowed: bfloat16" in run("eval", *args, "--gradients", "float16", code=2).stderr
    said = run(
        "eval", "-m", "digits/at", "-s", "sanity", "--gradients", "bfloat16", "--results", tmp_path, code=2
    ).stderr
    assert "sanity" in said and "bfloat16" in said
    assert "--resume" in run("eval", "--resume", "--gradients", "bfloat16", code=2).stderr
    plan = run("plan", *args, "--pilot", "8", "--gradients", "bfloat16").stdout
    assert "digits/at" in plan
    shutil.rmtree(tmp_path / "digits")


@pytest.mark.parametrize(("coarse", "said"), [(0.5, False), (3.0, True)])
def test_hardware_without_it_is_told_of(problem, monkeypatch, coarse, said):
    model, x, y = problem
    monkeypatch.setattr(
        worker, "measure_pass_seconds", lambda *args, **options: 2.0 * (coarse if options.get("bfloat16") else 1)
    )
    notes, seconds = [], []

    class Listening(Silent):
        def note(self, text):
            notes.append(text)

        def plan(self, title, stages, n, clean, took, device):
            seconds.append(took)

    for gradients in (None, "bfloat16"):
        evaluate(model, "quick", x=x, y=y, norm="Linf", eps=0.2, gradients=gradients, reporter=Listening())
    assert [("bfloat16 cost time here" in n) for n in notes] == [True] * said
    assert seconds[1] == pytest.approx(coarse * seconds[0])


def test_what_means_nothing_is_refused(problem):
    model, x, y = problem
    with pytest.raises(RobbenchError, match="'int8' given; allowed: bfloat16"):
        evaluate(model, "quick", x=x, y=y, norm="Linf", eps=0.2, gradients="int8")
    with pytest.raises(DataError, match=r"given with images in torch.float64; allowed: float32"):
        evaluate(model.double(), "quick", x=x.double(), y=y, norm="Linf", eps=0.2, gradients="bfloat16")
