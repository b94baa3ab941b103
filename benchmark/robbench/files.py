"""Two things that everything on disk needs: canonical digests, and files that are either old or new."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

__all__ = ["digest", "write_atomically"]


def digest(value: object) -> str:
    """SHA-256 of a value's canonical JSON (sorted keys, compact, ASCII), in hexadecimal.

    Raises:
        TypeError, ValueError: the value is not JSON (NaN and infinity are not).
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file as a whole: after a crash at any moment, the old or the new content is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
