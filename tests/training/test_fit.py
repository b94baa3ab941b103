"""Trainings whose iterations are given, or fitted to a time."""

import json
import time

import pytest

from robbench.core.errors import ModelError, RobbenchError
from robbench.models.card import Registry
from robbench.training.missing import list_missing
from robbench.training.options import Options
from robbench.training.plan import Fitter, Plan
from robbench.training.train import train
from support.cards import SMALL
from support.commands import run

CARD = (
    SMALL
    + """[recipe]
iterations = 40
batch_size = 32
optimizer = "adam"
lr = 0.01
schedule = "cosine"
seed = 3
"""
)


def put(root, text=CARD):
    path = root / "digits" / "m.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return find(root)


def find(root):
    return Registry([root]).find("digits/m")


def test_the_progress_of_one_piece_is_the_share_of_the_iterations():
    plan = Plan.parse("2000")
    assert str(plan) == "2000" and plan == Plan.parse("0:2000")
    assert all(plan.progress(i) == i / 2000 for i in range(2001))


def test_the_progress_of_several_pieces_by_hand():
    plan = Plan.parse("10:110, 60:160,135:140")
    assert str(plan) == "10:110,60:160,135:140" and plan.total == 140
    assert [plan.progress(i) for i in (0, 10, 11, 60, 135, 140)] == pytest.approx([0, 0, 0.01, 0.5, 0.875, 1])
    assert plan.progress(59) == Plan.parse("10:110").progress(59), "a later piece changes nothing before it"
    assert Plan().progress(7) == 0 and Plan().total == 0


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "-5", "5x", "1e3", "2000.0", "9999999999", "1" * 5000, "٠", ":", "5:", ":5", "5:9:12"),
        *("10:10", "20:10", "5:9,4:12", "5:9,5:12", "5:9,9:12", "5:9,", "5:9;7:12", "5:1000000001"),
    ],
)
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(RobbenchError, match=r"--iterations: .* given; allowed: a number from 1 to"):
        Plan.parse(text)


def simulate(seconds, cost, pause=lambda iteration: 0.0):
    """Let a fitter plan a training whose iterations cost `cost(time)` seconds: time at the end, and the plan."""
    fitter, plan, now, i = Fitter(seconds), Plan(), 0.0, 0
    while not plan.pieces or i < plan.total:
        took = cost(now)
        now += took
        i += 1
        if not plan.pieces or i < plan.total:
            before = plan.progress(i)
            plan = fitter.adjust(plan, i, took, now)
            assert plan.progress(i) == before, "the learning rate never jumps"
        now += pause(i)
        fitter.pause(pause(i))
    return now, plan


@pytest.mark.parametrize("seconds", [10, 60, 1800])
@pytest.mark.parametrize(
    "cost",
    [
        pytest.param(lambda now, whole: 0.01, id="quiet"),
        pytest.param(lambda now, whole: 0.01 + 0.19 * (now == 0), id="slow-first"),
        pytest.param(lambda now, whole: 0.03 if now > 0.4 * whole else 0.01, id="load-comes"),
        pytest.param(lambda now, whole: 0.01 if now > 0.4 * whole else 0.03, id="load-goes"),
        pytest.param(lambda now, whole: 0.03 if now > 0.95 * whole else 0.01, id="load-comes-late"),
        pytest.param(lambda now, whole: 0.03 if 0.3 < now / whole < 0.8 else 0.01, id="load-comes-and-goes"),
        pytest.param(lambda now, whole: 0.01 + 0.02 * (int(now * 7.3) % 3 == 0), id="flutter"),
        pytest.param(lambda now, whole: whole / 40, id="few-iterations"),
    ],
)
def test_a_fitted_plan_ends_in_time_under_any_load(seconds, cost):
    end, plan = simulate(seconds, lambda now: cost(now, seconds))
    assert 0.9 * seconds < end < 1.05 * seconds
    assert plan.progress(plan.total) == pytest.approx(1)
    assert len(plan.pieces) < 35


def test_pauses_are_planned_too():
    end, _ = simulate(60, lambda now: 0.01, lambda i: 0.5 if i % 100 == 0 else 0.0)
    assert 54 < end < 62
    end, _ = simulate(60, lambda now: 0.001, lambda i: 8.0 * (i in (3000, 15000)))
    assert 50 < end < 54, "time for one more pause at the end"


