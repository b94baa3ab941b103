"""robbench: how robust is this classifier, really?

The package is imported without torch; `robbench.evaluate` and the other names that need it are resolved on
first use, so that `robbench --help` and everything that only reads results stays fast.
"""

import os
from typing import TYPE_CHECKING, Any

from robbench.core.version import __version__

# Matrix products of Intel's library then sum in one order, whatever the width of a batch and the number of threads
# (docs/design.md). It is read at the first product of a process, and costs about nothing.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

__all__ = ["__version__", "evaluate"]

if TYPE_CHECKING:
    from robbench.evaluation.run import evaluate


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        from robbench.evaluation.run import evaluate

        return evaluate
    raise AttributeError(f"module 'robbench' has no attribute {name!r}")
