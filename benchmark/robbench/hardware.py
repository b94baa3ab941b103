"""What a number was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import robbench

__all__ = ["describe_device", "versions"]


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
