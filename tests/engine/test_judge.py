"""The judge: every condition of a break, one at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from robbench.core.threat import Ball
from robbench.core.types import Problem
from robbench.engine.judge import judge_points, read_answers

NAN, INF = float("nan"), float("inf")


def never(p, s, n):
    raise AssertionError("the judge asked again")


def judged(logits, x=None, *, last=None, with_grad=False, ask=None, **job):
    """Judge points beside clean images of 0.5 with label 0 and eps 0.1: [L, K] logits, one pixel value per lane."""
    logits = torch.tensor(logits)
    n = len(logits)
    lane = torch.arange(n)
    p = Problem(x=torch.full((n, 1, 1, 1), 0.5), y=0 * lane, sample=lane, trial=0 * lane, key=(0, 0))
    x = torch.full((n, 1, 1, 1), 0.55) if x is None else torch.tensor(x).view(-1, 1, 1, 1)
    widths = SimpleNamespace(fit=lambda n: n)
    job = {
        "ball": Ball("Linf", 0.1),
        "judge": "any",
        "draws": 1,
        "bfloat16": False,
        "widths": widths,
        "device": x.device,
        "model": None,
        **job,
    }
    answers, _ = read_answers(logits, p.y)

    def repeat(p, s, n):
        return logits[p.sample], logits[p.sample].sum(1)

    last = np.zeros(n, bool) if last is None else np.array(last)
    verdict = judge_points(
        SimpleNamespace(**job), p, {"x": x}, answers, np.ones(n, bool), last, with_grad, ask or repeat, logits
    )
    return verdict, answers


def test_only_finite_wrong_logits_break():
    logits = [[0.0, 1.0], [1.0, 0.0], [0.0, NAN], [0.0, INF], [NAN, 1.0], [0.0, 0.0]]
    verdict, answers = judged(logits)
    assert verdict.is_break.tolist() == [True, False, False, False, False, False]
    assert answers.is_finite.tolist() == [True, True, False, False, False, True]
    assert verdict.distance[0] == pytest.approx(0.05) and np.isnan(verdict.distance[1:]).all()
    assert verdict.forwards.sum() == 0 and verdict.corrected is None


def test_only_points_in_the_ball_and_the_box_break():
    x = [0.6, 0.61, 0.4, 0.39, NAN, 1.01, 0.5]
    verdict, _ = judged([[0.0, 1.0]] * 7, x)
    assert verdict.is_break.tolist() == [True, False, True, False, False, False, True]
    verdict, _ = judged([[0.0, 1.0]] * 3, [1.0, 1.001, -0.001], ball=Ball("Linf", 0.6))
    assert verdict.is_break.tolist() == [True, False, False]


def test_with_the_rule_final_only_last_points_break():
    verdict, _ = judged([[0.0, 1.0]] * 2, last=[False, True], judge="final")
    assert verdict.is_break.tolist() == [False, True]


def test_logits_from_bfloat16_are_asked_again():
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    asked = []

    def ask(p, s, n):
        asked.extend(p.sample[:n].tolist())
        return truth[p.sample], truth[p.sample, 1]

    # In bfloat16 the first two seem broken; the last two are the last points of their trials.
    told = [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    verdict, answers = judged(told, last=[False, False, True, True], with_grad=True, bfloat16=True, ask=ask)
    assert asked == [0, 1, 2, 3]
    assert verdict.is_break.tolist() == [False, True, True, False]
    assert answers.prediction.tolist() == [0, 1, 1, 0]
    assert verdict.forwards.tolist() == [1, 1, 0, 0], "a last point is charged once"
    at, logits, loss = verdict.corrected
    assert torch.equal(at, torch.arange(4)) and torch.equal(logits, truth) and torch.equal(loss, truth[:, 1])


def test_breaks_of_a_query_with_a_gradient_are_asked_again_without_one():
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    asked = []

    def ask(p, s, n):
        asked.extend(p.sample[:n].tolist())
        return truth[p.sample], truth[p.sample, 1]

    # The third claims nothing, the fourth lies outside of the ball.
    told, x = [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], [0.55, 0.55, 0.55, 0.8]
    verdict, answers = judged(told, x, last=[False, False, True, True], with_grad=True, ask=ask)
    assert asked == [0, 1, 0, 1], "answers that change are asked for a third time"
    assert verdict.is_break.tolist() == [False, True, False, False]
    assert answers.prediction.tolist() == [0, 1, 0, 1] and not verdict.forwards.any()
    assert not judged(told, x)[0].is_break[3] and judged(told, x)[0].is_break[0], "a query without a gradient counts"


def test_a_majority_of_draws_confirms_a_break_of_a_randomized_model():
    wrong = iter([[1, 0, 1], [1, 0, 1], [0, 0, 1], [0, 0, 1]])  # further answers, whether each lane's is wrong

    def model(x):
        flags = torch.tensor(next(wrong), dtype=torch.float32)
        return torch.stack([1 - flags, flags], 1)

    verdict, _ = judged([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]], draws=5, model=model)
    assert verdict.is_break.tolist() == [True, False, False], "the last lane claimed nothing"
    assert verdict.forwards.tolist() == [4, 4, 0]
