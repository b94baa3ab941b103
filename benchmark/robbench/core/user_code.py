"""The user's own modules. They are imported only when a person names them, never because a file does."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

from robbench.core.errors import RobbenchError

__all__ = ["import_user_modules", "make_cwd_importable", "require_imported"]


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
