"""Adversarial examples on disk: every break has one, it holds in the form that is stored, and no interrupt loses it."""

import json
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import torch
from torch import nn

from robbench.core.errors import ResultError, RobbenchError
from robbench.core.threat import Ball
from robbench.engine import engine
from robbench.evaluation import run as evaluation
from robbench.evaluation.keep_adversarials import round_to_float16
from robbench.evaluation.run import evaluate
from robbench.results.adversarials import FILE, Points, list_entries, merge, pack, read
from support import TESTS
from support.masks import Noisy
from support.models import small
from support.stored import folder, outcomes, stable, write_suite, write_transfer_suite


def stored(root):
    """All points of a run by (sample, attack), in float32."""
    groups = read(folder(root) / FILE).points
    return {
        (int(s), str(a)): torch.from_numpy(x).float()
        for g in groups
        for s, a, x in zip(g.sample, g.attack, g.x, strict=True)
    }


def check(root, model, x, first=0):
    """Every break has a point, no other row has, and each point re-derives its row."""
    rows = outcomes(folder(root))
    broken = rows[rows["status"] == "broken"].set_index(["sample", "attack"])
    points = stored(root)
    assert set(points) == set(broken.index) and points
    for key, x_adv in points.items():
        x0 = x[key[0] - first][None]
        assert Ball("Linf", float(rows.attrs.get("eps", 0.05))).contains(x0, x_adv[None])
        assert model(x_adv[None]).argmax() == broken.loc[key, "prediction"] != broken.loc[key, "label"]
        assert float((x_adv - x0).abs().max()) == pytest.approx(broken.loc[key, "distance"], abs=2**-10)
    return points


@pytest.mark.parametrize("mode", ["full", "cascade"])
def test_every_break_is_stored_and_re_derives(problem, tmp_path, mode):
    model, x, y = problem
    call = {"x": x, "y": y, "name": "small", "eps": 0.05, "lanes": 16}
    plain = evaluate(model, write_suite(tmp_path, mode), **call, results=tmp_path / "plain")
    kept = evaluate(model, write_suite(tmp_path, mode), **call, results=tmp_path / "kept", save_adversarials=True)
    assert kept.run_id == plain.run_id, "it is not part of what was measured"
    pd.testing.assert_frame_equal(
        stable(outcomes(folder(tmp_path / "plain"))), stable(outcomes(folder(tmp_path / "kept")))
    )
    assert not (folder(tmp_path / "plain") / FILE).exists()
    points = check(tmp_path / "kept", model, x)
    small_ones = sum(len(g.sample) for g in read(folder(tmp_path / "kept") / FILE).points if g.x.dtype == np.float16)
    assert small_ones > 0.8 * len(points), "most fit into float16"


def test_what_float16_would_change_stays_as_it_is(tmp_path):
    """A model that breaks within less than a float16 step of the ball's surface."""
    x = torch.full((8, 1, 4, 4), 0.7)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([torch.ones(16), -torch.ones(16)]))
        model[1].bias.copy_(torch.tensor([-1.0, 1.0]) * 16 * (0.7 - 0.0099999))
    y = torch.zeros(8, dtype=torch.int64)
    evaluate(model, "quick", x=x, y=y, eps=0.01, results=tmp_path, save_adversarials=True)
    (group,) = read(folder(tmp_path) / FILE).points
    assert group.x.dtype == np.float32 and len(group) == 8
    assert (model(torch.from_numpy(group.x)).argmax(1) == 1).all()


def test_float64_runs_keep_float64(tmp_path):
    x = torch.full((3, 1, 4, 4), 0.7, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double().eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([torch.ones(16), -torch.ones(16)]))
        model[1].bias.copy_(torch.tensor([-1.0, 1.0]) * 16 * (0.7 - 0.0099999))
    evaluate(model, "quick", x=x, y=torch.zeros(3).long(), eps=0.01, results=tmp_path, save_adversarials=True)
    (group,) = read(folder(tmp_path) / FILE).points
    assert group.x.dtype == np.float64


