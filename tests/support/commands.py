"""Run commands of robbench."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from robbench.__main__ import run_in_process


def run(*args: object, cwd: Path | None = None, code: int | None = 0, **env: str) -> SimpleNamespace:
    """Run a command as `python -m robbench` does, in this process, and check its exit code (None: any): its output."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, env),
        mock.patch.object(sys, "argv", ["robbench", *map(str, args)]),
    ):
        found = run_in_process()
    assert code in (None, found), out.getvalue() + err.getvalue()
    return SimpleNamespace(code=found, stdout=out.getvalue(), stderr=err.getvalue())
