"""`perf/gpu.py`, every step of it, small and on the CPU."""

import json
import subprocess
import sys
import tarfile

import pytest


def call(repo, out, *args):
    command = [sys.executable, repo / "perf/gpu.py", "--out", out, "--device", "cpu", "--smoke", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.whole
def test_every_step_runs_on_a_cpu_and_is_known_afterwards(repo, tmp_path):
    done = call(repo, tmp_path, "--minutes", "9")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert {step["status"] for step in record.values()} == {"done"}
    assert {"tests", "rates", "engine", "training speed", "peers", "digits/at fast"} < set(record)
    (engine,) = {row["network"] for row in json.loads((tmp_path / "engine.json").read_text())["rows"]}
    assert engine == "digits_convnet" and (tmp_path / "models/weights/digits/gpu_smoke.safetensors").exists()
    (part,) = (tmp_path / "carry").glob("*.tar")
    with tarfile.open(part) as archive:
        names = archive.getnames()
    assert {"gpu.json", "rates.json", "engine.json", "peers.json", "results/digits/at/fast/result.json"} <= set(names)
    assert not any(name.startswith("runs") for name in names), "checkpoints are not carried"
    again = call(repo, tmp_path, "--minutes", "9")
    assert again.returncode == 0 and again.stdout.count(": known") == len(record)
    late = call(repo, tmp_path, "--minutes", "0.01", "--again", "rates")
    assert late.returncode == 0 and "rates: left out" in late.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--minutes", "0"], "must be positive"),
        (["--minutes", "1", "--again", "rates"], "no such step"),
        (["--minutes", "1", "--device", "cuda:77"], "no CUDA device"),
    ],
)
def test_wrong_options_end_in_a_sentence(repo, tmp_path, args, message):
    done = call(repo, tmp_path, *args)
    assert done.returncode == 2 and message in done.stderr
