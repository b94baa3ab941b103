"""The same records wherever the work runs: a scheduler with workers in this process, and with those of a local Ray."""

import dataclasses
import json
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from robbench.core.errors import ModelError, RobbenchError
from robbench.data.sets import load
from robbench.evaluation import ray_cluster, scheduler
from robbench.evaluation.flow import Flow
from robbench.evaluation.ray_actor import Actor
from robbench.evaluation.ray_cluster import evaluate_all, make_factories
from robbench.evaluation.request import RunRequest
from robbench.evaluation.run import evaluate
from robbench.evaluation.scheduler import Reply, schedule_runs
from robbench.suite import load_suite
from support import TESTS
from support.cluster import View
from support.commands import run

pytestmark = pytest.mark.whole


class Nearby:
    """Workers in this process, which answer in any order; every `lose`-th task is lost with its worker."""

    batches = 1

    def __init__(self, workers=3, lose=0):
        self.workers, self.lose, self.random = workers, lose, random.Random(0)
        self.jobs, self.actors, self.sent, self.done, self.most = {}, {}, [], [], 0

    @property
    def has_free_worker(self):
        return len(self.sent) < 2 * self.workers

    def add(self, number, job):
        self.jobs[number] = pickle.dumps(dataclasses.replace(job, images=None)), job.images

    def submit(self, task):
        self.sent.append((self.random.randrange(self.workers), task))
        self.most = max(self.most, len(self.sent))

    def close(self, number):
        having = [i for i, actor in self.actors.items() if number in actor.workers]
        self.sent += [(i, scheduler.Task(number, "close")) for i in having]
        return len(having)

    def wait(self):
        worker, task = self.sent.pop(self.random.randrange(len(self.sent)))
        self.done.append(task)
        assert len(self.done) < 2000, "the same task again and again"
        if self.lose and len(self.done) % self.lose == 0:
            self.actors.pop(worker, None)
            return [(task, Reply(lost_reason="killed"))]
        actor = self.actors.setdefault(worker, Actor(1, "cpu"))
        actor.fetch_job = lambda digest, parts: dataclasses.replace(pickle.loads(parts[0]), images=parts[1])
        return [(task, actor.do_task(task, "", self.jobs[task.run]))]


def nearby(calls, pool, view=None):
    requests = [RunRequest.of(**call) for call in calls]
    return schedule_runs(make_factories(requests, View(), torch.device("cpu")), pool, view or View())


