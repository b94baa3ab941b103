"""A run that is killed, cut off or damaged goes on from what is sound, and says what is not."""

import errno
import functools
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import filelock
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from torch import nn

from robbench.commands.runs import resume_runs, runs
from robbench.core import files
from robbench.core.errors import BusyError, ResultError, RobbenchError, StorageError
from robbench.evaluation import inputs, setup, shards
from robbench.evaluation import run as evaluation
from robbench.evaluation.run import evaluate
from robbench.results import store
from robbench.results.records import COLUMNS, pack_rows, read_rows
from robbench.results.recovery import shard_name
from robbench.results.run_files import find_runs
from support.commands import run
from support.killing import killed_runs
from support.models import small
from support.stored import folder

pytestmark = pytest.mark.whole


def test_sigkill_at_random_instants_gives_the_same_bytes(tmp_path):
    root, lost = killed_runs(tmp_path, kills=4, samples=60, seed=0)
    evaluate("digits/at", "whitebox", samples=60, lanes=32, results=tmp_path / "whole")
    where = Path("digits/at/whitebox/outcomes.parquet")
    assert (root / where).read_bytes() == (tmp_path / "whole" / where).read_bytes()
    killed, whole = (json.loads((r / where).with_name("result.json").read_text()) for r in (root, tmp_path / "whole"))
    for part in (killed, whole, *killed["attacks"], *whole["attacks"]):
        for key in ("seconds", "wall_seconds", "date", "environment", "sha256"):
            part.pop(key, None)
    assert killed == whole
    assert [before for before, _ in lost] == [0] * 5, "what was finished before the last shard is never lost"
    assert lost[-1] == (0, 0) and not (root / "digits/at/whitebox/.partial").exists()


def one(problem, tmp_path, root="r", **more):
    model, x, y = problem
    call = {"x": x, "y": y, "name": "small", "eps": 0.05, "lanes": 8, "results": tmp_path / root, **more}
    return evaluate(model, more.pop("suite", "quick"), **{k: v for k, v in call.items() if k != "suite"})


class Stop(Exception):
    pass


def interrupted(problem, tmp_path, monkeypatch, after=20, root="r", error=Stop, **more):
    """Leave shards of a run behind; returns their folder."""
    real, count = shards.Shards.add, []

    def add(self, attack, status, rows):
        real(self, attack, status, rows)
        count.extend(rows["sample"])
        if len(count) >= after:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "Shards", functools.partial(shards.Shards, commit_seconds=-1.0))
        patch.setattr(shards.Shards, "add", add)
        with pytest.raises(error):
            one(problem, tmp_path, root, **more)
    return next((tmp_path / root).glob("*/small/*/.partial/*"))


class Notes(evaluation.Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-20])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def renamed(path):
    """A shard whose bytes are sound, of another run."""
    data = pack_rows(pd.read_parquet(path), "0" * 64, list(COLUMNS))
    path.unlink()
    path.with_name(f"{shard_name(data)}.parquet").write_bytes(data)


def older(path):
    """A shard as versions before this one wrote them."""
    rows = pd.read_parquet(path)
    path.unlink()
    data = rows.to_parquet(index=False)
    path.with_name(f"{shard_name(data)}.parquet").write_bytes(data)


def strange(path):
    """A shard of this run that holds a status that there is not, which would count as robust."""
    rows = pd.read_parquet(path).assign(status="brocken")
    data = pack_rows(rows, path.parent.name, list(COLUMNS))
    path.unlink()
    path.with_name(f"{shard_name(data)}.parquet").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (truncated, "not as it was written"),
        (flipped, "not as it was written"),
        (renamed, "of another run, 0000"),
        (older, "of an older or another format"),
        (strange, "status 'brocken' given"),
        (lambda p: p.write_bytes(b""), "not as it was written"),
    ],
)
def test_a_bad_shard_is_named_set_aside_and_computed_again(problem, tmp_path, monkeypatch, damage, told):
    partial = interrupted(problem, tmp_path, monkeypatch)
    shards = sorted(partial.glob("*.parquet"))
    assert len(shards) >= 2
    damage(shards[0])
    reporter = Notes()
    one(problem, tmp_path, reporter=reporter)
    (note,) = reporter.notes
    assert told in note and "Set aside" in note
    (aside,) = partial.parents[1].glob("*.damaged")
    assert aside.name in note
    one(problem, tmp_path, "whole")
    assert folder_bytes(tmp_path, "r") == folder_bytes(tmp_path, "whole")


