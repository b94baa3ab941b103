"""Run code or commands in a pseudo-terminal of a given width."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

__all__ = ["run_in_terminal"]


def run_in_terminal(code: str, columns: int, cwd: Path | None = None) -> str:
    """Run Python code whose stdout and stderr are a terminal, and return what it prints, with all control codes."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, columns))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")} | {"TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, cwd=cwd, env=env) as child:
        os.close(theirs)
        parts = []
        try:
            while part := os.read(ours, 65536):
                parts.append(part)
        except OSError:  # Linux says so that the other end is closed
            pass
        child.wait()
    os.close(ours)
    return b"".join(parts).decode().replace("\r\n", "\n")
