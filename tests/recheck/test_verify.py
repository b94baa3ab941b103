"""Verification: what was found is found again, and whatever was changed afterwards is named."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from robbench.core.errors import ResultError, RobbenchError
from robbench.evaluation.run import evaluate
from robbench.recheck.verify import verify
from robbench.results.adversarials import FILE, Points, pack, read
from robbench.results.records import pack_rows
from support.commands import run
from support.models import small
from support.stored import folder, write_suite

pytestmark = pytest.mark.whole


def images():
    """The images of the fixture `problem`, for a fixture that is made once."""
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = small()(x).argmax(1)
    y[::10] = (y[::10] + 1) % 10
    return x, y


@pytest.fixture(scope="module", params=["full", "cascade"])
def made(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    x, y = images()
    call = {"x": x, "y": y, "name": "small", "eps": 0.05, "lanes": 16, "results": root, "save_adversarials": True}
    evaluate(small(), write_suite(root, request.param), **call)
    (root / "s.toml").unlink()
    return folder(root)


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "result")


def checked(path, model=None):
    x, y = images()
    return verify(path, model or small(), x=x, y=y)


def rows_of(path):
    return pd.read_parquet(path / "outcomes.parquet")


def store_rows(path, rows):
    """Store other records with a new digest, as a forger does."""
    run_id = json.loads((path / "result.json").read_text())["run_id"]
    (path / "outcomes.parquet").write_bytes(pack_rows(rows, run_id))
    (path / "timings.parquet").unlink(missing_ok=True)


def first_broken(path):
    rows = rows_of(path)
    at = rows.index[rows["status"] == "broken"][3]
    return rows, at, (int(rows.at[at, "sample"]), rows.at[at, "attack"])


def change(path, **values):
    """Change columns of one broken row; returns whose it is."""
    rows, at, key = first_broken(path)
    for column, value in values.items():
        rows.loc[at, column] = value(rows.at[at, column]) if callable(value) else value
    store_rows(path, rows)
    return key


def forge(path, move):
    """Move one point, with digests to match; returns whose it is."""
    _, _, key = first_broken(path)
    kept = read(path / FILE)
    groups = []
    for g in kept.points:
        at = np.flatnonzero((g.sample == key[0]) & (g.attack == key[1]))
        x = g.x.copy()
        x[at] = move(x[at])
        fresh = Points.of(kept.run_id, g.sample, g.attack, x)
        groups.append(fresh)
    (path / FILE).write_bytes(pack(groups, kept.run_id, ["FGSM", "PGD"]))
    return key


def told(verification, key):
    return [f.what for f in verification.refuted if (f.sample, f.attack) == key]


def test_an_honest_result_is_confirmed(made):
    v = checked(made)
    assert v.refuted == [] and v.borderline == []
    assert v.confirmed == v.breaks == (rows_of(made)["status"] == "broken").sum() > 30
    assert checked(made / "result.json").confirmed == v.breaks
    assert "0 mismatches" in str(v)


def test_a_single_pixel_that_still_fools_the_model_is_found(copy):
    x, _ = images()
    content = bytearray((copy / FILE).read_bytes())
    group = next(g for g in read(copy / FILE).points if g.x.dtype == np.float16)
    key = int(group.sample[0]), str(group.attack[0])
    # The last bit of the first pixel for which that is a step towards the image: nothing else is wrong afterwards.
    other = (group.x[0].view(np.uint16) ^ 1).view(np.float16)
    x0 = x[key[0]].numpy()
    pixel = int(np.flatnonzero(np.abs(other - x0) < np.abs(group.x[0] - x0))[0])
    content[bytes(content).index(group.x[0].tobytes()) + 2 * pixel] ^= 1
    (copy / FILE).write_bytes(content)
    v = checked(copy)
    assert told(v, key) == ["the adversarial example is not the one that was stored (SHA-256)"]
    assert len(v.refuted) == 1 and v.confirmed == v.breaks - 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label": lambda v: (v + 1) % 10}, "the data set says"),
        ({"prediction": lambda v: (v + 1) % 10}, "is predicted as"),
        ({"distance": lambda v: v * 0.9}, "distance 0.0"),
        ({"distance": np.nan}, "distance nan"),
        ({"status": "robust"}, "recorded is: robust"),
        ({"status": "skipped"}, "recorded is: skipped"),
        ({"status": "misclassified"}, "recorded is: misclassified"),
        ({"status": "brocken"}, "status 'brocken'"),
        ({"attack": "PDG"}, None),
        ({"sample": 10**6}, None),
    ],
)
def test_a_changed_record_is_named(copy, values, message):
    key = change(copy, **values)
    v = checked(copy)
    found = told(v, key)
    assert found and any((message or "") in what for what in found), v.refuted
    assert v.confirmed < (rows_of(copy)["status"] == "broken").sum() or "status" in values


@pytest.mark.parametrize(
    ("move", "message"),
    [
        (lambda x: 1 - x, "outside the ball"),
        (lambda x: x + 2, "outside [0, 1]"),
        (lambda x: x * np.nan, "NaN"),
    ],
)
def test_forged_points_are_judged(copy, move, message):
    key = forge(copy, move)
    assert any(message in what for what in told(checked(copy), key))


def test_the_clean_image_is_no_adversarial_example(copy):
    x, _ = images()
    _, _, key = first_broken(copy)
    key = forge(copy, lambda _: x[key[0]].numpy())
    found = told(checked(copy), key)
    assert any("its true class" in what for what in found) and any("distance" in what for what in found)


def test_points_and_breaks_belong_together(copy):
    kept = read(copy / FILE)
    g = kept.points[0]
    gone, moved, twice = ((int(g.sample[i]), str(g.attack[i])) for i in (0, 1, 2))
    sample = g.sample.copy()
    sample[1], sample[3], attack = 10**6, g.sample[2], g.attack.copy()
    attack[3] = g.attack[2]
    changed = replace(g, sample=sample, attack=attack)
    rest = replace(changed, **{n: getattr(changed, n)[1:] for n in ("sample", "attack", "x", "sha256")})
    (copy / FILE).write_bytes(pack([rest, *kept.points[1:]], kept.run_id, ["FGSM", "PGD"]))
    v = checked(copy)
    assert told(v, gone) == told(v, moved) == ["is recorded as broken, and no adversarial example is stored"]
    assert "an adversarial example is stored; recorded is: nothing" in told(v, (10**6, moved[1]))
    assert "has more than one adversarial example" in told(v, twice)


def test_a_misclassified_sample_cannot_pass_for_right_nor_the_other_way(copy):
    rows = rows_of(copy)
    lost = rows["status"] == "misclassified"
    wrong, right = rows.loc[lost, "sample"].iloc[0], rows.loc[~lost, "sample"].iloc[0]
    rows.loc[rows["sample"] == wrong, "status"] = "robust"
    rows.loc[rows["sample"] == right, "status"] = "misclassified"
    store_rows(copy, rows)
    v = checked(copy)
    told_of = [f for f in v.refuted if "clean image" in f.what]
    assert {f.sample for f in told_of} == {wrong, right}
    assert "sample" in str(told_of[0])


def edit(path, change):
    stored = json.loads((path / "result.json").read_text())
    change(stored)
    (path / "result.json").write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["robust_accuracy"].update(value=0.9), "robust_accuracy.value is 0.9"),
        (lambda r: r["attacks"][1].update(forwards=1), "attacks[1].forwards is 1"),
        (lambda r: r.update(n=61), "n is 61; 60 follows"),
        (lambda r: r["threat"].update(eps="0.01"), "threat.eps is 0.01"),
        (lambda r: r.update(seed=7), "seed is 7"),
        (lambda r: r["identity"].update(seed=7), "run_id is"),
        (lambda r: r["flags"].update(nonfinite="no"), "flags.nonfinite is no"),
        (lambda r: r["attacks"][0]["config"].update(kind="spsa"), "attacks[0].config.kind is spsa"),
        (lambda r: r["identity"]["attacks"][0].pop("name"), "identity cannot be read"),
        (lambda r: r["identity"].update(threat=3), "identity cannot be read"),
    ],
)
def test_a_summary_must_follow_from_its_records(copy, change, message):
    edit(copy, change)
    assert any(message in str(f) for f in checked(copy).refuted)


def test_what_was_measured_must_be_what_is_here(copy):
    v = checked(copy, small(1))
    assert [f.what.split(":")[0] for f in v.refuted] == ["weights"] and v.confirmed == 0
    x, y = images()
    v = verify(copy, small(), x=x.flip(0), y=y)
    assert [f.what.split(":")[0] for f in v.refuted] == ["data"]
    other = nn.Sequential(*small(), nn.Identity()).eval()
    assert [f.what.split(":")[0] for f in checked(copy, other).refuted] == ["model"]


@pytest.mark.usefixtures("limited_time")
@pytest.mark.parametrize("name", [FILE, "outcomes.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "sparse", "empty"])
def test_what_cannot_be_read_is_an_error_and_no_mismatch(copy, name, kind):
    path = copy / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(2**38 if kind == "sparse" else 0)
    with pytest.raises(ResultError, match=name):
        checked(copy)


def test_damaged_and_absent_files_are_errors(copy, tmp_path):
    whole = (copy / FILE).read_bytes()
    (copy / FILE).write_bytes(whole[:-5])
    with pytest.raises(ResultError, match="damaged"):
        checked(copy)
    (copy / FILE).unlink()
    with pytest.raises(ResultError, match="--save-adversarials"):
        checked(copy)
    (copy / FILE).write_bytes(whole)
    (copy / "outcomes.parquet").write_bytes(b"PAR1")
    with pytest.raises(ResultError, match=r"outcomes\.parquet cannot be read"):
        checked(copy)
    (copy / "result.json").unlink()
    with pytest.raises(ResultError, match=r"expected: the folder"):
        checked(copy)


def test_a_file_of_another_run_is_told(copy):
    kept = read(copy / FILE)
    (copy / FILE).write_bytes(pack(kept.points, "0" * 64, ["FGSM", "PGD"]))
    assert any("is of run 0000" in str(f) for f in checked(copy).refuted)


def test_a_model_without_a_card_is_not_loaded_on_a_files_word(copy):
    with pytest.raises(ResultError, match=r"Sequential.*--model"):
        verify(copy)
    with pytest.raises(RobbenchError, match="Unknown option 'smaples'"):
        verify(copy, small(), smaples=3)


def test_a_tie_within_rounding_counts_neither_way(tmp_path):
    """The recorded prediction loses by less than another kernel may change."""
    x = torch.full((4, 1, 4, 4), 0.5)
    y = torch.zeros(4, dtype=torch.int64)

    class Tied(nn.Module):
        def __init__(self, extra):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))
            self.extra = extra

        def forward(self, x):
            s = (x.flatten(1).mean(1) - 0.52) * self.w * 100
            return torch.stack([-s, s + 1.0, s + 1.0 + self.extra, s - 9], dim=1)

    evaluate(
        Tied(0.0).eval(), write_suite(tmp_path), x=x, y=y, eps=0.05, results=tmp_path / "r", save_adversarials=True
    )
    path = folder(tmp_path / "r")
    (mismatch,) = verify(path, Tied(0.5).eval(), x=x, y=y).refuted
    assert str(mismatch).startswith("answers: the model answers differently since")
    stored = json.loads((path / "result.json").read_text()) | {"answers": []}  # as older versions wrote it
    del stored["sha256"], stored["wall_seconds"]
    (path / "result.json").write_text(json.dumps(stored))
    for extra, refuted in ((1e-5, 0), (0.5, 8)):
        v = verify(path, Tied(extra).eval(), x=x, y=y)
        assert (len(v.refuted), len(v.borderline)) == (refuted, 8 - refuted)
        assert v.confirmed == 0


def test_models_that_answer_at_random_are_put_to_the_vote(tmp_path):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()

        def forward(self, x):
            return self.net(x + 0.02 * torch.randn_like(x))

    x, y = images()
    evaluate(Noisy().eval(), write_suite(tmp_path), x=x, y=y, eps=0.1, results=tmp_path / "r", save_adversarials=True)
    v = verify(folder(tmp_path / "r"), Noisy().eval(), x=x, y=y)
    assert v.confirmed > 0.8 * v.breaks
    assert all("answers" in f.what for f in [*v.refuted, *v.borderline])


def test_the_verify_command_says_what_was_altered(tmp_path):
    run("eval", "-m", "digits/at", "-s", "quick", "--samples", 30, "--save-adversarials", cwd=tmp_path)
    path = tmp_path / "results/digits/at/quick"
    assert "breaks of 30 images confirmed, 0 mismatches" in run("verify", path, cwd=tmp_path).stdout
    edit(path, lambda r: r["clean_accuracy"].update(value=1.0))
    key = change(path, label=lambda v: (v + 1) % 10)
    done = run("verify", path, cwd=tmp_path, code=1)
    assert f"refuted: sample {key[0]}, {key[1]}: label" in done.stdout
    parsed = json.loads(run("verify", path, "--json", cwd=tmp_path, code=1).stdout)
    assert parsed["breaks"] > 10 and {"what", "sample", "attack"} == set(parsed["refuted"][0])
    assert "expected: the folder" in run("verify", tmp_path, cwd=tmp_path, code=2).stderr
