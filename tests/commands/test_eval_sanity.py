"""`robbench eval --suite sanity`, and the steps of `eval`."""

import json

import pytest

from robbench.core.errors import RobbenchError
from robbench.evaluation import worker
from robbench.evaluation.run import EvaluationRun
from robbench.masking import run as masking
from robbench.masking.run import examine
from robbench.results.locking import is_locked
from support.commands import run


def test_the_sanity_suite_is_run_and_asked_once(tmp_path, monkeypatch):
    looks, runs, real, locked, write = [], [], EvaluationRun.open, [], masking.write_atomically
    look_at_lock = lambda path, data: (locked.append(is_locked(tmp_path, path.parent)), write(path, data))  # noqa: E731
    monkeypatch.setattr(masking, "write_atomically", look_at_lock)
    look = worker.classify
    monkeypatch.setattr(worker, "classify", lambda *args: (looks.append(1), look(*args))[1])
    monkeypatch.setattr(EvaluationRun, "open", lambda self: (runs.append(self.title()), real(self))[1])
    done = run("eval", "-m", "digits/natural", "-s", "sanity", "--samples", 8, "--results", tmp_path)
    assert len(runs) == 1 and len(looks) == 1
    assert locked == [True, True], "the landscape and the verdict are written under the lock of the result"
    (folder,) = tmp_path.glob("digits/natural/sanity*")
    assert {"outcomes.parquet", "result.json", "sanity.json", "landscape.parquet"} <= {p.name for p in folder.iterdir()}
    assert "suite sanity: robust accuracy" in done.stdout and "forward-backward pairs an image" in done.stdout
    assert "written." in done.stderr
    again = run("eval", "-m", "digits/natural", "-s", "sanity", "--samples", 8, "--results", tmp_path, "--json")
    assert json.loads(again.stdout)["n"] == 8 and len(looks) == 1


def test_gradients_do_not_go_with_the_checks(tmp_path):
    args = ("eval", "-m", "digits/at", "-s", "sanity", "--gradients", "bfloat16")
    assert "which look at the gradients themselves" in run(*args, code=2, cwd=tmp_path).stderr
    with pytest.raises(RobbenchError, match="which look at the gradients themselves"):
        examine("digits/at", gradients="bfloat16")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--samples", "0"], "samples: 0 given; allowed: a whole number, at least 1"),
        (["--lanes", "-1"], "lanes: -1 given"),
        (["--norm", "L2"], "--norm L2 given without --eps"),
        (["--norm", "L7", "--eps", "0.1"], "norm: 'L7' given; allowed: Linf, L2, L1"),
        (["--seeds", "0"], "--seeds 0 given; allowed: 1 or more"),
        (
            ["--seeds", "2", "-s", "distance"],
            "--seeds 2 given with suite 'distance', which looks for the nearest",
        ),
        (["--seeds", "2", "--eps", "0.1,0.2"], "more than 1 at a single radius only"),
        (["--eps", "0.1,x"], "Several radii have commas between them"),
        (["--resume"], "--resume goes on with what was begun"),
        (["--all"], "and --all given; allowed: one of them"),
        (["--dataset", "digits"], "--dataset given with a registered model, whose card sets its images"),
        (["--crop", "8", "--on-broken", "skip"], "--crop, --on-broken given with a registered model"),
        (["-s", "whitbox"], "Did you mean whitebox"),
    ],
)
def test_what_eval_refuses_is_told_before_work(tmp_path, args, message):
    done = run("eval", "-m", "digits/at", *args, "--results", tmp_path / "r", code=2)
    assert message in done.stderr and not (tmp_path / "r").exists()
