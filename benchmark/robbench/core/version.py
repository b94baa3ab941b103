"""The version of the package, its folder, and digests of the files that verdicts depend on."""

import functools
import hashlib
import json
from pathlib import Path

__all__ = ["PACKAGE", "VERDICT_CODE", "__version__", "digest_judging_code", "digest_verdict_code"]

__version__ = "0.1.0"
PACKAGE = Path(__file__).resolve().parents[1]
VERDICT_CODE = ("attacks", "classifier", "core", "data", "engine", "evaluation", "models", "results", "suite.py")
"""The folders and files of the package that hold all code that a verdict depends on."""


def digest_verdict_code(package: Path = PACKAGE) -> dict[str, str]:
    """Digest the modules that a verdict depends on: path in the package -> first 16 digits of the SHA-256."""
    found = {path for name in VERDICT_CODE for path in [package / name, *(package / name).rglob("*.py")]}
    files = sorted(path for path in found if path.is_file())
    return {p.relative_to(package).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in files}


@functools.cache
def digest_judging_code() -> str:
    """Digest all modules that a verdict depends on together: 16 hexadecimal digits. Stored records name it."""
    return hashlib.sha256(json.dumps(digest_verdict_code(), sort_keys=True).encode()).hexdigest()[:16]
