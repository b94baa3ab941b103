"""One reader vouches for results: what does not follow from its records is named and is in no table."""

import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from robbench.core import rng
from robbench.core.errors import ResultError
from robbench.core.philox import draw_order
from robbench.core.version import digest_verdict_code
from robbench.data.sets import find_index_bounds, load
from robbench.evaluation.run import evaluate
from robbench.gate import measure
from robbench.gate.measure import read_stored_entry
from robbench.masking.stored import VerdictIndex
from robbench.recheck.verify import verify
from robbench.results import selection as choice
from robbench.results.consistency import derive_summary
from robbench.results.places import locate_result
from robbench.results.reader import read_results, read_vouched
from robbench.results.records import COLUMNS, TIMING_COLUMNS, pack_rows, read_rows
from robbench.results.schema import dump_result, dump_sealed, read_result, seal
from robbench.results.selection import describe_selection, find_selection_error
from robbench.results.store import RunStore
from support.commands import run
from support.evidence import write_evidence
from support.leaderboard import read_leaderboard
from support.models import small
from support.papers import result
from support.stored import folder


def rewrite(place, rows, **changed):
    """Store other records as a careful forger does: with the digests and the summary that follow from them."""
    stored = read_result(place / "result.json", changed=True)
    (place / "outcomes.parquet").write_bytes(pack_rows(rows, stored.run_id))
    (place / "timings.parquet").write_bytes(pack_rows(rows, stored.run_id, TIMING_COLUMNS))
    made = derive_summary(stored.model_copy(update=changed), rows)
    (place / "result.json").write_bytes(dump_sealed(made))
    return made


def without_losses(rows):
    lost = rows.loc[rows["status"].isin(["broken", "misclassified"]), "sample"].unique()
    return rows[~rows["sample"].isin(lost[:-5])]


def renumbered(rows):
    return rows.assign(sample=pd.factorize(rows["sample"])[0])


# ---- which samples


@pytest.mark.parametrize(
    ("forge", "selection"),
    [
        (without_losses, None),  # the selection still says all 40
        (without_losses, "all {n}"),
        (without_losses, "first {n} of 40"),
        (lambda rows: renumbered(without_losses(rows)), None),
        (lambda rows: rows[rows["sample"] != 3], "first {n} of 40"),
        (lambda rows: rows[rows["sample"] != 39].replace({"sample": {3: 41}}), "first {n} of 40"),
        (lambda rows: rows.iloc[::-1], None),
        (lambda rows: rows, "40 of 40 drawn with sample seed 0"),
        (lambda rows: rows, "all 41"),
        (lambda rows: rows, "first 40"),
        (lambda rows: rows, "all 040"),
    ],
)
def test_the_samples_are_exactly_those_that_the_selection_names(tmp_path, forge, selection):
    write_evidence(tmp_path, result("m", "whitebox", 9, {"A": 14, "B": 12}, n=40, dataset="custom"))
    place = tmp_path / "custom/m/whitebox"
    rows = forge(read_rows(place / "outcomes.parquet")).reset_index(drop=True)
    n = rows["sample"].nunique()
    rewrite(place, rows, selection=selection.format(n=n) if selection else "all 40")
    stored, damaged = read_results(tmp_path)
    assert not stored and "selection is" in damaged[0].reason and "outcomes.parquet" in damaged[0].reason
    assert "| [m]" not in read_leaderboard(tmp_path)
    with pytest.raises(ResultError, match="selection"):
        read_stored_entry(place)


def test_fewer_samples_are_a_sound_result_of_fewer(tmp_path):
    write_evidence(tmp_path, result("m", "whitebox", 9, {"A": 14, "B": 12}, n=40, dataset="custom"))
    place = tmp_path / "custom/m/whitebox"
    rewrite(place, read_rows(place / "outcomes.parquet").iloc[:20], selection="first 10 of 40")
    assert read_vouched(place).n == 10