def folder_bytes(tmp_path, root):
    return (next((tmp_path / root / "custom/small").iterdir()) / "outcomes.parquet").read_bytes()


def test_sound_shards_are_not_computed_again(problem, tmp_path, monkeypatch):
    interrupted(problem, tmp_path, monkeypatch, after=40, suite="whitebox")
    seen = []
    real = shards.Shards.add
    monkeypatch.setattr(
        shards.Shards, "add", lambda s, a, st, r: (seen.extend((a, i) for i in r["sample"]), real(s, a, st, r))
    )
    one(problem, tmp_path, suite="whitebox")
    assert 0 < len(seen) <= 360 - 40


def finished(tmp_path):
    (place,) = (tmp_path / "r/custom/small").iterdir()
    return place


def text(change):
    def damage(place):
        stored = json.loads((place / "result.json").read_text())
        (place / "result.json").write_text(json.dumps(change(stored)))

    return damage


@pytest.mark.parametrize(
    ("damage", "told", "aside"),
    [
        (
            lambda p: truncated(p / "result.json"),
            "result.json: the file: Invalid JSON",
            {"result.json", "outcomes.parquet"},
        ),
        (
            lambda p: (p / "result.json").write_bytes(b"\xff\xfe"),
            "result.json: the file",
            {"result.json", "outcomes.parquet"},
        ),
        (
            text(lambda r: {**r, "schema_version": 1}),
            "result.json: schema_version",
            {"result.json", "outcomes.parquet"},
        ),
        (lambda p: (p / "result.json").unlink(), "names no code", {"outcomes.parquet"}),
        (lambda p: truncated(p / "outcomes.parquet"), "outcomes.parquet cannot", {"outcomes.parquet", "result.json"}),
        (lambda p: flipped(p / "outcomes.parquet"), "outcomes.parquet", {"outcomes.parquet", "result.json"}),
        (lambda p: (p / "outcomes.parquet").unlink(), "outcomes.parquet is missing", {"result.json"}),
        (lambda p: truncated(p / "timings.parquet"), "timings.parquet", {"timings.parquet"}),
    ],
)
def test_a_bad_result_is_named_set_aside_and_made_again(problem, tmp_path, damage, told, aside):
    one(problem, tmp_path)
    place = finished(tmp_path)
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    damage(place)
    reporter = Notes()
    one(problem, tmp_path, reporter=reporter)
    assert any(told in note for note in reporter.notes)
    assert {p.name.removesuffix(".damaged") for p in place.glob("*.damaged")} == aside
    assert (place / "outcomes.parquet").read_bytes() == before["outcomes.parquet"]
    again, stored = (json.loads(t) for t in ((place / "result.json").read_text(), before["result.json"]))
    assert again["robust_accuracy"] == stored["robust_accuracy"] and again["run_id"] == stored["run_id"]


def test_outcomes_of_another_run_are_not_taken_for_this_ones(problem, tmp_path):
    one(problem, tmp_path)
    place = finished(tmp_path)
    rows = read_rows(place / "outcomes.parquet").assign(status="robust")
    (place / "outcomes.parquet").write_bytes(pack_rows(rows, "f" * 64))
    reporter = Notes()
    assert one(problem, tmp_path, reporter=reporter).robust_accuracy.value < 0.9
    assert "of another run, ffff" in reporter.notes[0]


def test_results_of_versions_that_kept_seconds_with_the_records_are_read(problem, tmp_path):
    first = one(problem, tmp_path)
    place = finished(tmp_path)
    rows = read_rows(place / "outcomes.parquet")
    (place / "timings.parquet").unlink()
    rows.to_parquet(place / "outcomes.parquet", index=False)
    reporter = Notes()
    assert one(problem, tmp_path, reporter=reporter) == first
    assert "nothing to compute" in reporter.notes[0]