@pytest.mark.parametrize("mode", ["full", "cascade", "challenge"])
def test_a_stage_sees_what_earlier_ones_left_in_whatever_portions(mode):
    """Beside a plain loop over whole stages, from any state that a kill can leave."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        n, stages = int(rng.integers(1, 12)), int(rng.integers(1, 5))
        broke, correct, lacking = rng.random((stages, n)) < 0.3, rng.random(n) < 0.8, rng.random((stages, n)) < 0.6
        attacked, skipped, expected = set(), set(), (set(), set())
        broken = np.zeros(n, bool)
        for k in range(stages):
            for i in np.flatnonzero(lacking[k] & correct):
                expected[bool(broken[i]) and mode != "full"].add((k, i))
            if mode == "cascade" or k == 0:
                broken |= broke[k] & correct & ~broken
        known = broke & ~lacking
        flow = Flow(mode, lacking, known, correct, lambda k, at: skipped.update((k, i) for i in at))  # noqa: B023
        out = []
        while not flow.is_over:
            k = int(rng.integers(stages))
            if rng.random() < 0.5 and out:
                k, at = out.pop(int(rng.integers(len(out))))
                flow.broke[k, at] = broke[k, at]
                flow.finish(k, at)
            elif len(at := flow.take(k, int(rng.integers(1, 4)))):
                attacked.update((k, i) for i in at)
                out.append((k, at))
        assert (attacked, skipped) == expected


FULL = """
version = 1
mode = "MODE"
[threat]
digits = { norm = "Linf", eps = "0.15" }
[[attack]]
name = "one step"
kind = "fgsm"
[[attack]]
name = "some"
kind = "pgd"
steps = 5
random_start = true
[[attack]]
name = "more"
kind = "apgd"
steps = 8
"""
COUPLED = """
version = 1
mode = "cascade"
[threat]
digits = { norm = "Linf", eps = "0.1" }
[[attack]]
name = "handed"
kind = "transfer"
surrogate = "natural"
attack = "fgsm"
objective = "ce"
[[attack]]
name = "theirs"
kind = "autoattack:APGD-CE"
batch = 12
[[attack]]
name = "twice"
kind = "pgd"
steps = 2
eot = 2
"""


@pytest.mark.parametrize(
    ("suite", "more"),
    [
        ("full.toml", {}),
        ("challenge.toml", {}),
        ("quick", {"save_adversarials": True}),
        ("quick", {"sample_seed": 3, "gradients": "bfloat16"}),
        ("coupled.toml", {"samples": 30}),
    ],
)
def test_the_bytes_are_those_of_one_process(tmp_path, suite, more):
    (tmp_path / "coupled.toml").write_text(COUPLED)
    for mode in ("full", "challenge"):
        (tmp_path / f"{mode}.toml").write_text(FULL.replace("MODE", mode))
    suite = str(tmp_path / suite) if suite.endswith("toml") else suite
    call = {"model": "digits/at", "suite": suite, "samples": 50, "lanes": 8, **more}
    pool = Nearby()
    (result,) = nearby([{**call, "results": tmp_path / "r"}], pool)
    here = evaluate(**call, results=tmp_path / "whole")
    assert files(tmp_path / "r") == files(tmp_path / "whole")
    assert result.robust_accuracy == here.robust_accuracy and result.flags == here.flags
    sizes = [len(t.positions) for t in pool.done if t.kind == "attack"]
    assert max(sizes) < 48, "the work was spread"
    assert pool.most <= 2 * pool.workers, "a bounded number of tasks is in flight"
    batches = [set(t.positions // 12) for t in pool.done if t.kind == "attack" and "coupled" in suite and t.stage == 1]
    assert sum(map(len, batches)) == len(set().union(*batches)), "a batch of another library's is not split"


def files(root):
    """What a tree holds that must not depend on how it was made."""
    kinds = ("outcomes.parquet", "adversarials.safetensors")
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.name in kinds}


def test_lost_workers_cost_their_tasks_and_no_more(tmp_path):
    call = {"model": "digits/at", "suite": "quick", "samples": 60, "lanes": 8}
    view, pool = View(), Nearby(lose=4)
    nearby([{**call, "results": tmp_path / "r"}], pool, view)
    evaluate(**call, results=tmp_path / "whole")
    assert files(tmp_path / "r") == files(tmp_path / "whole")
    told = sum("its task is done again" in note for note in view.notes)
    once = {(t.stage, tuple(t.at)) for t in pool.done if t.kind == "attack"}
    again = sum(t.kind == "attack" for t in pool.done) - len(once)
    assert again and again <= told


def test_a_task_that_loses_every_worker_is_given_up(tmp_path):
    call = {"model": "digits/at", "suite": "quick", "samples": 20, "lanes": 8}
    (outcome,) = nearby([call], Nearby(lose=1))
    assert isinstance(outcome, RobbenchError) and "3 workers in a row were lost" in str(outcome)


def test_a_model_that_fails_is_told_with_its_samples_and_holds_up_no_other(tmp_path, monkeypatch):
    (tmp_path / "brittle.py").write_text(BRITTLE)
    monkeypatch.chdir(tmp_path)
    own = {"model": "brittle:make", "dataset": "digits", "suite": "whitebox"}
    calls = [
        {**call, "samples": 40, "lanes": 8, "results": tmp_path / "r"}
        for call in (own, {"model": "digits/at", "suite": "quick"})
    ]
    view, pool = View(), Nearby()
    pool.batches = 3  # tasks of several batches, of which a late one may fail
    replies, real = [], scheduler._Scheduler.handle_reply
    monkeypatch.setattr(scheduler._Scheduler, "handle_reply", lambda s, t, r: (replies.append((t, r)), real(s, t, r)))
    outcomes = nearby(calls, pool, view)
    assert isinstance(outcomes[0], ModelError) and outcomes[1].n == 40
    told = re.search(r"too bright \(while attacking .*: it fails on samples? ([\d, ]+)\)", str(outcomes[0]))
    assert told, outcomes[0]
    images = load("digits")
    named = [images.x[images.index == int(i)][0, 0, 0, 6] for i in told[1].split(", ")]
    assert min(named) > 0.7 * 16, "those, and no others, are bright there"
    assert str(outcomes[0]) in view.notes
    stored = (tmp_path / "r/digits/brittle-make/whitebox/.partial").rglob("*.parquet")
    kept = {row for p in stored for row in pd.read_parquet(p)[["attack", "sample"]].itertuples(index=False, name=None)}
    suite = [stage.name for stage in load_suite("whitebox").stages("digits")]
    before = {
        (suite[t.stage], int(i)) for t, r in replies if not t.run and r.error for rows in r.rows for i in rows.sample
    }
    assert before and before <= kept, "what was finished before is kept, of the task that failed too"


BRITTLE = """
from torch import nn
from robbench.models.card import Registry
from robbench.models.load import load_model

