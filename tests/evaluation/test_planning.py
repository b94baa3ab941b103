"""What a run will cost, beside what it costs."""

import json
import math

import numpy as np
import pytest

from conftest import run
from robbench.core.errors import RobbenchError
from robbench.evaluation import planning
from robbench.evaluation.planning import _laid, _Pace, _Tried, as_rows, plan
from robbench.evaluation.run import evaluate
from robbench.results.store import read_rows


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Calibrate for a moment only."""
    monkeypatch.setattr(planning, "_SHORTEST", 0.05)


def passes(rows):
    return {name: (int(r["forwards"].sum()), int(r["backwards"].sum())) for name, r in rows.groupby("attack")}


def told(p):
    return {s.stage: (s.forwards, s.backwards) for s in p.stages}


@pytest.mark.parametrize(("each", "limit"), [(math.nan, 0.05), (1e-9, 0.05), (0.1, None), (1e9, 2.0)])
def test_calibration_takes_a_share_of_the_run(each, limit, monkeypatch):
    calibrated, limits = planning._calibrated, []

    def noted(run, stage, at, widths, seconds):
        limits.append(seconds)
        return calibrated(run, stage, at, widths, 0.01)

    monkeypatch.setattr(planning, "_calibrated", noted)
    monkeypatch.setattr(planning, "_opening", lambda run, widths: (0.0, each))
    p = plan("digits/natural", "quick", pilot=16, samples=400, lanes=4)
    expected = [0.05 * s.forwards / 4 * each if limit is None else limit for s in p.stages]
    assert limits == pytest.approx(expected, rel=0.02)


def test_records_of_the_same_run_leave_no_pass_open(tmp_path):
    asked = {"samples": 60, "results": tmp_path}
    evaluate("digits/natural", "quick", **asked)
    taken = passes(read_rows(tmp_path / "digits/natural/quick/outcomes.parquet"))
    p = plan("digits/natural", "quick", pilot=8, **asked)
    assert told(p) == taken and p.n == 60 and p.uncertainty == 0
    assert p.source.startswith("records of 60 images")
    other = plan("digits/natural", "quick", pilot=8, samples=60, results=tmp_path, seed=1)  # another run
    assert other.source == "a pilot on 8 images"


def test_a_pilot_foretells_passes(tmp_path):
    p = plan("digits/at", "quick", pilot=100, samples=400, results=tmp_path)
    evaluate("digits/at", "quick", samples=400, results=tmp_path)
    taken = passes(read_rows(tmp_path / "digits/at/quick/outcomes.parquet"))
    assert sum(map(sum, told(p).values())) == pytest.approx(sum(map(sum, taken.values())), rel=0.2)
    assert p.seconds > p.opening > 0 and all(s.seconds > 0 and s.passes_per_second > 0 for s in p.stages)
    assert 0 < p.uncertainty < 0.5
    assert not [*tmp_path.rglob("*@*")], "the pilot leaves nothing behind"


class AnyWidth:
    """Every width gives the same bits."""

    def fit(self, left):
        return left


@pytest.mark.parametrize(
    ("rounds", "trials", "broken", "seconds"),
    [
        ([5], 1, False, 5 * 1.25),  # a narrow batch of one
        ([5, 5, 5, 5], 1, False, 5 * 2.0),  # all lanes full to the end
        ([4, 4, 4, 4, 4], 1, False, 4 * 2.0 + 4 * 1.25),  # the fifth takes a free lane
        ([1, 3, 3, 3], 1, False, 1 * 2.0 + 2 * 1.75),  # one is done: a width of 3
        ([5], 3, False, 5 * 1.25 + 5 * 1.5),  # after the first trial, two beside each other
        ([5], 7, False, 5 * 1.25 + 5 * 1.75 + 5 * 1.75),  # after the first trial of seven, three, and three
        ([5], 3, True, 5 * 1.25 + 5 * 1.5),  # the third breaks it
        ([5, 5, 5, 5], 2, False, 5 * 2.0 + 5 * 2.0),
    ],
)
def test_images_are_laid_onto_lanes(rounds, trials, broken, seconds):
    pace = _Pace(lanes=4, narrow=2, full_seconds=2.0, narrow_seconds=1.5)
    n = len(rounds)
    tried = _Tried(np.full(n, trials), np.array(rounds, float), np.full(n, broken))
    assert _laid(tried, trials, AnyWidth(), pace) == pytest.approx(seconds)


def test_lanes_let_go_when_an_earlier_trial_breaks():
    pace = _Pace(lanes=4, narrow=2, full_seconds=2.0, narrow_seconds=1.5)
    tried = _Tried(np.array([2, 1]), np.array([5.0, 20.0]), np.array([True, False]))
    # The second image is alone from round 10 on: trials 2 and 3 of the first are let go of when trial 1 breaks it.
    assert _laid(tried, 9, AnyWidth(), pace) == pytest.approx(5 * 1.5 + 5 * 2.0 + 10 * 1.25 + _further(pace))


def _further(pace):
    """Eight more trials of 20 rounds of the image that stands: three, then four and one for want of a fifth lane."""
    return 20 * (pace.seconds(3) + pace.seconds(4) + pace.seconds(1))


def test_the_command_prints_a_table_or_json(tmp_path):
    asked = ("plan", "-m", "digits/natural", "-s", "quick", "--samples", 40, "--pilot", 10, "--workers", 2)
    found = json.loads(run(*asked, "--json", cwd=tmp_path).stdout)
    (p,) = found["plans"]
    assert p["n"] == 40 and len(p["stages"]) == 3
    assert found["total"]["wall_seconds"] == pytest.approx(found["total"]["work_seconds"] / 2)
    assert found["total"]["work_seconds"] == pytest.approx(p["opening"] + sum(s["seconds"] for s in p["stages"]))
    text = run(*asked, cwd=tmp_path).stdout
    assert "a pilot on 10 images" in text and "2 workers:" in text
    assert len({tuple(row) for row in as_rows([plan("digits/natural", "quick", samples=40, pilot=10)])}) == 1, "columns"


def test_a_pilot_of_one_image_is_refused(tmp_path):
    with pytest.raises(RobbenchError, match="pilot: 1 given; it must be at least 2"):
        plan("digits/natural", "quick", pilot=1, results=tmp_path)