MNIST = "58307ebf296d64db3d8a15e3d10912cb175f169f6a7001b0af629d10c8420c6d"


@pytest.mark.parametrize(
    ("samples", "selection", "dataset", "data", "seed", "sound"),
    [
        (range(898, 1198), "first 300 of 899", "digits", load("digits").digest, None, True),
        (range(300), "first 300 of 899", "digits", load("digits").digest, None, False),
        (range(300), "first 300 of 899", "digits", "own images", None, False),
        (range(898, 1043), "all 145", "digits", load("digits").digest, None, False),
        (range(200), "first 200 of 10000", "mnist", MNIST, None, True),
        (range(200), "first 200 of 9000", "mnist", MNIST, None, False),
        (range(200), "first 200 of 10000", "mnist", "own images", None, False),
        (range(200), "first 200 of 300", "mnist", None, None, False),
        (range(200), "first 200 of 10000", "cifar10", "the official files", None, True),
        (range(200), "first 200 of 10000", "fashion_mnist", MNIST, None, False),
        ([0, 1, 3], "first 3 of 10000", "cifar100", "?", None, False),
        ([0, 1, 3], "first 3 of 9999", "cifar100", "?", None, True),  # a copy that lacks image 2
        ([0, 1, 4], "first 3 of 9999", "cifar100", "?", None, False),
        ([0, 2, 1], "first 3 of 9999", "cifar100", "?", None, False),
        (draw_order(50, 7)[:9], "9 of 50 drawn with sample seed 7", "custom", "?", 7, True),
        (draw_order(50, 7)[1:10], "9 of 50 drawn with sample seed 7", "custom", "?", 7, False),
        (np.sort(draw_order(50, 7)[:9]), "9 of 50 drawn with sample seed 7", "custom", "?", 7, False),
        (draw_order(50, 8)[:9], "9 of 50 drawn with sample seed 7", "custom", "?", 7, False),
        (draw_order(50, 7)[:9], "9 of 50 drawn with sample seed 7", "custom", "?", None, False),
        ([-(2**63)], "first 1 of 5", "custom", "?", None, False),
        ([], "first 0 of 5", "custom", "?", None, False),
    ],
)
def test_indices_are_known_without_the_data(samples, selection, dataset, data, seed, sound):
    error = find_selection_error(
        np.array(samples, np.int64), selection=selection, sample_seed=seed, dataset=dataset, data=data
    )
    assert (error == "") == sound, error


def test_the_random_order_of_a_vast_test_set_is_not_drawn(monkeypatch):
    about = {"selection": "9 of 50 drawn with sample seed 7", "sample_seed": 7, "dataset": "custom", "data": "?"}
    monkeypatch.setattr(choice, "_MOST_DRAWN", 50)
    assert not find_selection_error(draw_order(50, 7)[:9], **about)
    monkeypatch.setattr(choice, "_MOST_DRAWN", 49)
    assert "a test set of up to 49 images" in find_selection_error(draw_order(50, 7)[:9], **about)


def test_what_is_known_of_test_sets_is_what_they_are():
    for name in ("digits", "mnist"):
        data = load(name)
        assert find_index_bounds(name, data.digest, len(data)) == (data.index[0], 0)


def test_the_random_order_is_that_of_the_random_numbers_on_tensors():
    position = torch.arange(999)
    words = rng.bits(rng.make_key(5, "samples"), position, torch.zeros_like(position), 0, 2)
    assert np.array_equal(draw_order(999, 5), np.lexsort((words[:, 1], words[:, 0])))


# ---- numbers that follow


