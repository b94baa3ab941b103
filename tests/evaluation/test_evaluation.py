"""One model × one suite → one result: identity, resume, extension, and everything that must be refused."""

import time

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from robbench.core.errors import DataError, ModelError, ResultError, RobbenchError, SuiteError
from robbench.engine import engine
from robbench.evaluation import inputs, worker
from robbench.evaluation import run as evaluation
from robbench.evaluation.inputs import select
from robbench.evaluation.options import Options
from robbench.evaluation.run import evaluate
from robbench.results.reader import read_results
from robbench.results.schema import read_result
from robbench.results.store import COLUMNS
from support.masks import Noisy
from support.models import Linear, small
from support.stored import outcomes, stable


def test_the_result_adds_up(problem, tmp_path):
    model, x, y = problem
    result = evaluate(model, "whitebox", x=x, y=y, name="small", eps=0.05, results=tmp_path, lanes=16)
    assert (result.n, result.dataset, result.model, result.selection) == (60, "custom", "small", "all 60")
    assert result.clean_accuracy.value == 0.9
    assert result.overrides == {"eps": "0.05"}
    (folder,) = (tmp_path / "custom" / "small").iterdir()
    assert folder.name == f"whitebox@{result.run_id[:8]}"
    rows = outcomes(folder)
    assert [*rows.columns, "seconds"] == list(COLUMNS)
    assert len(rows) == 60 * 6
    assert not rows.duplicated(["sample", "attack"]).any()
    lost = rows[rows["status"].isin(["broken", "misclassified"])]["sample"].unique()
    assert result.robust_accuracy.value == pytest.approx(1 - len(lost) / 60)
    assert 0 < result.robust_accuracy.value < 0.9, "the numbers must be able to differ"
    for attack in result.attacks:
        mine = rows[rows["attack"] == attack.name]
        assert attack.forwards == mine["forwards"].sum()
        assert attack.robust_accuracy.value == (mine["status"] == "robust").mean()
        assert attack.robust_accuracy.low <= attack.robust_accuracy.value <= attack.robust_accuracy.high
    broken = rows[rows["status"] == "broken"]
    assert (broken["prediction"] != broken["label"]).all()
    assert (broken["distance"] <= 0.05 + 1e-6).all()
    assert (rows.loc[rows["status"] == "robust", "prediction"] == rows.loc[rows["status"] == "robust", "label"]).all()


def test_cascade_attacks_survivors_only_and_loses_nothing(problem, tmp_path):
    model, x, y = problem
    result = evaluate(model, "quick", x=x, y=y, name="small", eps=0.05, results=tmp_path)
    rows = outcomes(next((tmp_path / "custom" / "small").iterdir())).set_index(["sample", "attack"])["status"]
    first, second, third = (rows.xs(a.name, level="attack") for a in result.attacks)
    assert (second[first == "broken"] == "skipped").all()
    assert (third[(first == "broken") | (second == "broken")] == "skipped").all()
    shares = [a.robust_accuracy.value for a in result.attacks]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == result.robust_accuracy.value


@pytest.mark.whole
def test_more_samples_extend_the_run_and_fewer_leave_it(problem, tmp_path):
    model, x, y = problem
    call = {"x": x, "y": y, "name": "small", "eps": 0.05, "results": tmp_path, "lanes": 8}
    evaluate(model, "whitebox", samples=20, **call)
    (folder,) = (tmp_path / "custom" / "small").iterdir()
    before = outcomes(folder)
    bigger = evaluate(model, "whitebox", samples=50, **call)
    after = outcomes(folder)
    assert bigger.n == 50 and bigger.selection == "first 50 of 60"
    kept = after[after["sample"] < 20].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, before, obj="rows of the first run, to the second of wall time")
    stored = (folder / "result.json").read_bytes()
    smaller = evaluate(model, "whitebox", samples=30, **call)
    assert smaller.n == 30
    assert (folder / "result.json").read_bytes() == stored, "a smaller look changes nothing on disk"
    alone = evaluate(model, "whitebox", samples=50, **{**call, "results": tmp_path / "other"})
    assert alone.run_id == bigger.run_id
    fresh = outcomes(next((tmp_path / "other" / "custom" / "small").iterdir()))
    pd.testing.assert_frame_equal(stable(after), stable(fresh))


