"""robbench: how robust is this classifier, really?

The package is imported without torch; `robbench.evaluate` and the other names that need it are resolved on
first use, so that `robbench --help` and everything that only reads results stays fast.
"""

import os
from typing import TYPE_CHECKING, Any

from robbench.core.settings import may_change_process
from robbench.core.version import __version__

# With this setting, Intel's matrix products sum in one order, for any batch width and number of threads
# (docs/design.md). The library reads it at the first product of a process. It costs about nothing.
if may_change_process():
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

__all__ = ["__version__", "evaluate"]

if TYPE_CHECKING:
    from robbench.evaluation.run import evaluate


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        from robbench.evaluation.run import evaluate

        return evaluate
    raise AttributeError(f"module 'robbench' has no attribute {name!r}")