@pytest.mark.parametrize("damage", [truncated, flipped])
def test_damaged_points_are_set_aside_and_found_again(problem, tmp_path, damage):
    call = {"save_adversarials": True}
    one(problem, tmp_path, **call)
    place = finished(tmp_path)
    before = (place / "adversarials.safetensors").read_bytes()
    damage(place / "adversarials.safetensors")
    reporter = Notes()
    one(problem, tmp_path, reporter=reporter, **call)
    assert "adversarials.safetensors" in reporter.notes[0] and "Set aside" in reporter.notes[0]
    assert (place / "adversarials.safetensors").read_bytes() == before


# --- what breaks while writing -------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_costs_nothing(problem, tmp_path, monkeypatch):
    real, calls = Path.replace, []

    def full(self, target):
        calls.append(target)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "Shards", functools.partial(shards.Shards, commit_seconds=-1.0))
        patch.setattr(Path, "replace", full)
        with pytest.raises(StorageError, match=r"No space left on device\. Free some space"):
            one(problem, tmp_path)
    (partial,) = finished(tmp_path).glob(".partial/*")
    assert len(list(partial.glob("*.parquet"))) == 3, "the holder, run.json and three shards were written before"
    one(problem, tmp_path)
    one(problem, tmp_path, "whole")
    assert folder_bytes(tmp_path, "r") == folder_bytes(tmp_path, "whole")


def test_files_and_their_folders_reach_the_disk(tmp_path, monkeypatch):
    """In this order: the content, the name in its folder; and every new folder in the one above it."""
    order = []
    sync, replace = os.fsync, Path.replace

    def fsync(handle):
        order.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    def renamed(self, target):
        order.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", renamed)
    files.write_atomically(tmp_path / "a" / "b" / "file", b"content")
    assert order == ["folder", "folder", "file", "rename", "folder"]


def test_the_records_are_safe_before_the_shards_go(problem, tmp_path, monkeypatch):
    order = []
    write, remove = store.write_atomically, shutil.rmtree
    monkeypatch.setattr(store, "write_atomically", lambda p, d: (order.append(p.name), write(p, d)))
    monkeypatch.setattr(store.shutil, "rmtree", lambda p, **k: (order.append("rmtree"), remove(p, **k)))
    one(problem, tmp_path)
    assert order[-4:] == ["timings.parquet", "outcomes.parquet", "result.json", "rmtree"]


def test_memory_that_runs_out_halves_the_lanes_and_then_says_so(problem, tmp_path):
    class Hungry(nn.Module):
        def __init__(self, most):
            super().__init__()
            self.net, self.most = small(), most

        def forward(self, x):
            if len(x) > self.most and x.requires_grad:
                raise MemoryError
            return self.net(x)

    _, x, y = problem
    reporter = Notes()
    call = {"x": x, "y": y, "eps": 0.05, "lanes": 16}
    assert evaluate(Hungry(4).eval(), "quick", **call, reporter=reporter).n == 60
    assert "going on with 4 lanes" in " ".join(reporter.notes)
    with pytest.raises(RobbenchError, match="Out of memory with a single lane"):
        evaluate(Hungry(0).eval(), "quick", **call)


# --- two processes -------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from robbench.results.locking import lock_result
with lock_result(Path(sys.argv[1]), Path(sys.argv[2]), False, print):
    print("held", flush=True); time.sleep(60)
