"""Stored records are used only if the model still gives the same answers, and the same code judged them."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from robbench.classifier import answers
from robbench.classifier.answers import AnswerProbe
from robbench.classifier.prepare import Target, prepare
from robbench.core import version
from robbench.core.errors import ResultError
from robbench.evaluation import run as evaluation
from robbench.evaluation.inputs import Images, make_probe, registered
from robbench.evaluation.options import Options
from robbench.evaluation.run import evaluate
from robbench.gate.measure import measure_entry
from robbench.linear.measure import measure_linear
from robbench.models.spec import ModelSpec
from robbench.recheck.reproduce import reproduce
from robbench.recheck.verify import verify
from robbench.results.consistency import derive_summary
from robbench.results.reader import read_results
from robbench.results.records import pack_rows, read_rows
from robbench.results.run_files import find_runs
from robbench.results.schema import dump_sealed, read_result, seal
from support.models import small
from support.stored import folder, write_suite


class Notes(evaluation.Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        if "is at chance" not in text:  # of the random labels here
            self.notes.append(text)


def _matrix(seed):
    return np.random.default_rng(seed).normal(size=(64, 10)).astype(np.float32)


class Outside(nn.Module):
    """A model, in eval mode, whose function is not in its tensors."""

    def __init__(self):
        super().__init__()
        self.training = False


class InNumpy(Outside):
    """Weights in a NumPy attribute."""

    def __init__(self, seed):
        super().__init__()
        self.w = _matrix(seed)

    def forward(self, x):
        return x.flatten(1) @ torch.from_numpy(self.w)


class InList(Outside):
    """An ensemble in a plain list."""

    def __init__(self, seed):
        super().__init__()
        self.members = [small(seed), small(seed + 100)]

    def forward(self, x):
        return sum(member(x) for member in self.members)


class InClosure(Outside):
    def __init__(self, seed):
        super().__init__()
        w = torch.from_numpy(_matrix(seed))
        self.answer = lambda x: x.flatten(1) @ w

    def forward(self, x):
        return self.answer(x)


class InFile(Outside):
    def __init__(self, path, seed):
        super().__init__()
        self.path = str(path)
        np.save(self.path, _matrix(seed))

    def forward(self, x):
        return x.flatten(1) @ torch.from_numpy(np.load(self.path))


class Scaled(Outside):
    """A scripted module whose function depends on a plain number."""

    shift: float

    def __init__(self, seed):
        super().__init__()
        self.net, self.shift = small(0), float(seed)

    def forward(self, x):
        z = self.net(x)
        return z + self.shift * torch.arange(10, device=z.device, dtype=z.dtype)


class Nearest(Outside):
    """One neighbour decides, as in a classifier of scikit-learn: answers are 0 or 1, without a gradient."""

    def __init__(self, seed):
        super().__init__()
        rng = np.random.default_rng(seed)
        self.points, self.labels = rng.random((50, 64)).astype(np.float32), rng.integers(0, 10, 50)

    def forward(self, x):
        distance = torch.cdist(x.detach().flatten(1), torch.from_numpy(self.points))
        nearest = torch.from_numpy(self.labels)[distance.argmin(1)]
        return torch.nn.functional.one_hot(nearest, 10).to(x.dtype)


MAKERS = {
    "numpy": lambda tmp_path, seed: InNumpy(seed),
    "list": lambda tmp_path, seed: InList(seed),
    "closure": lambda tmp_path, seed: InClosure(seed),
    "file": lambda tmp_path, seed: InFile(tmp_path / "w.npy", seed),
    "script": lambda tmp_path, seed: torch.jit.script(Scaled(seed)),
    "neighbour": lambda tmp_path, seed: Nearest(seed),
}


def images():
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(40) % 10


def options(tmp_path, **more):
    x, y = images()
    return {"x": x, "y": y, "name": "mine", "eps": 0.05, "results": tmp_path / "r", "lanes": 8, **more}


def queries(tmp_path):
    path = tmp_path / "q.toml"
    path.write_text('version = 1\n[[attack]]\nname = "Noise"\nkind = "noise"\nsteps = 3\n')
    return str(path)


def read_all(tmp_path):
    return {p.name: p.read_bytes() for p in folder(tmp_path / "r").iterdir() if p.is_file()}


def change_result(tmp_path, **fields):
    path = folder(tmp_path / "r") / "result.json"
    content = {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"}
    path.write_bytes(seal(content | fields))


class Stop(Exception):
    pass


def interrupt(model, tmp_path, monkeypatch, suite, **more):
    """Leave an unfinished run."""

    def stop(self, flags):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.EvaluationRun, "finish", stop)
        with pytest.raises(Stop):
            evaluate(model, suite, **options(tmp_path, **more))


# --- the model's answers ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning", "ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("kind", MAKERS)
def test_a_model_trained_again_does_not_get_the_old_number(tmp_path, kind):
    make, suite = MAKERS[kind], queries(tmp_path)
    first = evaluate(make(tmp_path, 0), suite, **options(tmp_path, samples=20))
    notes = Notes()
    assert evaluate(make(tmp_path, 0), suite, **options(tmp_path, samples=20), reporter=notes) == first
    assert ["nothing to compute" in n for n in notes.notes] == [True]
    before, other = read_all(tmp_path), make(tmp_path, 1)
    for n in (20, 40, 10):  # known, extended, fewer
        with pytest.raises(ResultError, match=r"result\.json: the model answers differently since: its logits for"):
            evaluate(other, suite, **options(tmp_path, samples=n))
    assert read_all(tmp_path) == before
    replaced = evaluate(other, suite, **options(tmp_path, samples=20), overwrite=True)
    alone = evaluate(other, suite, **options(tmp_path, samples=20, results=None))
    assert replaced.clean_accuracy == alone.clean_accuracy and replaced.run_id == first.run_id
    assert replaced.robust_accuracy == alone.robust_accuracy


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning", "ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("kind", ["numpy", "script"])
def test_an_unfinished_run_of_other_answers_is_not_resumed(tmp_path, monkeypatch, kind):
    make, suite = MAKERS[kind], queries(tmp_path)
    interrupt(make(tmp_path, 0), tmp_path, monkeypatch, suite)
    partial = next(folder(tmp_path / "r").glob(".partial/*"))
    before = {p.name: p.read_bytes() for p in partial.iterdir()}
    with pytest.raises(ResultError, match=r"run\.json: the model answers differently since"):
        evaluate(make(tmp_path, 1), suite, **options(tmp_path))
    assert {p.name: p.read_bytes() for p in partial.iterdir()} == before
    alone = evaluate(make(tmp_path, 1), suite, **options(tmp_path, results=None))
    assert evaluate(make(tmp_path, 1), suite, **options(tmp_path), overwrite=True).attacks[0].forwards == (
        alone.attacks[0].forwards
    )


def test_the_same_model_resumes_without_a_word(tmp_path, monkeypatch):
    interrupt(InNumpy(0), tmp_path, monkeypatch, queries(tmp_path))
    notes = Notes()
    evaluate(InNumpy(0), queries(tmp_path), **options(tmp_path), reporter=notes)
    assert notes.notes == []


def test_verify_reproduce_and_linear_compare_answers(tmp_path):
    x, y = images()
    suite = write_suite(tmp_path)
    evaluate(InList(0), suite, **options(tmp_path, save_adversarials=True))
    path = folder(tmp_path / "r")
    assert not verify(path, InList(0), x=x, y=y).refuted
    (mismatch,) = verify(path, InList(1), x=x, y=y).refuted
    assert str(mismatch).startswith("answers: the model answers differently since")
    assert not reproduce(path, InList(0), suite=suite, x=x, y=y, samples=8).verdicts
    with pytest.raises(ResultError, match="answers differently since"):
        reproduce(path, InList(1), suite=suite, x=x, y=y, samples=8)
    asked = {"x": x, "y": y, "name": "mine", "results": tmp_path / "l"}
    first = measure_linear(InList(0), **asked)
    assert measure_linear(InList(0), **asked) == first
    with pytest.raises(ResultError, match="answers differently since"):
        measure_linear(InList(1), **asked)
    assert measure_linear(InList(1), **asked, overwrite=True).answers != first.answers


def test_results_of_older_versions_are_known_with_a_word_where_tensors_are_not_all(tmp_path):
    first = evaluate(InNumpy(0), queries(tmp_path), **options(tmp_path))
    change_result(tmp_path, answers=[])
    notes = Notes()
    again = evaluate(InNumpy(0), queries(tmp_path), **options(tmp_path), reporter=notes)
    assert again.robust_accuracy == first.robust_accuracy
    assert "holds no answers of the model" in notes.notes[0] and "nothing to compute" in notes.notes[1]
    card = {"results": tmp_path / "c", "samples": 4}
    evaluate("digits/at", "quick", **card)
    path = folder(tmp_path / "c") / "result.json"
    content = {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"}
    path.write_bytes(seal(content | {"answers": []}))
    notes = Notes()
    evaluate("digits/at", "quick", **card, reporter=notes)
    assert [n for n in notes.notes if "nothing to compute" not in n] == []


class Noisy(nn.Module):
    """Answers at random, by one of the global generators."""

    def __init__(self, how):
        super().__init__()
        self.net, self.how = small(), how

    def forward(self, x):
        if self.how == "torch":
            return self.net(x + 0.02 * torch.randn_like(x))
        if self.how == "numpy":
            return self.net(x + torch.from_numpy(np.random.normal(0, 0.02, x.shape)).to(x.dtype))
        return self.net(x) * (2.0 if torch.rand(()) < 0.5 else 1.0)


@pytest.mark.parametrize("how", ["torch", "numpy", "coin"])
def test_models_that_answer_at_random_raise_no_alarm(tmp_path, how):
    for seed in range(4):
        torch.manual_seed(seed)
        more = options(tmp_path, results=tmp_path / f"r{seed}", samples=10)
        first = evaluate(Noisy(how).eval(), queries(tmp_path), **more)
        notes = Notes()
        assert evaluate(Noisy(how).eval(), queries(tmp_path), **more, reporter=notes) == first
        assert all(first.answers) and not any("not compared" in n for n in notes.notes)


class Held(nn.Module):
    """A model that is random, and whose network the digest of its tensors does not see."""

    def __init__(self, net, noise):
        super().__init__()
        self.held, self.noise = [net], noise

    def forward(self, x):
        return self.held[0](self.noise(x))


def off_the_grid(x):
    is_moved = ((x * 16 - (x * 16).round()).abs().flatten(1).amax(1) > 1e-3).view(-1, 1, 1, 1)
    return torch.where(is_moved, x + 0.05 * torch.randn_like(x), x)


NOISES = {
    "everywhere": lambda x: x + 0.02 * torch.randn_like(x),
    "one draw for the batch": lambda x: x + 0.05 * torch.randn(()),
    "off the grid": off_the_grid,
    "dropout": lambda x: nn.functional.dropout(x, 0.1),
}


@pytest.mark.parametrize("noise", NOISES)
def test_a_random_model_that_was_retrained_is_refused(tmp_path, noise):
    more = options(tmp_path, samples=10)
    for seed in (0, 1):
        torch.manual_seed(seed)
        evaluate(Held(small(0), NOISES[noise]).eval(), queries(tmp_path), **more)
    with pytest.raises(ResultError, match="answers differently since"):
        evaluate(Held(small(1), NOISES[noise]).eval(), queries(tmp_path), **more)


def test_a_probe_leaves_random_generators_and_the_model_as_they_are():
    seen = probe(Noisy("torch").eval())
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(0)
    np.random.seed(0)
    seen.record()
    seen.describe_change(["1 2 3 4 5 6 7 8 9 10"] * 32)
    assert torch.equal(torch.rand(3), expected[0]) and np.array_equal(np.random.rand(3), expected[1])


def probe(model, n=8, lanes=64, **more):
    x = images()[0][:n]
    module = prepare(model, torch.device("cpu"), x[:2], **more)
    return AnswerProbe(Target(module, "m", torch.device("cpu"), "", {}), x, lanes)


class Answer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.net, self.function = small(), function

    def forward(self, x):
        return self.function(self.net(x), x)


def test_a_probe_asks_once_or_twice_in_one_narrow_batch():
    asked = []
    seen = probe(Answer(lambda z, x: (asked.append(len(x)), z)[1]).eval())
    asked.clear()
    stored = seen.record()
    assert asked == [32, 32] and all(stored)
    seen.describe_change(stored)
    assert asked == [32, 32, 32]


def fail_on_noise(z, x):
    if float(x.std(dim=(1, 2, 3)).max()) > 0.28:
        raise ValueError("no such image")
    return z


@pytest.mark.parametrize(
    ("function", "changed"),
    [
        (lambda z, x: torch.where(z > 0, torch.nan, z), lambda z, x: z),
        (lambda z, x: torch.where(z > 0, torch.inf, z), lambda z, x: torch.where(z > 0.1, torch.inf, z)),
        (lambda z, x: 1000 + z, lambda z, x: 1000 + 1.05 * z),
        (lambda z, x: z[:, :5], lambda z, x: z[:, :6]),
        (fail_on_noise, lambda z, x: 1.05 * fail_on_noise(z, x)),
        (lambda z, x: z.softmax(1), lambda z, x: (1.2 * z).softmax(1)),
        (lambda z, x: z.bfloat16(), lambda z, x: (1.3 * z).bfloat16()),
        (lambda z, x: torch.zeros_like(z), lambda z, x: torch.zeros_like(z) + 1e-6 * z),
    ],
)
def test_answers_of_every_kind_are_compared(function, changed):
    stored = probe(Answer(function).eval()).record()
    assert any(stored)
    for n in (8, 8):
        assert probe(Answer(function).eval(), n).describe_change(stored) == ""
    assert probe(Answer(changed).eval()).describe_change(stored).startswith("its logits for")


def test_one_image_at_a_step_of_the_model_is_no_alarm_and_two_are():
    seen = probe(small())
    stored = seen.record()
    wrong = ["9 8 7 6 5 4 3 2 1 0", *stored[1:]]
    assert seen.describe_change(wrong) == ""
    assert "2 of 32 fixed images" in seen.describe_change([*wrong[:1], wrong[0], *stored[2:]])


def test_a_model_that_fails_on_the_probe_is_not_compared():
    def fail(z, x):
        raise ValueError("never")

    seen = probe(Answer(fail).eval())
    assert seen.record() == [""] * 32
    assert seen.describe_change(probe(small()).record()) == ""


def test_other_processors_batches_and_kernels_are_no_alarm(tmp_path):
    target, data = registered("digits/at", torch.device("cpu"), Options())
    stored = make_probe(target, Images.of(data), 64).record()
    for fast, lanes in ((False, 64), (True, 2), (True, 7), (False, 1000)):
        other, _ = registered("digits/at", torch.device("cpu"), Options(fast_layers=fast))
        assert make_probe(other, Images.of(data), lanes).describe_change(stored) == ""
    wide = AnswerProbe(
        Target(target.module.double(), "m", torch.device("cpu"), "", {}), Images.of(data).x(np.arange(8)).double(), 64
    )
    assert wide.describe_change(stored) == ""
    evaluate("digits/at", "quick", samples=8, results=tmp_path)
    env = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"}
    call = [sys.executable, "-m", "robbench", "eval", "-m", "digits/at", "-s", "quick", "--samples", "8"]
    more = ["--results", str(tmp_path), "--lanes", "3", "--no-fast-layers"]
    done = subprocess.run([*call, *more], env=env, capture_output=True, text=True, check=True)
    assert "nothing to compute" in done.stderr and "answers" not in done.stderr


def test_rounding_is_far_below_the_tolerance():
    stored, now = (answers._parse(probe(small(), **more).record())[0] for more in ({}, {"lanes": 3}))
    assert answers._measure_changes(stored, now).max() < answers._ROUNDING / 100
    assert math.isinf(answers._measure_changes(stored, [row[:3] for row in now]).max())


# --- the code that judged --------------------------------------------------------------------------------------


@pytest.fixture
def other_code(monkeypatch):
    """Return a function that changes the digest of the judging code."""

    def change(code="0123456789abcdef"):
        monkeypatch.setattr(version, "digest_judging_code", lambda: code)

    return change


@pytest.mark.parametrize("code", ["fedcba9876543210", ""])
def test_a_finished_result_of_other_code_is_shown_with_a_word(tmp_path, code):
    suite = write_suite(tmp_path)
    first = evaluate(small(), suite, **options(tmp_path))
    change_result(tmp_path, code=code)
    before, notes = read_all(tmp_path), Notes()
    again = evaluate(small(), suite, **options(tmp_path), reporter=notes)
    assert again.robust_accuracy == first.robust_accuracy and again.code == code
    assert "nothing to compute" in notes.notes[0] and "--overwrite measures it anew" in notes.notes[1]
    assert read_all(tmp_path) == before
    replaced = evaluate(small(), suite, **options(tmp_path), overwrite=True)
    assert replaced.code == version.digest_judging_code() == read_result(folder(tmp_path / "r") / "result.json").code


def spoil(tmp_path, status="robust"):
    """Give the stored result other verdicts and the digest of other code, as a wrong judge would."""
    path = folder(tmp_path / "r")
    stored = read_result(path / "result.json")
    rows = read_rows(path / "outcomes.parquet").assign(status=status)
    (path / "outcomes.parquet").write_bytes(pack_rows(rows, stored.run_id))
    spoiled = derive_summary(stored.model_copy(update={"code": "fedcba9876543210"}), rows)
    (path / "result.json").write_bytes(dump_sealed(spoiled))


def test_an_extension_computes_rows_of_other_code_again(tmp_path, monkeypatch):
    suite = write_suite(tmp_path)
    evaluate(small(), suite, **options(tmp_path, samples=20))
    spoil(tmp_path)
    before = read_all(tmp_path)
    interrupt(small(), tmp_path, monkeypatch, suite)
    assert read_all(tmp_path) == before, "the smaller result stays until the larger one is complete"
    assert evaluate(small(), suite, **options(tmp_path, samples=20)).robust_accuracy.value == 1, "as it is stored"
    notes = Notes()
    bigger = evaluate(small(), suite, **options(tmp_path), reporter=notes)
    assert any("They are computed again" in n and "fedcba9876543210" in n for n in notes.notes)
    assert bigger == read_result(folder(tmp_path / "r") / "result.json")
    alone = evaluate(small(), suite, **options(tmp_path, results=tmp_path / "alone"))
    assert (folder(tmp_path / "alone") / "outcomes.parquet").read_bytes() == read_all(tmp_path)["outcomes.parquet"]
    assert bigger.robust_accuracy == alone.robust_accuracy


def test_adversarials_asked_for_later_do_not_mix_code(tmp_path):
    suite = write_suite(tmp_path)
    evaluate(small(), suite, **options(tmp_path))
    change_result(tmp_path, code="fedcba9876543210")
    notes = Notes()
    evaluate(small(), suite, **options(tmp_path, save_adversarials=True), reporter=notes)
    assert any("They are computed again" in n for n in notes.notes)
    assert not any("without their adversarial examples" in n for n in notes.notes)


@pytest.mark.parametrize("unknown", [False, True])
def test_an_unfinished_run_of_other_code_begins_anew(tmp_path, monkeypatch, other_code, unknown):
    suite = write_suite(tmp_path)
    interrupt(small(), tmp_path, monkeypatch, suite)
    (stored,) = find_runs(tmp_path / "r")
    about = stored.folder / ".partial" / stored.run_id / "run.json"
    assert stored.done == 1 and len(stored.about.answers) == 32
    if unknown:  # as older versions wrote it
        about.write_bytes(seal({k: v for k, v in json.loads(about.read_text()).items() if k not in ("code", "sha256")}))
    else:
        other_code()
    shards = {p.name for p in about.parent.iterdir()}
    notes, seen = Notes(), []
    real = evaluation.Shards.add
    monkeypatch.setattr(evaluation.Shards, "add", lambda s, a, st, r: (seen.extend(r["sample"]), real(s, a, st, r))[1])
    evaluate(small(), suite, **options(tmp_path), reporter=notes)
    assert len(seen) == 80, "every record is computed again"
    assert len(notes.notes) == 1 and "Set aside as" in notes.notes[0]
    (aside,) = stored.folder.glob("*.damaged")
    assert {p.name for p in aside.iterdir()} == shards, "nothing is lost"


def test_records_without_a_summary_are_not_used_if_other_code_judged_them(tmp_path, other_code):
    suite = write_suite(tmp_path)
    evaluate(small(), suite, **options(tmp_path))
    spoil(tmp_path)
    (folder(tmp_path / "r") / "result.json").unlink()
    notes = Notes()
    assert evaluate(small(), suite, **options(tmp_path), reporter=notes).robust_accuracy.value < 1
    assert "names no code" in notes.notes[0] and (folder(tmp_path / "r") / "outcomes.parquet.damaged").exists()


@pytest.mark.parametrize(("stored_n", "n"), [(20, 20), (40, 20), (20, 40)])
def test_a_gate_measures_records_of_other_code_anew(tmp_path, stored_n, n):
    x, y = images()
    y = small()(x).argmax(1)
    suite = write_suite(tmp_path)
    spec = ModelSpec(small(), x, y, name="mine")

    def measure(results, samples, notes=None):
        return measure_entry(spec, suite, Options(results=results, samples=samples, eps=0.1, norm="Linf"), notes)

    measure(tmp_path / "r", stored_n)
    spoil(tmp_path)
    notes = Notes()
    entry = measure(tmp_path / "r", n, notes)
    assert sum("They are computed again" in note for note in notes.notes) == 1
    alone = measure(tmp_path / "alone", n)
    assert entry.verdicts == alone.verdicts and entry.robust_accuracy.value < 1
    aside = folder(tmp_path / "r") / "result.json.damaged"
    assert aside.exists() == (stored_n > n), "a larger result is kept"
    notes = Notes()
    assert measure(tmp_path / "r", n, notes).verdicts == entry.verdicts
    assert len(notes.notes) == 1 and "nothing to compute" in notes.notes[0]


@pytest.mark.parametrize("left_out", [(), ("sha256",), ("sha256", "wall_seconds")])
def test_a_gate_believes_no_code_that_was_written_by_hand(tmp_path, left_out):
    x, y = images()
    y, suite = small()(x).argmax(1), write_suite(tmp_path)
    spec = ModelSpec(small(), x, y, name="mine")

    def measure(results):
        return measure_entry(spec, suite, Options(results=results, samples=20, eps=0.1, norm="Linf"), None)

    measure(tmp_path / "r")
    spoil(tmp_path)
    path = folder(tmp_path / "r") / "result.json"
    forged = json.loads(path.read_text()) | {"code": version.digest_judging_code()}
    path.write_text(json.dumps({key: value for key, value in forged.items() if key not in left_out}))
    assert measure(tmp_path / "r").verdicts == measure(tmp_path / "alone").verdicts
    assert read_result(path).robust_accuracy.value < 1, "the forged result says 1"


def test_committed_results_are_read_as_before(repo):
    results = read_results(repo / "results").results
    assert {bool(r.code) for r in results} == {True, False}, "some are of versions that stored no answers and no code"
    assert all(r.answers for r in results if r.code)
