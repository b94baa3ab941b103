"""What a run will cost, beside what it costs."""

import json

import pytest
import torch

from robbench.core.errors import RobbenchError
from robbench.data.sets import load
from robbench.evaluation import planning
from robbench.evaluation.planning import _Stopwatch, as_rows, plan
from robbench.evaluation.run import evaluate
from robbench.results.store import read_rows
from support.commands import run

pytestmark = pytest.mark.whole


def passes(rows):
    return {name: (int(r["forwards"].sum()), int(r["backwards"].sum())) for name, r in rows.groupby("attack")}


def always_wrong():
    """Make a model that gives all images a class that the first two do not have."""
    first = load("digits", "test").y[:2]
    return Constant(next(k for k in range(10) if k not in first)).eval()


class Constant(torch.nn.Module):
    def __init__(self, k):
        super().__init__()
        self.register_buffer("logits", torch.eye(10)[k])

    def forward(self, x):
        return self.logits + 0 * x.flatten(1)[:, :10]


def told(p):
    return {s.stage: (s.forwards, s.backwards) for s in p.stages}


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


def test_a_pilot_on_all_images_is_the_run(tmp_path):
    p = plan("digits/at", "quick", samples=40, pilot=128)
    evaluate("digits/at", "quick", samples=40, results=tmp_path)
    assert told(p) == passes(read_rows(tmp_path / "digits/at/quick/outcomes.parquet"))
    assert p.source == "a pilot on 40 images" and p.uncertainty == 0


def test_records_of_more_images_than_asked_for_count_where_they_overlap(tmp_path):
    evaluate("digits/natural", "quick", samples=60, results=tmp_path)
    p = plan("digits/natural", "quick", pilot=8, samples=30, results=tmp_path)
    assert p.source.startswith("records of 30 images") and p.n == 30 and p.uncertainty == 0


def test_the_default_pilot_fills_the_lanes():
    assert plan("digits/natural", "quick", lanes=150).source == "a pilot on 150 images"
    assert plan("digits/natural", "quick", lanes=4).source == "a pilot on 128 images"


def test_the_pace_is_that_of_the_widest_calls():
    watch = _Stopwatch()
    watch.calls["a"] = [(0.0, 4), (2.0, 4), (6.0, 2), (7.0, 4)]
    assert watch.pace("a") == pytest.approx((2 + 4) / 2 / 4)
    watch.calls["a"] = [(0.0, 4)]
    assert watch.pace("a") is None


def test_the_model_is_left_as_it_was(monkeypatch):
    runs, make_run = [], planning.make_run
    monkeypatch.setattr(
        planning, "make_run", lambda *args, **kwargs: runs.append(make_run(*args, **kwargs)) or runs[-1]
    )
    plan("digits/natural", "quick", samples=20, pilot=10)
    assert not runs[0].target.module._forward_pre_hooks


def test_a_model_that_is_always_wrong_is_refused():
    with pytest.raises(RobbenchError, match="none of 2 images is classified correctly; nothing is to attack"):
        plan("test_planning:always_wrong", "quick", dataset="digits", samples=2)


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
    with pytest.raises(RobbenchError, match="pilot: 1 given; allowed: a whole number, at least 2"):
        plan("digits/natural", "quick", pilot=1, results=tmp_path)
