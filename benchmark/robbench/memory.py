"""The process's memory: freed memory stays in it, since loops ask for the same buffers every round; leaks are told."""

import ctypes
import itertools
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Growth", "keep_freed_memory", "resident_bytes"]

_LEAK = 64 * 2**20  # bytes; less is noise of the allocator

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


def resident_bytes() -> int | None:
    """Tell how much memory of the machine this process holds now; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()


@dataclass
class Growth:
    """Watches the memory of a process through a run, and tells a slow leak from what a run needs anyway.

    What the run itself keeps (its records, the adversarial examples) is told to it and does not count.
    """

    seen: list[int] = field(default_factory=list)
    kept: int = 0

    def look(self, held: int | None, kept: int = 0) -> None:
        """Take a measurement.

        Args:
            held: bytes that the process holds now.
            kept: bytes that the run itself has kept since the last time.
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
        # What leaked is there at all times, so the least of each quarter counts. Buffers that grow once are no leak:
        # the rise must go on through all quarters.
        quarter = (len(self.seen) - third) / 4
        parts = [self.seen[third + round(k * quarter) : third + round((k + 1) * quarter)] for k in range(4)]
        least = [min(part) for part in parts]
        steps = [later - before for before, later in itertools.pairwise(least)]
        return sum(steps) if min(steps) > sum(steps) / 6 and sum(steps) >= _LEAK else 0