def test_a_summary_that_a_kill_left_behind_is_made_again(problem, tmp_path):
    model, x, y = problem
    call = {"x": x, "y": y, "name": "small", "eps": 0.05, "results": tmp_path, "lanes": 8}
    evaluate(model, "quick", samples=20, **call)
    (folder,) = (tmp_path / "custom" / "small").iterdir()
    before = (folder / "result.json").read_bytes()
    evaluate(model, "quick", samples=50, **call)
    (folder / "result.json").write_bytes(before)  # killed after outcomes.parquet was written
    assert evaluate(model, "quick", samples=50, **call).n == 50
    assert read_result(folder / "result.json").n == 50


def test_a_finished_run_is_not_computed_again(problem, tmp_path, monkeypatch):
    model, x, y = problem
    call = {"x": x, "y": y, "name": "small", "eps": 0.05, "results": tmp_path}
    first = evaluate(model, "quick", **call)

    def forbidden(*args, **kwargs):
        raise AssertionError("computed again")

    class Listener(evaluation.Silent):
        def note(self, text):
            notes.append(text)

    notes: list[str] = []
    monkeypatch.setattr(engine, "attack_samples", forbidden)
    monkeypatch.setattr(worker, "classify", forbidden)
    assert evaluate(model, "quick", **call, reporter=Listener()) == first
    assert evaluate(model, "quick", **call, samples=20).n == 20
    (note,) = notes
    assert note.startswith(f"custom/small · quick · Linf 0.05: known since {first.date[:10]}, nothing to compute. ")
    assert "--results DIR" in note


@pytest.mark.whole
def test_an_interrupt_keeps_what_was_finished(problem, tmp_path, monkeypatch):
    model, x, y = problem
    call = {"x": x, "y": y, "name": "small", "eps": 0.05, "results": tmp_path, "lanes": 8}
    real, calls = engine.attack_samples, []

    def interrupted(*args, on_rows, **kwargs):
        def counted(rows):
            on_rows(rows)
            calls.append(len(rows.sample))
            if sum(calls) > 100:
                raise KeyboardInterrupt

        return real(*args, on_rows=counted, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "attack_samples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, "whitebox", **call)
    (folder,) = (tmp_path / "custom" / "small").iterdir()
    kept = pd.concat(pd.read_parquet(p) for p in folder.glob(".partial/*/*.parquet"))
    assert kept["status"].isin(["broken", "robust"]).sum() == sum(calls)
    assert not (folder / "result.json").exists()
    evaluate(model, "whitebox", **call)
    assert not (folder / ".partial").exists()
    whole = evaluate(model, "whitebox", **{**call, "results": tmp_path / "other"})
    fresh = outcomes(next((tmp_path / "other" / "custom" / "small").iterdir()))
    pd.testing.assert_frame_equal(stable(outcomes(folder)), stable(fresh))
    assert whole.n == 60


def test_a_different_run_in_the_same_place_is_refused_by_field(problem, tmp_path, monkeypatch):
    _, x, y = problem
    # A standard run, without overrides. Images of one's own always come with a radius.
    monkeypatch.setattr(inputs, "find_known_name", lambda name: None)
    call = {"x": x, "y": y, "name": "small", "results": tmp_path, "dataset": "fashion_mnist"}
    evaluate(small(0), "quick", **call)
    stored = (tmp_path / "fashion_mnist" / "small" / "quick" / "result.json").read_bytes()
    with pytest.raises(ResultError, match="weights: stored") as error:
        evaluate(small(1), "quick", **call)
    assert (
        "--overwrite" in str(error.value)
        and "data" not in str(error.value).split("What differs")[1].split("weights")[0]
    )
    assert (tmp_path / "fashion_mnist" / "small" / "quick" / "result.json").read_bytes() == stored
    replaced = evaluate(small(1), "quick", **call, overwrite=True)
    assert read_result(tmp_path / "fashion_mnist" / "small" / "quick" / "result.json") == replaced


def test_overrides_never_touch_the_standard_run(tmp_path):
    model, call = "digits/natural", {"results": tmp_path, "samples": 20}
    ids = {evaluate(model, "quick", **call, **o).run_id for o in ({}, {"eps": 0.1}, {"seed": 1}, {"sample_seed": 3})}
    assert len(ids) == 4
    folders = sorted(p.name.split("@")[0] for p in (tmp_path / "digits" / "natural").iterdir())
    assert folders == ["quick"] * 4
    assert len(read_results(tmp_path).results) == 4
    lanes = evaluate(model, "quick", **call, lanes=8)
    assert lanes.run_id in ids and lanes.overrides == {}, "batch width is recorded, not part of the identity"


def test_a_random_subset_is_seeded(problem):
    model, x, y = problem
    call = {"x": x, "y": y, "eps": 0.05, "samples": 20}
    a, b, c = (evaluate(model, "quick", **call, sample_seed=s) for s in (1, 1, 2))
    assert a.robust_accuracy == b.robust_accuracy
    assert a.selection == "20 of 60 drawn with sample seed 1"
    draws = [select(60, Options(samples=20, sample_seed=s)) for s in (1, 1, 2)]
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[2])
    assert len(set(draws[0])) == 20
    assert c.n == 20


