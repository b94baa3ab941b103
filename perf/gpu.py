"""Uses a GPU that is there for a few minutes, in order of worth: tests, rates, comparisons, full test sets, training.

    python perf/gpu.py --minutes 9 --out DIR
    python perf/gpu.py --device cpu --smoke --minutes 1 --out DIR     # every step, small, without a GPU

Each step is a process with a time limit of its own. A step is left out when too little time is left for it. After every
step, DIR/gpu.json tells what was done. So a second call goes on behind the last step. `--again` repeats steps. All
that a step writes is under DIR. At the end, DIR/carry holds it in tar files of at most 16 MiB each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robbench.models.card import Registry

REPOSITORY = Path(__file__).resolve().parents[1]
CARRY = 16 * 2**20  # bytes of one tar file
SPARE = 5.0  # seconds that are kept for writing
LAST_LINES = 25
FULL = ("cifar10/at", "cifar10/ls095_sigma30", "mnist/at", "mnist/ls095_sigma03")
SMOKE_CARD = """version = 1
title = "Smoke test"
dataset = "digits"
architecture = { name = "digits_convnet" }

[recipe]
iterations = 1000
batch_size = 32
optimizer = "adam"
lr = 0.001
"""


@dataclass(frozen=True)
class Step:
    """One use of the card.

    Attributes:
        name: key in gpu.json.
        command: words after `python`.
        need: seconds without which it is not begun.
        limit: seconds after which it is ended.
    """

    name: str
    command: tuple[str, ...]
    need: float
    limit: float


def list_steps(given: argparse.Namespace) -> list[Step]:
    """List the steps in order of worth. Training comes after them, and takes what is left (`list_trainings`)."""
    out, where = given.out, ("--device", given.device)
    tests = ("-m", "pytest", "-q", "-m", "gpu and not slow", "-p", "no:cacheprovider", "tests/engine/test_gpu.py")
    rates, engine, peers = (str(out / f"{name}.json") for name in ("rates", "engine", "peers"))
    run_rates = (str(REPOSITORY / "perf/gpu_rates.py"), "rates", *where, "--json", rates)
    run_engine = (str(REPOSITORY / "perf/gpu_rates.py"), "engine", *where, "--rates", rates, "--json", engine)
    run_peers = (str(REPOSITORY / "perf/vs_peers.py"), *where, "--sides", "plain", "--json", peers, "--repeats", "1")
    if given.smoke:
        tests += ("--collect-only",)
        run_rates += ("--size", "256")
        run_engine += ("--networks", "digits_convnet", "--images", "32", "--steps", "3", "--repetitions", "1")
        run_peers += ("--models", "digits/at", "--samples", "16", "--attacks", "FGSM")
        speed, evaluations = ("--iterations", "2", "--repetitions", "1"), [("digits/at", "fast", "32")]
    else:
        run_peers += ("--models", "cifar10/at", "--samples", "500", "--attacks", "APGD-CE", "APGD-T", "PGD-40")
        speed = ()
        evaluations = [(model, suite, "10000") for model in FULL for suite in ("fast", "autoattack")]
    steps = [
        Step("tests", tests, 20, 60),
        Step("rates", run_rates, 15, 60),
        Step("engine", run_engine, 30, 180),
        Step("training speed", (str(REPOSITORY / "perf/train.py"), *where, *speed), 40, 120),
        Step("peers", run_peers, 30, 180),
    ]
    for model, suite, n in evaluations:
        command = ("-m", "robbench", "eval", "-m", model, "-s", suite, "--samples", n, *where)
        steps.append(Step(f"{model} {suite}", (*command, "--results", str(out / "results")), 30, 240))
    return steps


def list_trainings(given: argparse.Namespace, left: float) -> list[Step]:
    """List the trainings that the time allows: the missing models in order of worth, each for an equal share."""
    where = ("--device", given.device, "--runs", str(given.out / "runs"))
    if given.smoke:
        card = given.out / "models/digits/gpu_smoke.toml"
        card.parent.mkdir(parents=True, exist_ok=True)
        card.write_text(SMOKE_CARD, encoding="utf-8")
        command = ("-m", "robbench", "train", "digits/gpu_smoke", "--iterations", "20", *where)
        return [Step("train digits/gpu_smoke", (*command, "--models", str(given.out / "models")), 10, 60)]
    share = given.training_minutes * 60
    from robbench.training.missing import list_missing

    names = [entry.full_name for entry in list_missing(Registry.default(), device=given.device)]
    return [
        Step(f"train {name}", ("-m", "robbench", "train", name, "--fit", f"{share:g}s", *where), share + 10, share + 60)
        for name in names[: max(0, int((left - SPARE) / (share + 15)))]
    ]


def copy_trained(names: list[str], out: Path) -> None:
    """Copy weights and cards that were trained in the repository, so that they can be carried."""
    for name in names:
        entry = Registry.default().find(name)
        if entry.card.weights is None or entry.card.weights.path is None:
            continue
        for source in (entry.path, entry.path.parents[1] / "weights" / entry.card.weights.path):
            target = out / "models" / source.relative_to(entry.path.parents[1])
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def run_step(step: Step, given: argparse.Namespace, left: float) -> dict[str, Any]:
    """Run a step within its limit. Its output goes to a file, and its last lines to gpu.json."""
    log = given.out / "logs" / (re.sub(r"\W+", "-", step.name) + ".txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join(filter(None, [str(REPOSITORY / "benchmark"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths}
    if given.data_dir:
        environment["ROBBENCH_DATA"] = str(given.data_dir)
    begin = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        try:
            done = subprocess.run(
                [sys.executable, *step.command], cwd=REPOSITORY, env=environment, check=False, stdin=subprocess.DEVNULL,
                stdout=stream, stderr=subprocess.STDOUT, timeout=max(1.0, min(step.limit, left - SPARE)),
            )  # fmt: skip
            status = "done" if done.returncode == 0 else f"failed with exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            status = "ended by its time limit"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    seconds = round(time.monotonic() - begin, 1)
    return {"status": status, "seconds": seconds, "command": list(step.command), "output": lines[-LAST_LINES:]}


def pack(out: Path) -> list[Path]:
    """Pack all files under `out`, but checkpoints and locks, into tar files of at most 16 MiB (a larger file alone)."""
    folder = out / "carry"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.tar"):
        old.unlink()
    parts: list[list[Path]] = [[]]
    size = 0
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        inside = path.relative_to(out).parts
        if inside[0] in ("carry", "runs") or any(part.startswith(".") for part in inside):
            continue
        stored = path.stat().st_size + 2048  # of its header and padding
        if parts[-1] and size + stored > CARRY - 2**15:
            parts.append([])
            size = 0
        parts[-1].append(path)
        size += stored
    made = []
    for number, paths in enumerate(parts):
        made.append(folder / f"gpu-{number:02d}.tar")
        with tarfile.open(made[-1], "w") as archive:
            for path in paths:
                archive.add(path, str(path.relative_to(out)))
    return made


def _has_gpu() -> bool:
    import torch  # seconds, which a smoke test on a CPU need not spend here

    return torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="time for everything")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is written")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:i or cpu")
    parser.add_argument("--smoke", action="store_true", help="small versions of all steps")
    parser.add_argument("--data-dir", type=Path, help="where the data sets are (ROBBENCH_DATA)")
    parser.add_argument("--training-minutes", type=float, default=2.0, help="of each model that is missing")
    parser.add_argument("--again", nargs="+", default=[], metavar="STEP", help="steps to repeat")
    given = parser.parse_args()
    given.out = given.out.resolve()
    if given.device != "cpu" and not _has_gpu():
        parser.error(f"--device {given.device}: no CUDA device; without one: --device cpu --smoke")
    if given.minutes <= 0 or given.training_minutes <= 0:
        parser.error("--minutes and --training-minutes must be positive")
    deadline = time.monotonic() + 60 * given.minutes
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "gpu.json"
    record: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    unknown = [name for name in given.again if name not in record]
    if unknown:
        parser.error(f"--again {' '.join(unknown)}: no such step in {path}; known: {', '.join(record) or 'none'}")

    def run(step: Step) -> None:
        left = deadline - time.monotonic()
        if record.get(step.name, {}).get("status") == "done" and step.name not in given.again:
            print(f"{step.name}: known", flush=True)
            return
        if left < step.need + SPARE:
            record[step.name] = {"status": f"left out: {left:.0f} s left, {step.need + SPARE:.0f} s needed"}
        else:
            record[step.name] = run_step(step, given, left)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"{step.name}: {record[step.name]['status']}, {record[step.name].get('seconds', 0)} s", flush=True)

    for step in list_steps(given):
        run(step)
    trainings = list_trainings(given, deadline - time.monotonic())
    for step in trainings:
        run(step)
        if not given.smoke:
            copy_trained([step.name.removeprefix("train ")], given.out)
    for part in pack(given.out):
        print(f"{part}: {part.stat().st_size / 2**20:.1f} MiB")
    failed = [name for name, step in record.items() if step["status"].startswith(("failed", "ended"))]
    if failed:
        sys.exit(f"Not done: {', '.join(failed)}. Their output is in {given.out / 'logs'}.")


if __name__ == "__main__":
    main()
