"""The machine: its description for results, and the memory of this process.

Freed memory stays in the process, because loops need the same buffers every round. A slow leak is reported.
"""

from __future__ import annotations

import ctypes
import functools
import gc
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
    "allocated_bytes",
    "describe_device",
    "environment",
    "has_bfloat16_instructions",
    "held_bytes",
    "keep_freed_memory",
    "resident_bytes",
    "revision",
    "versions",
]

_PACKAGES = ("numpy", "pandas", "pyarrow", "safetensors", "scikit-learn", "torchvision", "pyautoattack", "torchattacks")
_LEAK = 64 * 2**20  # bytes; a smaller rise is noise of the allocator

_PYTHON_BLOCK = 16  # bytes; the smallest

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU, or the name of the CPU with the number of threads in use."""
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


def has_bfloat16_instructions() -> bool | None:
    """Tell whether the CPU has instructions for bfloat16; None if the system has no list of its instructions."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return None
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"}) if words & {"flags", "Features"} else None  # x86, ARM


def versions() -> dict[str, str]:
    """List the versions that can change a number."""
    return {"robbench": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def held_bytes(device: torch.device) -> int | None:
    """Return the bytes that this process holds now on the model's device."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def environment(device: torch.device) -> dict[str, Any]:
    """Describe the software and hardware of a run, beyond `versions`, as JSON values."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    described: dict[str, Any] = {
        "revision": revision(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "packages": packages,
    }
    if device.type == "cuda":
        described["cuda"] = str(torch.version.cuda)
        described["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        described["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return described


@functools.cache
def revision() -> dict[str, Any]:
    """Identify the code: commit and whether the package has changes. Outside a checkout: the package's version."""
    package = PACKAGE
    # Check that git tracks this file: an installed package may lie inside another repository.
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
    """Return the resident bytes of this process, or None if the system does not report them."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()


class _MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h."""

    _NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _NAMES.split()]


def allocated_bytes() -> int | None:
    """Return the bytes that are allocated in this process, without the free blocks that the allocators hold.

    That is: blocks of malloc in use, small objects of Python, and all that is mapped outside of malloc. Unlike the
    resident bytes, they are the same before and after a call that keeps nothing. None if the C library does not tell.
    """
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)  # since glibc 2.33
    if mallinfo is None:
        return None
    mallinfo.restype = _MallocInfo
    try:
        mapped = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return None
    gc.collect()
    info = mallinfo()
    return mapped - int(info.arena) + int(info.uordblks) + _PYTHON_BLOCK * sys.getallocatedblocks()


@dataclass
class Growth:
    """Watches the memory of a process during a run and detects a slow leak.

    The caller reports the bytes that the run itself keeps (records, adversarial examples). They are no leak.
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
        """Bytes by which memory rose steadily after the first third of the run; 0 without a steady or large rise."""
        third = len(self.seen) // 3
        if third < 2:
            return 0
        # Leaked memory is never freed, so the minimum of each quarter counts. A buffer that grows once is no leak: the
        # minimum must rise from quarter to quarter.
        quarter = (len(self.seen) - third) / 4
        parts = [self.seen[third + round(k * quarter) : third + round((k + 1) * quarter)] for k in range(4)]
        least = [min(part) for part in parts]
        steps = [later - before for before, later in itertools.pairwise(least)]
        return sum(steps) if min(steps) > sum(steps) / 6 and sum(steps) >= _LEAK else 0