@pytest.mark.whole
def test_a_fitted_training_ends_in_time_and_is_recorded(tmp_path):
    put(tmp_path)
    args = ("train", "digits/m", "--models", tmp_path, "--fit", "8s")
    run(*args[:-2], "--iterations", 1, cwd=tmp_path)  # imports what is imported once
    begin = time.monotonic()
    done = run(*args, cwd=tmp_path)
    assert 6 < time.monotonic() - begin < 10
    trained = find(tmp_path).card.trained
    assert f"{trained.iterations} of {trained.iterations} iterations" in done.stdout
    assert (trained.fit, trained.instead) == (8.0, "") and trained.iterations > 40
    assert trained.command == "robbench train digits/m --fit 8s"
    assert Plan.parse(trained.plan).total == trained.iterations
    lines = [json.loads(line) for line in (tmp_path / "runs/digits/m.fit/log.jsonl").read_text().splitlines()]
    assert lines[-1]["iteration"] == trained.iterations and 0 < lines[-1]["lr"] < 1e-4 < lines[0]["lr"]
    assert 90 < len(lines) <= 101
    assert list_missing(Registry([tmp_path])) == []
    weights = find(tmp_path).card.weights
    again = run(*args, cwd=tmp_path)  # all is done: nothing is trained
    assert "Replaced" not in again.stdout and find(tmp_path).card.weights == weights


@pytest.mark.whole
def test_a_fitted_training_in_pieces_is_repeated_by_its_plan(tmp_path):
    entry = put(tmp_path)
    calls, done = 0, None
    while done is None or not done.table.get("plan") or done.table["iterations"] < done.wanted:
        calls += 1
        done = train(entry, Options(runs=tmp_path / "runs", fit=3.0, time_limit=0.5))
    first = find(tmp_path).card
    assert calls > 2 and ":" in first.trained.plan
    plan = Plan.parse(first.trained.plan)
    train(find(tmp_path), Options(runs=tmp_path / "runs", plan=plan, restart=True))
    second = find(tmp_path).card
    assert (second.trained.plan, second.trained.fit) == (first.trained.plan, 0)
    assert second.weights.sha256 == first.weights.sha256


@pytest.mark.whole
def test_a_given_number_of_iterations_scales_the_schedule(tmp_path):
    short, same = put(tmp_path / "a", CARD), put(tmp_path / "b", CARD.replace("= 40", "= 20"))
    train(short, Options(runs=tmp_path / "runs-a", plan=Plan.parse("20")))
    train(same, Options(runs=tmp_path / "runs-b"))
    a, b = find(tmp_path / "a").card, find(tmp_path / "b").card
    assert a.weights.sha256 == b.weights.sha256
    assert (a.trained.instead, b.trained.instead) == ("iterations 20 instead of 40", "")
    assert (tmp_path / "runs-a/digits/m.iterations/checkpoint.pt").exists()
    assert [e.name for e in list_missing(Registry([tmp_path / "a"]))] == ["m"], "partly trained"
    with pytest.raises(ModelError, match=r"--fit or --iterations than digits/m has now\. Start over with --restart"):
        train(find(tmp_path / "a"), Options(runs=tmp_path / "runs-a", plan=Plan.parse("0:30,10:20")))


def test_too_little_time_to_begin_is_refused_before_anything_is_trained(tmp_path):
    entry = put(tmp_path)
    with pytest.raises(ModelError, match=r"--fit 0\.001s given; reading data .* alone took .* Give more time"):
        train(entry, Options(runs=tmp_path / "runs", fit=0.001))
    assert find(tmp_path).card.weights is None and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--fit", "0"], "--fit: '0' given; allowed: seconds, or a number with s, m or h"),
        (["--fit", "5x"], "--fit: '5x' given"),
        (["--fit", ""], "--fit: '' given"),
        (["--fit", "nan"], "--fit: 'nan' given"),
        (["--fit", "-3m"], "--fit: '-3m' given"),
        (["--iterations", "0"], "--iterations: '0' given"),
        (["--iterations", ""], "--iterations: '' given"),
        (["--fit", "5m", "--iterations", "100"], "allowed: one of them"),
    ],
)
def test_wrong_times_and_numbers_are_refused(args, message):
    assert message in run("train", "digits/natural", *args, code=2).stderr


def test_all_missing_takes_no_time_to_fit():
    assert "work with named cards" in run("train", "--all-missing", "--fit", "5m", code=2).stderr