def test_rounding_never_moves_away_from_the_image():
    generator = torch.Generator().manual_seed(0)
    for eps in (0.3, 8 / 255, 1e-3):
        x0 = torch.rand(50, 3, 8, 8, generator=generator)
        x = (x0 + eps * (2 * torch.rand(x0.shape, generator=generator) - 1).sign()).clamp(0, 1)
        half = round_to_float16(x0, x)
        assert half.dtype == torch.float16
        assert ((half.float() - x).abs() <= 2**-11).all()
        assert ((half.float() - x0).abs() <= (x - x0).abs()).all()
        assert ((half >= 0) & (half <= 1)).all()
    edges = torch.tensor([0.0, 1.0, 1e-9, 6e-8, 1 - 1e-7]).view(5, 1, 1, 1)
    assert ((round_to_float16(edges, edges).float() - edges).abs() < 2e-7).all()


@pytest.mark.whole
def test_transfers_and_peers_are_kept_too(tmp_path):
    peer = '\n[[attack]]\nname = "peer"\nkind = "autoattack:APGD-CE"\nbatch = 16\n'
    path = tmp_path / "s.toml"
    write_transfer_suite(tmp_path)
    path.write_text(path.read_text() + peer)
    evaluate("digits/at", str(path), samples=16, results=tmp_path / "r", save_adversarials=True)
    rows = outcomes(folder(tmp_path / "r"))
    points = stored(tmp_path / "r")
    broken = rows[rows["status"] == "broken"]
    assert set(points) == set(zip(broken["sample"], broken["attack"], strict=True))
    assert {a for _, a in points} == {"BB", "peer"}


def test_models_that_answer_at_random_are_not_asked_again(problem, tmp_path):
    model, x, y = problem
    evaluate(Noisy(model, 0.1).eval(), "quick", x=x, y=y, eps=0.05, results=tmp_path, save_adversarials=True)
    assert {g.x.dtype.name for g in read(folder(tmp_path) / FILE).points} == {"float32"}


def test_an_extension_keeps_and_adds(problem, tmp_path):
    model, x, y = problem
    call = {"x": x, "y": y, "name": "small", "eps": 0.05, "lanes": 8}
    evaluate(model, write_suite(tmp_path), samples=20, **call, results=tmp_path / "a", save_adversarials=True)
    evaluate(model, write_suite(tmp_path), samples=50, **call, results=tmp_path / "a")  # it goes on saving by itself
    check(tmp_path / "a", model, x)
    evaluate(model, write_suite(tmp_path), samples=50, **call, results=tmp_path / "b", save_adversarials=True)
    assert (folder(tmp_path / "a") / FILE).read_bytes() == (folder(tmp_path / "b") / FILE).read_bytes()


@pytest.mark.whole
@pytest.mark.parametrize("mode", ["full", "cascade"])
def test_breaks_known_without_their_points_are_computed_again(problem, tmp_path, mode):
    model, x, y = problem
    call = {"x": x, "y": y, "name": "small", "eps": 0.05, "lanes": 8}

    class Listener(evaluation.Silent):
        def note(self, text):
            notes.append(text)

        def progress(self, name, finished, broken):
            attacked.append(finished)

    notes: list[str] = []
    attacked: list[int] = []
    evaluate(model, write_suite(tmp_path, mode), **call, results=tmp_path / "a")
    before = outcomes(folder(tmp_path / "a"))
    evaluate(
        model,
        write_suite(tmp_path, mode),
        **call,
        results=tmp_path / "a",
        samples=30,
        save_adversarials=True,
        reporter=Listener(),
    )
    again = int(((before["status"] == "broken") & (before["sample"] < 30)).sum())
    assert notes == [f"{again} breaks are known without their adversarial examples; they are computed again."]
    assert sum(attacked) == again, "and nothing else is"
    pd.testing.assert_frame_equal(stable(outcomes(folder(tmp_path / "a"))), stable(before))
    evaluate(model, write_suite(tmp_path, mode), **call, results=tmp_path / "a")
    check(tmp_path / "a", model, x)
    evaluate(model, write_suite(tmp_path, mode), **call, results=tmp_path / "b", save_adversarials=True)
    assert (folder(tmp_path / "a") / FILE).read_bytes() == (folder(tmp_path / "b") / FILE).read_bytes()
    notes.clear()
    evaluate(
        model, write_suite(tmp_path, mode), **call, results=tmp_path / "a", save_adversarials=True, reporter=Listener()
    )
    assert "nothing to compute" in notes[0]


