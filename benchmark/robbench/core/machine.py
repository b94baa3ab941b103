"""The machine: what a number was measured on, and the memory of this process."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import itertools
import os
import platform
import resource
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from robbench.core.settings import may_change_process
from robbench.core.version import PACKAGE, __version__

__all__ = [
    "Growth",
    "describe_device",
    "environment",
    "held_bytes",
    "keep_freed_memory",
    "resident_bytes",
    "revision",
    "versions",
]

_PACKAGES = ("numpy", "pandas", "pyarrow", "safetensors", "scikit-learn", "torchvision", "pyautoattack", "torchattacks")
_LEAK = 64 * 2**20  # bytes; a smaller rise is noise of the allocator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


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
    return {"robbench": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def held_bytes(device: torch.device) -> int | None:
    """Tell how many bytes this process holds now, on the device that the model runs on; None if unknown."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def environment(device: torch.device) -> dict[str, Any]:
    """Record what a run was made with, besides the `versions`, as JSON values."""
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
    """Name the code: its commit, and whether files of the package were changed; outside of a checkout its version."""
    package = PACKAGE
    # A checkout only if it is ours: an installed package may lie inside some other repository.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return {"package": __version__}
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


def keep_freed_memory() -> bool:
    """Tell glibc to reuse large freed blocks instead of returning them to the kernel.

    A returned block costs a page fault for each of its pages when the next round asks for it again. On two cores that
    was a quarter of the time of a small network's forward and backward pass (docs/performance.md). The price: the
    process keeps its peak memory. The setting holds for the whole process; ROBBENCH_KEEP_SETTINGS=1 forbids it.

    Returns:
        Whether the setting was made: not on other systems, and not if it is forbidden.
    """
    if sys.platform != "linux" or not may_change_process():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    # Older versions accept at most 32 MiB for the first setting.
    return (
        mallopt is not None
        and any(mallopt(_MMAP_THRESHOLD, size) for size in (1 << 30, 1 << 25))
        and bool(mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))
    )


def resident_bytes() -> int | None:
    """Tell how many bytes of the machine's memory this process holds now; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()


@dataclass
class Growth:
    """Watches the memory of a process during a run, and tells a slow leak from what a run needs anyway.

    What the run itself keeps (records, adversarial examples) does not count as a leak.
    """

    seen: list[int] = field(default_factory=list)
    kept: int = 0

    def look(self, held: int | None, kept: int = 0) -> None:
        """Take a measurement.

        Args:
            held: bytes that the process holds now.
            kept: bytes that the run itself has kept since the last measurement.
        """
        self.kept += kept
        if held is not None:
            self.seen.append(held - self.kept)

    @property
    def leaked(self) -> int:
        """Bytes by which memory rose steadily after the first third of the run; 0 if it did not, or by little."""
        third = len(self.seen) // 3
        if third < 2:
            return 0
        # Leaked memory is never freed, so the least of each quarter counts. Buffers that grow once are no leak, so the
        # rise must go on through all quarters.
        quarter = (len(self.seen) - third) / 4
        parts = [self.seen[third + round(k * quarter) : third + round((k + 1) * quarter)] for k in range(4)]
        least = [min(part) for part in parts]
        steps = [later - before for before, later in itertools.pairwise(least)]
        return sum(steps) if min(steps) > sum(steps) / 6 and sum(steps) >= _LEAK else 0
