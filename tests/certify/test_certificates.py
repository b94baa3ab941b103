"""Certificates on disk: judged breaks, resumed runs, tampered rows, the interval, contradictions, and the command."""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from robbench.certify import run as running
from robbench.certify.interval import CertificateIndex, find_contradictions
from robbench.certify.record import (
    COLUMNS,
    ROWS,
    SUMMARY,
    VERSIONS,
    read_certified,
    summarize_certified,
    write_certified,
)
from robbench.certify.run import Balls, certify
from robbench.certify.verify import verify_certified
from robbench.core.errors import ModelError, ResultError, RobbenchError
from robbench.core.threat import Ball
from robbench.core.types import Threat
from robbench.evaluation.options import Options
from robbench.evaluation.run import evaluate
from robbench.models.spec import ModelSpec
from robbench.report.terminal import print_results
from robbench.results.adversarials import FILE as POINTS
from robbench.results.adversarials import Points, merge, pack, read
from robbench.results.reader import read_results
from robbench.results.schema import dump_sealed
from support.attacks import Scripted
from support.commands import run
from support.leaderboard import read_leaderboard
from support.models import images, small

THREAT = Threat("Linf", Fraction(3, 100))
X = images(24)
NET = small()
Y = NET(X).argmax(1)
Y[::8] = (Y[::8] + 1) % 10


def spec(n=24, net=NET):
    return ModelSpec(net, X[:n], Y[:n], name="net")


def make(root, method="exact", samples=24, threat=THREAT, seconds=30.0, net=NET, **options):
    file = certify(spec(net=net), Balls(method, threat, seconds), Options(samples=samples, results=root, **options))
    (folder,) = (root / "custom" / "net" / "certified").glob(f"{method}@{file.run_id[:8]}")
    return file, folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("certified"))


@pytest.fixture
def copy(made, tmp_path):
    root = tmp_path / "results"
    return root, make(root)[1]


def check(folder, net=NET, samples=100):
    return verify_certified(folder, net, samples=samples, x=X, y=Y)


def forge(folder, change):
    """Change rows, and write them with a summary that follows from them."""
    file, rows = read_certified(folder)
    rows = change(rows.copy())
    kept = {n: getattr(file, n) for n in ("model", "dataset", "total", "selection", "hardware", "versions", "date")}
    points = (folder / POINTS).read_bytes() if (folder / POINTS).exists() else None
    again = summarize_certified(rows, file.identity, {**kept, "answers": file.answers, "files": {}})
    write_certified(folder, again, rows, points)


def test_every_image_has_a_verdict_that_holds(made):
    file, folder = made
    again, rows = read_certified(folder)
    assert again == file and list(rows["sample"]) == list(range(24)) and list(rows.columns) == list(COLUMNS)
    assert {"proven", "broken", "misclassified"} <= set(file.counts) and sum(file.counts.values()) == 24
    assert set(np.flatnonzero(rows["verdict"] == "misclassified")) == {0, 8, 16}
    (group,) = read(folder / POINTS).points
    points = torch.from_numpy(group.x)
    assert set(group.sample) == set(rows.loc[rows["verdict"] == "broken", "sample"])
    assert Ball.of(THREAT).contains(X[group.sample], points).all()
    assert (NET(points).argmax(1) != Y[group.sample]).all()
    proven = rows[rows["verdict"] == "proven"]
    assert (proven["radius"] == 0.03).all() and (proven["margin"] > 0).all()
    noise = (torch.rand(10_000, 64, generator=torch.Generator().manual_seed(0)).view(-1, 1, 8, 8) * 2 - 1).sign() * 0.03
    for sample in proven["sample"]:
        assert (NET((X[sample] + noise).clamp(0, 1)).argmax(1) == Y[sample]).all()


def test_points_of_the_program_are_judged_too(tmp_path, monkeypatch):
    class Lazy(running.PGD):
        """An attack that proposes the clean image."""

        def step(self, p, ball, s, t, logits, loss, grad):
            return {"x": p.x}

        def init(self, p, ball):
            return {"x": p.x}

    with monkeypatch.context() as patched:
        patched.setattr(running, "PGD", Lazy)
        file, folder = make(tmp_path / "lazy")
    assert file.counts == make(tmp_path / "usual")[0].counts
    assert set(read(folder / POINTS).points[0].attack) == {"program"}


