"""Settings of the whole process that robbench changes for speed, and the way to forbid that."""

import os

__all__ = ["may_change_process"]


def may_change_process() -> bool:
    """Tell whether robbench may change settings of the whole process: not if ROBBENCH_KEEP_SETTINGS is 1.

    There are two such settings: the order of sums in Intel's matrix products (`MKL_CBWR`, set by `import robbench`),
    and the memory allocator (`machine.keep_freed_memory`, called by `evaluate` and its like).
    """
    return os.environ.get("ROBBENCH_KEEP_SETTINGS", "") in ("", "0")