def test_an_edited_summary_is_repeated_by_no_reader(tmp_path):
    write_evidence(tmp_path, result("m", "whitebox", 9, {"A": 14, "B": 12}, n=40, dataset="custom"))
    write_evidence(tmp_path, result("o", "whitebox", 30, {"A": 33, "B": 32}, n=40, dataset="custom"))
    path = tmp_path / "custom/m/whitebox/result.json"
    fields = json.loads(path.read_text())
    del fields["sha256"]
    fields["robust_accuracy"]["value"] = 0.93
    path.write_text(json.dumps(fields))
    assert "robust_accuracy.value is 0.93; 0.225 follows" in read_results(tmp_path).damaged[0].reason
    for command in (
        ("export", path, "--format", "robustbench"),
        ("baseline", "--result", path, "--out", tmp_path / "b"),
    ):
        assert "0.225 follows from outcomes.parquet" in run(*command, code=2).stderr
    assert not (tmp_path / "b").exists()
    page = read_leaderboard(tmp_path)
    assert "| [m]" not in page and "93.0" not in page and "- custom/m/whitebox: damaged: " in page
    assert "damaged" in run("runs", "--results", tmp_path).stdout


def test_records_of_another_model_are_named(tmp_path):
    for name, worst in (("m", 9), ("o", 30)):
        write_evidence(
            tmp_path, result(name, "whitebox", worst, {"A": worst + 3, "B": worst + 2}, n=40, dataset="custom")
        )
    good, bad = tmp_path / "custom/o/whitebox", tmp_path / "custom/m/whitebox"
    shutil.copy(good / "outcomes.parquet", bad / "outcomes.parquet")
    with pytest.raises(ResultError, match=r"outcomes\.parquet: of another run|contradict"):
        read_stored_entry(bad)
    shutil.copytree(good, bad, dirs_exist_ok=True)  # the summary too
    (damage,) = read_results(tmp_path).damaged
    assert damage.name == "custom/m/whitebox" and "is the result of custom/o/whitebox" in damage.reason


@pytest.mark.parametrize(
    "overrides",
    [{"seed": "3"}, {"eps": "0.2"}, {"norm": "L2"}, {"sample_seed": "1"}, {"target": "0"}, {"x": "<b>"}, {"eps": []}],
)
def test_overrides_follow_from_the_identity(tmp_path, overrides):
    write_evidence(tmp_path, result("m", "whitebox", 9, {"A": 14, "B": 12}, n=40, dataset="custom"))
    path = tmp_path / "custom/m/whitebox/result.json"
    path.write_bytes(seal_again(json.loads(path.read_text()) | {"overrides": overrides}))
    with pytest.raises(ResultError, match=r"overrides.* follows from the identity"):
        read_vouched(path)


def test_a_baseline_names_the_code_of_a_stored_result_only_if_it_is_the_present_code(repo, monkeypatch):
    path = next(path for path in sorted(repo.glob("results/digits/*/*/result.json")) if read_vouched(path).code)
    monkeypatch.setattr(measure, "digest_judging_code", lambda: "0" * 16)
    assert read_stored_entry(path).code == {}
    monkeypatch.setattr(measure, "digest_judging_code", lambda: read_vouched(path).code)
    assert read_stored_entry(path).code == digest_verdict_code()


@pytest.mark.usefixtures("limited_time")
@pytest.mark.parametrize("name", ["result.json", "outcomes.parquet", "timings.parquet"])
def test_a_result_with_a_pipe_is_damaged(tmp_path, name):
    write_evidence(tmp_path, result("m", "whitebox", 9, {"A": 14, "B": 12}, n=40, dataset="custom"))
    place = tmp_path / "custom/m/whitebox"
    (place / name).unlink(missing_ok=True)
    os.mkfifo(place / name)
    with pytest.raises(ResultError, match=f"No result|{name} cannot be read: not a regular file"):
        read_vouched(place)