def test_a_point_that_the_judge_refuses_leaves_the_image_open(tmp_path, monkeypatch):
    monkeypatch.setattr(running.Certifier, "fit", lambda self, x, point: x[None])
    real = running.Certifier.judge
    monkeypatch.setattr(
        running.Certifier, "judge", lambda self, attack, name, *rest: {} if name == "search" else real(
            self, attack, name, *rest
        ),
    )  # fmt: skip
    file, _ = make(tmp_path)
    assert "broken" not in file.counts and file.counts["open"] > 0


def test_stored_images_are_not_decided_again_and_more_time_goes_to_open_ones(tmp_path, monkeypatch):
    asked = []
    real = running.decide
    monkeypatch.setattr(running, "decide", lambda *a: asked.append(a[-1]) or replace(real(*a), is_proven=False))
    make(tmp_path, samples=6, seconds=5.0)
    first = len(asked)
    assert first > 0
    make(tmp_path, samples=6, seconds=5.0)
    make(tmp_path, samples=3, seconds=4.0)
    assert len(asked) == first
    monkeypatch.setattr(running, "decide", real)
    file, _ = make(tmp_path, samples=12, seconds=30.0)
    assert file.n == 12 and "open" not in file.counts
    assert file.counts == make(tmp_path / "fresh", samples=12)[0].counts


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "_PAUSE", 0.0)
    real, seen = running.Certifier.decide_all, []

    def stop(self, todo):
        for i, row in enumerate(real(self, todo)):
            if i == 10:
                raise KeyboardInterrupt
            yield row

    with monkeypatch.context() as patched:
        patched.setattr(running.Certifier, "decide_all", stop)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path)
    (folder,) = (tmp_path / "custom" / "net" / "certified").iterdir()
    assert read_certified(folder)[0].n == 10
    (folder / SUMMARY).unlink()  # killed between rows and summary
    monkeypatch.setattr(
        running.Certifier, "decide_all", lambda self, todo: seen.extend(todo.tolist()) or real(self, todo)
    )
    file, _ = make(tmp_path)
    assert seen == list(range(10, 24)) and file.n == 24 and check(folder).refuted == []


def test_verify_confirms_what_is_honest(copy):
    _, folder = copy
    checked = check(folder)
    assert checked.refuted == [] and checked.borderline == [] and checked.derived == 24
    assert check(folder, samples=2).derived == 2 + checked.file.counts["broken"]


def test_a_changed_bit_is_found(copy):
    _, folder = copy
    for name in (ROWS, POINTS):
        data = bytearray((folder / name).read_bytes())
        kept = bytes(data)
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(ResultError, match="not as it was written"):
            read_certified(folder)
        (folder / name).write_bytes(kept)
    fields = json.loads((folder / SUMMARY).read_text())
    fields["counts"]["proven"] += 1
    (folder / SUMMARY).write_text(json.dumps(fields))
    with pytest.raises(ResultError, match="not as it was written"):
        read_certified(folder)
    assert any("not as it was written" in str(m) for m in check(folder).refuted)


@pytest.mark.parametrize(
    ("verdict", "values", "message"),
    [
        ("broken", {"verdict": "proven", "radius": 0.03, "margin": 0.1, "prediction": None}, "not proven again"),
        ("misclassified", {"verdict": "proven", "radius": 0.03, "margin": 0.1, "prediction": None}, "clean image"),
        ("proven", {"verdict": "misclassified", "radius": 0.0, "margin": np.nan, "prediction": 99}, "clean image"),
        ("proven", {"verdict": "broken", "radius": 0.0, "margin": np.nan}, "no point of its shape"),
        ("proven", {"margin": 1e9}, "margin 1e.09 is stored"),
        ("broken", {"prediction": 77}, "class 77 is stored"),
        ("broken", {"label": 5, "prediction": 6}, "label 5 is stored"),
    ],
)
def test_a_forged_row_that_is_sealed_again_is_derived_and_found(copy, verdict, values, message):
    _, folder = copy

    def change(rows):
        at = rows.index[(rows["verdict"] == verdict) & (rows["label"] != 5)][0]
        for name, value in values.items():
            rows.loc[at, name] = rows.loc[at, "label"] if value is None else value
        return rows

    forge(folder, change)
    read_certified(folder)  # nothing on disk contradicts it
    assert any(message.replace(".09", "+09") in str(m) for m in check(folder).refuted)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.assign(radius=rows["radius"] + 0.01),
        lambda rows: rows.assign(margin=-1.0),
        lambda rows: rows.assign(verdict="certified"),
        lambda rows: rows.iloc[1:],
        lambda rows: rows.assign(prediction=rows["label"]),
        lambda rows: rows.iloc[::-1],
    ],
)
def test_rows_that_contradict_themselves_are_refused(copy, change):
    _, folder = copy
    forge(folder, change)
    with pytest.raises(ResultError):
        read_certified(folder)


