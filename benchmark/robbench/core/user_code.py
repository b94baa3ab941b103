"""Modules of the user's own: imported because a person named them, never because a file did."""

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
    """Import modules that were named on the command line, so that files may speak of what is in them.

    Raises:
        RobbenchError: there is no such module, or importing it fails.
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
    """Return a module that a file speaks of, if a person has imported it.

    Args:
        name: of the module.
        what: what the file says, such as "Attack 'Mine': kind 'mine:Attack'".
        error: what is raised otherwise.

    Raises:
        RobbenchError: of the type `error`, with what to do.
    """
    if (module := sys.modules.get(name)) is None:
        raise error(
            f"{what} is code in a module that is not imported. A file alone never imports code: if you trust it, add "
            f"--import {name} (in Python, import {name} first)."
        )
    return module