def seal_again(fields):
    """Return a file with the digest of its fields, so that what is inside is looked at."""
    return seal({name: value for name, value in fields.items() if name != "sha256"})


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "trustworthy"},
        {"verdict": "trustworthy", "decided_by": []},
        {"overestimation": 0.5},
        {"n": 150},
        {"measured": {}},
        {"run_id": "0" * 64},
    ],
)
def test_an_edited_verdict_is_shown_as_damaged(tmp_path, repo, change):
    shutil.copytree(repo / "results/mnist/natural/sanity", tmp_path / "mnist/natural/sanity")
    path = tmp_path / "mnist/natural/sanity/sanity.json"
    (examined,) = read_results(tmp_path).results
    fields = json.loads(path.read_text())
    assert VerdictIndex(tmp_path).find(examined) == fields["verdict"] != "damaged"
    fields |= change if fields["verdict"] != "trustworthy" or "verdict" not in change else {"verdict": "masked"}
    path.write_bytes(seal_again(fields))
    assert VerdictIndex(tmp_path).find(examined) == "damaged"
    assert "mnist/natural/sanity/sanity.json: damaged: " in read_leaderboard(tmp_path)


@pytest.mark.parametrize("name", ["challenges", "pgd", "best", "correct", "zero_gradients"])
def test_a_verdict_on_other_records_is_damaged(tmp_path, repo, name):
    """Measurements that the records tell are compared with them, so that a verdict cannot follow from invented ones."""
    shutil.copytree(repo / "results/mnist/natural/sanity", tmp_path / "mnist/natural/sanity")
    path = tmp_path / "mnist/natural/sanity/sanity.json"
    fields = json.loads(path.read_text())
    measured = fields["measurements"]
    measured[name] = {"challenges": [], "pgd": measured["best"] | {"value": 0.5}}.get(name, measured[name])
    measured["best"] |= {"value": 0.5} if name == "best" else {}
    measured |= {name: 1} if name in ("correct", "zero_gradients") else {}
    path.write_bytes(seal_again(fields))
    (damage,) = VerdictIndex(tmp_path).list_damaged()
    assert f"measurements.{name}" in damage.reason


# ---- eval mends


def call(tmp_path, notes=None, **more):
    class Heard:
        def __getattr__(self, name):
            return (lambda text: notes.append(text)) if name == "note" and notes is not None else (lambda *a, **k: None)

    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = small()(x).argmax(1)
    about = {"x": x, "y": y, "name": "s", "eps": 0.05, "results": tmp_path, "save_adversarials": True, **more}
    return evaluate(small(), "quick", reporter=Heard(), **about)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["robust_accuracy"].update(value=0.93),
        lambda f: f.update(n=39),
        lambda f: f.update(run_id="0" * 64),
        lambda f: f["identity"].update(seed=3),
        lambda f: f.update(selection="all 41"),
    ],
)
def test_eval_again_makes_an_edited_summary_again(tmp_path, change, sealed):
    first = call(tmp_path)
    path = folder(tmp_path) / "result.json"
    kept = [(path.parent / name).read_bytes() for name in ("outcomes.parquet", "adversarials.safetensors")]
    fields = json.loads(path.read_text())
    change(fields)
    if not sealed:
        del fields["sha256"]
    path.write_text(json.dumps(fields))
    notes = []
    again = call(tmp_path, notes)
    # With another n, an edited summary says nothing about which code judged the records.
    told = "They are computed again" if fields["n"] == 39 else "made again from the records"
    assert any(told in note and "result.json" in note for note in notes), notes
    assert again.robust_accuracy == first.robust_accuracy
    timed = {"date": True, "seconds": True, "wall_seconds": True}
    if fields["n"] == 39:  # the attacks ran again
        timed["attacks"] = {"__all__": {"seconds"}}
    assert read_vouched(path).model_dump(exclude=timed) == first.model_dump(exclude=timed)
    assert [(path.parent / name).read_bytes() for name in ("outcomes.parquet", "adversarials.safetensors")] == kept
    quiet = []
    call(tmp_path, quiet)
    assert len(quiet) == 1 and "nothing to compute" in quiet[0]