def test_an_interrupt_keeps_the_points_of_its_rows(problem, tmp_path, monkeypatch):
    model, x, y = problem
    call = {"x": x, "y": y, "name": "small", "eps": 0.05, "lanes": 8, "save_adversarials": True}
    real, calls = engine.attack_samples, []

    def failing(error):
        def attack(*args, on_rows, **kwargs):
            def counted(rows):
                on_rows(rows)
                calls.append(len(rows.sample))
                if sum(calls) > 30:
                    raise error

            return real(*args, on_rows=counted, **kwargs)

        return attack

    for error in (KeyboardInterrupt(), RuntimeError("the model failed")):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(engine, "attack_samples", failing(error))
            with pytest.raises(type(error)):
                evaluate(model, write_suite(tmp_path), **call, results=tmp_path / "a")
    shards = list(folder(tmp_path / "a").glob(".partial/*/*.parquet"))
    assert shards and not (folder(tmp_path / "a") / FILE).exists()
    for shard in shards:
        rows = pd.read_parquet(shard)
        kept = sum(len(g) for g in read(shard.with_suffix(".safetensors")).points)
        assert kept == (rows["status"] == "broken").sum() > 0
    evaluate(model, write_suite(tmp_path), **call, results=tmp_path / "a")
    check(tmp_path / "a", model, x)


SCRIPT = """
import functools, sys, time, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from robbench.engine import engine
from robbench.evaluation import run as evaluation
from robbench.evaluation import shards
from robbench.results import store
from support.models import small
evaluation.Shards = functools.partial(shards.Shards, commit_seconds=0.0)
real, write = engine.attack_samples, store.write_atomically
def slow(*a, on_rows, **k):
    def later(rows):
        on_rows(rows); print("rows", flush=True)
    return real(*a, on_rows=later, **k)
def told(path, data):
    print(path.name, flush=True); write(path, data); print("done", flush=True)
engine.attack_samples, store.write_atomically = slow, told
x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1)); model = small(); y = model(x).argmax(1)
evaluation.evaluate(model, "quick", x=x, y=y, name="small", eps=0.05, results=sys.argv[1], lanes=8,
    save_adversarials=True)
"""


@pytest.mark.whole
def test_sigkill_between_any_two_writes_changes_nothing(tmp_path):
    script = SCRIPT.format(tests=TESTS)
    # Before and after writes of points and rows, and in the middle of the merge at the end.
    for word, times in ((".safetensors", 1), ("done", 5), (FILE, 1), ("result", 1)):
        with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "a")], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            seen = 0
            for line in child.stdout:
                seen += word in line.decode()
                if seen >= times:
                    child.send_signal(signal.SIGKILL)
                    break
            child.wait()
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    model = small()
    call = {"x": x, "y": model(x).argmax(1), "name": "small", "eps": 0.05, "lanes": 8, "save_adversarials": True}
    for root in "ab":
        evaluate(model, "quick", **call, results=tmp_path / root)
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b")
    pd.testing.assert_frame_equal(stable(outcomes(a)), stable(outcomes(b)))
    assert (a / FILE).read_bytes() == (b / FILE).read_bytes()
    check(tmp_path / "a", model, x)


def test_a_run_that_breaks_nothing_has_an_empty_file(problem, tmp_path):
    model, x, y = problem
    evaluate(model, "quick", x=x, y=y, eps="1e-7", results=tmp_path, save_adversarials=True)
    assert read(folder(tmp_path) / FILE).points == []


def test_a_place_to_store_is_needed(problem):
    model, x, y = problem
    with pytest.raises(RobbenchError, match="results=DIR"):
        evaluate(model, "quick", x=x, y=y, eps=0.05, save_adversarials=True)