@pytest.mark.usefixtures("limited_time")
@pytest.mark.parametrize("name", [SUMMARY, ROWS, POINTS])
def test_certificates_that_are_a_pipe_are_not_read(copy, name):
    _, folder = copy
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ResultError, match=f"{name} cannot be read: not a regular file"):
        read_certified(folder)


def test_rows_of_another_run_are_refused(copy):
    root, folder = copy
    file, rows = read_certified(folder)
    write_certified(root / "other", file.model_copy(update={"run_id": "0" * 64}), rows, None)
    data = (root / "other" / ROWS).read_bytes()
    (folder / ROWS).write_bytes(data)
    files = file.files | {ROWS: hashlib.sha256(data).hexdigest()}
    (folder / SUMMARY).write_bytes(dump_sealed(file.model_copy(update={"files": files})))
    with pytest.raises(ResultError, match="of another run"):
        read_certified(folder)


def test_a_stored_point_that_breaks_nothing_is_found(copy):
    _, folder = copy
    file, rows = read_certified(folder)
    (group,) = read(folder / POINTS).points
    sample = int(group.sample[0])
    clean = Points.of(file.run_id, group.sample[:1], group.attack[:1], X[sample : sample + 1].numpy())
    wanted = rows[rows["verdict"] == "broken"].assign(attack="search")
    points = pack(merge([clean, group], wanted), file.run_id, ["search", "program"])
    write_certified(folder, file, rows, points)
    found = [m for m in check(folder).refuted if m.sample == sample]
    assert ["does not break" in m.what for m in found] == [True]


def test_another_model_or_other_images_are_told(copy):
    _, folder = copy
    assert "weights" in str(check(folder, small(1)).refuted[0])
    assert "data" in str(verify_certified(folder, NET, x=X.flip(0), y=Y).refuted[0])


def attacked(root, eps="0.03", **changed):
    return evaluate(NET, "quick", x=X, y=Y, name="net", results=root, eps=eps, norm="Linf", **changed)


def test_the_interval_stands_beside_the_attack(copy, capsys):
    root, folder = copy
    result = attacked(root)
    other = attacked(root, eps="0.05")
    index, rows = CertificateIndex(root), read_certified(folder)[1]
    interval = index.find(result)
    assert index.find(other) is None
    assert interval.n == 24 and interval.low.value == pytest.approx((rows["verdict"] == "proven").mean())
    assert interval.low.value <= interval.high.value <= result.robust_accuracy.value
    assert interval.low.value == interval.high.value, "the method is exact"
    text = interval.format(24)
    assert text in read_leaderboard(root)
    assert f"{text} of 24" == interval.format(99)
    print_results([result, other], root)
    assert "attacked" in capsys.readouterr().out
    assert find_contradictions(root) == []
    make(root, "bounds", samples=5)
    assert CertificateIndex(root).find(result) == interval


@dataclass(frozen=True, kw_only=True)
class Few(Scripted):
    norms: ClassVar[tuple[str, ...]] = ("L0",)


def test_a_break_in_l0_contradicts_no_proof_in_another_norm(copy):
    root, _ = copy
    result = evaluate(NET, [Few(points=(0.0, 1.0))], x=X, y=Y, name="net", results=root, norm="L0", eps=63)
    assert result.threat.norm == "L0"
    assert find_contradictions(root) == []


def test_certificates_of_an_earlier_version_stand_nowhere(copy, monkeypatch):
    root, folder = copy
    result = attacked(root)
    monkeypatch.setitem(VERSIONS, "exact", VERSIONS["exact"] + 1)
    assert CertificateIndex(root).find(result) is None
    with pytest.raises(ResultError, match="Certify again"):
        check(folder)
    assert make(root)[1] != folder
    assert CertificateIndex(root).find(result).n == 24


def test_an_image_that_is_certified_and_broken_is_an_error_of_robbench(copy, capsys):
    root, folder = copy
    result = attacked(root, eps="0.05")
    assert find_contradictions(root) == []

    def prove(rows):
        at = rows["verdict"] == "broken"
        rows.loc[at, ["verdict", "radius", "margin"]] = ["proven", 0.03, 0.1]
        rows.loc[at, "prediction"] = rows.loc[at, "label"]
        return rows

    forge(folder, prove)
    # The attack had a larger radius. A break counts where its point lies within the radius of the proof.
    found = find_contradictions(root)
    rows = read_results(root).results[0]
    assert rows.run_id == result.run_id
    attacked(root)
    assert len(find_contradictions(root)) > len(found)
    assert all(text.startswith("ERROR OF ROBBENCH: sample ") for text in find_contradictions(root))
    assert "## Errors of robbench" in read_leaderboard(root)
    print_results([attacked(root)], root)
    assert "ERROR OF ROBBENCH" in capsys.readouterr().out


