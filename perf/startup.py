"""How long a command takes to answer, and what it imports: `python perf/startup.py [COMMAND]`.

Prints a table: processor time and wall time of a process (the least of three), the time until something is on the
screen (in a pseudo-terminal), the number of imported modules, and which of the large packages are among them.
"""

from __future__ import annotations

import argparse
import os
import pty
import shlex
import subprocess
import sys
import time

from tabulate import tabulate

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
CODE = """
import sys
sys.argv = ["robbench", *sys.argv[1:]]
from robbench.__main__ import run_in_process
run_in_process()
print("\\nmodules:", *sys.modules)
"""


def measure_process(args: list[str]) -> tuple[float, float, set[str]]:
    """Run a command: processor time and wall time in seconds, and the modules that it imported."""
    before, begin = os.times(), time.monotonic()
    done = subprocess.run([sys.executable, "-c", CODE, *args], capture_output=True, text=True, check=True)
    wall, after = time.monotonic() - begin, os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return spent, wall, set(done.stdout.rsplit("modules:", 1)[1].split())


def measure_first_output(args: list[str]) -> float:
    """Run a command in a pseudo-terminal: the seconds until its first output."""
    ours, theirs = pty.openpty()
    begin = time.monotonic()
    with subprocess.Popen([sys.executable, "-m", "robbench", *args], stdout=theirs, stderr=theirs) as child:
        os.close(theirs)
        os.read(ours, 1)
        seconds = time.monotonic() - begin
        child.terminate()
    os.close(ours)
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", nargs="*", help="such as 'show digits/at'; by default a list of commands")
    rows = []
    for command in parser.parse_args().command or COMMANDS:
        args = shlex.split(command)
        runs = [measure_process(args) for _ in range(3)]
        modules = runs[0][2]
        rows.append(
            {
                "command": command,
                "CPU s": min(run[0] for run in runs),
                "wall s": min(run[1] for run in runs),
                "first output s": min(measure_first_output(args) for _ in range(3)),
                "modules": len(modules),
                "large packages": ", ".join(name for name in LARGE if name in modules),
            }
        )
    print(tabulate(rows, headers="keys", floatfmt=".2f"))


if __name__ == "__main__":
    main()
