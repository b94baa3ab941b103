"""How long a command takes to answer, and what it imports: `python perf/startup.py [COMMAND]`.

Prints a table in under a minute: processor time and wall time of a process, and the time until something is on the
screen (each the least of n runs), n, the number of imported modules, and which of the large packages are among them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pty
import shlex
import subprocess
import sys
import tempfile
import time

COMMANDS = (
    "--help",
    "list models",
    "list suites",
    "list data",
    "list figures",
    "list attacks",
    "show digits/at",
    "runs",
    "eval -m digits/at --eps 8",
    "eval -m digits/at --samples 0",
    "eval -m digits/at --device tpu",
    "eval -m digits/at --norm L7 --eps 0.1",
    "eval -m digits/at -s whitebx",
    "plan -m digits/at --eps 8",
    "eval -m digits/at -s quick",
    "leaderboard --check",
)
LARGE = ("torch", "sklearn", "scipy", "matplotlib", "pandas", "pyarrow", "pydantic", "rich")
HEADS = ("CPU s", "wall s", "first s", "n", "modules")
RUNS = 3
SHORT = 1.0  # seconds
REPEATS = 15.0  # seconds after which every further command runs once: on a busy machine, too, the table takes a minute
CODE = """
import pathlib, sys
modules = sys.argv[1]
sys.argv = ["robbench", *sys.argv[2:]]
from robbench.__main__ import run_in_process
run_in_process()
pathlib.Path(modules).write_text(" ".join(sys.modules))
"""


def measure(args: list[str]) -> tuple[dict[str, float], set[str]]:
    """Run a command whose output goes to a pseudo-terminal: its seconds by column, and the modules that it imported."""
    ours, theirs = pty.openpty()
    before, begin = os.times(), time.monotonic()
    with tempfile.NamedTemporaryFile("r") as modules:
        command = [sys.executable, "-c", CODE, modules.name, *args]
        with subprocess.Popen(command, stdout=theirs, stderr=theirs):
            os.close(theirs)
            first = _wait_for_end(ours)
        wall, after = time.monotonic() - begin, os.times()
        imported = set(modules.read().split())
    os.close(ours)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"CPU s": cpu, "wall s": wall, "first s": first - begin}, imported


def _wait_for_end(terminal: int) -> float:
    """Read all output of a terminal; return the time of the first."""
    os.read(terminal, 1)
    first = time.monotonic()
    with contextlib.suppress(OSError):  # Linux says so that the other end is closed
        while os.read(terminal, 65536):
            pass
    return first


def main() -> None:
    """Print the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", nargs="*", help="such as 'show digits/at'; by default a list of commands")
    commands = parser.parse_args().command or COMMANDS
    width = max(map(len, commands))
    print(f"A command that takes under {SHORT:.0f} s runs up to {RUNS} times. Others run once.")
    print(f"{'command':<{width}}  " + "  ".join(f"{name:>7}" for name in HEADS) + "  large packages", flush=True)
    begin = time.monotonic()
    for command in commands:
        runs, imported = [], set[str]()
        while not runs or (len(runs) < RUNS and runs[0]["wall s"] < SHORT and time.monotonic() - begin < REPEATS):
            seconds, imported = measure(shlex.split(command))
            runs.append(seconds)
        cells = [f"{min(run[name] for run in runs):.2f}" for name in runs[0]] + [str(len(runs)), str(len(imported))]
        packages = ", ".join(name for name in LARGE if name in imported)
        print(f"{command:<{width}}  " + "  ".join(f"{cell:>7}" for cell in cells) + f"  {packages}", flush=True)


if __name__ == "__main__":
    main()