def test_eval_again_computes_samples_that_were_removed(tmp_path):
    first = call(tmp_path)
    place = folder(tmp_path)
    rewrite(place, without_losses(read_rows(place / "outcomes.parquet")))
    assert read_result(place / "result.json").robust_accuracy.value > first.robust_accuracy.value
    assert not read_results(tmp_path).results
    assert call(tmp_path).robust_accuracy == first.robust_accuracy and not read_results(tmp_path).damaged


def test_a_result_never_holds_samples_that_its_selection_leaves_out(tmp_path):
    """A run that was stopped leaves finished samples anywhere; a shorter run must not take them for the first n."""
    whole = call(tmp_path / "whole")
    rows = read_rows(folder(tmp_path / "whole") / "outcomes.parquet")
    store = RunStore(tmp_path, "custom", "s", "quick", whole.identity, standard=False)
    store.commit(rows[rows["sample"] % 2 == 1].astype(COLUMNS))
    short = call(tmp_path, samples=10, save_adversarials=False)
    assert short.n == 10 and short.selection == describe_selection(10, 40, None)
    stored = read_vouched(store.folder)
    assert stored.n == 10 and stored.selection == "first 10 of 40"
    assert call(tmp_path, save_adversarials=False).robust_accuracy == whole.robust_accuracy


# ---- verify


def test_verify_names_samples_that_were_removed(tmp_path):
    call(tmp_path)
    place = folder(tmp_path)
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = small()(x).argmax(1)
    assert not verify(place, small(), x=x, y=y).refuted
    rows = read_rows(place / "outcomes.parquet")
    gone = int(rows.loc[rows["status"] == "robust", "sample"].iloc[0])
    left = rows[rows["sample"] != gone]
    rewrite(place, left, selection="first 39 of 40")
    found = [str(m) for m in verify(place, small(), x=x, y=y).refuted]
    assert f"sample {gone}: is named by the selection and has no record" in found
    assert "sample 39: has records and is not named by the selection" in found


def test_verify_says_what_it_cannot_see():
    said = run("verify", "--help").stdout
    assert "removed together with its point cannot be seen" in " ".join(said.replace("│", " ").split())


def targeted(root, target, prediction, images=None, dataset="mnist"):
    """A stored result with this rule of targets, whose breaks of class 3 have this prediction."""
    identity = ({"target": target} if target is not None else {}) | ({"images": images} if images else {})
    wanted = result("m", "whitebox", 9, {"PGD": 9}, n=20).model_copy(
        update={"identity": identity, "dataset": dataset, "overrides": {} if target is None else {"target": target}}
    )
    made = write_evidence(root, wanted)
    place = locate_result(root, made)
    rows = read_rows(place / "outcomes.parquet")
    broken = rows["status"] == "broken"
    rewrite(place, rows.assign(label=3, prediction=broken.map({True: prediction, False: 3})))
    return place


@pytest.mark.parametrize(
    ("target", "prediction", "problem"),
    [
        ("next", 4, None), ("next", 5, "is not the target"), ("next", 3, "is not the target"), ("5", 5, None),
        ("5", 4, "is not the target"), ("3", 4, None), ("3", 3, "is not the target"),
        ("random", 7, "is not the target"),
        ("random", 3, "is not the target"), ("nonsense", 5, "no rule of targets"), ("-1", 5, "no rule of targets"),
        ("next", 0, "is not the target"), ("list-xyz", 5, "no rule of targets"), ("list-0123456789abcdef", 5, None),
    ],
)  # fmt: skip
def test_breaks_are_predictions_of_the_target(tmp_path, target, prediction, problem):
    folder = targeted(tmp_path, target, prediction)
    if problem is None:
        assert read_vouched(folder).n == 20
    else:
        with pytest.raises(ResultError, match=problem):
            read_vouched(folder)