"""


def held(root, place):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(root), str(place)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_two_processes_do_not_write_into_one_result(problem, tmp_path, monkeypatch):
    one(problem, tmp_path)
    place = finished(tmp_path)
    with held(tmp_path / "r", place) as other:
        with pytest.raises(BusyError, match=rf"process {other.pid} on .* works on it.*--wait"):
            one(problem, tmp_path)
        one(problem, tmp_path, eps=0.1)  # another result is no obstacle
        reporter = Notes()

        def killed(text):
            reporter.notes.append(text)
            other.kill()

        reporter.note = killed
        one(problem, tmp_path, reporter=reporter, wait=True)
        assert f"process {other.pid}" in reporter.notes[0] and "waiting" in reporter.notes[0]
    one(problem, tmp_path)  # the lock of a process that was killed holds up nobody


@pytest.mark.parametrize("holder", [{"pid": 1, "host": "elsewhere"}, {"pid": os.getpid(), "host": platform.node()}, {}])
def test_whether_a_run_goes_on_is_decided_by_its_lock(problem, tmp_path, monkeypatch, holder):
    """The file that names the holder may be of another host, or name a process id that is in use again."""
    partial = interrupted(problem, tmp_path, monkeypatch)
    (lock,) = (tmp_path / "r/.locks").glob("*.lock")
    lock.with_suffix(".json").write_text(json.dumps(holder))
    (row,) = find_runs(tmp_path / "r")
    assert row.state == "unfinished"
    with held(tmp_path / "r", partial.parents[1]) as other:
        lock.with_suffix(".json").unlink()
        (row,) = find_runs(tmp_path / "r")
        assert row.state == "running"
        other.kill()
    (row,) = find_runs(tmp_path / "r")
    assert row.state == "unfinished"
    one(problem, tmp_path)
    assert not lock.with_suffix(".json").exists()


def test_resume_does_not_end_as_a_success_while_a_run_is_left(problem, tmp_path, monkeypatch):
    partial = interrupted(problem, tmp_path, monkeypatch)
    with held(tmp_path / "r", partial.parents[1]) as other:
        run("eval", "--resume", "--results", tmp_path / "r", code=2)
        other.kill()


@pytest.mark.parametrize("save", [False, True])
def test_what_a_kill_after_the_result_leaves_is_no_unfinished_run_and_goes(problem, tmp_path, monkeypatch, save):
    more = {"save_adversarials": save}
    interrupted(problem, tmp_path, monkeypatch, **more)
    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "rmtree", lambda *a, **k: None)  # killed before
        one(problem, tmp_path, **more)
    place = finished(tmp_path)
    (partial,) = place.glob(".partial/*")
    shard = f".{'a' * 32}.parquet.x1234567"
    assert list(partial.glob("*.parquet")) and bool(list(partial.glob("*.safetensors"))) == save
    left = [
        place / ".result.json.ab12cd_9",
        partial / shard,
        place / ".adversarials.safetensors.aaaaaaaa",
    ]
    for path in left:
        path.write_bytes(b"half")
    (place / ".keep").write_text("not ours")
    assert [r.state for r in find_runs(tmp_path / "r")] == ["finished"]
    one(problem, tmp_path, **more)
    assert not (place / ".partial").exists() and not any(path.exists() for path in left) and (place / ".keep").exists()
    (place / ".keep").unlink()
    one(problem, tmp_path, "whole", **more)
    assert folder_bytes(tmp_path, "r") == folder_bytes(tmp_path, "whole")


def test_points_that_are_not_in_the_result_yet_are_not_removed(problem, tmp_path, monkeypatch):
    one(problem, tmp_path)
    partial = interrupted(problem, tmp_path, monkeypatch, save_adversarials=True)
    assert [r.state for r in find_runs(tmp_path / "r")] == ["unfinished", "finished"]
    kept = set(partial.glob("*.safetensors"))
    with monkeypatch.context() as patch:
        patch.setattr(store.RunStore, "begin", lambda *a: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            one(problem, tmp_path)
    assert kept and set(partial.glob("*.safetensors")) == kept


def test_memory_that_runs_out_at_the_start_halves_the_lanes(problem, tmp_path):
    class Wide(nn.Module):
        def __init__(self, most):
            super().__init__()
            self.net, self.most = small(), most

        def forward(self, x):
            if len(x) > self.most:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
            return self.net(x)

    _, x, y = problem
    reporter = Notes()
    result = evaluate(Wide(4).eval(), "quick", x=x, y=y, eps=0.05, lanes=16, reporter=reporter)
    assert result.lanes == 4 and result.n == 60
    assert "out of memory (DefaultCPUAllocator" in " ".join(reporter.notes)
    with pytest.raises(RobbenchError, match="Out of memory with a single lane"):
        evaluate(Wide(0).eval(), "quick", x=x, y=y, eps=0.05, lanes=16)


@pytest.mark.parametrize("lanes", [100_000, 10**9, 10**30])
def test_more_lanes_than_images_are_not_allocated(problem, tmp_path, lanes):
    few = one(problem, tmp_path, "few", lanes=256)
    many = one(problem, tmp_path, "many", lanes=lanes)
    assert many.lanes == 256 and many.robust_accuracy == few.robust_accuracy


def test_a_tree_that_cannot_be_written_can_still_be_looked_at(problem, tmp_path, monkeypatch):
    first = one(problem, tmp_path)

    def refused(*args, **kwargs):
        raise PermissionError(errno.EACCES, "read-only")

    monkeypatch.setattr(filelock.FileLock, "acquire", refused)
    assert one(problem, tmp_path) == first


# --- what was asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["weights", "model.structure", "data"])
def test_what_changed_is_named_and_never_mixed(problem, tmp_path, monkeypatch, field):
    """A changed model or data set makes a new run, and old shards stay out of it."""
    _, x, y = problem
    changed = {
        "weights": (small(1), x, y),
        "model.structure": (nn.Sequential(*small(0), nn.Identity()).eval(), x, y),
        "data": (small(0), x.flip(0), y),
    }[field]
    # Only runs without overrides have one place, and images of one's own always come with a radius.
    monkeypatch.setattr(inputs, "find_known_name", lambda name: None)
    call = {"dataset": "fashion_mnist", "eps": None}
    old = interrupted((small(0), x, y), tmp_path, monkeypatch, **call)
    reporter = Notes()
    one(changed, tmp_path, **call, reporter=reporter)
    (note,) = [note for note in reporter.notes if "a different unfinished run" in note]
    assert f"{field}: stored" in note
    one(changed, tmp_path, "alone", **call)
    outcomes = "fashion_mnist/small/quick/outcomes.parquet"
    assert (tmp_path / "r" / outcomes).read_bytes() == (tmp_path / "alone" / outcomes).read_bytes()
    assert list(old.glob("*.parquet")), "the other run's shards are left alone"


def test_a_changed_attack_or_suite_is_named(problem, tmp_path, monkeypatch):
    from robbench.attacks import PGD

    model, x, y = problem
    monkeypatch.setattr(inputs, "find_known_name", lambda name: None)
    call = {"x": x, "y": y, "name": "small", "dataset": "fashion_mnist", "results": tmp_path / "r", "lanes": 8}
    evaluate(model, "quick", **call)
    with monkeypatch.context() as patch:
        patch.setattr(PGD, "version", PGD.version + 1)
        with pytest.raises(ResultError, match=r"attacks\[\d\]\.version: stored 1, this run 2"):
            evaluate(model, "quick", **call)
    with monkeypatch.context() as patch:
        patch.setattr(setup, "ENGINE_VERSION", 99)
        with pytest.raises(ResultError, match=r"engine: stored 1, this run 99"):
            evaluate(model, "quick", **call)


def unsealed(path):
    """Read a description without its digest, as older versions wrote it. The digest shows a careless edit only."""
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}


def test_runs_are_listed_and_resumed_as_they_were_described(tmp_path, monkeypatch, capsys):
    """An interrupted run goes on from anywhere by its own description; one that cannot holds up no other."""
    tree, real = tmp_path / "tree", shards.Shards.add
    call = {"samples": 30, "lanes": 16}

    def stopped(self, attack, status, rows):
        real(self, attack, status, rows)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(shards.Shards, "add", stopped)
        for model, more in (("digits/at", {}), ("digits/natural", {"eps": "0.1"})):
            with pytest.raises(Stop):
                evaluate(model, "quick", **call, **more, results=tree)
    evaluate("digits/trades", "quick", **call, results=tree)
    found = [r.as_row(tree) for r in find_runs(tree)]
    assert [r["state"] for r in found] == ["unfinished", "unfinished", "finished"]
    assert found[0]["images"] == "30" and found[0]["done"] not in ("0 %", "100 %")
    runs(tree)
    shown = capsys.readouterr()
    assert "2 to be continued: robbench eval --resume" in shown.err and "digits/trades/quick" in shown.out
    # One of them can no longer be made: its description does not lead to what was begun.
    (about,) = tree.glob("digits/natural/*/.partial/*/run.json")
    about.write_text(json.dumps({**unsealed(about), "seed": 5}))
    with pytest.raises(typer.Exit) as code:
        resume_runs(tree, "cpu", wait=False, as_json=False)
    assert code.value.exit_code == 2
    told = capsys.readouterr()
    assert "seed: stored 0, this run 5" in told.err and "at " in told.out
    assert [r.state for r in find_runs(tree)] == ["unfinished", "finished", "finished"]
    evaluate("digits/at", "quick", **call, results=tmp_path / "whole")
    outcomes = "digits/at/quick/outcomes.parquet"
    assert (tree / outcomes).read_bytes() == (tmp_path / "whole" / outcomes).read_bytes()


def test_a_description_from_elsewhere_runs_no_code(problem, tmp_path, monkeypatch, capsys):
    partial = interrupted(problem, tmp_path, monkeypatch)
    (row,) = find_runs(tmp_path / "r")
    assert "call evaluate again" in row.note and row.resumable is None
    about = unsealed(partial / "run.json")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    (partial / "run.json").write_text(json.dumps({**about, "model": "evil:make", "own_images": False}))
    with pytest.raises(typer.Exit):
        resume_runs(tmp_path / "r", "cpu", wait=False, as_json=False)
    assert "which a file alone must not start" in capsys.readouterr().err and not (tmp_path / "ran").exists()
    for broken in ("{", '"text"', json.dumps({**about, "samples": -1}), json.dumps({**about, "identity": {}})):
        (partial / "run.json").write_text(broken)
        (row,) = find_runs(tmp_path / "r")
        assert row.state == "damaged" and "run.json" in row.note


def test_runs_and_resume_on_the_command_line(tmp_path, problem):
    one(problem, tmp_path)
    listed = json.loads(run("runs", "--results", tmp_path / "r", "--json").stdout)
    assert [r["state"] for r in listed] == ["finished"]
    assert "No run in" in run("eval", "--resume", "--results", tmp_path / "r").stderr
    assert "takes only" in run("eval", "--resume", "--samples", 3, code=2).stderr


def test_fewer_images_than_were_begun_leave_the_rest_to_go_on(problem, tmp_path, monkeypatch):
    partial = interrupted(problem, tmp_path, monkeypatch, after=30, suite="whitebox")
    assert one(problem, tmp_path, suite="whitebox", samples=5).n == 5
    assert (partial / "run.json").exists() and list(partial.glob("*.parquet"))
    one(problem, tmp_path, suite="whitebox")
    one(problem, tmp_path, "whole", suite="whitebox")
    assert folder_bytes(tmp_path, "r") == folder_bytes(tmp_path, "whole")


def test_saving_goes_on_after_an_interrupt(problem, tmp_path, monkeypatch):
    interrupted(problem, tmp_path, monkeypatch, save_adversarials=True)
    one(problem, tmp_path)
    one(problem, tmp_path, "whole", save_adversarials=True)
    assert folder_bytes(tmp_path, "r") == folder_bytes(tmp_path, "whole")
    assert (folder(tmp_path / "r") / "adversarials.safetensors").exists()


def test_ctrl_c_keeps_what_was_finished(problem, tmp_path, monkeypatch):
    partial = interrupted(problem, tmp_path, monkeypatch, error=KeyboardInterrupt)
    assert list(partial.glob("*.parquet")) and not list(partial.glob(".*"))


def test_values_that_were_changed_are_told_by_their_digest(problem, tmp_path):
    """A file that reads well and still says of which run it is, but holds other values."""
    one(problem, tmp_path)
    path = finished(tmp_path) / "outcomes.parquet"
    before = path.read_bytes()
    table = pq.read_table(path)
    at = table.column_names.index("forwards")
    other = table.set_column(at, "forwards", pa.array([1] * len(table)))
    pq.write_table(other.replace_schema_metadata(table.schema.metadata), path)
    reporter = Notes()
    one(problem, tmp_path, reporter=reporter)
    assert "not those that were written (SHA-256)" in reporter.notes[0]
    assert path.read_bytes() == before