def test_a_proof_in_linf_forbids_breaks_in_l2_and_not_the_other_way(copy):
    root, folder = copy
    evaluate(NET, "quick", x=X, y=Y, name="net", results=root, eps="0.1", norm="L2")

    def prove(rows):
        at = rows["verdict"] != "misclassified"
        rows.loc[at, ["verdict", "radius", "margin"]] = ["proven", 0.03, 0.1]
        rows.loc[at, "prediction"] = rows.loc[at, "label"]
        return rows

    rows = read_results(root).results[0]
    assert rows.threat.norm == "L2"
    forge(folder, prove)
    near = [t for t in find_contradictions(root) if "L2" in t]
    assert all(float(t.split(" L2 ")[1].split(". ")[0]) <= 0.030001 for t in near)
    _, other = make(root, "bounds", threat=Threat("L2", Fraction(1, 5)))
    forge(other, lambda rows: prove(rows).assign(radius=np.where(rows["verdict"] == "misclassified", 0, 0.2)))
    attacked(root)
    assert any("proven in L2" in t and " L2 " in t.split("broken")[1] for t in find_contradictions(root))
    assert not any("proven in L2" in t and " Linf " in t.split("broken")[1] for t in find_contradictions(root))


def test_a_model_that_answers_at_random_has_no_proof(tmp_path):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small()

        def forward(self, x):
            return self.inner(x) + torch.randn(len(x), 10)

    with pytest.raises(ModelError, match="cannot be certified"):
        make(tmp_path, net=Noisy().eval())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out + 1e-2 * torch.randn(out.shape), "differ by"),
        (lambda out: out * torch.tensor([1.1, *[1.0] * 9]), "differ by"),
    ],
)
def test_a_model_that_answers_otherwise_in_float32_has_no_proof(tmp_path, change, message):
    net = small()
    net[-1].register_forward_hook(lambda layer, args, out: change(out) if out.dtype == torch.float32 else out)
    with pytest.raises(ModelError, match=message):
        make(tmp_path, net=net)


def test_only_first_images_are_certified():
    with pytest.raises(RobbenchError, match="first images"):
        certify(spec(), Balls("bounds", THREAT, 1.0), Options(sample_seed=1))


def test_the_command_certifies_verifies_and_refuses(tmp_path):
    done = run("certify", "digits/natural", "--method", "bounds", "--eps", "0.01", "--samples", "3", cwd=tmp_path)
    assert "digits/natural · bounds: 3 images: 3 proven" in done.stdout
    (folder,) = (tmp_path / "results" / "digits" / "natural" / "certified").iterdir()
    assert f"robbench verify {folder.relative_to(tmp_path)}" in done.stdout
    told = run("verify", folder, "--samples", "1", cwd=tmp_path)
    assert "1 of 3 images derived again, 0 mismatches" in told.stdout
    command = ("certify", "digits/natural", "--method", "bounds", "--eps", "0.01", "--samples", "3", "--json")
    listed = json.loads(run(*command, cwd=tmp_path).stdout)
    assert listed["counts"] == {"proven": 3}
    for args, message in (
        (("--eps", "0.1", "--norm", "L2"), "allowed: Linf"),
        (("--method", "smoothing", "--eps", "0.1"), "--method smoothing needs --sigma"),
        (("--sigma", "0.1"), "--sigma goes with"),
        (("--eps", "0.1", "--draws", "100"), "--draws 100 given with --method exact; --draws goes with"),
        (("--method", "smoothing", "--sigma", "0.1", "--norm", "L2"), "--norm L2 given with --method smoothing"),
        (("--eps", "0.1", "--seconds", "0"), "--seconds"),
        (("--method", "smoothing", "--sigma", "-1"), "--sigma: -1.0 given"),
        (("--method", "smoothing", "--sigma", "0.1", "--seed", "-1"), "--seed: -1 given"),
        (("--method", "smoothing", "--sigma", "0.1", "--draws", "0"), "--draws: 0 given"),
    ):
        assert message in run("certify", "digits/natural", *args, cwd=tmp_path, code=2).stderr
    frame = pd.read_parquet(folder / ROWS)
    assert list(frame.columns) == list(COLUMNS)
