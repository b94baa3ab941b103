"""The command line as a user meets it: output, exit codes, and the time to the first help."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from robbench.results.schema import ResultFile
from support.commands import run

pytestmark = pytest.mark.whole

MODELS = ["natural", "at", "ls095_sigma03", "lsq2_sigma03"]


def process(*args):
    """Run `python -m robbench` for itself."""
    command = [sys.executable, "-m", "robbench", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One evaluation of two models, shared by the tests that look at it."""
    folder = tmp_path_factory.mktemp("cli")
    args = ["eval", "--model", "digits/natural", "--model", "digits/at", "--suite", "quick", "--samples", "40"]
    return folder, args, run(*args, cwd=folder)


def test_eval_prints_the_table_and_the_progress_apart(quick):
    folder, _, done = quick
    assert "digits, Linf 0.2, suite quick" in done.stdout
    assert "Worst case" in done.stdout and "natural" in done.stdout
    assert "40 images" in done.stderr and "about 1 s" in done.stderr and "PGD-10-CW" in done.stderr
    assert sorted(p.name for p in (folder / "results/digits/at/quick").iterdir()) == [
        "outcomes.parquet",
        "result.json",
        "timings.parquet",
    ]


def test_json_is_the_stored_object_and_whether_to_trust_it(quick):
    folder, _, _ = quick
    done = run("eval", "-m", "digits/at", "-s", "quick", "--samples", 40, "--json", cwd=folder)
    printed = json.loads(done.stdout)
    stored = json.loads((folder / "results/digits/at/quick/result.json").read_text())
    assert (
        (printed.pop("verdict"), printed.pop("verdict_n")) == ("unchecked", None)
        and len(stored.pop("sha256")) == 64
        and "overestimation" in printed
    )
    del printed["overestimation"]
    assert printed == stored
    for key in ("schema_version", "run_id", "model", "dataset", "threat", "suite", "n", "seed"):
        assert key in printed
    for accuracy in (printed["clean_accuracy"], printed["robust_accuracy"]):
        assert set(accuracy) == {"value", "low", "high"} and 0 <= accuracy["low"] <= accuracy["high"] <= 1
    assert {"name", "robust_accuracy", "forwards", "backwards", "seconds"} <= set(printed["attacks"][0])
    assert ResultFile.model_validate(printed)
    rows = pd.read_parquet(folder / "results/digits/at/quick/outcomes.parquet")
    assert {"sample", "attack", "status", "prediction"} <= set(rows.columns)
    assert sorted(rows["sample"].unique()) == list(range(898, 938)), "official indices, in official order"
    both = run("eval", "-m", "digits/at", "-m", "digits/natural", "-s", "quick", "--samples", 40, "--json", cwd=folder)
    assert [r["model"] for r in json.loads(both.stdout)] == ["at", "natural"]


def test_leaderboard_writes_checks_and_notices_staleness(quick, tmp_path):
    folder, _, _ = quick
    board = tmp_path / "board.md"
    run("leaderboard", "--output", board, cwd=folder)
    first = board.read_bytes()
    run("leaderboard", "--output", board, cwd=folder)
    assert board.read_bytes() == first
    assert "up to date" in run("leaderboard", "--check", "--output", board, cwd=folder).stdout
    details = tmp_path / "board-digits.md"
    whole = details.read_text()
    assert "suite quick" in whole and "suite quick" not in board.read_text()
    details.write_text(whole.replace("natural", "unnatural"))
    assert "board-digits.md is stale" in run("leaderboard", "--check", "--output", board, cwd=folder, code=1).stderr
    details.write_text(whole)
    board.write_text(board.read_text().replace("natural", "unnatural"))
    assert "stale" in run("leaderboard", "--check", "--output", board, cwd=folder, code=1).stderr
    assert "No results tree" in run("leaderboard", "--results", tmp_path / "none", cwd=folder, code=2).stderr


def test_show_prints_a_card_and_its_results(quick):
    folder, _, _ = quick
    shown = run("show", "digits/at", cwd=folder).stdout
    assert "digits_convnet" in shown and "Worst case" in shown
    assert "No results yet" in run("show", "cifar10/natural_resnet18", cwd=folder).stdout
    parsed = json.loads(run("show", "digits/at", "--json", cwd=folder).stdout)
    assert parsed["card"]["architecture"]["name"] == "digits_convnet" and len(parsed["results"]) == 1


