"""The gate on real models: what an injected regression, a weakened attack and an unchanged model make of it."""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from robbench.attacks.pgd import PGD
from robbench.commands.app import app
from robbench.core.errors import ResultError, RobbenchError
from robbench.evaluation.options import Options
from robbench.gate.baseline import read_baseline
from robbench.gate.measure import choose_entries, measure_entry_again

pytestmark = pytest.mark.whole

SUITE = """
version = 1
title = "For the gate"
mode = "full"
[threat]
digits = { norm = "Linf", eps = "0.2" }
[[attack]]
name = "FGSM"
kind = "fgsm"
objective = "ce"
[[attack]]
name = "PGD"
kind = "pgd"
objective = "margin"
steps = 10
random_start = true
"""
REPO = Path(__file__).resolve().parents[2]
SOURCE = ["--architecture", "digits_convnet", "--dataset", "digits"]


def call(*args, cwd, code=0):
    """Run a command in this process, in a folder; returns what it prints, or the words of its error."""
    with contextlib.chdir(cwd):
        done = CliRunner().invoke(app, [str(a) for a in args])
    refused = isinstance(done.exception, RobbenchError)
    assert (2 if refused else done.exit_code) == code, done.output
    return str(done.exception) if refused else done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with weights, a suite and a baseline of them on 300 images."""
    folder = tmp_path_factory.mktemp("gate")
    shutil.copy(REPO / "models/weights/digits/at.safetensors", folder / "net.safetensors")
    (folder / "mine.toml").write_text(SUITE)
    args = ["baseline", "-m", "file:net.safetensors", *SOURCE, "-s", "mine.toml", "--samples", 300, "--out", "b.json"]
    said = call(*args, cwd=folder)
    assert "300 images" in said and "robbench check --baseline b.json" in said
    return folder


def noisy(folder, seed, scale):
    """Write worse.safetensors: net.safetensors with noise on every weight."""
    weights, noise = load_file(folder / "net.safetensors"), torch.Generator().manual_seed(seed)
    worse = {
        k: (t.float() * (1 + scale * torch.randn(t.shape, generator=noise))).to(t.dtype) for k, t in weights.items()
    }
    save_file(worse, folder / "worse.safetensors")


def check(folder, *args, code=0):
    return json.loads(call("check", "--baseline", "b.json", "--json", *args, cwd=folder, code=code))


def outcomes(found):
    return {t["what"]: t["outcome"] for t in found["models"][0]["tests"]}


def test_an_unchanged_model_gives_the_same_verdicts(folder):
    found = check(folder, "--markdown", "page.md", "--junit", "junit.xml")
    assert not found["failed"] and found["models"][0]["flips"] == [] and found["models"][0]["changes"] == []
    assert set(outcomes(found).values()) == {"passed"}
    assert (folder / "page.md").read_text().startswith("## ✅ Gate passed: 4 tests (1 model, 300 images")
    suite = ElementTree.parse(folder / "junit.xml").getroot()[0]
    assert suite.get("tests") == "4" and suite.get("failures") == "0" and len(suite) == 4


def test_other_seeds_of_the_attacks_pass(folder):
    found = check(folder, "--seed", 7)
    assert not found["failed"] and found["models"][0]["flips"]
    assert [c["field"] for c in found["models"][0]["changes"]] == ["seed"]


def test_a_regression_of_the_weights_fails_and_is_explained(folder):
    """Noise on the weights, a few points of robust accuracy: the gate fails, names the cause, and shows the images."""
    noisy(folder, seed=0, scale=0.3)
    args = ["--model", "file:worse.safetensors", "--markdown", "page.md", "--junit", "junit.xml"]
    found = check(folder, *args, code=1)
    worst = next(t for t in found["models"][0]["tests"] if t["what"] == "worst case")
    assert found["failed"] and worst["outcome"] == "failed" and -30 < worst["points"] < -3
    assert worst["p_adjusted"] <= 0.01 and len(worst["lost"]) - len(worst["gained"]) == -round(3 * worst["points"])
    assert [c["field"] for c in worst["because"]] == ["weights"]
    flips = {f["sample"]: f for f in found["models"][0]["flips"]}
    assert all(flips[s]["worst_case"] == "lost" for s in worst["lost"])
    page = (folder / "page.md").read_text()
    assert page.startswith("## ❌ Gate FAILED") and "What changed: weights" in page and f"{worst['lost'][0]} (" in page
    suite = ElementTree.parse(folder / "junit.xml").getroot()[0]
    (failure,) = suite.iter("failure")
    assert "worst case: significantly lower" in failure.get("message") and "robust → broken" in failure.text


def test_a_regression_of_two_points_fails_on_all_test_images(tmp_path):
    """A little noise on the weights, 2 of 100 images lost: 899 images are enough to be certain."""
    baseline = ["baseline", "-m", "file:net.safetensors", *SOURCE, "-s", "quick", "--out", "b.json"]
    shutil.copy(REPO / "models/weights/digits/at.safetensors", tmp_path / "net.safetensors")
    call(*baseline, cwd=tmp_path)
    noisy(tmp_path, seed=5, scale=0.09)
    found = check(tmp_path, "--model", "file:worse.safetensors", code=1)
    clean, worst = found["models"][0]["tests"][:2]
    assert clean["outcome"] == "passed" and worst["outcome"] == "failed"
    assert -2.6 < worst["points"] < -1.5 and worst["p_adjusted"] < 0.01


def test_a_weakened_attack_fails_and_is_named(folder, tmp_path):
    """The same weights, and PGD with 2 steps instead of 10."""
    for name in ("net.safetensors", "b.json"):
        shutil.copy(folder / name, tmp_path)
    (tmp_path / "mine.toml").write_text(SUITE.replace("steps = 10", "steps = 2"))
    found = check(tmp_path, code=1)
    assert outcomes(found) == {"clean accuracy": "passed", "worst case": "passed", "FGSM": "passed", "PGD": "failed"}
    pgd = found["models"][0]["tests"][-1]
    assert pgd["because"] == [{"field": "attack", "text": "steps 10 → 2", "attack": "PGD"}]
    said = call("check", "--baseline", "b.json", cwd=tmp_path, code=1)
    assert "the attack has become weaker" in said and "What changed: attack PGD: steps 10 → 2" in said
    assert "robbench baseline" in said and "broken → robust" in said
    (tmp_path / "mine.toml").write_text(SUITE.split('[[attack]]\nname = "PGD"')[0])
    assert check(tmp_path, code=1)["models"][0]["removed_attacks"] == ["PGD"]


def test_an_attack_weakened_in_the_code_fails_too(folder, monkeypatch):
    """Its parameters are the same; only its verdicts tell."""
    monkeypatch.setattr(PGD, "step", lambda self, p, ball, s, t, logits, loss, grad: s)  # it stands still
    said = call("check", "--baseline", "b.json", cwd=folder, code=1)
    assert "PGD: the attack has become weaker" in said and "Nothing else that a baseline records changed" in said


def test_stored_results_are_compared_without_torch(folder, tmp_path):
    root = tmp_path / "kept"
    args = ["baseline", "-m", "file:net.safetensors", *SOURCE, "-s", "mine.toml", "--samples", 40]
    call(*args, "--out", tmp_path / "small.json", "--results", root, cwd=folder)
    (stored,) = root.glob("digits/file-net/mine@*")
    arguments = ["robbench", "check", "--baseline", str(tmp_path / "small.json"), "--result", str(stored)]
    code = f"import sys; sys.argv = {arguments}; from robbench.__main__ import main\n"
    code += "try: main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Gate passed" in done.stdout, done.stderr
    call("baseline", "--result", stored, "--out", tmp_path / "again.json", cwd=folder)
    (first,), (again,) = (read_baseline(tmp_path / name).runs for name in ("small.json", "again.json"))
    assert again.verdicts == first.verdicts and again.sample_seed == 0 and again.code == first.code
    message = call("check", "--baseline", "b.json", "--result", stored, cwd=folder, code=2)
    assert "260 of the 300 images of the baseline were not measured" in message


def test_a_baseline_alone_imports_no_code(folder, monkeypatch):
    baseline = read_baseline(folder / "b.json")
    (run,) = baseline.runs
    strange = run.model_copy(update={"given": run.given.model_copy(update={"model": "module_of_a_stranger:net"})})
    theirs = baseline.model_copy(update={"runs": [strange]})
    with pytest.raises(ResultError, match=r"'module_of_a_stranger:net' of the baseline .* --import module_of_a_str"):
        choose_entries(theirs, [])
    assert choose_entries(theirs, ["module_of_a_stranger:net"]) == [(strange, strange.given)]  # a person named it
    monkeypatch.setitem(sys.modules, "module_of_a_stranger", sys)
    assert choose_entries(theirs, []) == [(strange, strange.given)]


@pytest.mark.parametrize("model", ["timm:resnet18", "hf:owner/repo", "robustbench:Standard"])
def test_a_baseline_alone_downloads_nothing(folder, model):
    baseline = read_baseline(folder / "b.json")
    (run,) = baseline.runs
    strange = run.model_copy(update={"given": run.given.model_copy(update={"model": model})})
    theirs = baseline.model_copy(update={"runs": [strange]})
    for named in ([], [run.name]):
        with pytest.raises(ResultError, match=rf"is a download, or may run code.*--model {model}"):
            choose_entries(theirs, named)
    assert choose_entries(theirs, [model]) == [(strange, strange.given)]  # a person named it


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("s.toml", "canary = 1"), ("s.toml", "canary"), ("s.toml", "version = 'canary'"), ("s.toml", b"canary\xff"),
        ("s.toml", "version = 1\n[threat]\ndigits = 'canary'\n[[attack]]\nname = 'a'\nkind = 'pgd'"),
        ("w.pt", "canary"), ("w.pt", "ccanary\ncanary\n."), ("w.safetensors", "canary" * 9), ("w.ckpt", "Vcanary\n."),
        ("d.csv", "canary,b\n"), ("d.csv", "path,label\nx.png,canary\n"), ("c.txt", "canary\ncanary\n"),
    ],
)  # fmt: skip
def test_no_message_repeats_a_file_that_a_baseline_names(folder, tmp_path, name, content):
    path, images = tmp_path / name, tmp_path / "images/a"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    images.mkdir(parents=True)
    (images / "x.png").touch()
    (run,) = read_baseline(folder / "b.json").runs
    here = {"model": f"file:{folder / 'net.safetensors'}"}
    own = here | {"dataset": "mine", "norm": "Linf", "eps": "0.1"}
    given = {
        ".toml": here, ".csv": own | {"data": str(path), "classes": {"a": 0}},
        ".txt": own | {"data": str(images.parent), "classes": str(path)},
    }.get(path.suffix, {"model": f"file:{path}"})  # fmt: skip
    suite = str(path) if path.suffix == ".toml" else "quick"
    theirs = run.model_copy(update={"given": run.given.model_copy(update=given), "suite": suite})
    with pytest.raises(RobbenchError) as error:
        measure_entry_again(theirs, Options(results=tmp_path / "r"))
    assert str(path) in str(error.value) or "state dict" in str(error.value), "the file was read"
    assert "canary" not in str(error.value).replace(str(tmp_path), "")


def test_the_name_of_an_entry_imports_no_code_of_its_source(folder):
    baseline = read_baseline(folder / "b.json")
    (run,) = baseline.runs
    strange = run.model_copy(update={"given": run.given.model_copy(update={"model": "module_of_a_stranger:net"})})
    with pytest.raises(ResultError, match="--import module_of_a_stranger"):
        choose_entries(baseline.model_copy(update={"runs": [strange]}), [run.name])


def test_a_sequential_check_measures_less(folder):
    found = check(folder, "--sequential", "--max-drop", "5")
    assert not found["failed"] and "certain after" in found["early"] and found["models"][0]["n"] < 300


def test_the_commands_and_the_code_of_the_docs_run(tmp_path):
    text = (REPO / "docs/gate.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in block.replace("--samples 300", "--samples 40").splitlines()]
    assert [words[1] for words in lines] == ["baseline", *["check"] * 5]
    for words in lines:
        call(*words[1:], cwd=tmp_path)
    assert (tmp_path / "gate.xml").exists() and (tmp_path / "gate.md").exists()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(code, {})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--baseline", "none.json"], "none.json cannot be read: No such file or directory. Expected: a baseline"),
        (["--baseline", "mine.toml"], "mine.toml: the file: Invalid JSON"),
        (["--baseline", "b.json", "--alpha", "2"], "alpha: 2.0 given"),
        (["--baseline", "b.json", "--result", "none"], "No result at none"),
        (["--baseline", "b.json", "--result", "none", "--seed", "1"], "reads stored results"),
        (["--baseline", "b.json", "-m", "digits/at", "-m", "digits/natural"], "Unknown model of the baseline"),
        (["--baseline", "b.json", "-m", "digits/nobody"], "Unknown model"),
    ],
)
def test_wrong_input_exits_2(folder, args, message):
    assert message in call("check", *args, cwd=folder, code=2)


def test_a_baseline_is_of_a_model_or_of_a_result(folder):
    assert "either --model" in call("baseline", "--out", "x.json", cwd=folder, code=2)
    told = call("baseline", "--out", "x.json", "-m", "digits/naturl", cwd=folder, code=2)
    assert ": digits/natural, " in told and not (folder / "x.json").exists()
