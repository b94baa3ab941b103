"""Files: canonical digests, bounded reads, atomic writes, and the removal of damaged files."""

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
import tomllib
from io import BufferedReader
from pathlib import Path
from typing import Any

from robbench.core.errors import StorageError

__all__ = [
    "append_text",
    "check_name",
    "check_path_component",
    "check_size",
    "digest",
    "digest_file",
    "is_unicode",
    "load_toml",
    "open_regular",
    "parse_json",
    "read_bounded",
    "read_json",
    "read_json_lines",
    "refuse_links",
    "remove_temporaries",
    "set_aside",
    "write_atomically",
]

_INTEGER_BITS = 64  # a longer integer overflows in computations, and no count or seed of a run is as long
_GROWTH = 2**16  # bytes that a file may grow by while it is read
_KEY_PART = r"""(?:[A-Za-z0-9_-]++|"[^"\n]*+"|'[^'\n]*+')"""
# The time of tomllib grows with the square of the number of parts of a key.
_LONG_KEY = re.compile(rf"(?<![A-Za-z0-9_-]){_KEY_PART}(?:[ \t]*+\.[ \t]*+{_KEY_PART}){{100}}")
_MOST_CONTAINERS = 10_000
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FREE_VALUES = 2**15  # in a JSON file; the largest of this package's have a thousand
_TEMPORARY = re.compile(r"\.(.+\.(?:json|parquet|safetensors|csv|png|md))\.\w{8}")  # as `_replace` names them


def digest(value: object) -> str:
    """SHA-256 of a value's canonical JSON (sorted keys, compact, ASCII), in hexadecimal.

    Raises:
        TypeError, ValueError: the value is not JSON (NaN and infinity are not).
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_path_component(name: str, what: str) -> str:
    """Return a name that is one component of a path. Such a name cannot leave the folder that it is joined to.

    Raises:
        ValueError: the name is not one component. The message begins with `what`.
    """
    if name in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\:") or len(name.encode()) > 200:
        raise ValueError(f"{what}: {name[:80]!r} given; allowed: up to 200 bytes of printable text without / \\ or :")
    return name


def is_unicode(name: object) -> bool:
    """Return whether a name can be written: names of files, and JSON, may hold half of a character."""
    return not any("\ud800" <= letter <= "\udfff" for letter in str(name))


def check_name(name: str) -> str:
    """Return a name that a table, a heading or a figure can show: printable text on one line.

    Raises:
        ValueError: the name is empty, longer than 200 characters, or holds characters that are not printable.
    """
    if not name.strip() or not name.isprintable() or len(name) > 200:
        raise ValueError(f"{name[:80]!r} given; allowed: a name of up to 200 printable characters")
    return name


def check_size(value: object) -> None:
    """Refuse a parsed JSON or TOML value that is too large to work with.

    Raises:
        ValueError: it holds an integer of more than 64 bits, or more than 10,000 lists and tables.
    """
    waiting, containers = [value], 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            containers += 1
            if containers > _MOST_CONTAINERS:
                raise ValueError(f"more than {_MOST_CONTAINERS:,} lists and tables given")
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
            raise ValueError(f"an integer of {value.bit_length()} bits given; allowed: at most {_INTEGER_BITS} bits")


def load_toml(text: str) -> dict[str, Any]:
    """Parse TOML text that may be hostile.

    Raises:
        ValueError: the text is not TOML, is nested too deeply, has a key of a hundred parts, or is too large
            (`check_size`).
    """
    if _LONG_KEY.search(text):
        raise ValueError("a dotted key of more than 100 parts given")
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    check_size(table)
    return table


def open_regular(path: Path, most: int) -> BufferedReader:
    """Open a regular file of at most `most` bytes. Opening or reading a pipe, a socket or a device may never end.

    Raises:
        OSError: the file cannot be opened, is not a regular file, or is larger.
    """
    # A pipe without a writer opens at once with O_NONBLOCK. The flag changes nothing for regular files.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size <= most:
        return file
    file.close()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    raise OSError(errno.EFBIG, f"larger than {most:,} bytes")


def read_bounded(path: Path, most: int) -> bytes:
    """Read a regular file of at most `most` bytes.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is larger.
    """
    with open_regular(path, most) as file:
        # `read` allocates all that it is asked for, so it is asked for little more than there is.
        bound = min(most, os.fstat(file.fileno()).st_size + _GROWTH)
        data = file.read(bound + 1)
    if len(data) > bound:
        raise OSError(errno.EFBIG, f"larger than {bound:,} bytes; it grew while it was read")
    return data


def digest_file(path: Path, most: int) -> str:
    """SHA-256 of a regular file of at most `most` bytes, in hexadecimal.

    Raises:
        OSError: see `open_regular`.
    """
    with open_regular(path, most) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, most: int) -> bytes:
    """Read the text of a JSON file of at most `most` bytes, with a sensible number of values.

    A parser may keep an error for each wrong value, which takes far more memory than the file.

    Raises:
        OSError: see `read_bounded`; or the file holds too many values.
    """
    data = read_bounded(path, most)
    if (values := data.count(b",")) > (allowed := _FREE_VALUES + len(data) // 32):
        raise OSError(errno.EFBIG, f"{values:,} values in {len(data):,} bytes; allowed: {allowed:,}")
    return data


def parse_json(text: str | bytes) -> Any:
    """Parse the JSON text of a stranger. Two readers of an object with a repeated key may take different values.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or an object holds a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_take_pairs)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _take_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object holds a key twice")
    return found