class Constant(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


def linear_logits(x):
    s = x.flatten(1).sum(1)
    return torch.stack([s, -s], dim=1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x, r"shape \(.*\) to a batch of .* images.*; expected logits of shape"),
        (lambda x: x.flatten(1).sum(1), "expected logits"),
        (lambda x: (linear_logits(x), linear_logits(x)), "a tuple"),
        (lambda x: linear_logits(x) * torch.nan, "NaN or infinity to every clean image; to sample 0"),
        (lambda x: linear_logits(x) + torch.inf, "NaN or infinity"),
        (lambda x: linear_logits(x)[:, :1], "one logit per image"),
        (lambda x: x @ torch.ones(3, 3), "cannot be run on images of shape"),
    ],
)
def test_answers_that_mean_nothing_are_refused(answer, message):
    x = torch.rand(4, 1, 8, 8)
    with pytest.raises(ModelError, match=message):
        evaluate(Constant(answer).eval(), "quick", x=x, y=torch.zeros(4, dtype=torch.int64), eps=0.1)


def test_class_counts_must_match():
    x = torch.rand(4, 1, 8, 8)
    with pytest.raises(ModelError, match="2 classes; the labels go up to 5"):
        evaluate(Constant(linear_logits).eval(), "quick", x=x, y=torch.tensor([0, 1, 5, 0]), eps=0.1)
    with pytest.raises(ModelError, match="2 classes; the data set has 10"):
        evaluate(Constant(linear_logits).eval(), "quick", dataset="digits")


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.rand(4, 1, 8, 8) * 255, torch.zeros(4).long(), r"spans .* expected \[0, 1\]"),
        (torch.rand(4, 1, 8, 8) - 0.5, torch.zeros(4).long(), r"expected \[0, 1\]"),
        (torch.full((4, 1, 8, 8), torch.nan), torch.zeros(4).long(), "NaN or infinity in 4 of 4 images"),
        (torch.zeros(4, 8, 8), torch.zeros(4).long(), r"\[N, C, H, W\]"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.int32), torch.zeros(4).long(), "in float16, float32 or float64"),
        (torch.zeros(4, 1, 8, 8), torch.zeros(3).long(), r"4 integer labels"),
        (torch.zeros(4, 1, 8, 8), torch.tensor([0, 0, 0, -1]), "label -1"),
        (torch.zeros(0, 1, 8, 8), torch.zeros(0).long(), "no images"),
        (torch.zeros(4, 1, 8, 8), None, "go together"),
        (None, None, "Give images"),
    ],
)
def test_bad_images_are_refused(x, y, message):
    with pytest.raises(DataError, match=message):
        evaluate(small(), "quick", x=x, y=y, eps=0.1)


