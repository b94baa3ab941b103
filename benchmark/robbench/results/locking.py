"""A lock, so that one process at a time works on a result. The system frees it when the process dies."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock

from robbench.core.errors import BusyError, StorageError
from robbench.core.files import digest, parse_json, read_bounded, refuse_links, remove_temporaries, write_atomically

__all__ = ["is_locked", "lock_result"]

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_PATIENCE = 0.2  # seconds; `is_locked` of another process holds a lock for less than a millisecond


@contextlib.contextmanager
def lock_result(root: Path, folder: Path, wait: bool, note: Callable[[str], None]) -> Iterator[None]:
    """Lock the folder of a result for this process, so that no other process writes there.

    The lock is a lock of the system (`flock`). The lock of a killed process is free at once.

    Args:
        root: the results tree. The lock files are in `root / ".locks"`.
        folder: the folder of the result.
        wait: whether to wait if another process holds the lock.
        note: called with a text that names the other process before waiting.

    Raises:
        BusyError: another process holds the lock. The message names it.
        StorageError: the lock file cannot be made, or a link leads out of the tree.
    """
    place, holder = _lock_paths(root, folder)
    refuse_links(root, folder)
    refuse_links(root, place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(place, root, folder, wait, note)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise StorageError(
                f"{place} cannot be made: {error.strerror or error}. Give another results tree."
            ) from error
        lock = None  # a read-only tree: nobody can write, and finished results need no lock
    try:
        if lock is not None:
            with contextlib.suppress(StorageError):  # the file only tells others which process holds the lock
                remove_temporaries(holder.parent, holder.name)
                write_atomically(holder, json.dumps(_describe_self(folder)).encode())
        yield
    finally:
        if lock is not None:
            holder.unlink(missing_ok=True)
            lock.release()


def _acquire(place: Path, root: Path, folder: Path, wait: bool, note: Callable[[str], None]) -> filelock.BaseFileLock:
    lock = filelock.FileLock(place)
    try:
        lock.acquire(timeout=_PATIENCE)
    except filelock.Timeout:
        busy = f"{folder}: {_format_holder(_read_holder(place.with_suffix('.json')))} works on it"
        if not wait:
            raise BusyError(
                f"{busy}. Nothing was computed. Wait for it (--wait), or give another tree (--results DIR)."
            ) from None
        note(f"{busy}; waiting for it to end.")
        lock.acquire()
    return lock


def _describe_self(folder: Path) -> dict[str, object]:
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": platform.node(), "since": now, "folder": str(folder)}


def is_locked(root: Path, folder: Path) -> bool:
    """Try the lock of a result, and return whether another process holds it.

    The file that names the holder does not count: it may come from another machine, or name a process that ended.
    """
    place, _ = _lock_paths(root, folder)
    if not place.is_file() or place.is_symlink():
        return False
    try:
        with filelock.FileLock(place).acquire(timeout=0):
            return False
    except filelock.Timeout:
        return True
    except OSError:  # a tree of somebody else, where nobody here can write
        return False


def _read_holder(path: Path) -> dict[str, Any] | None:
    """Read which process last locked a result: pid, host, since, folder. None if there is no such file."""
    try:
        about = parse_json(read_bounded(path, 2**16))
    except (OSError, ValueError, RecursionError):
        return None
    return about if isinstance(about, dict) else None


def _lock_paths(root: Path, folder: Path) -> tuple[Path, Path]:
    place = root / ".locks" / f"{digest(str(folder.relative_to(root)))[:16]}.lock"
    return place, place.with_suffix(".json")


def _format_holder(about: dict[str, Any] | None) -> str:
    if about is None:  # not written yet
        return "another process"
    return f"process {about.get('pid')!s:.20} on {about.get('host')!s:.80} (since {about.get('since')!s:.40})"
