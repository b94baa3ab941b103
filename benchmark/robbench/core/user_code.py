"""The user's own modules. They are imported only when a person names them, never because a file does.

Code of the user may raise anything, and may try to end the process.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType

from robbench.core.errors import RobbenchError

__all__ = [
    "StrayExitError",
    "contain_exits",
    "import_user_modules",
    "make_cwd_importable",
    "refuse_exits",
    "require_imported",
]


_TEST_RUNNERS = ("_pytest.outcomes", "unittest.case")  # modules whose exceptions skip a test or end all tests


class StrayExitError(RuntimeError):
    """Code of the user tried to end the process."""


@contextlib.contextmanager
def contain_exits() -> Iterator[None]:
    """Turn exceptions that end a process, or skip a test, into an error: SystemExit, GeneratorExit, `pytest.skip`.

    So is an exception whose text cannot be printed, because printing it may end the process. KeyboardInterrupt passes,
    because it comes from the person.

    Raises:
        StrayExitError: the block raised such an exception.
    """
    try:
        yield
    except BaseException as error:
        ends = not isinstance(error, Exception | KeyboardInterrupt) or type(error).__module__ in _TEST_RUNNERS
        try:
            text = str(error)
        except BaseException:  # whoever prints it would end the process
            name = type(error).__name__
            raise StrayExitError(f"{name} was raised, whose text cannot be printed") from None
        if not ends:
            raise
        raise StrayExitError(f"{type(error).__name__}({text}) was raised, which would end the process") from error


@contextlib.contextmanager
def refuse_exits() -> Iterator[None]:
    """Do as `contain_exits`, and let `os._exit(0)` raise, too.

    Exit code 0 would claim success. Other codes pass: a watchdog may need them. So does a forked process.

    Raises:
        StrayExitError: see `contain_exits`.
    """
    end, owner = os._exit, os.getpid()

    def refuse(status: int) -> None:
        if status or os.getpid() != owner:
            end(status)
        raise StrayExitError("os._exit(0) was called, which would end the process")

    os._exit = refuse  # type: ignore[assignment]
    try:
        with contain_exits():
            yield
    finally:
        os._exit = end


def make_cwd_importable() -> None:
    """Make the current directory importable, as under `python -m`."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()


def import_user_modules(names: list[str]) -> None:
    """Import the modules of `--import`. Files may then name the code in them.

    Raises:
        RobbenchError: a module does not exist, or importing it fails.
    """
    make_cwd_importable()
    for name in names:
        try:
            with contain_exits():
                importlib.import_module(name)
        except Exception as error:  # the user's code may raise anything
            raise RobbenchError(
                f"--import {name}: {type(error).__name__}: {error}. Expected a module, installed or in {os.getcwd()}."
            ) from None


def require_imported(name: str, what: str, error: type[RobbenchError]) -> ModuleType:
    """Return a module that a file names. The module must be imported already.

    Args:
        name: name of the module.
        what: the entry of the file, such as "Attack 'Mine': kind 'mine:Attack'".
        error: the type of the error.

    Raises:
        RobbenchError: the module is not imported. The error has the type `error` and says what to do.
    """
    if (module := sys.modules.get(name)) is None:
        raise error(
            f"{what} is code in a module that is not imported. A file alone never imports code: if you trust it, add "
            f"--import {name} (in Python, import {name} first)."
        )
    return module