def test_a_model_in_training_mode_is_refused():
    model = small()
    model[2].train()
    with pytest.raises(ModelError, match=r"training mode \(2\).*eval\(\)"):
        evaluate(model, "quick", x=torch.rand(4, 1, 8, 8), y=torch.zeros(4).long(), eps=0.1)


def test_chance_in_the_answers_is_flagged(problem):
    model, x, y = problem
    assert "randomized" in evaluate(Noisy(model, 0.1).eval(), "quick", x=x, y=y, eps=0.05).flags
    assert "randomized" not in evaluate(model, "quick", x=x, y=y, eps=0.05).flags


def test_probabilities_are_flagged(problem):
    model, x, y = problem
    soft = nn.Sequential(model, nn.Softmax(dim=1)).eval()
    assert "probabilities" in evaluate(soft, "quick", x=x, y=y, eps=0.05).flags
    assert "probabilities" not in evaluate(model, "quick", x=x, y=y, eps=0.05).flags


def test_dead_gradients_are_flagged(problem):
    model, x, y = problem
    scaled = Constant(lambda z: 1e4 * model(z)).eval()
    assert "zero_gradients" in evaluate(scaled, "whitebox", x=x, y=y, eps=0.05).flags
    assert "zero_gradients" not in evaluate(model, "whitebox", x=x, y=y, eps=0.05).flags


def test_the_users_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10)).eval()
    x = torch.rand(8, 1, 8, 8)
    before = {k: (v.clone(), v.stride()) for k, v in model.state_dict().items()}
    evaluate(model, "quick", x=x, y=model(x).argmax(1), eps=0.1)
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k][0]) and v.stride() == before[k][1] for k, v in model.state_dict().items())


def test_a_view_inside_the_model_is_no_obstacle():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(144, 10)

        def forward(self, x):
            return self.head(self.conv(x).view(len(x), -1))

    model = Viewing().eval()
    x = torch.rand(8, 1, 8, 8)
    assert evaluate(model, "quick", x=x, y=model(x).argmax(1), eps=0.1).n == 8


def test_float64_images_run_in_float64():
    x = torch.rand(8, 1, 4, 4, dtype=torch.float64)
    model = Linear(torch.ones(16, dtype=torch.float64), -8.0).eval()
    result = evaluate(model, "whitebox", x=x, y=model(x).argmax(1), eps=0.5)
    assert result.identity["dtype"] == "torch.float64"
    assert result.robust_accuracy.value == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"model": "digits/natural", "x": torch.rand(1, 1, 8, 8)}, RobbenchError, "module of your own"),
        ({"model": "digits/natural", "stpes": 3}, RobbenchError, "Unknown option"),
        ({"model": "digits/natural", "samples": 0}, RobbenchError, "samples: 0 given"),
        ({"model": "digits/natural", "lanes": 0}, RobbenchError, "lanes: 0 given"),
        ({"model": "digits/natural", "device": "cuda:99"}, ModelError, "available here: auto, cpu"),
        ({"model": "digits/natural", "norm": "L2"}, SuiteError, "without --eps"),
        ({"model": "digits/natural", "eps": "8"}, SuiteError, "8/255"),
        ({"model": "digits/natural", "eps": "x"}, SuiteError, "eps: 'x' given"),
        ({"model": "digits/natural", "eps": "1", "norm": "Lp"}, SuiteError, "Linf, L2, L1"),
        ({"model": "digits/naturl"}, RobbenchError, "The closest of .*: digits/natural"),
    ],
)
def test_meaningless_options_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        evaluate(**call)


def test_the_estimate_reaches_the_reporter(problem):
    model, x, y = problem
    heard = []

    class Listener(evaluation.Silent):
        def plan(self, title, stages, n, clean, seconds, device):
            heard.append((title, len(stages), n, clean, device))
            assert seconds > 0

        def progress(self, name, finished, broken):
            heard.append(finished)

    begin = time.perf_counter()
    evaluate(model, "whitebox", x=x, y=y, name="small", eps=0.05, reporter=Listener())
    assert heard[0] == ("custom/small · whitebox · Linf 0.05", 6, 60, 54, "cpu")
    assert sum(heard[1:]) == 54 * 6
    assert time.perf_counter() - begin < 60
