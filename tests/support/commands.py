"""Run commands of robbench."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from robbench.__main__ import main


def run(*args: object, cwd: Path | None = None, code: int | None = 0, **env: str) -> SimpleNamespace:
    """Run a command as `python -m robbench` does, in this process, and check its exit code (None: any): its output."""
    out, err, found = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, env),
        mock.patch.object(sys, "argv", ["robbench", *map(str, args)]),
    ):
        try:
            main()
        except SystemExit as ended:
            found = int(ended.code or 0)
    assert code in (None, found), out.getvalue() + err.getvalue()
    return SimpleNamespace(code=found, stdout=out.getvalue(), stderr=err.getvalue())