def test_random_targets_are_drawn_again(tmp_path):
    """From seed, official index and label, where the number of classes is that of a data set or of the answers."""
    x = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    own = {"x": x, "y": small()(x).argmax(1)}
    for i, (model, call) in enumerate([("digits/natural", {"samples": 30}), (small(), own)]):
        for seed in (0, 3):
            root = tmp_path / f"{i}-{seed}"
            found = evaluate(model, "quick", **call, eps=0.5, target="random", seed=seed, results=root)
            folder = locate_result(root, found)
            assert read_vouched(folder).run_id == found.run_id
            rows = read_rows(folder / "outcomes.parquet")
            broken = rows["status"] == "broken"
            assert broken.sum() > 5
            one = rows.index[broken & (rows["sample"] == rows.loc[broken, "sample"].iloc[0])]
            last = int(rows["label"].max())
            others = set(range(last + 1)) - {int(rows["label"][one[0]]), int(rows["prediction"][one[0]])}
            rows.loc[one, "prediction"] = min(others)
            rewrite(folder, rows)
            with pytest.raises(ResultError, match="is not the target 'random'"):
                read_vouched(folder)


@pytest.mark.parametrize("target", ["least-likely", "list-0123456789abcdef", "next", "5"])
def test_all_attacks_have_the_same_target(tmp_path, target):
    wanted = result("m", "whitebox", 9, {"PGD": 9, "FGSM": 9}, n=20)
    wanted = wanted.model_copy(update={"identity": {"target": target}, "overrides": {"target": target}})
    folder = locate_result(tmp_path, write_evidence(tmp_path, wanted))
    rows = read_rows(folder / "outcomes.parquet").assign(label=4)
    broken = rows["status"] == "broken"
    rows["prediction"] = broken.map({True: 5, False: 4})
    rewrite(folder, rows)
    assert read_vouched(folder).n == 20
    rows.loc[broken[broken].index[-1], "prediction"] = 6
    rewrite(folder, rows)
    with pytest.raises(ResultError, match="prediction 6 is not the target"):
        read_vouched(folder)


@pytest.mark.parametrize("eps", ["47/2550", "1/3", "0.0123456789", "8/255", "0.1"])
def test_a_radius_that_the_summary_rounds_is_no_contradiction(tmp_path, eps):
    found = evaluate("digits/natural", "quick", samples=4, eps=eps, results=tmp_path)
    folder = locate_result(tmp_path, found)
    assert read_vouched(folder).overrides["eps"] == found.overrides["eps"]
    path = folder / "result.json"
    fields = json.loads(path.read_text())
    fields["overrides"]["eps"] = "0.3"
    fields.pop("sha256")
    path.write_bytes(seal(fields))
    with pytest.raises(ResultError, match="eps is"):
        read_vouched(folder)


def test_own_images_are_no_known_test_set(tmp_path):
    images = {"resize": None, "crop": None, "channels": 3, "classes": None}
    assert read_vouched(targeted(tmp_path / "a", None, 5, images, "mine")).n == 20
    with pytest.raises(ResultError, match="images of the user's own"):
        read_vouched(targeted(tmp_path / "b", None, 5, images, "mnist"))


def test_no_character_loses_a_run(tmp_path):
    made = write_evidence(
        tmp_path, result("m", "whitebox", 9, {"PGD": 9}, n=20, flags={"a": "half \ud800 a character"})
    )
    assert read_vouched(locate_result(tmp_path, made)).flags["a"] == "half ? a character"
    assert b"half ? a character" in dump_result(made).encode(), "what --json prints"
    assert json.loads(seal({"\udcff": ["\ud800"]}))["?"] == ["?"]
    for identity in ({"attacks": [{"name": "\ud800"}]}, {"images": {"classes": {"\udcff": 1}}}):
        with pytest.raises(ResultError, match="not Unicode text"):
            RunStore(tmp_path, "digits", "m", "quick", identity, standard=True)