@pytest.mark.parametrize("what", ["models", "suites", "attacks", "data"])
def test_every_list_is_the_same_as_table_and_as_json(what):
    rows = json.loads(run("list", what, "--json").stdout)
    assert len(rows) >= 2
    table = run("list", what).stdout
    assert all(str(next(iter(row.values()))) in table for row in rows)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["eval", "-m", "digits/naturl"], ": digits/natural, "),
        (["eval", "-m", "digits/natural", "-s", "whitebx"], "Did you mean whitebox"),
        (["eval", "-m", "natural"], "ambiguous"),
        (["eval", "-m", "digits/natural", "--eps", "8"], "8/255"),
        (["eval", "-m", "digits/natural", "--device", "tpu"], "allowed: auto, cpu"),
        (["eval", "-m", "digits/natural", "--models", "/nowhere"], "/nowhere"),
        (["list", "modls"], "Did you mean models"),
        (["data", "fetch", "imagenet"], "Unknown data set 'imagenet'"),
        (["train", "digits/natural", "--time-limit", "soon"], "9m"),
        (["train", "digits/nobody"], "Unknown model"),
        (["eval"], "--model"),
        (["leaderbord"], "leaderbord"),
    ],
)
def test_wrong_input_exits_2_and_says_what_to_do(args, message):
    done = run(*args, code=2)
    assert message in done.stderr


def test_a_process_of_its_own_ends_with_the_same_code_and_sentence():
    done = process("eval", "-m", "digits/naturl")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("robbench: Unknown model 'digits/nat")


def test_missing_data_names_both_ways(tmp_path):
    done = run("eval", "-m", "cifar10/natural_resnet18", "--data-dir", tmp_path, cwd=tmp_path, code=2)
    assert "robbench data fetch cifar10" in done.stderr and "ROBBENCH_DATA" in done.stderr


def test_help_is_fast():
    process("--help")  # the first run may have to compile bytecode
    spent = []
    for _ in range(3):  # processor time: a busy machine makes everything wait
        begin = os.times()
        process("--help")
        end = os.times()
        spent.append(end.children_user + end.children_system - begin.children_user - begin.children_system)
    assert min(spent) < 0.5
    code = "import sys; sys.argv = ['robbench', 'list', 'models']\nfrom robbench.commands.app import app\n"
    code += "try: app()\nfinally: assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_registry_of_ones_own(tmp_path, repo):
    mine = tmp_path / "mine"
    (mine / "digits").mkdir(parents=True)
    shutil.copytree(repo / "models/weights/digits", mine / "weights/digits")
    card = (repo / "models/digits/natural.toml").read_text()
    (mine / "digits" / "my_model.toml").write_text(card.replace("Naturally trained", "My"))
    args = ["eval", "-m", "my_model", "-s", "quick", "--samples", "10", "--json"]
    by_option = json.loads(run(*args, "--models", mine, cwd=tmp_path).stdout)
    by_variable = json.loads(run(*args, cwd=tmp_path, ROBBENCH_MODELS=str(mine)).stdout)
    assert by_option == by_variable
    assert by_option["model"] == "my_model"
    weights = mine / "weights/digits/natural.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    told = run(*args, "--models", mine, "--results", tmp_path / "r2", cwd=tmp_path, code=2).stderr
    for digest in (hashlib.sha256(weights.read_bytes()).hexdigest(), card.split('sha256 = "')[1][:64]):
        assert digest in told
    weights.unlink()
    assert (
        "natural.safetensors" in run(*args, "--models", mine, "--results", tmp_path / "r3", cwd=tmp_path, code=2).stderr
    )


def test_ctrl_c_says_how_to_go_on(tmp_path):
    args = ["robbench", "eval", "-m", "digits/at", "-s", "whitebox", "--lanes", "1"]
    # Whoever runs the tests in the background has them, and so this child, ignore the signal.
    code = f"import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv = {args!r}; "
    code += "from robbench.__main__ import main; main()"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=env
    ) as child:
        assert child.stderr is not None
        assert "899 images" in child.stderr.readline()
        time.sleep(2)
        child.send_signal(signal.SIGINT)
        told = child.stderr.read()
        assert child.wait() == 130
    assert "Run the same command again to resume" in told and "Traceback" not in told
    assert list(tmp_path.glob("results/digits/at/whitebox/.partial/*/*.parquet"))


def test_a_pipe_that_closes_is_no_error(repo):
    for command in ("list models", f"show digits/natural --results {repo / 'results'}"):
        shell = f"{sys.executable} -m robbench {command} | head -1; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
        assert done.stderr == "" and done.returncode in (0, 141)


def test_train_through_the_command_line(tmp_path, repo):
    mine = tmp_path / "mine"
    (mine / "digits").mkdir(parents=True)
    text = (repo / "models/digits/natural.toml").read_text().split("[weights]")[0].replace("2000", "30")
    (mine / "digits" / "tiny.toml").write_text(text)
    done = run("train", "tiny", "--models", mine, cwd=tmp_path)
    assert "30 of 30 iterations" in done.stdout
    assert "loss" in done.stderr
    result = run("eval", "-m", "tiny", "--models", mine, "-s", "quick", "--samples", "20", "--json", cwd=tmp_path)
    assert json.loads(result.stdout)["n"] == 20
