"""One process per result: a lock that the system lets go of when its process dies."""

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
from robbench.core.files import digest

__all__ = ["lock_result", "read_holder"]

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def lock_result(root: Path, folder: Path, wait: bool, note: Callable[[str], None]) -> Iterator[None]:
    """Hold a result's folder for this process, so that no other writes there.

    The lock is the system's (`flock`): that of a process that was killed is free at once.

    Args:
        root: the results tree; the lock files lie in its `.locks`.
        folder: of the result.
        wait: wait for the process that holds it, instead of refusing.
        note: hears whom it waits for.

    Raises:
        BusyError: another process holds it; the sentence says which.
    """
    place, holder = _paths(root, folder)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquired(place, root, folder, wait, note)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise StorageError(f"{place} cannot be made: {error.strerror or error}.") from error
        lock = None  # nothing can be written here, and what is finished can be looked at by many
    try:
        if lock is not None:
            with contextlib.suppress(OSError):  # it only names the process to others
                holder.write_text(json.dumps(_self(folder)), encoding="utf-8")
        yield
    finally:
        if lock is not None:
            holder.unlink(missing_ok=True)
            lock.release()


def _acquired(place: Path, root: Path, folder: Path, wait: bool, note: Callable[[str], None]) -> filelock.BaseFileLock:
    lock = filelock.FileLock(place)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        told = f"{folder}: {_described(read_holder(root, folder))} works on it"
        if not wait:
            raise BusyError(
                f"{told}. Nothing was computed. Wait for it (--wait), or give another tree (--results DIR)."
            ) from None
        note(f"{told}; waiting for it to end.")
        lock.acquire()
    return lock


def _self(folder: Path) -> dict[str, object]:
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": platform.node(), "since": now, "folder": str(folder)}


def read_holder(root: Path, folder: Path) -> dict[str, Any] | None:
    """Read which process said last that it works on a result: pid, host, since, folder; None if none did."""
    try:
        about = json.loads(_paths(root, folder)[1].read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) else None


def _paths(root: Path, folder: Path) -> tuple[Path, Path]:
    place = root / ".locks" / f"{digest(str(folder.relative_to(root)))[:16]}.lock"
    return place, place.with_suffix(".json")


def _described(about: dict[str, Any] | None) -> str:
    if about is None:  # not written yet
        return "another process"
    return f"process {about.get('pid')} on {about.get('host')!s:.80} (since {about.get('since')!s:.40})"