class Brittle(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = load_model(Registry.default().find("digits/natural")).module

    def forward(self, x):
        if x.requires_grad and (x[:, 0, 0, 6] > 0.7).any():
            raise ValueError("too bright")
        return self.net(x)

def make():
    return Brittle().eval()
"""


def test_ray_missing_or_misused_is_a_sentence(tmp_path, monkeypatch):
    call = {"model": "digits/at", "suite": "quick", "samples": 8}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        with pytest.raises(RobbenchError, match=r"pip install 'robbench\[cluster\]'"):
            evaluate_all([RunRequest.of(**call)], View())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    with monkeypatch.context() as patch:
        patch.setattr("ray.init", lambda *a, **k: pytest.fail("Ray would try for minutes"))
        for address in (nobody, "nowhere", "127.0.0.1:no", "ray://127.0.0.1:1"):
            with pytest.raises(RobbenchError, match="no Ray cluster answers there"):
                evaluate_all([RunRequest.of(**call)], View(), address=address)
    for options, told in (({"workers": 0}, "--workers: 0"), ({"threads": 0}, "--threads-per-worker: 0")):
        with pytest.raises(RobbenchError, match=told):
            evaluate_all([RunRequest.of(**call)], View(), **options)
    with pytest.raises(RobbenchError, match="allowed: auto, cpu, cuda"):
        evaluate_all([RunRequest.of(**call, device="cuda:1")], View())
    assert "go with --executor ray" in run("eval", "-m", "digits/at", "--workers", 2, code=2).stderr


def test_all_names_what_it_leaves_out(tmp_path, repo):
    done = run("eval", "--all", "--dataset", "digits", "-s", "quick", "--samples", 4, "--json", cwd=tmp_path)
    assert {r["model"] for r in json.loads(done.stdout)} == {"natural", "at", "trades", "ls095_sigma03", "lsq2_sigma03"}
    assert "no registered model" in run("eval", "--all", "--dataset", "nothing", code=2).stderr
    (tmp_path / "more/digits").mkdir(parents=True)
    card = (repo / "models/digits/natural.toml").read_text()
    (tmp_path / "more/digits/other.toml").write_text(card[: card.index("[weights]")])
    args = ("--all", "--dataset", "digits", "--models", tmp_path / "more", "-s", "quick", "--samples", 4)
    assert "1 not trained yet and left out (digits/other)" in run("eval", *args, cwd=tmp_path).stderr


# --- a local Ray, started once -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray():
    """A cluster of two CPUs on the loopback address, which every test joins."""
    pytest.importorskip("ray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, at import and start
        with ray_cluster.open_pool("local", 2, 1, "cpu", print) as pool:
            import ray

            pool.stop()  # every test has workers of its own

            yield ray


CALLS = [
    {"model": "digits/at", "suite": "whitebox", "samples": 40, "lanes": 8},
    {"model": "digits/natural", "suite": "quick", "samples": 80, "lanes": 16, "save_adversarials": True},
]


def test_workers_of_ray_make_the_same_bytes_and_one_that_is_killed_costs_its_task(tmp_path, ray, monkeypatch):
    pools, taken, real = [], [], scheduler._Scheduler.handle_reply

    def kept(factories, pool, reporter):
        pools.append(pool)
        return schedule_runs(factories, pool, reporter)

    monkeypatch.setattr(ray_cluster, "schedule_runs", kept)
    monkeypatch.setattr(scheduler._Scheduler, "handle_reply", lambda s, t, r: (taken.append((t, r)), real(s, t, r)))
    killed = []

    def kill(done):
        working = [handle.pid for handle in pools[0].handles if handle.pid and handle.tasks]
        if done > 60 and working and not killed:
            killed.append(working[0])
            os.kill(killed[0], signal.SIGKILL)

    view = View(kill)
    outcomes = evaluate_all([RunRequest.of(**call, results=tmp_path / "r") for call in CALLS], view, workers=2)
    assert [o.n for o in outcomes] == [40, 80] and killed
    for call in CALLS:
        evaluate(**call, results=tmp_path / "whole")
    assert files(tmp_path / "r") == files(tmp_path / "whole")
    lost = [(t, r) for t, r in taken if r.lost_reason]
    assert lost and sum(r.has_begun for _, r in lost) == 1, "of the tasks that it had, one was begun"
    done = [(t.run, t.stage, int(i)) for t, r in taken if t.kind == "attack" and not r.lost_reason for i in t.at]
    assert len(done) == len(set(done)), "no record was computed twice but those of that task"


def test_code_that_a_worker_cannot_import_is_a_sentence(tmp_path, ray, monkeypatch):
    (tmp_path / "brittle.py").write_text(BRITTLE)
    monkeypatch.chdir(tmp_path)
    call = {"model": "brittle:make", "dataset": "digits", "suite": "quick", "samples": 8}
    (outcome,) = evaluate_all([RunRequest.of(**call)], View(), workers=1)
    assert isinstance(outcome, ModelError) and "cannot import: No module named 'brittle'" in str(outcome)


def test_a_driver_that_is_killed_is_resumed(tmp_path, ray):
    code = (
        "import functools, sys\nfrom robbench.evaluation import run\n"
        "run.Shards = functools.partial(run.Shards, commit_seconds=0.0)\n"
        "from robbench.evaluation.ray_cluster import evaluate_all\nfrom robbench.evaluation.request import RunRequest\n"
        f"from support.cluster import View\nrequest = RunRequest.of(**{CALLS[0]!r}, results=sys.argv[1])\n"
        "evaluate_all([request], View(lambda done: print(done, flush=True)), "
        "address=sys.argv[2], workers=1)"
    )
    args = [sys.executable, "-c", code, str(tmp_path / "r"), ray.get_runtime_context().gcs_address]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=TESTS) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            if int(line) > 60:
                break
        driver.kill()
    found = [*(tmp_path / "r").rglob(".partial/*/*.parquet")]
    assert found
    known = sum(len(pd.read_parquet(path)) for path in found)
    evaluate_all([RunRequest.of(**CALLS[0], results=tmp_path / "r")], view := View(), workers=1)
    evaluate(**CALLS[0], results=tmp_path / "whole")
    assert files(tmp_path / "r") == files(tmp_path / "whole")
    assert view.total == 240 - known, "only what was missing was computed"


def test_a_small_sweep_through_scheduler_and_store(repo):
    args = ["--models", "12", "--samples", "600", "--suite", "quick", "--workers", "4", "--lanes", "32", "--here"]
    done = subprocess.run([sys.executable, repo / "perf/sweep.py", *args], check=True, stdout=subprocess.PIPE)
    found = json.loads(done.stdout)
    assert found["models"] == 12 and found["tasks"] >= 36
    assert found["growth MiB, last two thirds"] < 40
    assert found["driver / task, %"] < 10  # tasks of seconds; the full size is in docs/scaling.md
