"""Keep freed memory in the process: attack and training loops ask for the same large buffers every round."""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc to reuse large freed blocks instead of returning them to the kernel; False where that is unknown.

    A block that was returned is faulted in again page by page at the next round. On two cores that took a quarter of
    the time of a small network's forward and backward pass (docs/performance.md). The process keeps its peak memory.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    # 32 MiB is the most that older versions accept for the first.
    return (
        mallopt is not None
        and any(mallopt(_MMAP_THRESHOLD, size) for size in (1 << 30, 1 << 25))
        and bool(mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))
    )