def points(samples, names, kind=np.float32):
    x = np.arange(len(samples) * 4, dtype=kind).reshape(-1, 1, 2, 2) / 64
    return Points.of("run", np.array(samples), np.array(names), x)


def test_merging_takes_the_first_and_the_order_of_the_rows():
    wanted = pd.DataFrame({"sample": [3, 1, 1, 9], "attack": ["a", "b", "a", "a"]})
    parts = [points([1, 3], ["a", "a"]), points([1, 1, 5], ["b", "a", "a"]), points([2], ["a"], np.float16)]
    (group,) = merge(parts, wanted)
    assert list(zip(group.sample.tolist(), group.attack.tolist(), strict=True)) == [(3, "a"), (1, "b"), (1, "a")]
    assert np.array_equal(group.x[2], parts[0].x[0]), "the first of two counts"
    assert merge([], wanted) == []


def test_damage_is_named(tmp_path):
    path = tmp_path / FILE
    whole = pack([points([1, 2], ["a", "b"])], "run", ["a", "b"])
    path.write_bytes(whole)
    assert read(path).altered == []
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert len(read(path).altered) == 1
    for content, message in ((whole[:-9], "damaged"), (b"", "damaged"), (b"x" * 99, "damaged")):
        path.write_bytes(content)
        with pytest.raises(ResultError, match=message):
            read(path)
    path.write_bytes(safetensors.numpy.save({"x": np.zeros(3)}))
    with pytest.raises(ResultError, match="metadata"):
        read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"float32/x_adv": None}, "lacks one of"),
        ({"float32/sha256": None}, "lacks one of"),
        ({"float32/sample": np.zeros(2)}, "the format"),
        ({"float32/sample": np.zeros(3, np.int64)}, "the format"),
        ({"float32/attack": np.zeros((2, 1), np.int64)}, "the format"),
        ({"float32/x_adv": np.zeros(2)}, "the format"),
        (
            {f"int64/{name}": np.zeros(2, np.int64) for name in ("x_adv", "sample", "attack")}
            | {"int64/sha256": np.zeros((2, 32), np.uint8)},
            "the format",
        ),
        ({"version": 2}, "version 2 given"),
        ({"version": None}, "does not name the run"),
        ({"attacks": "ab"}, "version 1 given"),
        ({"sha256": []}, "version 1 given"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, change, message):
    path = tmp_path / FILE
    path.write_bytes(pack([points([1, 2], ["a", "b"])], "run", ["a", "b"]))
    with safetensors.safe_open(path, "numpy") as file:
        about, parts = json.loads(file.metadata()["robbench"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, value in change.items():
        held = parts if "/" in name else about
        held.pop(name, None) if value is None else held.update({name: value})
    path.write_bytes(safetensors.numpy.save(parts, {"robbench": json.dumps(about)}))
    with pytest.raises(ResultError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("sample", "attack"),
    [
        (np.zeros(2, np.int64), np.zeros(2)),
        (np.zeros(2, np.int64), np.zeros(3, np.int64)),
        (np.zeros(2, np.int64), np.zeros((2, 2), np.int64)),
        (np.zeros((2, 2), np.int64), np.zeros(2, np.int64)),
    ],
)
def test_entries_of_another_form_are_refused(tmp_path, sample, attack):
    path, about = tmp_path / FILE, {"version": 1, "run_id": "run", "attacks": ["a"], "sha256": {}}
    parts = {"float32/sample": sample, "float32/attack": attack}
    path.write_bytes(safetensors.numpy.save(parts, {"robbench": json.dumps(about)}))
    with pytest.raises(ResultError, match="cannot be read"):
        list_entries(path)


@pytest.mark.parametrize("at", [-1, 2, 2**40])
def test_a_position_without_a_name_is_shown_as_it_is(tmp_path, at):
    path = tmp_path / FILE
    path.write_bytes(pack([points([1, 2], ["a", "b"])], "run", ["a", "b"]))
    with safetensors.safe_open(path, "numpy") as file:
        about, parts = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path.write_bytes(safetensors.numpy.save(parts | {"float32/attack": np.array([0, at])}, about))
    assert [points.attack.tolist() for points in read(path).points] == [["a", f"attack number {at}"]]