def read_json_lines(path: Path, most: int) -> list[dict[str, Any]]:
    """Read a file of at most `most` bytes with one JSON object on each line.

    Raises:
        OSError: see `read_bounded`.
        ValueError: a line is not a JSON object.
    """
    lines = [parse_json(line) for line in read_bounded(path, most).decode().splitlines()]
    if not all(isinstance(line, dict) for line in lines):
        raise ValueError("a line is not an object")
    return lines


def append_text(path: Path, text: str) -> None:
    """Append to a regular file, or make it. A link is not followed, and a pipe is refused.

    Raises:
        StorageError: the file cannot be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        _make_folder(path.parent)
        with os.fdopen(os.open(path, flags, 0o644), "ab") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            file.write(text.encode())
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}. Remove it.") from error


def refuse_links(root: Path, path: Path) -> None:
    """Check that nothing between a root and a path below it is a symbolic link. `root` itself may be one.

    A tree of files may come from somebody else. A link in it would lead a write to a file outside.

    Raises:
        StorageError: a folder or the file is a link.
    """
    for part in [path, *path.parents]:
        if part == root:
            return
        if part.is_symlink():
            raise StorageError(f"{part} is a link, to {part.resolve()}. Nothing is written through it. Remove it.")


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file in one step. After a crash or a power loss the file has either the old or the new content.

    Raises:
        StorageError: the file cannot be written (full disk, read-only folder). The old content is unchanged.
    """
    try:
        _replace(path, data)
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "Free some space, and give the same command again" if error.errno in _FULL else "Give another place"
        raise StorageError(
            f"{path} cannot be written: {reason}. {remedy}. Files that were written before are complete."
        ) from error


def _replace(path: Path, data: bytes) -> None:
    _make_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files of `write_atomically` that a killed process left in a folder.

    Args:
        folder: a folder that no other process writes to now.
        name: name of the file that they were to become; None means any name.
    """
    for path in folder.glob(".*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and name in (None, match[1]) and not path.is_dir():
            path.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents. Sync each parent, so that the new entry survives a power loss."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk. Without this, a power loss can undo a rename."""
    if os.name != "posix":
        return  # other systems cannot open a folder
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync folders
            raise
    finally:
        os.close(handle)


def set_aside(path: Path, folder: Path) -> Path:
    """Move a damaged file to `<name>.damaged` in a folder and return its new path. Nothing reads such files.

    Raises:
        StorageError: the file cannot be moved.
    """
    taken = [folder / f"{path.name}.damaged{n or ''}" for n in range(1000)]
    target = next((t for t in taken if not t.exists()), taken[0])
    try:
        _make_folder(folder)
        path.replace(target)
    except OSError as error:
        raise StorageError(f"{path} is damaged and cannot be moved to {target}: {error.strerror or error}.") from error
    return target
