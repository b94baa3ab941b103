"""What a number was measured on."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import robbench
from robbench.memory import resident_bytes

__all__ = ["describe_device", "environment", "held_bytes", "versions"]

_PACKAGES = ("numpy", "pandas", "pyarrow", "safetensors", "scikit-learn", "torchvision", "pyautoattack", "torchattacks")


def describe_device(device: torch.device) -> str:
    """Name a device: the GPU's name, or the CPU's with its threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """List the versions that can change a number."""
    return {"robbench": robbench.__version__, "torch": str(torch.__version__), "python": platform.python_version()}


def held_bytes(device: torch.device) -> int | None:
    """Tell how much memory this process holds now, on the device that the model runs on."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def environment(device: torch.device) -> dict[str, Any]:
    """Record what a run was made with, beyond the versions that head the record; JSON values."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    told: dict[str, Any] = {
        "revision": revision(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "packages": packages,
    }
    if device.type == "cuda":
        told["cuda"] = str(torch.version.cuda)
        told["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        told["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return told


@functools.cache
def revision() -> dict[str, Any]:
    """Name the code: commit and whether files of the package were changed; its version outside of a checkout."""
    package = Path(robbench.__file__).resolve().parent
    # A checkout only if it is ours: an installed package may lie inside some other repository.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return {"package": robbench.__version__}
    commit, changed = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain", "--", ".")
    return {"commit": commit, "modified": bool(changed)}


def _git(folder: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=10
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
